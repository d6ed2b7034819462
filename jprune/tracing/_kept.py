"""Values with some positions left out: which are kept, and how to cut an array."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jprune.tracing._values import Labels, Value

Positions = np.ndarray | None  # None: all of them


class Kept:
    """Which labels are kept.

    Attributes:
        component: the component of each label.
        removed: whether a component is removed.
        hook: what sees each equation that is evaluated, see
            :func:`jprune.tracing._interpreter.evaluate`.
    """

    def __init__(
        self,
        component: np.ndarray,
        removed: np.ndarray,
        hook: Callable[..., Any] | None = None,
    ):
        self.component = component
        self.removed = removed
        self.hook = hook

    def mask(self, ids: np.ndarray) -> np.ndarray:
        """Returns which labels are kept."""
        return ~self.removed[self.component[ids]]

    def positions(self, value: Value) -> tuple[Positions, ...]:
        """Returns the positions along each axis at which a value is held.

        Where labels vary along several axes, that is the smallest box around what is
        kept, and what is removed has any values in it.
        """
        found: list[Positions] = [
            _positions(self.mask(dim.ids)) if isinstance(dim, Labels) else None
            for dim in value.dims
        ]
        if value.joint is not None:
            mask = self.mask(value.joint.ids)
            for place, axis in enumerate(value.joint.axes):
                rest = tuple(i for i in range(mask.ndim) if i != place)
                found[axis] = _positions(mask.any(axis=rest))
        return tuple(found)

    def shape(self, value: Value) -> tuple[Any, ...]:
        """Returns the shape in which a value is held."""
        pairs = zip(self.positions(value), value.shape, strict=True)
        return tuple(n if kept is None else len(kept) for kept, n in pairs)

    def touches(self, values: Sequence[Value]) -> bool:
        """Whether anything of some values is removed."""
        return any(
            not self.mask(labels.ids).all()
            for value in values
            for labels in value.labelled
        )

    def cut(self, array: Any, stored: Value, used: Value) -> Any:
        """Returns an array held as one value, as it is held as another."""
        if stored is used:
            return array
        before, after = self.positions(stored), self.positions(used)
        for axis, (have, want) in enumerate(zip(before, after, strict=True)):
            if want is not None:
                array = take_held(array, axis, have, want)
        return array


def outer(sides: Sequence[Any]) -> np.ndarray:
    """Returns the box with the given sides."""
    box = np.ones((), bool)
    for side in sides:
        box = box[..., None] & side
    return box


def _positions(mask: Any) -> Positions:
    return None if mask.all() else np.flatnonzero(mask)


def take_held(array: Array, axis: int, have: Positions, want: np.ndarray) -> Array:
    """Returns positions of an array that is held at some of them."""
    index = want if have is None else np.searchsorted(have, want)
    return take(array, axis, index)


def take(array: Array, axis: int, index: np.ndarray) -> Array:
    """Returns static positions along an axis, by slices where that is possible."""
    size = array.shape[axis]
    if len(index) == size and np.array_equal(index, np.arange(size)):
        return array
    steps = np.diff(index)
    if len(index) and (steps > 0).all() and (steps == steps[:1]).all():
        step = int(steps[0]) if len(steps) else 1
        first, last = int(index[0]), int(index[-1])
        return lax.slice_in_dim(array, first, last + 1, step, axis)
    return jnp.take(array, index, axis=axis, mode="clip")


def scatter(array: Array, axis: int, kept: Positions, size: int) -> Array:
    """Returns an array in full along an axis, with zeros where it was removed."""
    if kept is None:
        return array
    # A constant gather from one zero more: no scatter, whose labels would be pinned.
    widths = [(0, int(a == axis), 0) for a in range(array.ndim)]
    padded = lax.pad(array, jnp.zeros((), array.dtype), widths)
    index = np.full(size, len(kept))
    index[kept] = np.arange(len(kept))
    return take(padded, axis, index)
