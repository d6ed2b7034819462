"""Groups of removable units: the types, without the builders.

They stand below :mod:`jprune.tracing`, which builds groups, and :mod:`jprune.units`,
which builds others and is where users find them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from jprune import trees


class Member(NamedTuple):
    """An axis of a leaf, divided among the units of a group.

    Attributes:
        leaf: the leaf; its value is a ``ShapeDtypeStruct``.
        axis: the axis.
        units: int, for each position of the axis the unit that it belongs to; -1 if it
            belongs to none of the group.
    """

    leaf: trees.Leaf
    axis: int
    units: np.ndarray


class Pinned(NamedTuple):
    """Channels that are coupled, and cannot be removed.

    Attributes:
        members: as those of a group; the units are the channels.
        reasons: why they cannot be removed.
    """

    members: tuple[Member, ...]
    reasons: tuple[str, ...]


class Group(NamedTuple):
    """Removable units that are alike: of one leaf, or of several coupled ones.

    Attributes:
        leaves: the leaves that a unit has entries in; their values are
            ``ShapeDtypeStruct``. The first stands for the group where one layer is
            asked for: in tables of path patterns, and in rules that read a shape.
        layout: one letter an axis of the first leaf.
        shape: the shape of the unit scores. For one leaf: 1 for an axis taken as a
            whole, the number of blocks (rounded up) for one cut into blocks, and full
            for the others. For coupled channels: their number.
        pool: ``(scores of each leaf, how) -> unit scores`` of ``shape``.
        expand: bool ``shape`` -> a mask for each leaf, every axis 1 or full.
        sizes: int64, the entries in each unit; broadcasts to ``shape``.
        stack: the axis of the first leaf, and of ``shape``, that is a stack of layers.
        members: of coupled channels, which positions of which axes they are.
    """

    leaves: tuple[trees.Leaf, ...]
    layout: str
    shape: tuple[int, ...]
    pool: Callable[[Sequence[Array], str], Array]
    expand: Callable[[Array], list[Array]]
    sizes: np.ndarray
    stack: int | None = None
    members: tuple[Member, ...] = ()

    @property
    def leaf(self) -> trees.Leaf:
        """The first of the leaves."""
        return self.leaves[0]


class Units(NamedTuple):
    """The removable units of a tree.

    Attributes:
        groups: one for each prunable leaf, in flattening order; or the groups of
            coupled channels.
        how: how the scores of a unit's entries are pooled.
        choose: ``(scores of the leaf, group) -> keep``, where survivors are chosen
            inside fixed groups, whatever the budget (N:M); or None.
        density: the kept fraction that ``choose`` fixes; or None.
        least: how many units of each group survive whatever their scores.
        tree: the tree, with ``ShapeDtypeStruct`` in the place of arrays.
        pinned: of coupled channels, those that cannot be removed.
    """

    groups: tuple[Group, ...]
    how: str
    choose: Callable[[Array, Group], Array] | None = None
    density: float | None = None
    least: int = 0
    tree: Any = None
    pinned: tuple[Pinned, ...] = ()

    @property
    def leaves(self) -> tuple[trees.Leaf, ...]:
        """The leaves that units have entries in, in flattening order, each once."""
        found = {leaf.place: leaf for group in self.groups for leaf in group.leaves}
        return tuple(found[place] for place in sorted(found))
