"""The labels of a whole function: which are removed together, which never."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from jprune.tracing._values import (
    FIXED,
    Dim,
    Fixed,
    Free,
    Labels,
    Value,
    is_one,
    spread,
)


class Graph:
    """Labels, the pairs of them that are joined, and those that are pinned.

    Attributes:
        size: the number of labels.
        where: what is being analysed, for the reasons of pins.
        unknown: ``"error"`` or ``"pin"``, what to do about an unknown primitive.
    """

    def __init__(self, unknown: str = "error", size: int = 0):
        self.size = size
        self.where = ""
        self.unknown = unknown
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.pins: list[tuple[np.ndarray, str]] = []

    def fresh(self, count: int) -> np.ndarray:
        """Returns new labels."""
        self.size += count
        return np.arange(self.size - count, self.size)

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Lets labels be removed together, one by one."""
        if a is not b and a.size:
            self.edges.append((a, b))

    def pin(self, ids: np.ndarray, reason: str) -> None:
        """Lets labels never be removed."""
        if ids.size:
            self.pins.append((ids.ravel(), f"{reason}{self.where}"))

    def pin_dim(self, dim: Dim, reason: str) -> None:
        """Lets nothing of a dimension be removed."""
        if isinstance(dim, Labels):
            self.pin(dim.ids, reason)

    def pin_value(self, value: Value, reason: str) -> Value:
        """Lets nothing of a value be removed."""
        for dim in value.dims:
            self.pin_dim(dim, reason)
        if value.joint is not None:
            self.pin(value.joint.ids, reason)
        return Value(value.aval, (FIXED,) * len(value.dims))

    def components(self) -> np.ndarray:
        """Returns the number of the component of each label."""
        if not self.edges:
            return np.arange(self.size)
        # Its import would be half of that of the whole library.
        from scipy.sparse import coo_array, csgraph

        rows, columns = (np.concatenate(side) for side in zip(*self.edges, strict=True))
        ones = np.ones(rows.size, np.int8)
        graph = coo_array((ones, (rows, columns)), shape=(self.size, self.size))
        return csgraph.connected_components(graph, directed=False)[1]

    def resolve(
        self, value: Value, prefer: Iterable[int] = (), avoid: Iterable[int] = ()
    ) -> Value:
        """Ties labels that vary along several axes along one of them.

        That is the first axis whose positions share no label, so that attention heads
        and the groups of a norm come out as units. Of preferred axes, positions may
        also share all their labels, as when heads are repeated.

        Args:
            value: any value.
            prefer: axes to be tried first.
            avoid: axes to be tried last.
        """
        joint = value.joint
        if joint is None:
            return value
        value = dataclasses.replace(value, joint=None)
        first = [axis for axis in prefer if axis in joint.axes]
        last = set(avoid)
        for axis in [*first, *sorted(joint.axes, key=last.__contains__)]:
            place = joint.axes.index(axis)
            classes = np.moveaxis(joint.ids, place, 0)
            classes = classes.reshape(classes.shape[0], -1)
            if self._tie(classes, repeated=axis in first):
                rows = np.moveaxis(joint.background, place, 0).reshape(classes.shape)
                alike = (rows == rows[:, :1]).all(axis=1)
                background = np.where(alike, rows[:, 0], np.nan)
                return value.replace_dim(axis, Labels(classes[:, 0], background))
        self.pin(joint.ids, "a reshape mixes it with other positions")
        return value

    def _tie(self, classes: np.ndarray, repeated: bool) -> bool:
        """Joins the labels of each row, unless two rows share some.

        Args:
            classes: labels in rows.
            repeated: whether rows may share labels if they share all, but not if all
                rows do.

        Returns:
            Whether the labels were joined.
        """
        labels, first, places = np.unique(
            classes, return_index=True, return_inverse=True
        )
        # The first row with a label owns it.
        owners = first // max(classes.shape[1], 1)
        rows = owners[places.reshape(classes.shape)]
        apart = rows == (rows[:, :1] if repeated else np.arange(len(rows))[:, None])
        if not apart.all() or (repeated and np.all(rows == 0)):
            return False
        self.join(classes[owners, 0], labels)
        return True

    def align(
        self, values: Sequence[Value], reason: str, skip: Sequence[int] = ()
    ) -> tuple[list[Value], list[np.ndarray | Dim]]:
        """Joins the dimensions of values of one shape.

        Args:
            values: values without joints, of one shape, up to sizes of 1 that
                broadcast, or of rank 0.
            reason: of a pin where labels meet a fixed dimension.
            skip: axes to leave alone.

        Returns:
            The values as they are to be cut, and for each axis the labels, FIXED or a
            ``Free``.
        """
        ranked = [value for value in values if value.shape]
        common: list[np.ndarray | Dim] = []
        for axis in range(len(ranked[0].shape) if ranked else 0):
            # What has size 1 where others have not is broadcast.
            wide = [value for value in ranked if not is_one(value.shape[axis])]
            dims = [value.dims[axis] for value in wide or ranked]
            ids = [dim.ids for dim in dims if isinstance(dim, Labels)]
            if axis in skip or not any(isinstance(dim, Labels | Fixed) for dim in dims):
                common.append(dims[0])
            elif len(ids) == 0:
                common.append(FIXED)
            elif any(isinstance(dim, Fixed) for dim in dims):
                for own in ids:
                    self.pin(own, reason)
                common.append(FIXED)
            else:
                for a, b in itertools.pairwise(ids):
                    self.join(a, b)
                common.append(ids[0])
        return [_cut(value, common) for value in values], common

    def pair(
        self, a: Value, i: int, b: Value, j: int, reason: str
    ) -> tuple[Value, Value, np.ndarray | Dim]:
        """Joins an axis of one value with an axis of another."""
        x, y = a.dims[i], b.dims[j]
        if isinstance(x, Labels) and isinstance(y, Labels):
            self.join(x.ids, y.ids)
            return a, b, x.ids
        if isinstance(x, Labels) and isinstance(y, Free):
            background = spread(y.background, x.ids.size)
            return a, b.replace_dim(j, Labels(x.ids, background)), x.ids
        if isinstance(x, Free) and isinstance(y, Labels):
            background = spread(x.background, y.ids.size)
            return a.replace_dim(i, Labels(y.ids, background)), b, y.ids
        self.pin_dim(x, reason)
        self.pin_dim(y, reason)
        return a, b, x if isinstance(x, Free) and isinstance(y, Free) else FIXED


def _cut(value: Value, common: Sequence[np.ndarray | Dim]) -> Value:
    """Returns the value with labels in the place of free dimensions."""
    for axis, (dim, ids) in enumerate(zip(value.dims, common, strict=False)):
        if isinstance(dim, Free) and isinstance(ids, np.ndarray):
            labels = Labels(ids, spread(dim.background, ids.size))
            value = value.replace_dim(axis, labels)
    return value
