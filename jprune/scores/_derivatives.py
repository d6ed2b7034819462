"""What the second-order criteria share: where to differentiate, and over what.

A function of the parameters becomes a function of a *list* of some of their leaves, so
that ``grad``, ``jvp`` and ``vjp`` never meet an integer or a PRNG key. An outer-product
curvature, ``mean_n sum_c r_nc r_nc'``, is known by its *rows* ``r_nc``, which are
computed a chunk of examples at a time.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jprune import masks as mask_trees
from jprune import trees
from jprune.types import Masks, Params

T = TypeVar("T")

# (values, batch, key) -> output: a model or a loss as a function of some leaves.
OfValues = Callable[..., Array]
# (fn_of, values, example, key) -> for each of the values its rows, (rows, *shape).
RowsOf = Callable[[OfValues, Sequence[Array], Any, PRNGKeyArray | None], list[Array]]


def at_product(params: Params, masks: Masks | None) -> Params:
    """Returns the product of weights and masks, or ``params`` without masks."""
    return params if masks is None else mask_trees.apply(params, masks)


def floating(params: Params) -> list[int]:
    """Returns the indices of the leaves that have a derivative.

    Raises:
        TypeError: a leaf is complex.
        ValueError: no leaf is a floating array.
    """
    chosen = [leaf for leaf in trees.leaves_of(params) if trees.is_inexact(leaf.value)]
    if not chosen:
        raise ValueError("params: none of the leaves is a floating array")
    check_real(chosen)
    return [leaf.place for leaf in chosen]


def check_real(leaves: Sequence[trees.Leaf]) -> None:
    """Raises TypeError for a complex leaf, whose curvature is not one number."""
    for leaf in leaves:
        if jnp.issubdtype(leaf.value.dtype, jnp.complexfloating):
            raise TypeError(
                f"params: the leaf {leaf.path!r} is {leaf.value.dtype}; curvature is "
                "defined for real weights, so give real and imaginary parts as leaves"
            )


def of_leaves(
    fn: Callable[..., Array], params: Params, indices: Sequence[int]
) -> tuple[list[Array], OfValues]:
    """Returns some leaves of ``params``, and ``fn`` as a function of their list.

    The new function takes a key, which ``fn`` gets if it has an argument named ``key``
    or a third one without default: Hutchinson's estimator needs a key where the loss
    may not.
    """
    flat = jax.tree.leaves(params)
    arguments = inspect.signature(fn).parameters
    required = [
        a
        for a in arguments.values()
        if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)
        and a.default is a.empty
    ]

    def fn_of(values: Sequence[Array], batch: Any, key: PRNGKeyArray | None) -> Any:
        at = dict(zip(indices, values, strict=True))
        new = trees.replace_leaves(params, at, lambda leaf: leaf)
        if key is not None and len(required) > 2:
            return fn(new, batch, key)
        if key is not None and "key" in arguments:
            return fn(new, batch, key=key)
        return fn(new, batch)

    return [jnp.asarray(flat[i]) for i in indices], fn_of


def at_least_float32(x: Array) -> Array:
    """Returns ``x``, in float32 if it was of half precision."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_not_empty(batch: PyTree) -> None:
    """Raises ValueError if a leaf of ``batch`` holds no example."""
    for leaf in trees.leaves_of(batch):
        if leaf.shape[:1] == (0,):
            raise ValueError(
                f"batch: the leaf {leaf.path!r} of shape {leaf.shape} has no examples"
            )


def number_of_examples(batch: PyTree) -> int:
    """Returns the size of the leading axis that the leaves of ``batch`` share.

    Raises:
        ValueError: there is no such axis, or it has size 0.
    """
    check_not_empty(batch)
    shapes = {leaf.path: leaf.shape for leaf in trees.leaves_of(batch)}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "batch: derivatives per example need leaves that share a leading axis, got "
            f"the shapes {shapes}"
        )
    return sizes.pop()[0]


def hessian_product(
    loss_of: OfValues, values: list[Array], batch: Any, key: PRNGKeyArray | None
) -> Callable[[list[Array]], list[Array]]:
    """Returns ``v -> H v``, linearised once to be applied many times."""
    gradient = jax.grad(lambda values: loss_of(values, batch, key))
    return jax.linearize(gradient, values)[1]


