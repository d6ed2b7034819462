"""Arrays divided into tiles: how large they are, pooling, expanding, ranking inside.

A *tile* is a tuple with a block size for each axis of an array: 1 leaves the axis as it
is, the size of the axis takes it as a whole, anything else cuts it into blocks, of
which the last may be smaller.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

Tile = tuple[int, ...]

HOW = ("sum", "mean", "max", "l1", "l2")


def shape_of(shape: tuple[int, ...], tile: Tile) -> tuple[int, ...]:
    """Returns the number of tiles along each axis.

    Example:
        >>> shape_of((5, 4), (2, 4))
        (3, 1)
    """
    return tuple(-(-n // size) for n, size in zip(shape, tile, strict=True))


def sizes(shape: tuple[int, ...], tile: Tile) -> np.ndarray:
    """Returns the number of entries in each tile.

    Returns:
        int64 of the array's rank; an axis along which all tiles are alike has size 1.

    Example:
        >>> sizes((5, 4), (2, 4)).tolist()
        [[8], [8], [4]]
    """
    counts = np.ones((1,) * len(shape), np.int64)
    for axis, (n, size) in enumerate(zip(shape, tile, strict=True)):
        along = np.minimum(size, n - np.arange(0, n, size)) if n % size else size
        counts = counts * np.reshape(along, [-1] + [1] * (len(shape) - axis - 1))
    return counts


@functools.partial(jax.jit, static_argnames=("how", "tile"))
def pool(scores: Array, how: str, tile: Tile) -> Float[Array, "..."]:
    """Returns one score for each tile.

    Half precision is pooled in float32. NaN in a tile makes its score NaN.

    Args:
        scores: real scores.
        how: ``"sum"``, ``"mean"``, ``"max"``, ``"l1"`` (sum of absolute values) or
            ``"l2"`` (root of the sum of squares), over the tile's true entries.
        tile: the tile.

    Example:
        >>> pool(jnp.array([-1.0, -3.0, -5.0]), "mean", (2,)).tolist()
        [-2.0, -5.0]
    """
    values = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if how == "l1":
        values = jnp.abs(values)
    elif how == "l2":
        values = jnp.square(values)
    largest = functools.partial(jnp.max, initial=-jnp.inf)
    reduce, padding = (largest, -jnp.inf) if how == "max" else (jnp.sum, 0.0)
    # Whole axes are not reshaped: they may be sharded.
    whole = tuple(a for a, size in enumerate(tile) if size == scores.shape[a])
    values = reduce(values, axis=whole, keepdims=True)
    for axis, size in enumerate(tile):
        if axis not in whole and size > 1:
            values = reduce(_split(values, axis, size, padding), axis=axis + 1)
    if how == "l2":
        return jnp.sqrt(values)
    return values / sizes(scores.shape, tile) if how == "mean" else values


@functools.partial(jax.jit, static_argnames=("shape", "tile"))
def expand(
    keep: Bool[Array, "..."], shape: tuple[int, ...], tile: Tile
) -> Bool[Array, "..."]:
    """Returns the mask of the entries whose tile is kept.

    Args:
        keep: bool, one for each tile.
        shape: the shape of the array.
        tile: the tile.

    Returns:
        bool; an axis that is one tile long has size 1, all others are full.

    Example:
        >>> expand(jnp.array([[True], [False]]), (3, 4), (2, 4)).tolist()
        [[True], [True], [False]]
    """
    for axis, (n, size) in enumerate(zip(shape, tile, strict=True)):
        if size > 1 and keep.shape[axis] > 1:
            before, count, after = _around(keep, axis)
            tiled = jnp.broadcast_to(
                jnp.expand_dims(keep, axis + 1), (*before, count, size, *after)
            )
            keep = tiled.reshape(*before, count * size, *after)
            keep = lax.slice_in_dim(keep, 0, n, axis=axis)
    return keep


# Compiled as one, the pairs of entries are never stored.
@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def largest(scores: Array, n: int, m: int, axis: int) -> Bool[Array, "..."]:
    """Returns the mask of the n largest of each m consecutive entries along an axis.

    Ties go to the lower index, and NaN ranks lowest.

    Example:
        >>> largest(jnp.array([1.0, 2.0, 2.0, 2.0]), 2, 4, 0)
        Array([False,  True,  True, False], dtype=bool)
    """
    grouped = _split(scores, axis, m, 0)
    own, other = jnp.expand_dims(grouped, axis + 2), jnp.expand_dims(grouped, axis + 1)
    own_nan, other_nan = own != own, other != other
    above = (other > own) | (own_nan & ~other_nan)
    level = (other == own) | (own_nan & other_nan)
    earlier = np.tri(m, k=-1, dtype=bool)
    earlier = earlier.reshape(m, m, *[1] * (scores.ndim - axis - 1))
    rank = jnp.sum(above | (level & earlier), axis + 2)
    return (rank < n).reshape(scores.shape)


def _split(values: Array, axis: int, size: int, padding: float) -> Shaped[Array, "..."]:
    """Cuts an axis into two, (blocks, size), filling up the last block."""
    before, n, after = _around(values, axis)
    if n % size:
        widths = [(0, -n % size if a == axis else 0) for a in range(values.ndim)]
        values = jnp.pad(values, widths, constant_values=padding)
    return values.reshape(*before, -(-n // size), size, *after)


def _around(values: Array, axis: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    return values.shape[:axis], values.shape[axis], values.shape[axis + 1 :]
