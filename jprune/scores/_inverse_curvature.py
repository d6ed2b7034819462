"""Inverses of curvature matrices over the prunable weights, whole or in blocks.

An *inverse* turns a function into ``(params, batch, *, masks, key) ->
InverseCurvature``. They differ in the matrix and in the way to invert it:

===============================  ================================  ===============
:func:`inverse_hessian`          ``H + damping I``                 directly
:func:`inverse_gauss_newton`     ``mean J' H_out J + damping I``   directly
:func:`inverse_fisher`           ``mean g g' + damping I``         rank by rank
===============================  ================================  ===============

With ``masks`` only living weights can move to make up for a removal: the inverse is
that of their rows and columns, taken at the product of weights and masks, and the rows
and columns of removed weights are 0. So the inverse at masks is also what is left of an
inverse when these weights are removed. Precision, leaves that are not floating arrays
and ``jax.jit`` are as in :mod:`jprune.scores._curvature`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jprune import masks as mask_trees
from jprune import trees
from jprune.scores import _derivatives as derivatives
from jprune.types import ApplyFn, Batch, LossFn, Masks, Params, Prunable

_MAX_ENTRIES = 20_000**2


class InverseCurvature(NamedTuple):
    """A block-diagonal inverse of the curvature, and which weight is in which row.

    Attributes:
        blocks: of float32 or wider. The rows and columns of weights that are removed,
            and of slots that no weight has, are 0.
        slots: pytree like the parameters: row ``i`` of block ``j`` is that of the
            weight with the slot ``j * b + i``. A scalar -1 for leaves that are not
            prunable.
    """

    blocks: Float[Array, "k b b"]
    slots: PyTree[Int[Array, "..."]]


# (params, batch=None, *, masks=None, key=None) -> InverseCurvature.
InverseFn = Callable[..., InverseCurvature]


class _Problem(NamedTuple):
    """What a matrix is made of: a function of the prunable leaves, and the data."""

    fn_of: derivatives.OfValues
    values: list[Array]
    batch: Batch
    key: PRNGKeyArray | None
    slots: list[Int[Array, "..."]]
    shape: tuple[int, int]
    live: Bool[Array, "k b"]

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.result_type(jnp.float32, *self.values)


def inverse_hessian(
    loss_fn: LossFn,
    *,
    damping: float = 1e-4,
    block: int | None = None,
    prunable: Prunable = None,
    chunk: int = 32,
    max_entries: int = _MAX_ENTRIES,
) -> InverseFn:
    """Makes the inverse of the exact Hessian, ``(H + damping I)^-1``.

    The blocks of the Hessian are formed, one Hessian-vector product a weight, so this
    is for small nets. Away from a minimum the Hessian may be indefinite, which Gauss-
    Newton and Fisher matrices never are.

    Args:
        loss_fn: ``(params, batch[, key]) -> scalar``.
        damping: added to the diagonal.
        block: the size of the blocks, which hold consecutive weights of one leaf in C
            order; entries outside count as 0. None: one block for all leaves.
        prunable: which leaves; see :func:`jprune.trees.prunable_leaves`. The others
            are constants.
        chunk: Hessian-vector products in memory at the same time.
        max_entries: the most entries that the blocks may have in all.

    Returns:
        ``(params, batch=None, *, masks=None, key=None) -> InverseCurvature``. It raises
        ValueError if nothing is prunable, if the blocks exceed ``max_entries``, and for
        a batch without examples.

    Raises:
        ValueError: ``damping`` is negative, ``block`` or ``chunk`` below 1.

    Example:
        >>> loss = lambda params, _: jnp.sum(params["w"] ** 2)
        >>> inverse_fn = jax.jit(inverse_hessian(loss, damping=0.0))
        >>> inverse_fn({"w": jnp.ones((1, 2))}).blocks[0]
        Array([[0.5, 0. ],
               [0. , 0.5]], dtype=float32)

    Reference:
        Hassibi, Stork & Wolff, "Optimal Brain Surgeon and General Network Pruning",
        IEEE ICNN 1993.
    """
    _check_hyper(damping >= 0, damping, block, chunk)

    def blocks_of(problem: _Problem) -> Array:
        values, slots = problem.values, problem.slots
        count, size = problem.shape
        product = derivatives.hessian_product(
            problem.fn_of, values, problem.batch, problem.key
        )

        def row(slot: Array) -> Array:
            basis = [
                (own == slot).astype(v.dtype)
                for own, v in zip(slots, values, strict=True)
            ]
            return pack(product(basis), slots, problem.shape)[slot // size]

        rows = derivatives.map_chunks(row, count * size, chunk)
        return _invert(rows.reshape(count, size, size), damping, problem.live)

    return _inverse_fn(loss_fn, blocks_of, block, prunable, max_entries)


def inverse_gauss_newton(
    apply_fn: ApplyFn,
    loss: Callable[[Array, PyTree], Array],
    *,
    damping: float = 1e-4,
    block: int | None = None,
    prunable: Prunable = None,
    chunk: int = 8,
    max_entries: int = _MAX_ENTRIES,
) -> InverseFn:
    """Makes ``(mean_n J_n' H_n J_n + damping I)^-1``, of the Gauss-Newton matrix.

    ``J_n`` is the Jacobian of the outputs of example n by the weights, ``H_n`` the
    Hessian of its loss by the outputs. For a squared error this is the matrix of the
    Optimal Brain Surgeon, the mean of ``X X'`` over examples and outputs.

    Args:
        apply_fn: ``(params, inputs[, key]) -> outputs``; see
            :func:`~jprune.scores._curvature.gauss_newton_diagonal`.
        loss: ``(outputs, target) -> scalar`` of one example, convex in the outputs.
        damping: added to the diagonal (the paper's alpha, 1e-8 to 1e-4).
        block: the size of the blocks; see :func:`inverse_hessian`.
        prunable: which leaves; the others are constants.
        chunk: examples in memory at the same time, each with a gradient an output.
        max_entries: the most entries that the blocks may have in all.

    Returns:
        ``(params, (inputs, targets), *, masks=None, key=None) -> InverseCurvature``. It
        raises ValueError if nothing is prunable, if the blocks exceed ``max_entries``,
        for another batch, and for a ``loss`` that is not a scalar.

    Raises:
        ValueError: ``damping`` is negative, ``block`` or ``chunk`` below 1.

    Example:
        >>> apply_fn = lambda params, x: x @ params["w"]
        >>> squared_error = lambda y, target: jnp.sum((y - target) ** 2) / 2
        >>> batch = (jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros((2, 1)))
        >>> inverse_fn = inverse_gauss_newton(apply_fn, squared_error, damping=0.0)
        >>> inverse = jax.jit(inverse_fn)({"w": jnp.ones((2, 1))}, batch)
        >>> jnp.diagonal(inverse.blocks[0])
        Array([2. , 0.5], dtype=float32)

    Reference:
        Hassibi, Stork & Wolff, "Optimal Brain Surgeon and General Network Pruning",
        IEEE ICNN 1993.

    Differs from the paper: any convex loss weights the outputs. The matrix is formed,
    then inverted, where the paper updates the inverse gradient by gradient. A product
    of matrices a chunk is faster, but of a singular matrix (fewer gradients than
    weights) float32 keeps only the digits that ``damping`` has over 1e-7 of the largest
    eigenvalue, which the recursion does not lose.
    """
    _check_hyper(damping >= 0, damping, block, chunk)

    rows = functools.partial(derivatives.gauss_newton_rows, loss=loss)

    def blocks_of(problem: _Problem) -> Array:
        size = derivatives.number_of_examples(problem.batch)
        zero = jnp.zeros((*problem.shape, problem.shape[1]), problem.dtype)

        def add(total: Array, rows: list[Array]) -> Array:
            x = _pack_rows(rows, problem)
            return total + jnp.einsum("rki,rkj->kij", x, x)

        total = _fold(add, zero, rows, problem, chunk)
        return _invert(total / size, damping, problem.live)

    return _inverse_fn(apply_fn, blocks_of, block, prunable, max_entries)


def inverse_fisher(
    loss_fn: LossFn,
    *,
    damping: float = 1e-5,
    block: int | None = None,
    prunable: Prunable = None,
    chunk: int = 32,
    max_entries: int = _MAX_ENTRIES,
) -> InverseFn:
    """Makes the inverse of the damped empirical Fisher information (WoodFisher).

    ``F = damping I + (1/P) sum_n g_n g_n'`` with ``g_n`` the gradient of the loss of
    example n at its true label. By the Woodbury identity, from
    ``F_0^-1 = I / damping``,

    ``F_n^-1 = F_{n-1}^-1 - F_{n-1}^-1 g_n g_n' F_{n-1}^-1 / (P + g_n' F_{n-1}^-1 g_n)``

    in each block. In float32 this keeps its digits where a block has more weights than
    there are examples. Elsewhere the large first term has to cancel: the diagonal was
    off by 7e-4 for ``damping=1e-5``, and by 6e-6 for 1e-3, with 200 gradients of unit
    variance and 40 weights.

    Args:
        loss_fn: ``(params, batch[, key]) -> scalar``, a mean over the leading axis of
            the leaves of ``batch``, given one example at a time.
        damping: added to the diagonal.
        block: the size of the blocks; see :func:`inverse_hessian`.
        prunable: which leaves; the others are constants. Large nets are done leaf by
            leaf, as each call holds all its blocks.
        chunk: examples whose gradients are in memory at the same time.
        max_entries: the most entries that the blocks may have in all.

    Returns:
        ``(params, batch, *, masks=None, key=None) -> InverseCurvature``. It raises
        ValueError if nothing is prunable, if the blocks exceed ``max_entries``, and for
        a batch without examples.

    Raises:
        ValueError: ``damping`` is not positive, ``block`` or ``chunk`` below 1.

    Example:
        >>> loss = lambda params, x: jnp.mean(x @ params["w"])
        >>> inverse_fn = jax.jit(inverse_fisher(loss, damping=1.0))
        >>> inverse_fn({"w": jnp.ones((2, 1))}, jnp.array([[1.0, 0.0]])).blocks[0]
        Array([[0.5, 0. ],
               [0. , 1. ]], dtype=float32)

    Reference:
        Singh & Alistarh, "WoodFisher: Efficient Second-Order Approximation for Neural
        Network Compression", NeurIPS 2020.
    """
    _check_hyper(damping > 0, damping, block, chunk)

    def blocks_of(problem: _Problem) -> Array:
        size = derivatives.number_of_examples(problem.batch)
        update = functools.partial(_woodbury, count=size)

        def add(blocks: Array, rows: list[Array]) -> Array:
            return jax.lax.scan(update, blocks, _pack_rows(rows, problem))[0]

        # A row and column of zeros, those of a removed weight, stay so in each update.
        start = jax.vmap(jnp.diag)(problem.live.astype(problem.dtype) / damping)
        return _fold(add, start, derivatives.fisher_rows, problem, chunk)

    return _inverse_fn(loss_fn, blocks_of, block, prunable, max_entries)


def pack(
    leaves: Sequence[Array], slots: Sequence[Array], shape: tuple[int, ...]
) -> Array:
    """Returns the entries of ``leaves`` in their slots, ``(k, b)``, and 0 elsewhere.

    The result is bool for bool leaves, else of float32 or wider.
    """
    packed = jnp.zeros(math.prod(shape), jnp.result_type(*leaves))
    if packed.dtype != bool:
        packed = derivatives.at_least_float32(packed)
    for leaf, own in zip(leaves, slots, strict=True):
        packed = packed.at[own].set(leaf.astype(packed.dtype))
    return packed.reshape(shape)


def unpack(packed: Array, slots: Sequence[Array]) -> list[Array]:
    """Returns the leaves that :func:`pack` packed."""
    return [packed.reshape(-1)[own] for own in slots]


def kept(
    masks: Sequence[Array], slots: Sequence[Array], shape: tuple[int, ...]
) -> Bool[Array, "k b"]:
    """Returns which slots hold a weight that its leaf of ``masks`` keeps."""
    full = [
        jnp.broadcast_to(mask if jnp.ndim(mask) > 0 else True, own.shape)
        for mask, own in zip(masks, slots, strict=True)
    ]
    return pack(full, slots, shape)


def _inverse_fn(
    fn: Callable[..., Array],
    blocks_of: Callable[[_Problem], Array],
    block: int | None,
    prunable: Prunable,
    max_entries: int,
) -> InverseFn:
    def inverse_fn(
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> InverseCurvature:
        derivatives.check_not_empty(batch)
        leaves = trees.prunable_leaves(params, prunable)
        derivatives.check_real(leaves)
        own, shape = _slots_of(leaves, block, max_entries)
        at = [leaf.place for leaf in leaves]
        product = derivatives.at_product(params, masks)
        values, fn_of = derivatives.of_leaves(fn, product, at)
        own_masks = [mask_trees.never_pruned()] * len(at)
        if masks is not None:
            own_masks = [jnp.asarray(jax.tree.leaves(masks)[i]) for i in at]
        live = kept(own_masks, own, shape)
        problem = _Problem(fn_of, values, batch, key, own, shape, live)
        slots = trees.replace_leaves(
            params, dict(zip(at, own, strict=True)), jnp.full((), -1, jnp.int32)
        )
        return InverseCurvature(blocks_of(problem), slots)

    return inverse_fn


def _slots_of(
    leaves: Sequence[trees.Leaf], block: int | None, max_entries: int
) -> tuple[list[Int[Array, "..."]], tuple[int, int]]:
    sizes = [leaf.size for leaf in leaves]
    if block is None:
        starts, size, count = np.cumsum([0, *sizes[:-1]]), sum(sizes), 1
    else:
        size = min(block, max(sizes))
        blocks = [-(-n // size) for n in sizes]
        starts, count = np.cumsum([0, *blocks[:-1]]) * size, sum(blocks)
    if count * size**2 > max_entries:
        raise ValueError(
            f"block: {sum(sizes)} prunable weights in {count} block(s) of {size} have "
            f"an inverse of {count * size**2} entries, more than max_entries="
            f"{max_entries}; give smaller blocks (such as block=100), fewer leaves "
            "(prunable=), or use obd, which needs the diagonal only"
        )
    slots = [
        jnp.arange(start, start + leaf.size, dtype=jnp.int32).reshape(leaf.shape)
        for start, leaf in zip(starts.tolist(), leaves, strict=True)
    ]
    return slots, (count, size)


def _fold(
    step: Callable[[Array, list[Array]], Array],
    init: Array,
    rows: derivatives.RowsOf,
    problem: _Problem,
    chunk: int,
) -> Array:
    rows_of = functools.partial(rows, problem.fn_of, problem.values)
    return derivatives.fold_rows(step, init, rows_of, problem.batch, problem.key, chunk)


def _pack_rows(rows: list[Array], problem: _Problem) -> Float[Array, "r k b"]:
    flat = [r.reshape(-1, *r.shape[2:]) for r in rows]
    return jax.vmap(lambda leaves: pack(leaves, problem.slots, problem.shape))(flat)


@jax.jit
def _invert(
    matrix: Float[Array, "k b b"],
    damping: jax.typing.ArrayLike,
    live: Bool[Array, "k b"],
) -> Float[Array, "k b b"]:
    both = live[:, :, None] & live[:, None, :]
    # A 1 on the diagonal of the rest makes the matrix invertible and leaves the living
    # part alone.
    diagonal = jax.vmap(jnp.diag)(jnp.where(live, damping, 1).astype(matrix.dtype))
    inverse = jnp.linalg.inv(jnp.where(both, matrix, 0) + diagonal)
    return jnp.where(both, (inverse + inverse.mT) / 2, 0)


def _woodbury(
    blocks: Float[Array, "k b b"], row: Float[Array, "k b"], *, count: int
) -> tuple[Float[Array, "k b b"], None]:
    column = jnp.einsum("kij,kj->ki", blocks, row)
    scale = count + jnp.einsum("ki,ki->k", row, column)
    change = column[:, :, None] * (column / scale[:, None])[:, None, :]
    return blocks - change, None


def _check_hyper(possible: bool, damping: float, block: int | None, chunk: int) -> None:
    if not possible:
        raise ValueError(f"damping: too small, got {damping}")
    for name, value in (("block", block), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: at least 1 is needed, got {value}")
