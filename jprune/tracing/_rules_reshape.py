"""The rule of reshapes: axes that merge repeat labels, one that is split joins them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from jprune.tracing import _jax_api, _kept, _values
from jprune.tracing._graph import Graph
from jprune.tracing._interpreter import Passed, Step, rule
from jprune.tracing._jax_api import JaxprEqn
from jprune.tracing._kept import Kept
from jprune.tracing._values import UNKNOWN, Dim, Free, Joint, Labels, Value

# Axes of the operand, and axes of the result that hold the same entries.
Block = tuple[list[int], list[int]]


def _blocks(before: Sequence[Any], after: Sequence[Any]) -> list[Block]:
    """Returns the smallest runs of axes with equal products, without axes of size 1.

    Example:
        >>> _blocks((2, 3, 8), (6, 2, 4))
        [([0, 1], [0]), ([2], [1, 2])]
    """
    sides = []
    for shape in (before, after):
        axes = [a for a, n in enumerate(shape) if not (_jax_api.is_size(n) and n == 1)]
        products: list[Any] = []
        for axis in axes:
            products.append((products[-1] if products else 1) * shape[axis])
        sides.append((axes, products))
    (own, own_products), (new, new_products) = sides
    blocks, i, j = [], 0, 0
    # Symbolic sizes can be compared, but not ordered.
    for stop, product in enumerate(own_products, 1):
        if product in new_products[j:]:
            end = new_products.index(product, j) + 1
            blocks.append((own[i:stop], new[j:end]))
            i, j = stop, end
    return blocks


def _reshape(kept: Kept, step: Step, operand: Any) -> list[Any]:
    value, out = step.ins[0], step.outs[0]
    have, want = kept.positions(value), kept.positions(out)
    own, new = step.inner
    before, after = (
        _kept.outer([_side(side[axis], shaped.shape[axis]) for axis in axes]).ravel()
        for axes, side, shaped in ((own, have, value), (new, want, out))
    )
    if np.array_equal(before, after):
        return [lax.reshape(operand, kept.shape(out))]
    for axis in own:
        operand = _kept.scatter(operand, axis, have[axis], value.shape[axis])
    sizes = [
        n if kept_here is None or axis in new else len(kept_here)
        for axis, (kept_here, n) in enumerate(zip(want, out.shape, strict=True))
    ]
    result = lax.reshape(operand, sizes)
    for axis in new:
        if want[axis] is not None:
            result = _kept.take(result, axis, want[axis])
    return [result]


def _side(positions: np.ndarray | None, size: int) -> np.ndarray:
    mask = np.ones(size, bool)
    if positions is not None:
        mask[:] = False
        mask[positions] = True
    return mask


@rule("reshape", evaluate=_reshape)
def reshape(graph: Graph, eqn: JaxprEqn, value: Value) -> Passed:
    """Repeats labels where axes merge, and makes joints where an axis is split."""
    aval = _jax_api.result(eqn)
    if value.const is not None:
        out = _values.constant(aval, value.const.reshape(aval.shape))
        return Passed([value], [out], ([], []))
    if 0 in value.shape:
        pinned = graph.pin_value(value, "it is reshaped and has no entries")
        return Passed([pinned], [_values.fixed(aval)], ([], []))
    out = _values.fixed(aval)
    blocks = _blocks(value.shape, aval.shape)
    joined = [b for b in blocks if value.joint and set(b[0]) & set(value.joint.axes)]
    used: list[Block] = []
    for block in blocks:
        own, new = block
        dims = [value.dims[axis] for axis in own]
        if block in joined:
            continue
        if len(own) == len(new) == 1:
            out = out.replace_dim(new[0], dims[0])
        elif all(isinstance(dim, Free) for dim in dims):
            for axis in new:
                out = out.replace_dim(axis, Free(_common(dims)))
        elif any(isinstance(dim, Labels) for dim in dims):
            used.append(block)
            out = _relabel(graph, value, out, own, new)
    if joined:
        own, new = _union(joined)
        used.append((own, new))
        out = _relabel(graph, value, out, own, new)
    return Passed([value], [out], _union(used))


def _union(blocks: Sequence[Block]) -> Block:
    own = sorted(axis for block in blocks for axis in block[0])
    return own, sorted(axis for block in blocks for axis in block[1])


def _relabel(
    graph: Graph, value: Value, out: Value, own: Sequence[int], new: Sequence[int]
) -> Value:
    """Carries the labels over some axes of a value to those of its reshaped form."""
    labelled = [axis for axis in own if isinstance(value.dims[axis], Labels)]
    before = [value.shape[axis] for axis in own]
    after = [out.shape[axis] for axis in new]
    joint = value.joint if value.joint and set(value.joint.axes) <= set(own) else None
    if not all(map(_jax_api.is_size, [*before, *after])):
        for axis in labelled:
            graph.pin_dim(value.dims[axis], "a reshape merges it with a symbolic size")
        if joint is not None:
            graph.pin(joint.ids, "a reshape merges it with a symbolic size")
        return out
    if joint is None:
        dim = value.dims[labelled.pop(0)]
        assert isinstance(dim, Labels)
        axes = [axis for axis in own if value.dims[axis] is dim]
        joint = Joint(tuple(axes), dim.ids, dim.background)
    for axis in labelled:
        graph.pin_dim(value.dims[axis], "a reshape merges it with another such axis")
    lifted = [n if a in joint.axes else 1 for a, n in zip(own, before, strict=True)]
    ids, background = (
        np.broadcast_to(x.reshape(lifted), before).reshape(after)
        for x in (joint.ids, joint.background)
    )
    settled = _values.settle(new, ids, background)
    if isinstance(settled, Joint) and out.joint is not None:
        # A value carries one joint.
        settled = graph.resolve(dataclasses.replace(out, joint=settled))
        return dataclasses.replace(settled, joint=out.joint)
    return _values.with_labels(out, settled)


def _common(dims: Sequence[Dim]) -> np.ndarray:
    """Returns the number that fills all of a value that is free in some axes."""
    for dim in dims:
        if isinstance(dim, Free) and len(dim.background) == 1:
            if not np.isnan(dim.background[0]):
                return dim.background
    return UNKNOWN
