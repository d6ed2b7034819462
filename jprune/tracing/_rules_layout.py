"""Rules of primitives that move axes and positions: labels move along."""

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
from jprune.tracing._values import (
    FIXED,
    UNKNOWN,
    Dim,
    Fixed,
    Free,
    Labels,
    Value,
)

Index = np.ndarray | None  # the operand's position for each of the result's; None: same


# Axes as a whole.


def moved(aval: Any, value: Value, axes: Sequence[int | None], new: Dim) -> Value:
    """Returns a value whose axis i is the operand's ``axes[i]``, or ``new`` if None."""
    dims = tuple(
        value.dims[axis] if axis is not None else FIXED if _values.is_one(n) else new
        for axis, n in zip(axes, aval.shape, strict=True)
    )
    out = Value(aval, dims)
    if value.joint is not None:
        places = [list(axes).index(axis) for axis in value.joint.axes]
        settled = _values.settle(places, value.joint.ids, value.joint.background)
        out = _values.with_labels(out, settled)
    return out


@rule("transpose")
def transpose(graph: Graph, eqn: JaxprEqn, value: Value) -> Passed:
    """Permutes the axes."""
    axes, aval = eqn.params["permutation"], _jax_api.result(eqn)
    if value.const is not None:
        out = _values.constant(aval, value.const.transpose(axes))
    else:
        out = moved(aval, value, axes, FIXED)
    return Passed([value], [out])


@rule("squeeze")
def squeeze(graph: Graph, eqn: JaxprEqn, value: Value) -> Passed:
    """Drops axes of size 1."""
    dropped, aval = eqn.params["dimensions"], _jax_api.result(eqn)
    if value.const is not None:
        return Passed(
            [value], [_values.constant(aval, value.const.squeeze(tuple(dropped)))]
        )
    axes = [axis for axis in range(len(value.shape)) if axis not in dropped]
    return Passed([value], [moved(aval, value, axes, FIXED)])


def _broadcast(kept: Kept, step: Step, operand: Any) -> list[Any]:
    shape = kept.shape(step.outs[0])
    return _jax_api.bind(step.eqn, operand, shape=shape)


@rule("broadcast_in_dim", evaluate=_broadcast)
def broadcast_in_dim(graph: Graph, eqn: JaxprEqn, value: Value) -> Passed:
    """Makes free dimensions of what is new or was of size 1."""
    aval, places = _jax_api.result(eqn), eqn.params["broadcast_dimensions"]
    if value.const is not None and all(map(_jax_api.is_size, aval.shape)):
        lifted = [1] * len(aval.shape)
        for axis, place in enumerate(places):
            lifted[place] = value.shape[axis]
        const = np.broadcast_to(value.const.reshape(lifted), aval.shape)
        return Passed([value], [_values.constant(aval, const)])
    new = Free(value.along(0) if not value.shape else UNKNOWN)
    axes: list[int | None] = [None] * len(aval.shape)
    for axis, place in enumerate(places):
        same = value.shape[axis] == aval.shape[place]
        axes[place] = axis if same else None
    return Passed([value], [moved(aval, value, axes, new)])


# Positions of axes.


def indexed(graph: Graph, aval: Any, value: Value, index: Sequence[Index]) -> Value:
    """Returns the value at static positions of its axes."""
    if value.const is not None:
        const = value.const
        for axis, own in enumerate(index):
            const = const if own is None else const.take(own, axis)
        return _values.constant(aval, const)
    dims: list[Dim] = []
    for axis, (dim, own) in enumerate(zip(value.dims, index, strict=True)):
        if own is None or isinstance(dim, Fixed):
            dims.append(dim)
        elif isinstance(dim, Free):
            whole = len(dim.background) == 1
            cut = Free(dim.background if whole else dim.background[own])
            dims.append(FIXED if len(own) == 1 else cut)
        elif len(own) == 1 and value.shape[axis] != 1:
            graph.pin(dim.ids[own], "a slice takes this one position")
            dims.append(FIXED)
        else:
            dims.append(Labels(dim.ids[own], dim.background[own]))
    out = Value(aval, tuple(dims))
    if value.joint is not None:
        ids, background = value.joint.ids, value.joint.background
        for place, axis in enumerate(value.joint.axes):
            own = index[axis]
            if own is not None:
                ids, background = ids.take(own, place), background.take(own, place)
        settled = _values.settle(value.joint.axes, ids, background)
        if isinstance(settled, dict) and not settled:
            graph.pin(ids, "a slice takes this one position")
        out = _values.with_labels(out, settled)
    return out


