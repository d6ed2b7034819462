"""The one transformation of which dynamic sparse training methods are special cases."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jprune import masks as masks_lib
from jprune import pruning, selection
from jprune import scores as scores_lib
from jprune import units as units_lib
from jprune.allocation import Allocation, erdos_renyi_kernel
from jprune.pruning import Sparsity
from jprune.sparse_training import _state
from jprune.sparse_training._rules import Dropped, Event
from jprune.types import Masks, Params, Prunable
from jprune.units import Units

Drop = Callable[[Event], Dropped]
Grow = Callable[[Event], list[Array]]
Steps = Callable[[Any], Any]
UnitsOf = Callable[[Params], Units]


class _Carry(NamedTuple):
    """What a mask update changes of a :class:`MaskState`."""

    masks: Masks
    flipped: Masks
    visited: Masks
    refused: Array
    memory: Any


def dynamic(
    sparsity: Sparsity | None = None,
    *,
    drop: Drop,
    grow: Grow,
    fraction: float | Steps,
    due: Steps,
    hold: bool = False,
    regrow: bool = True,
    allocation: Allocation | None = None,
    units: UnitsOf | None = None,
    prunable: Prunable = None,
    masks: Masks | None = None,
    memory: Any = (),
    seed: int | PRNGKeyArray = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that drops and grows weights while it trains.

    It comes first in a chain, sees the dense gradient, and emits the gradient at the
    masks. In a mask update every layer loses the living units that ``drop`` does not
    keep, and gains as many as it says where ``grow`` scores highest. Finish the chain
    with :func:`sparse`.

    Args:
        sparsity: the removed fraction, in [0, 1), or a table of path patterns.
        drop: ``event -> (keeps, gains)``: which living units stay, and how many units
            each layer is to grow, see :class:`Dropped`.
        grow: ``event -> scores``, larger = grow.
        fraction: the part of the living units to drop, or ``step -> fraction``.
        due: ``step -> bool``, whether the masks are updated.
        hold: whether a mask update takes the place of the gradient step (inside
            :func:`sparse`).
        regrow: whether what was just dropped may grow at once, and then keeps its
            value.
        allocation: of the initial masks, see :mod:`jprune.allocation`;
            Erdos-Renyi-Kernel unless given.
        units: what is dropped and grown at once: a builder such as
            ``jprune.units.filters``; single weights unless given.
        prunable: which leaves are pruned, see :func:`jprune.trees.prunable_leaves`.
        masks: the initial masks, in place of ``sparsity`` and random ones.
        memory: what ``drop`` sees as ``event.memory`` at the first mask update: an
            array or a pytree of them.
        seed: of the initial masks and of random growth; an int or a key.

    Returns:
        A transformation whose state is a :class:`MaskState`. A mask update with a
        gradient that is not finite is left out, and counted in the state.

    Raises:
        ValueError: a sparsity outside [0, 1), a fraction outside [0, 1], or both or
            neither of ``sparsity`` and ``masks``; (from ``init``) masks that do not
            fit, or what :func:`jprune.prune` says; (from ``update``) no ``params``.
    """
    if (sparsity is None) == (masks is None):
        raise ValueError(
            f"sparsity, masks: give one of them, got {sparsity!r} and "
            f"{'masks' if masks is not None else None}"
        )
    if isinstance(sparsity, jax.Array):
        raise ValueError("sparsity: a Python number is needed, not an array")
    if isinstance(sparsity, (float, int)):
        selection.check_sparsity(sparsity)
    if not callable(fraction) and not 0 <= fraction <= 1:
        raise ValueError(f"fraction: {fraction} is outside [0, 1]")

    def units_of(params: Params) -> Units:
        if units is None:
            return units_lib.weights(params, prunable=prunable)
        return units(params)

    def next_hold(step: Array) -> Array | None:
        return jnp.asarray(due(step)) if hold else None

    def init_fn(params: Params) -> Any:
        own = units_of(params)
        key = jax.random.key(seed) if isinstance(seed, int) else jnp.asarray(seed)
        key, first = jax.random.split(key)
        if masks is not None:
            start = units_lib.expand(own, params, units_lib.living(own, params, masks))
        else:
            noise = scores_lib.random(params, key=first)
            spread = None if isinstance(sparsity, Mapping) else erdos_renyi_kernel()
            start = pruning.prune(
                noise, sparsity, units=own, allocation=allocation or spread
            )
        start = _sharded_like(start, params)

        def own_buffers() -> Masks:
            # A buffer that stands in a state twice could not be donated.
            return jax.tree.map(jnp.copy, start)

        return _state.MaskState(
            step=jnp.zeros((), jnp.int32),
            key=key,
            masks=own_buffers(),
            flipped=masks_lib.difference(start, start),
            initial=own_buffers(),
            visited=own_buffers(),
            changed=jnp.zeros((), bool),
            hold_next=next_hold(jnp.zeros((), jnp.int32)),
            refused=jnp.zeros((), jnp.int32),
            memory=jax.tree.map(jnp.asarray, memory),
        )

    def mask_update(
        carry: _Carry, step: Array, key: Array, params: Params, grads: optax.Updates
    ) -> _Carry:
        masks, _, visited, refused, memory = carry
        own = units_of(params)
        event = Event(
            step=step,
            key=jax.random.fold_in(key, step),
            fraction=jnp.asarray(
                fraction(step) if callable(fraction) else fraction, float
            ),
            units=own,
            weights=_floats(own, params),
            grads=_floats(own, grads),
            living=units_lib.living(own, params, masks),
            memory=memory,
        )
        keeps, gains, remembered = drop(event)
        free = [~keep for keep in keeps]
        if not regrow:
            free = [~alive for alive in event.living]
        grown = event.top(grow(event), free, gains)
        chosen = [keep | new for keep, new in zip(keeps, grown, strict=True)]
        new = units_lib.expand(own, params, chosen)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in event.grads]))
        new, memory = jax.tree.map(
            lambda a, b: jnp.where(finite, a, b), (new, remembered), (masks, memory)
        )
        # Written as the old masks and a difference, the new ones take their place; else
        # every step, with an update or without, would copy them.
        flipped = masks_lib.symmetric_difference(masks, new)
        new = masks_lib.symmetric_difference(masks, flipped)
        visited = masks_lib.union(visited, new)
        return _Carry(new, flipped, visited, refused + ~finite, memory)

    update_when_due = _conditional(mask_update)

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
        is_due = jnp.asarray(due(state.step))
        carry = _Carry(*(getattr(state, name) for name in _Carry._fields))
        carry = update_when_due(is_due, carry, state.step, state.key, params, updates)
        step = jnp.asarray(optax.safe_increment(state.step))
        state = state._replace(
            step=step,
            changed=is_due | (state.step == 0),
            hold_next=next_hold(step),
            **carry._asdict(),
        )
        return _clear(updates, carry.masks), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def every(period: int, *, start: int | None = None, end: int | None = None) -> Steps:
    """Returns the function that is true every ``period`` steps.

    Args:
        period: the number of steps from one event to the next.
        start: the first event; ``period`` unless given.
        end: the step from which on there is no event; never unless given.

    Raises:
        ValueError: ``period`` is below 1.

    Example:
        >>> due = every(2, end=6)
        >>> [step for step in range(9) if due(step)]
        [2, 4]
    """
    if period < 1:
        raise ValueError(f"every: {period} is below 1")
    first = period if start is None else start

    def due(step: Any) -> Any:
        inside = (step >= first) if end is None else (step >= first) & (step < end)
        return inside & ((step - first) % period == 0)

    return due


def cosine_fraction(initial: float, *, end: int, final: float = 0.0) -> Steps:
    """Returns the fraction that falls along half a cosine.

    ``f(t) = final + (initial - final) (1 + cos(pi t / end)) / 2``, and ``final`` after
    the end.

    Example:
        >>> fraction = cosine_fraction(0.3, end=100)
        >>> [round(float(fraction(t)), 4) for t in (0, 50, 100)]
        [0.3, 0.15, 0.0]
    """
    if not 0 <= final <= initial <= 1:
        raise ValueError(f"fraction: {initial} to {final} does not fall within [0, 1]")

    def fraction(step: Any) -> Any:
        t = jnp.minimum(step, end) / end
        return final + (initial - final) * (1 + jnp.cos(jnp.pi * t)) / 2

    return fraction


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
        for x in (leaves[group.leaf.place] for group in units.groups)
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
