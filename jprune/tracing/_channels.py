"""From labels to groups of channels: clusters, pooling, expanding, and a summary."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jprune import layouts, trees
from jprune._groups import Group, Member, Pinned, Units
from jprune.tracing._trace import Traced
from jprune.types import Layouts


def clusters(
    traced: Traced, places: set[int]
) -> tuple[list[tuple[Member, ...]], tuple[Pinned, ...]]:
    """Returns the members of the groups, and what is pinned.

    Components with entries in the same axes of the same leaves form a cluster.

    Args:
        traced: the function on labels.
        places: the leaves that are masked; of the others, nothing is said.
    """
    axes: list[tuple[trees.Leaf, int, np.ndarray]] = [
        (leaf, axis, traced.component[ids])
        for leaf, own in zip(traced.leaves, traced.labels, strict=True)
        for axis, ids in enumerate(own)
        if ids is not None and leaf.place in places
    ]
    signature: dict[int, list[int]] = {}
    for number, (_, _, component) in enumerate(axes):
        # In the order of positions: that is the order of units.
        for own in dict.fromkeys(component.tolist()):
            signature.setdefault(own, []).append(number)
    clusters: dict[tuple, list[int]] = {}
    for own, numbers in signature.items():
        why = tuple(traced.reasons.get(own, ()))
        clusters.setdefault((tuple(numbers), why), []).append(own)
    free, pinned = [], []
    for (numbers, why), components in clusters.items():
        members = tuple(_member(axes[number], components) for number in numbers)
        if why:
            pinned.append(Pinned(members, why))
        else:
            free.append(members)
    return free, tuple(pinned)


def _member(
    labelled: tuple[trees.Leaf, int, np.ndarray], components: Sequence[int]
) -> Member:
    leaf, axis, component = labelled
    order = np.argsort(components)
    ranked = np.asarray(components)[order]
    place = np.minimum(np.searchsorted(ranked, component), len(ranked) - 1)
    found = ranked[place] == component
    return Member(leaf, axis, np.where(found, order[place], -1))


def group_of(members: tuple[Member, ...], layout: Layouts) -> Group:
    """Returns the group of units that have the given members."""
    leaves = {member.leaf.place: member.leaf for member in members}
    first = _first(members)
    ordered = [first, *(leaf for leaf in leaves.values() if leaf is not first)]
    by_leaf = [
        tuple(member for member in members if member.leaf.place == leaf.place)
        for leaf in ordered
    ]
    size = int(max(member.units.max() for member in members)) + 1
    sizes = sum((_sizes(own, size) for own in by_leaf), np.zeros(size, np.int64))
    (letters,) = layouts.layouts_of([first], layout)

    def pool(scores: Sequence[Array], how: str) -> Float[Array, " units"]:
        found = [
            _pool(
                score,
                tuple(member.units for member in own),
                axes=tuple(member.axis for member in own),
                size=size,
                how=how,
            )
            for own, score in zip(by_leaf, scores, strict=True)
        ]
        if how == "max":
            return jnp.max(jnp.stack(found), axis=0)
        total = sum(found[1:], found[0])
        if how == "l2":
            return jnp.sqrt(total)
        return total / sizes if how == "mean" else total

    def expand(keep: Bool[Array, " units"]) -> list[Array]:
        return [_expand(own, keep) for own in by_leaf]

    return Group(tuple(ordered), letters, (size,), pool, expand, sizes, None, members)


def _first(members: Sequence[Member]) -> trees.Leaf:
    """Returns the leaf that makes the channels: a kernel that has them as outputs."""
    kernels = []
    for member in members:
        try:
            trees.prunable_leaves({member.leaf.path: member.leaf.value})
        except ValueError:
            continue
        kernels.append(member)
    for member in kernels:
        letters = layouts.default_layout(member.leaf.path, member.leaf.shape)
        if letters[member.axis] == "O":
            return member.leaf
    return (kernels or members)[0].leaf


@functools.partial(jax.jit, static_argnames=("axes", "size", "how"))
def _pool(
    score: Array,
    divided: tuple[Array, ...],
    *,
    axes: tuple[int, ...],
    size: int,
    how: str,
) -> Float[Array, " units"]:
    """Returns the pooled scores of a leaf, before roots and divisions.

    An entry that belongs to a unit by two axes counts once.

    Args:
        score: the scores of the leaf.
        divided: for each member axis, the unit of each position.
        axes: the member axes.
        size: the number of units.
        how: how they are pooled.
    """
    values = score.astype(jnp.promote_types(score.dtype, jnp.float32))
    if how == "l1":
        values = jnp.abs(values)
    elif how == "l2":
        values = jnp.square(values)
    neutral = -jnp.inf if how == "max" else 0.0
    pooled = jnp.full(size, neutral, values.dtype)
    for number, axis in enumerate(axes):
        own = values
        for other in range(number):
            sides = [_lift(divided[k], axes[k], score.ndim) for k in (other, number)]
            own = jnp.where(_same_unit(*sides), neutral, own)
        rest = tuple(a for a in range(score.ndim) if a != axis)
        # What belongs to no unit is dropped.
        places = jnp.where(divided[number] < 0, size, divided[number])
        if how == "max":
            pooled = pooled.at[places].max(jnp.max(own, axis=rest), mode="drop")
        else:
            pooled = pooled.at[places].add(jnp.sum(own, axis=rest), mode="drop")
    return pooled


def _lift(units: Any, axis: int, rank: int) -> Any:
    return units.reshape([-1 if a == axis else 1 for a in range(rank)])


def _same_unit(a: Any, b: Any) -> Any:
    return (a == b) & (a >= 0)


def _sizes(members: Sequence[Member], size: int) -> np.ndarray:
    """Returns how many entries of a leaf each unit has."""
    shape = members[0].leaf.shape
    sizes = np.zeros(size, np.int64)
    for number, member in enumerate(members):
        axes = [m.axis for m in members[: number + 1]]
        counted = np.ones([n if a in axes else 1 for a, n in enumerate(shape)], bool)
        for other in members[:number]:
            sides = [_lift(m.units, m.axis, len(shape)) for m in (other, member)]
            counted = counted & ~_same_unit(*sides)
        rest = tuple(axis for axis in range(len(shape)) if axis != member.axis)
        times = np.prod([n for a, n in enumerate(shape) if a not in axes], dtype=int)
        chosen = np.flatnonzero(member.units >= 0)
        np.add.at(sizes, member.units[chosen], counted.sum(axis=rest)[chosen] * times)
    return sizes


def _expand(members: Sequence[Member], keep: Array) -> Array:
    mask = jnp.ones((), bool)
    for member in members:
        side = jnp.where(member.units >= 0, keep[member.units], True)
        rank = len(member.leaf.shape)
        mask = mask & jnp.expand_dims(
            side, [axis for axis in range(rank) if axis != member.axis]
        )
    return mask


# For people.


def summary(units: Units) -> str:
    """Returns a table for people: the groups, their members, and what is pinned.

    Args:
        units: what :func:`couplings` returned.

    Example:
        >>> from jprune import couplings
        >>> def apply_fn(params, x):
        ...     return jnp.tanh(x @ params["a"]) @ params["b"]
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> print(summary(couplings(apply_fn, params, jnp.ones((1, 3)))))
        4 units of 5 entries: a[:, #] b[#, :]
        pinned: 3 of a[#, :]
            a matrix product sums over it together with a dimension that is fixed
        pinned: 2 of b[:, #]
            it is an output (the only)
    """
    lines = []
    for group in units.groups:
        least, most = int(np.min(group.sizes)), int(np.max(group.sizes))
        entries = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        lines.append(
            f"{group.shape[0]:,} units of {entries} entries: {_listed(group.members)}"
        )
    return "\n".join([*lines, reasons_of(units.pinned)] if units.pinned else lines)


def reasons_of(pinned: Sequence[Pinned]) -> str:
    """Returns what is pinned and why, in lines for people."""
    lines = []
    for members, reasons in pinned:
        size = max(int(member.units.max()) + 1 for member in members)
        lines.append(f"pinned: {size:,} of {_listed(members)}")
        lines += [f"    {reason}" for reason in reasons[:3]]
    return "\n".join(lines)


def _listed(members: Sequence[Member]) -> str:
    return " ".join(
        f"{member.leaf.path}[{', '.join(_marks(member))}]" for member in members
    )


def _marks(member: Member) -> list[str]:
    return [
        "#" if axis == member.axis else ":" for axis in range(len(member.leaf.shape))
    ]
