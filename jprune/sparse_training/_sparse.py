"""The outer transformation that makes any chain with masks exact."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jprune import masks as masks_lib
from jprune import trees
from jprune.sparse_training import _state
from jprune.types import Masks, Params


def sparse(
    tx: optax.GradientTransformation, *, approximate: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Makes a chain that holds masks exact through plain ``optax.apply_updates``.

    After every step, the weights outside the masks are exactly 0.0, and the inner
    optimiser's moments of them have the value of a fresh start; weights that are grown
    start from there. In a step that the method spends on its masks (RigL's), no
    parameter moves but for what is dropped, and the inner state stays as it is but for
    those moments.

    Moments are found by their path: the leaf of the state whose path ends in that of a
    parameter, and which has its shape.

    Start from ``apply_masks(params, masks_of(opt_state))``; a dense start is forgiven,
    and is sparse after the first step.

    Args:
        tx: a chain with one transformation, or several for different leaves, that hold
            masks, such as ``optax.chain(rigl(0.9), optax.adam(1e-3))``.
        approximate: whether to accept optimisers that keep factored moments (adafactor,
            sm3), which cannot be fresh for single weights.

    Returns:
        A transformation whose ``update`` needs ``params``.

    Raises:
        ValueError: (from ``init``) nothing in ``tx`` holds masks, two transformations
            hold those of one leaf, or moments are factored; (from ``update``) no
            ``params``.

    Example:
        >>> from jprune.sparse_training import rigl
        >>> tx = sparse(optax.chain(rigl(0.5), optax.adam(1e-3)))
        >>> params = {"kernel": jnp.ones((2, 4))}
        >>> opt_state = tx.init(params)
        >>> updates, opt_state = tx.update(params, opt_state, params)
        >>> int(jnp.sum(optax.apply_updates(params, updates)["kernel"] != 0))
        4
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: Params) -> _state.SparseState:
        inner = tx.init(params)
        masks = _masks_for(params, inner)
        if not approximate:
            _check_moments(params, masks, inner)
        return _state.SparseState(inner, jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, _state.SparseState]:
        if params is None:
            raise ValueError(
                "params: sparse needs them; call update(grads, state, params)"
            )
        before = _masks_for(params, state.inner)
        updates, inner = tx.update(updates, state.inner, params, **extra_args)
        after = _masks_for(params, inner)
        found = _state.holders(inner)
        hold = jnp.any(jnp.stack([holder.hold for holder in found]))
        begun = jnp.any(jnp.stack([holder.step > 1 for holder in found]))
        stray = state.stray + jnp.where(begun, _count_stray(params, before), 0)

        def land(update: Array, param: Array, mask: Array) -> Array:
            kept = jnp.where(hold, jnp.zeros_like(update), update)
            if not np.ndim(mask):
                return kept
            return jnp.where(mask, kept, -param.astype(update.dtype))

        # What a moment is at the start; XLA folds what it does not need.
        fresh = tx.init(jax.tree.map(_zeros_like, params))
        unbroken = masks_lib.intersection(before, after)
        inner = _finish(params, unbroken, hold, state.inner, inner, fresh)
        updates = jax.tree.map(land, updates, params, after)
        return updates, _state.SparseState(inner, stray)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _finish(
    params: Params,
    unbroken: Masks,
    hold: Array,
    old: PyTree,
    new: PyTree,
    fresh: PyTree,
) -> PyTree:
    """Returns the inner state with fresh moments where a life was not unbroken."""
    place_of = _Places(params)
    masks = jax.tree.leaves(unbroken)

    def leaf(keys: Sequence[Any], new: Any, old: Any, fresh: Any) -> Any:
        if _state.is_holder(new):
            return new
        held = jnp.where(hold, old, new)
        place = place_of(keys, np.shape(new))
        if place is None or not np.ndim(masks[place]):
            return held
        return jnp.where(masks[place], held, fresh)

    return jax.tree_util.tree_map_with_path(
        leaf, new, old, fresh, is_leaf=_state.is_holder
    )


def _masks_for(params: Params, inner: optax.OptState) -> Masks:
    masks = _state.masks_of(inner)
    masks_lib.check(masks, params)
    return masks


def _count_stray(params: Params, masks: Masks) -> Array:
    counts = [
        jnp.sum((leaf.value != 0) & ~mask, dtype=jnp.int32)
        for leaf, mask in zip(
            trees.leaves_of(params), jax.tree.leaves(masks), strict=True
        )
        if np.ndim(mask)
    ]
    return jnp.sum(jnp.stack(counts), dtype=jnp.int32)


def _check_moments(params: Params, masks: Masks, inner: optax.OptState) -> None:
    place_of = _Places(params)
    leaves, all_masks = trees.leaves_of(params), jax.tree.leaves(masks)
    flat, _ = jax.tree_util.tree_flatten_with_path(inner, is_leaf=_state.is_holder)
    for keys, value in flat:
        place = None if _state.is_holder(value) else place_of(keys)
        if place is None or not np.ndim(all_masks[place]):
            continue
        shape = np.shape(value)
        if np.size(value) > 1 and shape != leaves[place].shape:
            raise ValueError(
                f"tx: its state {trees.path_of(keys)!r} has shape {shape}, but the "
                f"parameter {leaves[place].path!r} has {leaves[place].shape}; moments "
                "of single weights cannot be fresh. Accept it with approximate=True"
            )


class _Places:
    """Finds the parameter that a leaf of an optimiser's state belongs to."""

    def __init__(self, params: Params):
        self.leaves = {leaf.path: leaf for leaf in trees.leaves_of(params)}

    def __call__(
        self, keys: Sequence[Any], shape: tuple[int, ...] | None = None
    ) -> int | None:
        names = trees.path_of(keys).split("/")
        ends = ("/".join(names[i:]) for i in range(len(names) + 1))
        for end in ends:
            leaf = self.leaves.get(end)
            if leaf is not None and (shape is None or leaf.shape == shape):
                return leaf.place
        return None


def _zeros_like(param: Any) -> Any:
    return jnp.zeros_like(param) if trees.is_inexact(param) else param
