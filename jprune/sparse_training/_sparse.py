"""The outer transformation that makes any chain with masks exact."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jprune import masks as masks_lib
from jprune import trees
from jprune.sparse_training import _state
from jprune.sparse_training._state import Storage
from jprune.types import Masks, Params

# A wrapper in the wrong order leaves weights outside the masks again and again, so a
# look at some of the steps finds it. Never at the first, where a dense start is fair.
_LOOK_EVERY = 64


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

    def init_fn(params: Params) -> Any:
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
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError(
                "params: sparse needs them; call update(grads, state, params)"
            )
        holders = _state.holders(state.inner)
        step = holders[0].step
        due = _any(holder.due_next for holder in holders)
        # The masks of a dense start are news to the moments too.
        enters = due | (step == 0) | (step % _LOOK_EVERY == 1)
        holds = [x.hold_next for x in holders if x.hold_next is not None]

        def update_masks(carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
            inner, stray = carry
            before = _masks_for(params, inner)
            _, new = tx.update(updates, inner, params, **extra_args)
            inner = _state.with_holders(inner, _state.holders(new))
            unbroken = masks_lib.intersection(before, _masks_for(params, inner))
            # What a moment is at the start; XLA drops what nobody asks for.
            fresh = tx.init(jax.tree.map(_zeros_like, params))
            stray += jnp.where(step > 0, _count_stray(params, before), 0)
            return _where_unbroken(params, unbroken, inner, fresh), stray

        def descend(carry: tuple) -> tuple:
            grads, inner = carry
            settled = _state.settle(inner, counted=enters)
            updates, settled = tx.update(grads, settled, params, **extra_args)
            inner = _state.unsettle(settled)
            return _land(updates, params, _masks_for(params, inner)), inner

        def spend(carry: tuple) -> tuple:
            updates, inner = carry
            masks = _state.masks_stored(inner, Storage.SPARSE, Storage.SOFT)
            still = jax.tree.map(jnp.zeros_like, updates)
            return _land(still, params, masks), inner

        # Loops of no turn or one: unlike a cond, they work in place.
        inner, stray = _once(enters, update_masks, (state.inner, state.stray))
        carry = (updates, inner)
        if holds:
            spends = _any(holds)
            carry = _of_types(carry, jax.eval_shape(descend, carry))
            carry = _once(~spends, descend, carry)
            updates, inner = _once(spends, spend, carry)
        else:
            updates, inner = descend(carry)
        return updates, _state.SparseState(inner, stray)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _land(updates: optax.Updates, params: Params, masks: Masks) -> optax.Updates:
    """Returns updates that take the weights outside the masks to exactly zero."""
    return jax.tree.map(
        lambda u, p, m: jnp.where(m, u, -p.astype(u.dtype)) if np.ndim(m) else u,
        updates,
        params,
        masks,
    )


def _where_unbroken(
    params: Params, unbroken: Masks, inner: PyTree, fresh: PyTree
) -> PyTree:
    """Returns the inner state with fresh moments where a life was not unbroken."""
    owner_of = trees.Owners(params)
    masks = jax.tree.leaves(unbroken)

    def leaf(keys: Sequence[Any], value: Any, fresh: Any) -> Any:
        owner = None if _state.is_holder(value) else owner_of(keys, np.shape(value))
        if owner is None or not np.ndim(masks[owner.place]):
            return value
        return jnp.where(masks[owner.place], value, fresh)

    return jax.tree_util.tree_map_with_path(
        leaf, inner, fresh, is_leaf=_state.is_holder
    )


def _once(needed: Array, fn: Callable[[Any], Any], carry: Any) -> Any:
    """Returns ``fn(carry)`` if it is needed, else ``carry``, without a copy."""

    def turn(state: tuple) -> tuple:
        return jnp.zeros((), bool), fn(state[1])

    return jax.lax.while_loop(lambda state: state[0], turn, (needed, carry))[1]


def _of_types(carry: Any, types: Any) -> Any:
    """Returns the carry with arrays of the given types, to be overwritten."""
    return jax.tree.map(
        lambda x, t: x if x.dtype == t.dtype else jnp.zeros(t.shape, t.dtype),
        carry,
        types,
    )


def _any(flags: Iterable[Array]) -> Array:
    return jnp.any(jnp.stack(list(flags)))


def _masks_for(params: Params, inner: optax.OptState) -> Masks:
    """Returns the masks outside which weights are zero."""
    masks = _state.masks_stored(inner, Storage.SPARSE)
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
    return sum(counts, jnp.zeros((), jnp.int32))


def _check_moments(params: Params, masks: Masks, inner: optax.OptState) -> None:
    owner_of = trees.Owners(params)
    all_masks = jax.tree.leaves(masks)
    flat, _ = jax.tree_util.tree_flatten_with_path(inner, is_leaf=_state.is_holder)
    for keys, value in flat:
        owner = None if _state.is_holder(value) else owner_of(keys)
        if owner is None or not np.ndim(all_masks[owner.place]):
            continue
        shape = np.shape(value)
        if np.size(value) > 1 and shape != owner.shape:
            raise ValueError(
                f"tx: its state {trees.path_of(keys)!r} has shape {shape}, but the "
                f"parameter {owner.path!r} has {owner.shape}; moments of single "
                "weights cannot be fresh. Accept it with approximate=True"
            )


def _zeros_like(param: Any) -> Any:
    return jnp.zeros_like(param) if trees.is_inexact(param) else param
