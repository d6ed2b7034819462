"""What is known of a value: a label for each position of each dimension.

Two positions that must be removed together have joined labels. A dimension is one of

* :data:`FIXED`: nothing of it can be removed (data, windows, axes of size 1);
* :class:`Free`: nothing says which positions it has; any can be taken (a broadcast, a
  constant, random bits). It is evaluated in full, and cut where it meets labels;
* :class:`Labels`: one label a position.

The *background* of a position is the number that fills its slice when it is removed,
NaN if that is unknown. A dimension that a reshape has split has labels that vary along
several dimensions, :class:`Joint`, until the first operation that is not mere layout.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jprune.tracing import _jax_api

# A constant larger than this is not looked into.
LARGEST_CONSTANT = 2**22


@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """A dimension of which nothing can be removed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Free:
    """A dimension that can be cut anywhere; its background has one entry or all."""

    background: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """A dimension with a label and a background for each position."""

    ids: np.ndarray
    background: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Joint:
    """Labels that vary along several axes (in rising order); their shape is theirs."""

    axes: tuple[int, ...]
    ids: np.ndarray
    background: np.ndarray


Dim = Fixed | Free | Labels

FIXED = Fixed()
UNKNOWN = np.full(1, np.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """What is known of a value.

    Attributes:
        aval: its shape (of the unpruned network) and dtype.
        dims: one for each axis; FIXED at the axes of ``joint``.
        joint: labels that vary along several axes, or None.
        const: the value itself, if it is a constant of moderate size.
    """

    aval: Any
    dims: tuple[Dim, ...]
    joint: Joint | None = None
    const: np.ndarray | None = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape in the unpruned network."""
        return tuple(self.aval.shape)

    @property
    def labelled(self) -> list[Labels | Joint]:
        """Its labels."""
        found: list[Labels | Joint] = [d for d in self.dims if isinstance(d, Labels)]
        return found if self.joint is None else [*found, self.joint]

    def is_fixed(self, axis: int) -> bool:
        """Whether nothing along an axis can be removed."""
        in_joint = self.joint is not None and axis in self.joint.axes
        return isinstance(self.dims[axis], Fixed) and not in_joint

    def replace_dim(self, axis: int, dim: Dim) -> "Value":
        """Returns the value with another dimension."""
        dims = (*self.dims[:axis], dim, *self.dims[axis + 1 :])
        return dataclasses.replace(self, dims=dims)

    def along(self, axis: int) -> np.ndarray:
        """Returns what fills each slice of an axis when it is removed."""
        if not self.shape:
            return UNKNOWN if self.const is None else _floats(self.const).reshape(1)
        dim = self.dims[axis]
        return UNKNOWN if isinstance(dim, Fixed) else dim.background


def fixed(aval: Any) -> Value:
    """Returns a value of which nothing can be removed."""
    return Value(aval, (FIXED,) * len(aval.shape))


def free(aval: Any, background: np.ndarray = UNKNOWN) -> Value:
    """Returns a value that can be cut anywhere."""
    dims = tuple(FIXED if is_one(n) else Free(background) for n in aval.shape)
    return Value(aval, dims)


def constant(aval: Any, value: Any) -> Value:
    """Returns a value that is known."""
    if _jax_api.is_key(aval) or not all(map(_jax_api.is_size, aval.shape)):
        return fixed(aval)
    if _jax_api.is_tracer(value) or math.prod(aval.shape) > LARGEST_CONSTANT:
        return free(aval)
    array = np.asarray(value)
    dims = tuple(
        FIXED if n == 1 else Free(_uniform(array, axis))
        for axis, n in enumerate(aval.shape)
    )
    return Value(aval, dims, const=array)


def _uniform(array: np.ndarray, axis: int) -> np.ndarray:
    """Returns the number that fills each slice, NaN where a slice holds several."""
    if array.size == 0 or np.iscomplexobj(array):
        return UNKNOWN
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    values = _floats(rows[:, 0])
    return np.where((rows == rows[:, :1]).all(axis=1), values, np.nan)


def _floats(array: np.ndarray) -> np.ndarray:
    return (
        np.full(array.shape, np.nan) if array.dtype.kind == "c" else array.astype(float)
    )


def is_one(size: Any) -> bool:
    """Whether a dimension has size 1, so that it broadcasts."""
    return _jax_api.is_size(size) and size == 1


def spread(background: np.ndarray, size: int) -> np.ndarray:
    """Returns a background with one entry for each position."""
    return np.broadcast_to(background, (size,))


def settle(
    axes: Sequence[int], ids: np.ndarray, background: np.ndarray
) -> Joint | dict:
    """Returns labels over axes as a joint, or as a dict of one axis if one suffices."""
    background = np.broadcast_to(background, ids.shape)
    wide = [i for i, n in enumerate(ids.shape) if n != 1]
    axes = [axes[i] for i in wide]
    ids, background = (x.reshape([x.shape[i] for i in wide]) for x in (ids, background))
    for i, axis in enumerate(axes):
        first = tuple(slice(None) if j == i else slice(0, 1) for j in range(ids.ndim))
        if np.array_equal(np.broadcast_to(ids[first], ids.shape), ids):
            rows = np.moveaxis(background, i, 0).reshape(ids.shape[i], -1)
            alike = (rows == rows[:, :1]).all(axis=1)
            values = np.where(alike, rows[:, 0], np.nan)
            return {axis: Labels(ids[first].ravel(), values)}
    order = np.argsort(axes)
    return Joint(
        tuple(int(axes[i]) for i in order),
        ids.transpose(order),
        background.transpose(order),
    )


def with_labels(value: Value, settled: Joint | dict[int, Labels]) -> Value:
    """Returns the value with labels that :func:`settle` made."""
    if isinstance(settled, Joint):
        return dataclasses.replace(value, joint=settled)
    for axis, labels in settled.items():
        value = value.replace_dim(axis, labels)
    return value