def at(kept: Kept, operand: Any, before: Value, after: Value, index: Any) -> Any:
    """Evaluates :func:`indexed` on what is held."""
    held, wanted = kept.positions(before), kept.positions(after)
    for axis, own in enumerate(index):
        have, want = held[axis], wanted[axis]
        size = after.shape[axis]
        if own is None and (want is None or have is not None):
            continue
        positions = np.arange(size) if own is None else own
        chosen = positions if want is None else positions[want]
        operand = _kept.take_held(operand, axis, have, chosen)
    return operand


def _index(kept: Kept, step: Step, operand: Any) -> list[Any]:
    pairs = zip(step.outs, step.inner, strict=True)
    return [at(kept, operand, step.ins[0], out, index) for out, index in pairs]


def _bounds(eqn: JaxprEqn) -> list[tuple[Any, Any, Any]]:
    first, last = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(first)
    return list(zip(first, last, steps, strict=True))


def _slice(kept: Kept, step: Step, operand: Any) -> list[Any]:
    (index,), value, out = step.inner, step.ins[0], step.outs[0]
    bounds = [
        own if n != m and i is None else (0, size, 1)
        for own, i, n, m, size in zip(
            _bounds(step.eqn), index, value.shape, out.shape, operand.shape, strict=True
        )
    ]
    operand = lax.slice(operand, *zip(*bounds, strict=True))
    return [at(kept, operand, value, out, index)]


@rule("slice", evaluate=_slice)
def slice_(graph: Graph, eqn: JaxprEqn, value: Value) -> Passed:
    """Takes a slice; one of a single position pins it."""
    aval, index = _jax_api.result(eqn), []
    for axis, bounds in enumerate(_bounds(eqn)):
        whole = value.shape[axis] == aval.shape[axis]
        # A fixed axis may have a symbolic size.
        index.append(
            None
            if whole or (value.const is None and value.is_fixed(axis))
            else np.arange(*bounds)
        )
    return Passed([value], [indexed(graph, aval, value, index)], [index])


@rule("split", evaluate=_index)
def split(graph: Graph, eqn: JaxprEqn, value: Value) -> Passed:
    """Takes consecutive slices."""
    ends = np.cumsum(eqn.params["sizes"])
    starts = ends - np.asarray(eqn.params["sizes"])
    outs, inner = [], []
    for var, i, j in zip(eqn.outvars, starts, ends, strict=True):
        index: list[Index] = [None] * len(value.shape)
        index[eqn.params["axis"]] = np.arange(i, j)
        outs.append(indexed(graph, _jax_api.aval(var), value, index))
        inner.append(index)
    return Passed([value], outs, inner)


@rule("rev")
def rev(graph: Graph, eqn: JaxprEqn, value: Value) -> Passed:
    """Reverses axes."""
    index: list[Index] = [None] * len(value.shape)
    for axis in eqn.params["dimensions"]:
        if _jax_api.is_size(value.shape[axis]):
            index[axis] = np.arange(value.shape[axis])[::-1]
    return Passed([value], [indexed(graph, _jax_api.result(eqn), value, index)])


def _padded(kept: Kept, step: Step, operand: Any, padding: Any) -> list[Any]:
    value, out = step.ins[0], step.outs[0]
    held, wanted = kept.positions(value), kept.positions(out)
    widths = list(step.eqn.params["padding_config"])
    cut: dict[int, np.ndarray] = {}
    for axis, (low, high, between) in enumerate(widths):
        dim, want = out.dims[axis], wanted[axis]
        if want is None or (low, high, between) == (0, 0, 0):
            continue
        if between == 0 and low >= 0 and high >= 0:
            assert isinstance(dim, Labels)
            mask = kept.mask(dim.ids)
            size = len(mask)
            widths[axis] = (int(mask[:low].sum()), int(mask[size - high :].sum()), 0)
        else:
            operand = _kept.scatter(operand, axis, held[axis], value.shape[axis])
            cut[axis] = want
    result = lax.pad(operand, padding, widths)
    for axis, want in cut.items():
        result = _kept.take(result, axis, want)
    return [result]


