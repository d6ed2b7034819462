"""Optimal Brain Surgeon: removing weights and moving the others to make up for it.

All functions read an :class:`~jprune.scores._inverse_curvature.InverseCurvature`; where
it is block-diagonal the blocks are treated as if they did not interact.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jprune import masks as mask_trees
from jprune import trees
from jprune.scores import _inverse_curvature as inverses
from jprune.scores._inverse_curvature import InverseCurvature, InverseFn
from jprune.types import Batch, Masks, Params, ScoreFn, Scores


class ObsResult(NamedTuple):
    """What :func:`obs_prune` leaves.

    Attributes:
        params: the parameters, with 0 at the removed weights and the others moved.
        masks: bool leaves of full shape, True where a weight lives; a scalar True for
            leaves that are not prunable.
        inverse: the inverse curvature of the weights that live.
        increase: the predicted rise of the loss, the sum of the saliencies of the
            removed weights, each at its removal.
    """

    params: Params
    masks: Masks
    inverse: InverseCurvature
    increase: Float[Array, ""]


def obs(
    fn: Callable[..., Array],
    *,
    inverse: Callable[[Callable[..., Array]], InverseFn] = inverses.inverse_fisher,
) -> ScoreFn:
    """Scores weights by the saliency of Optimal Brain Surgeon.

    ``score_q = w_q^2 / (2 [H^-1]_qq)``: the rise of the loss when weight q is set to 0
    and all others make the best of it, to second order at a minimum. Never above the
    saliency of Optimal Brain Damage for the same positive definite H. Diagonal entries
    below 0, which only an indefinite Hessian has, give negative scores.

    Args:
        fn: what ``inverse`` takes: a loss ``(params, batch[, key]) -> scalar``, or the
            model for :func:`~jprune.scores._inverse_curvature.inverse_gauss_newton`.
        inverse: makes the inverse curvature from ``fn``. Bind its other arguments with
            ``functools.partial``: ``partial(inverse_fisher, block=1000)``,
            ``partial(inverse_gauss_newton, loss=squared_error)``. The default is
            WoodFisher's.

    Returns:
        A score function; scores are of float32 or wider, and a scalar 0 for leaves that
        are not prunable. Weights that ``masks`` remove have score 0, and those that
        live are scored as if the removed ones stayed 0. It raises what the inverse
        raises.

    Example:
        >>> import functools
        >>> loss = lambda params, x: jnp.mean(x @ params["w"] + params["b"])
        >>> params = {"w": jnp.array([[2.0], [1.0]]), "b": jnp.ones(1)}
        >>> inverse = functools.partial(inverses.inverse_fisher, damping=1.0)
        >>> score_fn = jax.jit(obs(loss, inverse=inverse))
        >>> scores = score_fn(params, jnp.array([[1.0, 0.0]]))
        >>> scores["w"].ravel(), scores["b"]
        (Array([4. , 0.5], dtype=float32), Array(0., dtype=float32))

    Reference:
        Hassibi, Stork & Wolff, "Optimal Brain Surgeon and General Network Pruning",
        IEEE ICNN 1993; Singh & Alistarh, "WoodFisher: Efficient Second-Order
        Approximation for Neural Network Compression", NeurIPS 2020.
    """
    inverse_fn = inverse(fn)

    def score_fn(
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Scores:
        return obs_saliency(params, inverse_fn(params, batch, masks=masks, key=key))

    return score_fn


def obs_saliency(params: Params, inverse: InverseCurvature) -> Scores:
    """Returns ``w_q^2 / (2 [H^-1]_qq)`` for each weight.

    Args:
        params: the parameters.
        inverse: their inverse curvature.

    Returns:
        Scores of float32 or wider: 0 for weights that the inverse lacks, and a scalar 0
        for leaves that are not prunable.

    Raises:
        ValueError: ``inverse`` is of other parameters.

    Example:
        >>> loss = lambda params, _: jnp.sum(params["w"] ** 2)
        >>> params = {"w": jnp.array([[1.0, 3.0]])}
        >>> inverse_fn = jax.jit(inverses.inverse_hessian(loss, damping=0.0))
        >>> obs_saliency(params, inverse_fn(params))
        {'w': Array([[1., 9.]], dtype=float32)}

    Reference:
        Hassibi, Stork & Wolff, "Optimal Brain Surgeon and General Network Pruning",
        IEEE ICNN 1993.
    """
    at, weights, slots = _match(params, inverse)
    scores = _saliency_of_leaves(weights, slots, inverse.blocks)
    zero = jnp.zeros((), inverse.blocks.dtype)
    return trees.replace_leaves(params, dict(zip(at, scores, strict=True)), zero)


def obs_update(params: Params, inverse: InverseCurvature, masks: Masks) -> Params:
    """Removes a set of weights at once, and moves the others to make up for it.

    ``dw = -H^-1 E (E' H^-1 E)^-1 w_Q`` with ``E`` the columns of the identity at the
    removed weights Q; for one weight q, ``dw = -(w_q / [H^-1]_qq) H^-1 e_q``. On a
    quadratic loss this is its minimum under ``w_Q = 0``. One linear solve a block.

    Args:
        params: the parameters.
        inverse: their inverse curvature.
        masks: False at the weights to remove.

    Returns:
        The parameters in their dtypes: exactly 0 where ``masks`` are False, and with
        leaves that are not prunable as they were.

    Raises:
        ValueError: ``inverse`` or ``masks`` are of other parameters, or a leaf without
            inverse has a mask.

    Example:
        >>> loss = lambda p, _: jnp.sum(p["w"]) ** 2 + p["w"][0, 1] ** 2
        >>> params = {"w": jnp.array([[1.0, 2.0]])}
        >>> inverse = jax.jit(inverses.inverse_hessian(loss, damping=0.0))(params)
        >>> obs_update(params, inverse, {"w": jnp.array([[False, True]])})
        {'w': Array([[0. , 2.5]], dtype=float32)}

    Reference:
        Hassibi, Stork & Wolff, "Optimal Brain Surgeon and General Network Pruning",
        IEEE ICNN 1993; for sets Singh & Alistarh, "WoodFisher: Efficient Second-Order
        Approximation for Neural Network Compression", NeurIPS 2020.
    """
    at, weights, slots = _match(params, inverse)
    mask_trees.check(masks, params)
    for mask in trees.leaves_of(masks):
        if mask.place not in at and mask.shape:
            raise ValueError(
                f"masks: the leaf {mask.path!r} has a mask of shape {mask.shape} but "
                "no inverse; make it prunable there, or give a mask of shape ()"
            )
    own = [jnp.asarray(jax.tree.leaves(masks)[i]) for i in at]
    new = _remove_set(weights, slots, inverse.blocks, own)
    return trees.replace_leaves(params, dict(zip(at, new, strict=True)), _same)


def obs_prune(
    params: Params, inverse: InverseCurvature, count: int | Array
) -> ObsResult:
    """Removes weights one at a time, each time the one with the least saliency.

    At each step the weight q with the smallest ``w_q^2 / (2 [H^-1]_qq)`` goes, the
    others move by ``-(w_q / [H^-1]_qq) H^-1 e_q``, and the inverse is brought to that
    of the remaining weights,

    ``H^-1 <- H^-1 - H^-1 e_q e_q' H^-1 / [H^-1]_qq``.

    The steps cost ``b^2`` each and run in one compiled loop.

    Args:
        params: the parameters.
        inverse: their inverse curvature.
        count: how many weights to remove; may be traced. No more are removed than live.

    Returns:
        An :class:`ObsResult`. Ties go to the lower slot, leaf by leaf in C order.

    Raises:
        ValueError: ``inverse`` is of other parameters, or ``count`` is an integer that
            is negative or above the number of prunable weights.

    Example:
        >>> loss = lambda p, _: jnp.sum(p["w"]) ** 2 + p["w"][0, 1] ** 2
        >>> params = {"w": jnp.array([[1.0, 2.0]])}
        >>> inverse = jax.jit(inverses.inverse_hessian(loss, damping=0.0))(params)
        >>> result = obs_prune(params, inverse, 1)
        >>> result.params["w"], float(result.increase)
        (Array([[0. , 2.5]], dtype=float32), 0.5)

    Reference:
        Hassibi, Stork & Wolff, "Optimal Brain Surgeon and General Network Pruning",
        IEEE ICNN 1993.

    Differs from the paper: the inverse is downdated instead of computed again from the
    moved weights, and the number of removals is given.
    """
    at, weights, slots = _match(params, inverse)
    total = sum(own.size for own in slots)
    if isinstance(count, int) and not 0 <= count <= total:
        raise ValueError(
            f"count: at least 0 and at most {total}, the prunable weights, got {count}"
        )
    new, live, blocks, increase = _remove_one_by_one(
        weights, slots, inverse.blocks, count
    )
    return ObsResult(
        trees.replace_leaves(params, dict(zip(at, new, strict=True)), _same),
        trees.replace_leaves(
            params, dict(zip(at, live, strict=True)), mask_trees.never_pruned()
        ),
        InverseCurvature(blocks, inverse.slots),
        increase,
    )


def _same(leaf: Any) -> Any:
    return leaf


def _match(
    params: Params, inverse: InverseCurvature
) -> tuple[list[int], list[Array], list[Array]]:
    if jax.tree.structure(params) != jax.tree.structure(inverse.slots):
        raise ValueError(
            "inverse: it is of parameters with the structure "
            f"{jax.tree.structure(inverse.slots)}, got {jax.tree.structure(params)}"
        )
    slots = [leaf for leaf in trees.leaves_of(inverse.slots) if leaf.shape]
    leaves = trees.leaves_of(params)
    for own in slots:
        if leaves[own.place].shape != own.shape:
            raise ValueError(
                f"inverse: its leaf {own.path!r} has the shape {own.shape}, the "
                f"parameter {leaves[own.place].shape}"
            )
    at = [own.place for own in slots]
    weights = [jnp.asarray(leaves[i].value) for i in at]
    return at, weights, [jnp.asarray(own.value) for own in slots]


def _saliency(
    weights: Float[Array, "k b"], blocks: Float[Array, "k b b"]
) -> tuple[Float[Array, "k b"], Bool[Array, "k b"]]:
    diagonal = jnp.diagonal(blocks, axis1=1, axis2=2)
    live = diagonal != 0
    return weights**2 / (2 * jnp.where(live, diagonal, 1)), live


def _pack(weights: list[Array], slots: list[Array], blocks: Array) -> Array:
    packed = inverses.pack(weights, slots, blocks.shape[:2])
    return packed.astype(jnp.result_type(packed, blocks))


def _unpack(packed: Array, slots: list[Array], like: list[Array]) -> list[Array]:
    new = inverses.unpack(packed, slots)
    return [x.astype(w.dtype) for x, w in zip(new, like, strict=True)]


@jax.jit
def _saliency_of_leaves(
    weights: list[Array], slots: list[Array], blocks: Float[Array, "k b b"]
) -> list[Array]:
    saliency, live = _saliency(_pack(weights, slots, blocks), blocks)
    return inverses.unpack(jnp.where(live, saliency, 0), slots)


@jax.jit
def _remove_set(
    weights: list[Array],
    slots: list[Array],
    blocks: Float[Array, "k b b"],
    masks: list[Array],
) -> list[Array]:
    packed = _pack(weights, slots, blocks)
    keep = inverses.kept(masks, slots, blocks.shape[:2])
    removed = _saliency(packed, blocks)[1] & ~keep
    both = removed[:, :, None] & removed[:, None, :]
    # The identity stands in for the weights that stay: the system keeps its size.
    identity = jax.vmap(jnp.diag)((~removed).astype(blocks.dtype))
    right = jnp.where(removed, packed, 0)[:, :, None]
    multipliers = jnp.linalg.solve(jnp.where(both, blocks, 0) + identity, right)
    moved = packed - (blocks @ multipliers)[:, :, 0]
    return _unpack(jnp.where(keep, moved, 0), slots, weights)


@jax.jit
def _remove_one_by_one(
    weights: list[Array],
    slots: list[Array],
    blocks: Float[Array, "k b b"],
    count: int | Array,
) -> tuple[list[Array], list[Array], Array, Array]:
    packed = _pack(weights, slots, blocks)
    live = _saliency(packed, blocks)[1]
    state = (jnp.where(live, packed, 0), live, blocks, jnp.zeros((), packed.dtype))
    steps = jnp.minimum(count, jnp.sum(live))
    packed, live, blocks, increase = jax.lax.fori_loop(0, steps, _remove_least, state)
    new = _unpack(packed, slots, weights)
    return new, inverses.unpack(live, slots), blocks, increase


def _remove_least(
    _: Array, state: tuple[Array, Array, Array, Array]
) -> tuple[Array, Array, Array, Array]:
    weights, live, blocks, increase = state
    saliency = jnp.where(live, _saliency(weights, blocks)[0], jnp.inf)
    i, q = jnp.unravel_index(jnp.argmin(saliency), saliency.shape)
    column = blocks[i, :, q]
    # Rounding must not leave a trace of the removed weight: its entries become 0.
    gone = jnp.arange(column.size) == q
    block = blocks[i] - column[:, None] * (column / column[q])[None, :]
    block = jnp.where(gone[:, None] | gone[None, :], 0, block)
    moved = weights[i] - weights[i, q] / column[q] * column
    return (
        weights.at[i].set(jnp.where(gone, 0, moved)),
        live.at[i, q].set(False),
        blocks.at[i].set(block),
        increase + saliency[i, q],
    )
