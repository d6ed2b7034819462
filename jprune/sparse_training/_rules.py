"""What a mask update sees, and the rules that drop and grow by it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real

from jprune import selection
from jprune import units as units_lib
from jprune.units import Units


class Event(NamedTuple):
    """What the rules of a mask update see.

    Values of entries have one array a leaf of the units, and values of units one a
    group of them.

    Attributes:
        step: the number of updates before this one.
        key: a fresh key.
        fraction: of the living units, how many to drop.
        units: the units.
        weights: the leaves of the units, in float32 at least.
        grads: the gradients, likewise.
        living: which units live, in the groups' shapes.
        memory: what the drop rule has left at the last update.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    fraction: Float[Array, ""]
    units: Units
    weights: list[Array]
    grads: list[Array]
    living: list[Array]
    memory: Any = ()

    @property
    def stacks(self) -> list[int | None]:
        """For each group the axis of its stack of layers, or None."""
        return [group.stack for group in self.units.groups]

    def pool(self, values: Sequence[Array]) -> list[Array]:
        """Returns values of entries pooled to units."""
        return units_lib.pool_leaves(self.units, values)

    def choose(self, scores: Sequence[Array]) -> list[Array]:
        """Returns what N:M units keep, by scores of the units."""
        if self.units.choose is None:
            raise ValueError(
                "units: they choose nothing by themselves, as N:M units do"
            )
        groups = zip(scores, self.units.groups, strict=True)
        return [self.units.choose(score, group) for score, group in groups]

    def layer_sizes(self) -> list[int]:
        """Returns the number of units in each layer."""
        sizes = []
        for group, axis in zip(self.units.groups, self.stacks, strict=True):
            depth = 1 if axis is None else group.shape[axis]
            sizes += [math.prod(group.shape) // max(depth, 1)] * depth
        return sizes

    def sums(self, values: Sequence[Array]) -> Real[Array, " layers"]:
        """Returns the sum over the units of each layer."""
        found = []
        for value, axis in zip(values, self.stacks, strict=True):
            others = tuple(i for i in range(value.ndim) if i != axis)
            found.append(jnp.sum(value, axis=others).ravel())
        return jnp.concatenate(found)

    def along(self, values: Real[Array, " layers"]) -> list[Array]:
        """Returns the values of layers, to broadcast against units."""
        spread, start = [], 0
        for group, axis in zip(self.units.groups, self.stacks, strict=True):
            depth = 1 if axis is None else group.shape[axis]
            shape = [depth if a == axis else 1 for a in range(len(group.shape))]
            spread.append(values[start : start + depth].reshape(shape))
            start += depth
        return spread

    def counts(self, hits: Sequence[Bool[Array, "..."]]) -> Int[Array, " layers"]:
        """Returns how many units are hit in each layer."""
        return self.sums([hit.astype(jnp.int32) for hit in hits])

    def top(
        self,
        scores: Sequence[Array],
        among: Sequence[Array] | None,
        counts: Int[Array, " layers"],
    ) -> list[Array]:
        """Returns the units with the largest scores in each layer, of some or all."""
        return selection.select(scores, counts, stacks=self.stacks, among=among)

    def top_of_all(
        self,
        scores: Sequence[Array],
        among: Sequence[Array] | None,
        count: Int[Array, ""],
    ) -> list[Array]:
        """Returns the units with the largest scores of all layers, of some or all."""
        return selection.select(scores, count[None], together=True, among=among)


class Dropped(NamedTuple):
    """What a drop rule decides.

    Attributes:
        keeps: which units stay, in the groups' shapes.
        gains: how many units each layer is to grow; None if nothing grows.
        memory: what the rule is to see at the next update; as it was if None.
    """

    keeps: list[Array]
    gains: Int[Array, " layers"] | None = None
    memory: Any = None


def layers_kept(event: Event) -> Int[Array, " layers"]:
    """Returns how many units of each layer stay when a fraction of them is dropped."""
    living = event.counts(event.living)
    return living - jnp.floor(event.fraction * living).astype(living.dtype)


def magnitudes(event: Event) -> list[Array]:
    """Returns the magnitudes of weights, pooled to units."""
    return event.pool([jnp.abs(w) for w in event.weights])


def sensitivities(event: Event) -> list[Array]:
    """Returns what the removal of units changes the loss by, to first order."""
    pairs = zip(event.weights, event.grads, strict=True)
    return event.pool([jnp.abs(w * g) for w, g in pairs])


def replaced(event: Event, keeps: list[Array]) -> Dropped:
    """Lets every layer gain as many units as it lost."""
    return Dropped(keeps, event.counts(event.living) - event.counts(keeps))


def smallest(event: Event) -> Dropped:
    """Drops the fraction of each layer with the smallest magnitude, rounded down."""
    keeps = event.top(magnitudes(event), event.living, layers_kept(event))
    return replaced(event, keeps)


def least_sensitive(event: Event) -> Dropped:
    """Drops the fraction of each layer with the smallest ``|w g|``, rounded down."""
    keeps = event.top(sensitivities(event), event.living, layers_kept(event))
    return replaced(event, keeps)


def smallest_of_each_sign(event: Event) -> Dropped:
    """Drops the smallest positive and the largest negative weights of each layer.

    The fraction is taken of either sign, rounded down. Zeros go too: a weight that was
    grown where no gradient reaches it must not hold its place for ever.
    """
    values = event.pool(event.weights)
    kept = [jnp.zeros_like(alive) for alive in event.living]
    for sign in (1, -1):
        side = [
            alive & (sign * value > 0)
            for alive, value in zip(event.living, values, strict=True)
        ]
        signed = [sign * value for value in values]
        best = event.top(signed, side, layers_kept(event._replace(living=side)))
        kept = [a | b for a, b in zip(kept, best, strict=True)]
    return replaced(event, kept)


def steepest(event: Event) -> list[Array]:
    """Grows where the dense gradient is largest in magnitude."""
    return event.pool([jnp.abs(g) for g in event.grads])


def anywhere(event: Event) -> list[Array]:
    """Grows at random."""
    keys = jax.random.split(event.key, len(event.living))
    return [
        jax.random.uniform(key, alive.shape)
        for key, alive in zip(keys, event.living, strict=True)
    ]


def shares(
    total: Int[Array, ""], weights: Real[Array, " layers"], room: Int[Array, " layers"]
) -> Int[Array, " layers"]:
    """Returns integers in proportion to weights that sum to a total, within room."""
    whole = jnp.sum(weights)
    exact = total * (weights / jnp.where(whole > 0, whole, 1))
    whole = jnp.minimum(jnp.floor(exact).astype(room.dtype), room)
    # What is left goes to the largest remainders, one each, and then to any room.
    order = jnp.argsort(jnp.floor(exact) - exact, stable=True)
    free = (room - whole)[order]
    missing = total - jnp.sum(whole, dtype=room.dtype)
    has_room = free > 0
    one = (has_room & (jnp.cumsum(has_room) <= missing)).astype(room.dtype)
    free, missing = free - one, missing - jnp.sum(one, dtype=room.dtype)
    before = jnp.cumsum(free, dtype=room.dtype) - free
    more = jnp.clip(missing - before, 0, free)
    return whole.at[order].add((one + more).astype(room.dtype))
