"""The one transformation of which dynamic sparse training methods are special cases."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jprune import masks as masks_lib
from jprune import pruning, selection, trees
from jprune import scores as scores_lib
from jprune import units as units_lib
from jprune.allocation import Allocation, erdos_renyi_kernel
from jprune.pruning import Sparsity
from jprune.sparse_training import _rules, _state
from jprune.sparse_training._rules import Dropped, Event
from jprune.sparse_training._state import Storage
from jprune.sparse_training._timing import Steps
from jprune.types import Masks, Params, Prunable
from jprune.units import Units

Drop = Callable[[Event], Dropped]
Grow = Callable[[Event], list[Array]]
UnitsOf = Callable[[Params], Units]
# (memory, gradients of the leaves with units) -> memory, in every step
Track = Callable[[Any, list[Array]], Any]
# event -> gradients of the leaves with units
Emit = Callable[[Event], list[Array]]


class _Carry(NamedTuple):
    """What a mask update changes of a :class:`MaskState`."""

    masks: Masks
    visited: Masks
    refused: Array
    memory: Any


def dynamic(
    sparsity: Sparsity | None = None,
    *,
    drop: Drop,
    grow: Grow = _rules.anywhere,
    fraction: float | Steps = 0.0,
    due: Steps,
    hold: bool = False,
    regrow: bool = True,
    storage: Storage = Storage.SPARSE,
    track: Track | None = None,
    emit: Emit | None = None,
    allocation: Allocation | None = None,
    units: UnitsOf | None = None,
    prunable: Prunable = None,
    masks: Masks | Callable[[Params], Masks] | None = None,
    memory: Any = (),
    seed: int | PRNGKeyArray = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that drops and grows weights while it trains.

    It comes first in a chain, sees the dense gradient, and emits the gradient at the
    masks. In a mask update every layer loses the living units that ``drop`` does not
    keep, and gains as many as it says where ``grow`` scores highest. The gradient step
    follows with the new masks. Finish the chain with :func:`sparse`.

    Args:
        sparsity: the removed fraction, in [0, 1), or a table of path patterns.
        drop: ``event -> (keeps, gains, memory)``: which units stay, how many each layer
            is to grow, and what to remember, see :class:`Dropped`.
        grow: ``event -> scores``, larger = grow.
        fraction: the part of the living units to drop, or ``step -> fraction``.
        due: ``step -> bool``, whether the masks are updated.
        hold: whether a mask update takes the place of the gradient step (inside
            :func:`sparse`).
        regrow: whether what was just dropped may grow at once, and then keeps its
            value.
        storage: what becomes of the weights outside the masks, see :class:`Storage`.
        track: ``(memory, gradients) -> memory``, what is remembered of every step;
            lists have one entry a leaf.
        emit: ``event -> gradients`` in place of the gradient at the masks (of all
            weights, if they are ``LATENT`` or ``SOFT``); lists have one entry a leaf.
        allocation: of the initial masks, see :mod:`jprune.allocation`;
            Erdos-Renyi-Kernel unless given.
        units: what is dropped and grown at once: a builder such as
            ``jprune.units.filters``; single weights unless given. Of N:M units, which
            fix their own sparsity, each group keeps what ``drop`` keeps, as far as
            there is room, and fills up by ``grow``.
        prunable: which leaves are pruned, see :func:`jprune.trees.prunable_leaves`.
        masks: the initial masks, or ``params -> masks``, in place of ``sparsity`` and
            random ones.
        memory: what ``drop`` sees as ``event.memory`` at the first mask update: an
            array, a pytree of them, or a function of the units and the parameters.
        seed: of the initial masks and of random growth; an int or a key.

    Returns:
        A transformation whose state is a :class:`MaskState`. A mask update with a
        gradient that is not finite is left out, and counted in the state.

    Raises:
        ValueError: a sparsity outside [0, 1), a fraction outside [0, 1], or both or
            neither of ``sparsity`` and ``masks``; (from ``init``) masks that do not
            fit, or what :func:`jprune.prune` says; (from ``update``) no ``params``.
    """
    if sparsity is not None and masks is not None:
        raise ValueError(
            f"sparsity, masks: give one of them, got {sparsity!r} and masks"
        )
    if sparsity is None and masks is None and units is None:
        raise ValueError("sparsity, masks: give one of them, got neither")
    if isinstance(sparsity, jax.Array):
        raise ValueError("sparsity: a Python number is needed, not an array")
    if isinstance(sparsity, (float, int)):
        selection.check_sparsity(sparsity)
    if units is not None and not callable(units):
        raise TypeError(
            "units: a function of the parameters is needed, such as "
            "jprune.units.filters or lambda params: jprune.couplings(apply_fn, params, "
            f"x), got {type(units).__name__}"
        )
    if not callable(fraction) and not 0 <= fraction <= 1:
        raise ValueError(f"fraction: {fraction} is outside [0, 1]")

    def units_of(params: Params) -> Units:
        if units is None:
            return units_lib.weights(params, prunable=prunable)
        return units(params)

    def is_due(step: Array) -> Array:
        return jnp.asarray(due(step))

    def next_hold(step: Array) -> Array | None:
        # An array of its own: the same buffer twice in a state could not be donated.
        return is_due(step) if hold else None

    def at_step(state: _state.MaskState, step: Any) -> _state.MaskState:
        step = jnp.asarray(step)
        return state._replace(
            step=step, due_next=is_due(step), hold_next=next_hold(step)
        )

    def init_fn(params: Params) -> Any:
        own = units_of(params)
        key = jax.random.key(seed) if isinstance(seed, int) else jnp.asarray(seed)
        key, first = jax.random.split(key)
        start = _sharded_like(first_masks(own, params, first), params)
        remembered = memory(own, params) if callable(memory) else memory

        def own_buffers() -> Masks:
            return jax.tree.map(jnp.copy, start)

        step = jnp.zeros((), jnp.int32)
        return _state.MaskState(
            step=step,
            key=key,
            masks=own_buffers(),
            initial=own_buffers(),
            visited=own_buffers(),
            due_next=is_due(step),
            hold_next=next_hold(step),
            refused=jnp.zeros((), jnp.int32),
            memory=jax.tree.map(jnp.asarray, remembered),
            storage=storage,
        )

    def first_masks(own: Units, params: Params, key: PRNGKeyArray) -> Masks:
        if masks is not None:
            given = masks(params) if callable(masks) else masks
            return units_lib.expand(own, params, units_lib.living(own, params, given))
        if sparsity == 0.0:
            everything = [jnp.ones(group.shape, bool) for group in own.groups]
            return units_lib.expand(own, params, everything)
        noise = scores_lib.random(params, key=key)
        spread = allocation
        if spread is None and isinstance(sparsity, (float, int)):
            spread = erdos_renyi_kernel()
        return pruning.prune(noise, sparsity, units=own, allocation=spread)

    def event_of(
        masks: Masks,
        step: Array,
        key: Array,
        params: Params,
        grads: optax.Updates,
        memory: Any,
    ) -> Event:
        own = units_of(params)
        part = fraction(step) if callable(fraction) else fraction
        return Event(
            step=step,
            key=jax.random.fold_in(key, step),
            fraction=jnp.asarray(part, float),
            units=own,
            weights=_floats(own, params),
            grads=_floats(own, grads),
            living=units_lib.living(own, params, masks),
            memory=memory,
        )

    def mask_update(
        carry: _Carry, step: Array, key: Array, params: Params, grads: optax.Updates
    ) -> _Carry:
        masks, visited, refused, memory = carry
        event = event_of(masks, step, key, params, grads, memory)
        keeps, gains, remembered = drop(event)
        remembered = memory if remembered is None else remembered
        chosen = _grown(event, keeps, gains, grow, regrow=regrow)
        new = units_lib.expand(event.units, params, chosen)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in event.grads]))
        new, memory = jax.tree.map(
            lambda a, b: jnp.where(finite, a, b), (new, remembered), (masks, memory)
        )
        return _Carry(new, masks_lib.union(visited, new), refused + ~finite, memory)

    update_when_due = _conditional(mask_update)

    def tracked(memory: Any, params: Params, grads: optax.Updates) -> Any:
        return track(memory, _floats(units_of(params), grads)) if track else memory

    def emitted(
        grads: optax.Updates, state: _state.MaskState, step: Array, params: Params
    ) -> Any:
        if emit is None:
            dense = storage in (Storage.LATENT, Storage.SOFT)
            return grads if dense else _clear(grads, state.masks)
        event = event_of(state.masks, step, state.key, params, grads, state.memory)
        places = [leaf.place for leaf in event.units.leaves]
        flat = jax.tree.leaves(grads)
        new = {
            place: value.astype(flat[place].dtype)
            for place, value in zip(places, emit(event), strict=True)
        }
        return trees.replace_leaves(grads, new, lambda leaf: leaf)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        if params is None:
            raise ValueError(
                "params: they are needed; call update(grads, state, params)"
            )
        if isinstance(state, _state.Settled):
            state, counted = state
            step = jnp.where(counted, state.step - 1, state.step)
            new = emitted(updates, state, step, params)
            memory = jax.tree.map(
                functools.partial(jnp.where, counted),
                state.memory,
                tracked(state.memory, params, updates),
            )
            state = at_step(state._replace(memory=memory), optax.safe_increment(step))
            return new, _state.Settled(state, counted)
        memory = tracked(state.memory, params, updates)
        state = state._replace(memory=memory)
        carry = _Carry(*(getattr(state, name) for name in _Carry._fields))
        carry = update_when_due(
            is_due(state.step), carry, state.step, state.key, params, updates
        )
        state = state._replace(**carry._asdict())
        new = emitted(updates, state, state.step, params)
        return new, at_step(state, optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _grown(
    event: Event, keeps: list[Array], gains: Array | None, grow: Grow, *, regrow: bool
) -> list[Array]:
    """Returns what is kept and what grows."""
    if gains is None:
        return keeps
    barred = keeps if regrow else event.living
    if event.units.choose is None:
        free = [~taken for taken in barred]
        grown = event.top(grow(event), free, gains)
        return [keep | new for keep, new in zip(keeps, grown, strict=True)]
    places = zip(keeps, barred, grow(event), strict=True)
    return event.choose(
        [
            jnp.where(keep, jnp.inf, jnp.where(taken, -jnp.inf, score))
            for keep, taken, score in places
        ]
    )


def _sharded_like(masks: Masks, params: Params) -> Masks:
    """Returns the masks, those of full shape sharded as their parameters."""

    def leaf(mask: Array, param: Any) -> Array:
        if mask.ndim == 0 or mask.shape != jnp.shape(param):
            return mask
        return mask | jnp.zeros_like(param, dtype=bool)

    return jax.tree.map(leaf, masks, params)


def _clear(updates: optax.Updates, masks: Masks) -> optax.Updates:
    """Returns the updates with zeros outside the masks.

    As :func:`jprune.masks.apply`, but by their bits, which vectorises better than a
    select and has no derivative.
    """
    masks_lib.check(masks, updates)

    def leaf(update: Any, mask: Array) -> Any:
        if mask.ndim == 0:
            return update
        if not jnp.issubdtype(update.dtype, jnp.floating):
            return jnp.where(mask, update, 0)
        integers = jnp.dtype(f"int{8 * update.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(update, integers)
        return jax.lax.bitcast_convert_type(bits & -mask.astype(integers), update.dtype)

    return jax.tree.map(leaf, updates, masks)


def _floats(units: Units, tree: Any) -> list[Array]:
    leaves = jax.tree.leaves(tree)
    return [
        jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        for x in (leaves[leaf.place] for leaf in units.leaves)
    ]


def _conditional(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes ``(due, carry, *rest) -> fn(carry, *rest) if due else carry``.

    Under ``vmap``, where a ``cond`` would compute both branches in every step, ``fn``
    runs only if it is due for some element.
    """

    @jax.custom_batching.custom_vmap
    def call(due: Array, carry: Any, rest: tuple) -> Any:
        return jax.lax.cond(due, lambda c: fn(c, *rest), lambda c: c, carry)

    @call.def_vmap
    def _(size: int, batched: Any, due: Array, carry: Any, rest: tuple) -> Any:
        def spread(value: Array, is_batched: bool) -> Array:
            return (
                value if is_batched else jnp.broadcast_to(value, (size, *value.shape))
            )

        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched[2])
        carry = jax.tree.map(spread, carry, batched[1])
        dues = spread(due, batched[0])

        def run(carry: Any) -> Any:
            new = jax.vmap(lambda c, r: fn(c, *r), in_axes=(0, axes))(carry, rest)
            return jax.tree.map(
                lambda a, b: jnp.where(dues.reshape(size, *[1] * (a.ndim - 1)), a, b),
                new,
                carry,
            )

        out = jax.lax.cond(jnp.any(due), run, lambda c: c, carry)
        return out, jax.tree.map(lambda _: True, out)

    return lambda due, carry, *rest: call(due, carry, rest)
