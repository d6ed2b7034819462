"""Masks: which weights live, as pytrees beside the parameters.

A mask leaf is a bool array of the parameter's rank in which every axis is 1 or full, so
a mask over filters of an HWIO kernel has the shape ``(1, 1, 1, O)``. ``True`` keeps. A
leaf of shape ``()`` means *never pruned*: it keeps everything under every operation
here, and counts in no denominator.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from jprune import trees
from jprune.types import Masks, Params, Prunable


def never_pruned() -> Array:
    """Returns the mask leaf of a parameter that is never pruned.

    Example:
        >>> never_pruned()
        Array(True, dtype=bool)
    """
    return jnp.ones((), bool)


def dense(params: Params, *, prunable: Prunable = None) -> Masks:
    """Returns masks that keep everything.

    Args:
        params: any pytree.
        prunable: which leaves get a mask, see :func:`jprune.trees.prunable_leaves`; all
            others are never pruned.

    Example:
        >>> masks = dense({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
        >>> jax.tree.map(jnp.shape, masks)
        {'bias': (), 'kernel': (2, 3)}
    """
    leaves = trees.prunable_leaves(params, prunable)
    full = {leaf.place: jnp.ones(leaf.shape, bool) for leaf in leaves}
    return trees.replace_leaves(params, full, never_pruned())


def from_zeros(params: Params, *, prunable: Prunable = None) -> Masks:
    """Returns the masks of a network that stores its pruned weights as zeros.

    Example:
        >>> from_zeros({"kernel": jnp.array([[0.0, 2.0]])})["kernel"]
        Array([[False,  True]], dtype=bool)
    """
    leaves = trees.prunable_leaves(params, prunable)
    nonzero = {leaf.place: leaf.value != 0 for leaf in leaves}
    return trees.replace_leaves(params, nonzero, never_pruned())


def apply(params: Params, masks: Masks) -> Params:
    """Returns the parameters with the removed ones at zero.

    ``where(mask, param, 0)``: infinite or NaN weights under a mask become zero too.
    Also known as ``jprune.apply_masks``.

    Args:
        params: any pytree; leaves that are not arrays pass through.
        masks: masks that fit it.

    Raises:
        ValueError: the masks do not fit; the message names the leaf.

    Example:
        >>> apply({"w": jnp.array([[1.0, 2.0]])}, {"w": jnp.array([[True, False]])})
        {'w': Array([[1., 0.]], dtype=float32)}
    """
    check(masks, params)
    return jax.tree.map(_apply_leaf, params, masks)


def _apply_leaf(param: Any, mask: Array) -> Any:
    if np.ndim(mask) == 0:
        return param
    return jnp.where(mask, param, jnp.zeros((), param.dtype))


def check(masks: Masks, params: Params) -> None:
    """Raises unless the masks fit the parameters.

    Raises:
        ValueError: another tree, rank or shape; the message names the leaf's path.
        TypeError: a mask leaf that is not bool.

    Example:
        >>> check({"w": jnp.ones((1, 2), bool)}, {"w": jnp.ones((3, 2))})
    """
    owners, leaves = trees.leaves_of(params), trees.leaves_of(masks)
    if jax.tree.structure(params) != jax.tree.structure(masks):
        raise ValueError(
            _difference([x.path for x in leaves], [x.path for x in owners])
        )
    for mask, owner in zip(leaves, owners, strict=True):
        if jnp.result_type(mask.value) != jnp.bool_:
            raise TypeError(
                f"masks: the leaf {mask.path!r} has dtype "
                f"{jnp.result_type(mask.value)}; masks are bool"
            )
        fits = len(mask.shape) == len(owner.shape) and all(
            size in (1, full)
            for size, full in zip(mask.shape, owner.shape, strict=True)
        )
        if mask.shape and not fits:
            raise ValueError(
                f"masks: the leaf {mask.path!r} has shape {mask.shape}, which does not "
                f"fit the parameter's {owner.shape}; every axis must be 1 or full, or "
                "the shape () for a leaf that is never pruned"
            )


def _difference(found: Sequence[str], expected: Sequence[str]) -> str:
    missing = [path for path in expected if path not in found]
    extra = [path for path in found if path not in expected]
    details = [
        f"{label} {paths[:5]}"
        for label, paths in (("missing", missing), ("unexpected", extra))
        if paths
    ]
    reason = "; ".join(details) or "the containers are of other types"
    return f"masks: the tree differs from that of the parameters: {reason}"


def union(a: Masks, b: Masks) -> Masks:
    """Returns what lives in one mask or the other.

    Example:
        >>> union({"w": jnp.array([True, False])}, {"w": jnp.array([False, False])})
        {'w': Array([ True, False], dtype=bool)}
    """
    return _combine(jnp.logical_or, a, b)


def intersection(a: Masks, b: Masks) -> Masks:
    """Returns what lives in both masks.

    Example:
        >>> a, b = {"w": jnp.array([True, False])}, {"w": jnp.array([True, True])}
        >>> intersection(a, b)
        {'w': Array([ True, False], dtype=bool)}
    """
    return _combine(jnp.logical_and, a, b)


def difference(a: Masks, b: Masks) -> Masks:
    """Returns what lives in ``a`` and not in ``b``.

    Example:
        >>> difference({"w": jnp.array([True, True])}, {"w": jnp.array([True, False])})
        {'w': Array([False,  True], dtype=bool)}
    """
    return _combine(lambda x, y: x & ~y, a, b)


def symmetric_difference(a: Masks, b: Masks) -> Masks:
    """Returns what lives in one mask and not in the other.

    Example:
        >>> a, b = {"w": jnp.array([True, False])}, {"w": jnp.array([True, True])}
        >>> symmetric_difference(a, b)
        {'w': Array([False,  True], dtype=bool)}
    """
    return _combine(jnp.logical_xor, a, b)


def invert(masks: Masks) -> Masks:
    """Returns what does not live. Leaves that are never pruned stay so.

    Example:
        >>> invert({"w": jnp.array([True, False]), "b": never_pruned()})
        {'b': Array(True, dtype=bool), 'w': Array([False,  True], dtype=bool)}
    """
    return jax.tree.map(lambda mask: ~mask if jnp.ndim(mask) else mask, masks)


def _combine(rule: Callable[[Array, Array], Array], a: Masks, b: Masks) -> Masks:
    def leaf(path: Sequence[Any], x: Array, y: Array) -> Array:
        _check_pair(trees.path_of(path), x, y)
        return rule(x, y) if jnp.ndim(x) else x

    return jax.tree_util.tree_map_with_path(leaf, a, b)


def _check_pair(path: str, x: Array, y: Array) -> None:
    if jnp.ndim(x) != jnp.ndim(y):
        raise ValueError(
            f"masks: at {path!r} one mask has shape {jnp.shape(x)} and the other "
            f"{jnp.shape(y)}"
        )


def counts(masks: Masks, params: Params | None = None) -> dict[str, Int[Array, ""]]:
    """Returns the number of living weights of each leaf, by path.

    Args:
        masks: the masks.
        params: the parameters, whose shapes say how many weights an entry of a
            broadcasting mask stands for; without them, entries of masks are counted.

    Returns:
        Counts by path. Leaves that are never pruned are left out.

    Example:
        >>> masks = {"w": jnp.array([[True, False]]), "b": never_pruned()}
        >>> {path: int(n) for path, n in counts(masks).items()}
        {'w': 1}
        >>> {path: int(n) for path, n in counts(masks, {"w": jnp.ones((3, 2)), "b": 0}
        ...                                    ).items()}
        {'w': 3}
    """
    return {
        leaf.path: jnp.sum(leaf.value) * (size // max(leaf.size, 1))
        for leaf, size in _masked_leaves(masks, params)
    }


def sizes(masks: Masks, params: Params | None = None) -> dict[str, int]:
    """Returns the number of weights of each leaf that can be pruned, by path.

    Example:
        >>> sizes({"w": jnp.ones((1, 2), bool)}, {"w": jnp.ones((3, 2))})
        {'w': 6}
    """
    return {leaf.path: size for leaf, size in _masked_leaves(masks, params)}


def _masked_leaves(masks: Masks, params: Params | None) -> list[tuple[trees.Leaf, int]]:
    leaves = trees.leaves_of(masks)
    if params is None:
        owners = leaves
    else:
        check(masks, params)
        owners = trees.leaves_of(params)
    return [
        (leaf, owner.size)
        for leaf, owner in zip(leaves, owners, strict=True)
        if leaf.shape
    ]


def count(masks: Masks, params: Params | None = None) -> Int[Array, ""]:
    """Returns the number of living weights among the prunable ones.

    Example:
        >>> int(count({"w": jnp.array([True, False]), "b": never_pruned()}))
        1
    """
    return sum(counts(masks, params).values(), jnp.zeros((), jnp.int32))


def density(masks: Masks, params: Params | None = None) -> float | Array:
    """Returns the living fraction of the prunable weights (1 if there are none).

    Example:
        >>> float(density({"w": jnp.array([True, False]), "b": never_pruned()}))
        0.5
    """
    total = sum(sizes(masks, params).values())
    return count(masks, params) / total if total else jnp.ones(())


def sparsity(masks: Masks, params: Params | None = None) -> float | Array:
    """Returns the removed fraction of the prunable weights.

    Example:
        >>> float(sparsity({"w": jnp.array([True, True, True, False])}))
        0.25
    """
    return 1 - density(masks, params)


def densities(masks: Masks, params: Params | None = None) -> dict[str, Array]:
    """Returns the living fraction of each leaf, by path.

    Example:
        >>> {k: float(v) for k, v in densities({"w": jnp.array([True, False])}).items()}
        {'w': 0.5}
    """
    total = sizes(masks, params)
    kept = counts(masks, params)
    return {path: kept[path] / max(size, 1) for path, size in total.items()}


def hamming(a: Masks, b: Masks, params: Params | None = None) -> Int[Array, ""]:
    """Returns the number of weights on which two masks differ.

    Example:
        >>> a, b = {"w": jnp.array([True, False])}, {"w": jnp.array([False, True])}
        >>> int(hamming(a, b))
        2
    """
    return count(symmetric_difference(a, b), params)


def overlap(a: Masks, b: Masks, params: Params | None = None) -> Array:
    """Returns the size of the intersection over that of the union.

    Two empty masks overlap fully.

    Example:
        >>> a, b = {"w": jnp.array([True, True])}, {"w": jnp.array([False, True])}
        >>> float(overlap(a, b))
        0.5
    """
    both, either = count(intersection(a, b), params), count(union(a, b), params)
    return jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0)


def pack(masks: Masks) -> PyTree:
    """Returns the masks at one bit a weight.

    Returns:
        A pytree with the structure of ``masks``; a leaf of n entries becomes
        ``ceil(n / 8)`` bytes (uint8), most significant bit first.

    Example:
        >>> pack({"w": jnp.array([[True, False, True]])})
        {'w': Array([160], dtype=uint8)}
    """
    return jax.tree.map(lambda mask: jnp.packbits(jnp.ravel(mask)), masks)


def unpack(bits: PyTree, like: PyTree) -> Masks:
    """Returns the masks that :func:`pack` packed.

    Args:
        bits: packed masks.
        like: a pytree of anything with the masks' shapes, as from ``jax.eval_shape``.

    Raises:
        ValueError: a leaf holds another number of bytes than its shape needs.

    Example:
        >>> masks = {"w": jnp.array([[True, False, True]])}
        >>> unpack(pack(masks), masks)
        {'w': Array([[ True, False,  True]], dtype=bool)}
    """

    def leaf(path: Sequence[Any], packed: Array, shaped: Any) -> Array:
        size = int(np.prod(np.shape(shaped), dtype=np.int64))
        if packed.shape != (-(-size // 8),):
            raise ValueError(
                f"bits: the leaf {trees.path_of(path)!r} has shape {packed.shape}, but "
                f"a mask of shape {np.shape(shaped)} needs {-(-size // 8)} bytes"
            )
        flat = jnp.unpackbits(packed, count=size)
        return flat.astype(bool).reshape(np.shape(shaped))

    return jax.tree_util.tree_map_with_path(leaf, bits, like)


def summary(masks: Masks, params: Params | None = None) -> str:
    """Returns a table for people: the leaves, their shapes and what lives.

    Example:
        >>> print(summary({"fc": jnp.array([[True, False]]), "bias": never_pruned()}))
        leaf   shape   kept  of  density
        bias                       never pruned
        fc     (1, 2)     1   2  50.00%
        total             1   2  50.00%
    """
    owners = trees.leaves_of(masks if params is None else params)
    kept = {path: int(n) for path, n in counts(masks, params).items()}
    total = sizes(masks, params)
    rows: list[tuple[str, ...]] = [("leaf", "shape", "kept", "of", "density")]
    for owner in owners:
        if owner.path in total:
            shape, size = str(owner.shape), total[owner.path]
            rows.append(_row(owner.path, shape, kept[owner.path], size))
        else:
            shape = str(owner.shape) if params is not None else ""
            rows.append((owner.path, shape, "", "", "never pruned"))
    rows.append(_row("total", "", sum(kept.values()), sum(total.values())))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}"
        for a, b, c, d, e in rows
    ]
    return "\n".join(lines)


def _row(path: str, shape: str, kept: int, size: int) -> tuple[str, ...]:
    return path, shape, f"{kept:,}", f"{size:,}", f"{kept / max(size, 1):.2%}"