def map_chunks(fn: Callable[[Array], Array], size: int, chunk: int) -> Array:
    """Returns ``[fn(0), ..., fn(size - 1)]``, ``chunk`` of them at a time.

    Above ``size``, to fill up the last chunk, ``fn`` may return anything. (``lax.map``
    compiles ``fn`` once more for a last chunk that is not full.)
    """
    chunk = min(chunk, size)
    positions = jnp.arange(-(-size // chunk) * chunk).reshape(-1, chunk)
    mapped = jax.lax.map(jax.vmap(fn), positions)
    return mapped.reshape(-1, *mapped.shape[2:])[:size]


def fold_rows(
    step: Callable[[T, list[Array]], T],
    init: T,
    rows_of: Callable[[Any, PRNGKeyArray | None], list[Array]],
    batch: PyTree,
    key: PRNGKeyArray | None,
    chunk: int,
) -> T:
    """Folds ``step`` over the rows of all examples, ``chunk`` examples at a time.

    Args:
        step: ``(carry, rows) -> carry``, the rows of shape ``(chunk, rows, *leaf)``.
            The last chunk is filled up with rows of zeros, which must not count.
        init: the first carry.
        rows_of: ``(example, key) -> rows`` of one example, which has the leaves of
            ``batch`` without their leading axis.
        batch: a pytree of arrays with the same leading axis.
        key: is split into a key per example.
        chunk: examples in memory at the same time.

    Raises:
        ValueError: ``batch`` has no examples.
    """
    size = number_of_examples(batch)
    chunk = min(chunk, size)
    keys = None if key is None else jax.random.split(key, size)

    def body(carry: T, positions: Array) -> tuple[T, None]:
        at = jnp.minimum(positions, size - 1)
        examples, own = jax.tree.map(lambda x: jnp.asarray(x)[at], (batch, keys))
        rows = jax.vmap(rows_of)(examples, own)
        live = positions < size
        rows = [jnp.where(live.reshape(-1, *(1,) * (r.ndim - 1)), r, 0) for r in rows]
        return step(carry, rows), None

    positions = jnp.arange(-(-size // chunk) * chunk).reshape(-1, chunk)
    return jax.lax.scan(body, init, positions)[0]


def fisher_rows(
    loss_of: OfValues, values: Sequence[Array], example: Any, key: PRNGKeyArray | None
) -> list[Array]:
    """Returns the gradient of the loss of one example as one row, float32 or wider.

    The example goes to the loss as a batch of one, so any loss that is a mean over the
    batch will do.
    """
    batch = jax.tree.map(lambda x: x[None], example)
    grads = jax.grad(loss_of)(values, batch, key)
    return [at_least_float32(g)[None] for g in grads]


def gauss_newton_rows(
    apply_of: OfValues,
    values: Sequence[Array],
    example: Any,
    key: PRNGKeyArray | None,
    *,
    loss: Callable[[Array, PyTree], Array],
) -> list[Array]:
    """Returns ``F' J`` for one example, where ``F F'`` is the output Hessian.

    ``F`` holds eigenvectors times the roots of their eigenvalues: a singular output
    Hessian, such as that of the softmax, has no Cholesky factor. Negative eigenvalues
    count as 0.

    Raises:
        ValueError: ``loss`` is not a scalar for one example, or ``example`` is not
            a pair.
    """
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise ValueError(
            "batch: a Gauss-Newton matrix needs the pair (inputs, targets), got "
            f"{type(example).__name__}"
        )
    inputs, target = example

    def output_of(values: Sequence[Array]) -> Array:
        return apply_of(values, jax.tree.map(lambda x: x[None], inputs), key)[0]

    output, pull_back = jax.vjp(output_of, values)

    def flat_loss(flat: Array) -> Array:
        value = loss(flat.reshape(output.shape), target)
        if jnp.shape(value) != ():
            raise ValueError(
                "loss: a scalar for the outputs of one example is needed, got shape "
                f"{jnp.shape(value)} for outputs of shape {output.shape}"
            )
        return value

    hessian = jax.hessian(flat_loss)(at_least_float32(output).reshape(-1))
    eigenvalues, vectors = jnp.linalg.eigh(hessian)
    factor = vectors * jnp.sqrt(jnp.maximum(eigenvalues, 0))[None, :]
    rows = factor.T.reshape(-1, *output.shape).astype(output.dtype)
    return [at_least_float32(r) for r in jax.vmap(lambda row: pull_back(row)[0])(rows)]