@rule("pad", evaluate=_padded)
def pad(graph: Graph, eqn: JaxprEqn, value: Value, padding: Value) -> Passed:
    """Gives new positions labels, with the padding value as their background."""
    value = graph.resolve(value)
    aval, widths = _jax_api.result(eqn), eqn.params["padding_config"]
    filler = padding.along(0)
    plain = [tuple(own) == (0, 0, 0) for own in widths]
    dims: list[Dim] = []
    for axis, (dim, (low, _, between)) in enumerate(
        zip(value.dims, widths, strict=True)
    ):
        if isinstance(dim, Fixed):
            dims.append(FIXED)
            continue
        background = dim.background
        if not all(plain[:axis] + plain[axis + 1 :]):
            background = np.where(background == filler, background, np.nan)
        if plain[axis]:
            dims.append(dataclasses.replace(dim, background=background))
        elif isinstance(dim, Free):
            same = len(background) == 1 and background == filler
            dims.append(Free(background if same else UNKNOWN))
        else:
            n = len(dim.ids)
            places = low + np.arange(n) * (between + 1)
            inside = (places >= 0) & (places < aval.shape[axis])
            graph.pin(dim.ids[~inside], "a negative padding cuts it off")
            ids = graph.fresh(aval.shape[axis])
            filled = np.full(len(ids), filler[0])
            ids[places[inside]] = dim.ids[inside]
            filled[places[inside]] = background[inside]
            dims.append(Labels(ids, filled))
    return Passed([value, padding], [Value(aval, tuple(dims))])


# Joining values.


def _concatenate(kept: Kept, step: Step, *operands: Any) -> list[Any]:
    return [lax.concatenate(operands, step.eqn.params["dimension"])]


@rule("concatenate", evaluate=_concatenate)
def concatenate(graph: Graph, eqn: JaxprEqn, *values: Value) -> Passed:
    """Concatenates labels; pieces without labels get some."""
    axis, aval = eqn.params["dimension"], _jax_api.result(eqn)
    if all(value.const is not None for value in values):
        consts = [value.const for value in values if value.const is not None]
        return Passed(values, [_values.constant(aval, np.concatenate(consts, axis))])
    others = [i for i in range(len(aval.shape)) if i != axis]
    values = tuple(graph.resolve(value, others) for value in values)
    reason = "a concatenation pairs it with a dimension that is fixed"
    used, kinds = graph.align(values, reason, skip=[axis])
    dims = [
        FIXED
        if i == axis
        else same_background(kind, [value.along(i) for value in used])
        for i, kind in enumerate(kinds)
    ]
    pieces = [value.dims[axis] for value in used]
    if any(isinstance(piece, Labels) for piece in pieces):
        labelled = [
            _labelled(graph, piece, value.shape[axis])
            for piece, value in zip(pieces, used, strict=True)
        ]
        used = [
            value.replace_dim(axis, dim)
            for value, dim in zip(used, labelled, strict=True)
        ]
        dims[axis] = Labels(
            np.concatenate([dim.ids for dim in labelled]),
            np.concatenate([dim.background for dim in labelled]),
        )
    elif all(isinstance(piece, Free) for piece in pieces):
        dims[axis] = Free(UNKNOWN)
    return Passed(used, [Value(aval, tuple(dims))])


def same_background(kind: np.ndarray | Dim, backgrounds: Sequence[np.ndarray]) -> Dim:
    """Returns a dimension whose background is known where all operands agree."""
    if isinstance(kind, Fixed):
        return FIXED
    common = backgrounds[0]
    for other in backgrounds[1:]:
        common = np.where(common == other, common, np.nan)
    if isinstance(kind, np.ndarray):
        return Labels(kind, _values.spread(common, kind.size))
    return Free(common)


def _labelled(graph: Graph, piece: Dim, size: int) -> Labels:
    if isinstance(piece, Labels):
        return piece
    ids = graph.fresh(size)
    if isinstance(piece, Fixed):
        graph.pin(ids, "it is concatenated with others and fixed")
        return Labels(ids, np.full(size, np.nan))
    return Labels(ids, _values.spread(piece.background, size))


@rule("stack")
def stack(graph: Graph, eqn: JaxprEqn, *values: Value) -> Passed:
    """Joins the values; the new axis is fixed."""
    axis, aval = eqn.params["axis"], _jax_api.result(eqn)
    values = tuple(graph.resolve(value) for value in values)
    reason = "a stack pairs it with a dimension that is fixed"
    used, kinds = graph.align(values, reason)
    dims = [
        same_background(kind, [value.along(i) for value in used])
        for i, kind in enumerate(kinds)
    ]
    dims.insert(axis, FIXED)
    return Passed(used, [Value(aval, tuple(dims))])


@rule("tile")
def tile(graph: Graph, eqn: JaxprEqn, value: Value) -> Passed:
    """Repeats labels; what had size 1 becomes free."""
    value = graph.resolve(value)
    aval = _jax_api.result(eqn)
    dims: list[Dim] = []
    for dim, n, m in zip(value.dims, value.shape, aval.shape, strict=True):
        if n == m:
            dims.append(dim)
        elif not isinstance(dim, Labels):
            dims.append(Free(UNKNOWN) if n == 1 or isinstance(dim, Free) else FIXED)
        else:
            times = m // n
            dims.append(Labels(np.tile(dim.ids, times), np.tile(dim.background, times)))
    return Passed([value], [Value(aval, tuple(dims))])
