"""The state of masks that live in an optimiser, and what can be read from it."""

import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from jprune import masks as masks_lib
from jprune import trees
from jprune.types import Masks, Params


@jax.tree_util.register_static
class Storage(enum.Enum):
    """What becomes of the weights outside the masks; no leaf of a state."""

    SPARSE = "they are zero"
    LATENT = "they keep a value, which the forward pass does not see"
    SOFT = "they are set to zero in an update of the masks, and train on"
    DENSE = "they train on; the masks choose who gets a gradient"


class MaskState(NamedTuple):
    """The state of a transformation that holds masks.

    Attributes:
        step: the number of updates so far.
        key: from which, with the step, all randomness is drawn.
        masks: which weights live.
        initial: the masks of the beginning.
        visited: which weights have ever lived.
        due_next: whether the next update is one of the masks.
        hold_next: whether the next update is to be spent on the masks, so that
            :func:`sparse` takes no gradient step; None if that never happens.
        refused: how many mask updates were left out because a gradient was not finite.
        memory: what the rules carry from one update to the next.
        storage: what becomes of the weights outside the masks.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    masks: Masks
    initial: Masks
    visited: Masks
    due_next: Bool[Array, ""]
    hold_next: Bool[Array, ""] | None
    refused: Int[Array, ""]
    memory: Any
    storage: Storage


class Settled(NamedTuple):
    """A state whose masks are not to change in the next update.

    :func:`sparse` updates masks first, and wraps the states of the holders for the
    gradient step; whatever stands around a holder hands its state on unseen.

    Attributes:
        state: the state.
        counted: whether the update of the masks has counted the step.
    """

    state: MaskState
    counted: Bool[Array, ""]


class SparseState(NamedTuple):
    """The state of :func:`sparse`.

    Attributes:
        inner: the state of the transformation that it finishes.
        stray: how many non-zero weights have arrived outside the masks, at updates of
            the masks, at the second update and at every 64th from there, all together.
    """

    inner: optax.OptState
    stray: Int[Array, ""]


def holders(opt_state: optax.OptState) -> list[MaskState]:
    """Returns the states in ``opt_state`` that hold masks."""
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_holder) if is_holder(x)]


def is_holder(node: Any) -> bool:
    """Whether ``node`` is a state that holds masks."""
    return isinstance(node, MaskState)


def with_holders(
    opt_state: optax.OptState, states: Sequence[MaskState | Settled]
) -> optax.OptState:
    """Returns ``opt_state`` with other states of its holders, in their order."""
    rest = iter(states)
    return jax.tree.map(
        lambda node: next(rest) if is_holder(node) else node,
        opt_state,
        is_leaf=is_holder,
    )


def settle(opt_state: optax.OptState, *, counted: Bool[Array, ""]) -> optax.OptState:
    """Wraps the states of holders, see :class:`Settled`."""
    return with_holders(opt_state, [Settled(x, counted) for x in holders(opt_state)])


def unsettle(opt_state: optax.OptState) -> optax.OptState:
    """Undoes :func:`settle`."""

    def is_settled(node: Any) -> bool:
        return isinstance(node, Settled)

    return jax.tree.map(
        lambda node: node.state if is_settled(node) else node,
        opt_state,
        is_leaf=is_settled,
    )


def masks_of(opt_state: optax.OptState) -> Masks:
    """Returns the masks that an optimiser's state holds.

    Several holders, as ``optax.partition`` makes, are joined.

    Args:
        opt_state: the state of a chain with a transformation such as :func:`rigl`,
            however deep inside.

    Returns:
        Masks with the structure of the parameters.

    Raises:
        ValueError: no part of the state holds masks, or two hold those of one leaf.

    Example:
        >>> from jprune.sparse_training import static
        >>> params = {"kernel": jnp.ones((4, 4))}
        >>> opt_state = optax.chain(static(0.75), optax.adam(1e-3)).init(params)
        >>> int(masks_lib.count(masks_of(opt_state)))
        4
    """
    return _join(opt_state, lambda holder: holder.masks)


def masks_stored(opt_state: optax.OptState, *storages: Storage) -> Masks:
    """Returns the masks of holders with one of some storages; others prune nothing."""

    def part(holder: MaskState) -> Masks:
        if holder.storage in storages:
            return holder.masks
        return jax.tree.map(lambda _: masks_lib.never_pruned(), holder.masks)

    return _join(opt_state, part)


def forward_params(params: Params, opt_state: optax.OptState) -> Params:
    """Returns the parameters with which a loss is to be evaluated.

    For methods that store sparse weights in a chain inside :func:`sparse`, these are
    the parameters as they are; so they are for methods whose masks the forward pass
    does not see (:func:`soft_filter`, :func:`gsm`). For all others, and in a bare
    chain, they are the parameters at the masks. Their gradient is *straight-through*:
    that with respect to the parameters at the masks, dense, as if the masks were not
    there, which is what methods grow or update latent weights by.

    Args:
        params: the parameters.
        opt_state: the state of the optimiser.

    Raises:
        ValueError: the state holds no masks.

    Example:
        >>> from jprune.sparse_training import static
        >>> params = {"kernel": jnp.ones((4, 4))}
        >>> opt_state = optax.chain(static(0.75), optax.sgd(0.1)).init(params)
        >>> float(forward_params(params, opt_state)["kernel"].sum())
        4.0
    """
    # Inside sparse, what is stored sparse is zero already.
    hidden = [] if _finished(opt_state) else [Storage.SPARSE]
    masks = masks_stored(opt_state, Storage.LATENT, *hidden)
    masks_lib.check(masks, params)
    return jax.tree.map(
        lambda p, m: _straight_through(p, m) if np.ndim(m) else p, params, masks
    )


@jax.custom_jvp
def _straight_through(param: Array, mask: Array) -> Array:
    return jnp.where(mask, param, jnp.zeros((), param.dtype))


@_straight_through.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return _straight_through(*primals), tangents[0]


def check(opt_state: optax.OptState) -> None:
    """Raises if weights outside the masks did not stay at zero.

    That happens when something outside :func:`sparse` rewrites the updates, such as a
    weight decay or an average in the wrong order. Call it once in a while, outside
    ``jit``.

    Raises:
        ValueError: it happened, or the state holds no masks.
    """
    masks_of(opt_state)
    for node in _finished(opt_state):
        if stray := int(np.sum(node.stray)):
            raise ValueError(
                f"opt_state: {stray} non-zero weights arrived outside the masks; "
                "sparse(...) must stand outside everything that rewrites updates, and "
                "inside MultiSteps alone"
            )


def exploration_rate(
    opt_state: optax.OptState, params: Params | None = None
) -> float | Array:
    """Returns the share of all prunable weights that have ever lived.

    Args:
        opt_state: a state that holds masks.
        params: the parameters, needed where masks broadcast.

    Example:
        >>> from jprune.sparse_training import static
        >>> float(exploration_rate(static(0.75).init({"kernel": jnp.ones((4, 4))})))
        0.25

    Reference:
        Liu et al., Do we actually need dense over-parameterization? In-time
        over-parameterization in sparse training, 2021, arXiv:2102.02887 (``R_s``).
    """
    return masks_lib.density(_join(opt_state, lambda x: x.visited), params)


def distance_from_start(
    opt_state: optax.OptState, params: Params | None = None
) -> Int[Array, ""]:
    """Returns the Hamming distance between the masks and those of the beginning.

    Args:
        opt_state: a state that holds masks.
        params: the parameters, needed where masks broadcast.
    """
    initial = _join(opt_state, lambda x: x.initial)
    return masks_lib.hamming(masks_of(opt_state), initial, params)


def survival_of_grown(opt_state: optax.OptState, params: Params | None = None) -> Array:
    """Returns the share of the weights grown so far that live; NaN if none was grown.

    Args:
        opt_state: a state that holds masks.
        params: the parameters, needed where masks broadcast.
    """
    visited = _join(opt_state, lambda x: x.visited)
    grown = masks_lib.difference(visited, _join(opt_state, lambda x: x.initial))
    alive = masks_lib.intersection(grown, masks_of(opt_state))
    return masks_lib.count(alive, params) / masks_lib.count(grown, params)


def _finished(opt_state: optax.OptState) -> list[SparseState]:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SparseState))
    return [node for node in nodes if isinstance(node, SparseState)]


def _join(opt_state: optax.OptState, part: Callable[[MaskState], Masks]) -> Masks:
    found = [part(holder) for holder in holders(opt_state)]
    if not found:
        raise ValueError(
            "opt_state: no part of it holds masks; put a transformation such as "
            "rigl(...) into the chain"
        )
    if len(found) == 1 and not _has_holes(found[0]):
        return found[0]
    paths = [leaf.path for leaf in trees.leaves_of(_fill_holes(found[0]))]
    columns = zip(*map(_leaves_with_holes, found), strict=True)
    leaves = [_only(path, column) for path, column in zip(paths, columns, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(_fill_holes(found[0])), leaves)


def _only(path: str, column: tuple) -> Array:
    """Returns the one mask that the holders have for a leaf."""
    masks = [mask for mask in column if not _is_hole(mask) and np.ndim(mask)]
    if len(masks) > 1:
        raise ValueError(f"opt_state: two transformations hold masks of {path!r}")
    return masks[0] if masks else masks_lib.never_pruned()


def _is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _has_holes(tree: PyTree) -> bool:
    return any(_is_hole(x) for x in _leaves_with_holes(tree))


def _leaves_with_holes(tree: PyTree) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_hole)


def _fill_holes(tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: masks_lib.never_pruned() if _is_hole(x) else x, tree, is_leaf=_is_hole
    )
