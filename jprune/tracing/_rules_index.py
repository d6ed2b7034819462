"""Rules of gathers, scatters and dynamic slices, and of what makes values anew.

Indices that are constants move labels as a slice does. Indices that are computed pin
the axes that they point into, and pass the others.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jprune.tracing import _jax_api, _kept, _values
from jprune.tracing._graph import Graph
from jprune.tracing._interpreter import Passed, Step, pin_all, rule
from jprune.tracing._jax_api import JaxprEqn
from jprune.tracing._kept import Kept
from jprune.tracing._rules_layout import at, indexed, moved
from jprune.tracing._values import (
    FIXED,
    UNKNOWN,
    Dim,
    Free,
    Labels,
    Value,
)

_POINTED = "computed indices point into it"

# Gathers.


def _static_index(eqn: JaxprEqn, value: Value, indices: Value) -> np.ndarray | None:
    """Returns the positions along the one axis that a gather takes, if it is so."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if indices.const is None or len(numbers.start_index_map) != 1:
        return None
    axis = int(numbers.start_index_map[0])
    rest = [
        n == m
        for a, (n, m) in enumerate(zip(value.shape, sizes, strict=True))
        if a != axis
    ]
    if numbers.collapsed_slice_dims != (axis,) or not all(rest):
        return None
    index, size = indices.const[..., 0], value.shape[axis]
    if eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        return np.clip(index, 0, size - 1)
    inside = ((index >= 0) & (index < size)).all()
    return index if inside else None


def _gather(kept: Kept, step: Step, operand: Any, indices: Any) -> list[Any]:
    value, out = step.ins[0], step.outs[0]
    index, middle, axes = step.inner
    if index is not None:
        taken = at(kept, operand, value, middle, index)
        return [lax.transpose(taken, axes)]
    held, wanted = kept.positions(value), kept.positions(out)
    numbers = step.eqn.params["dimension_numbers"]
    for axis in map(int, numbers.start_index_map):
        operand = _kept.scatter(operand, axis, held[axis], value.shape[axis])
    sizes = [
        n if size == full else size
        for size, full, n in zip(
            step.eqn.params["slice_sizes"], value.shape, operand.shape, strict=True
        )
    ]
    (result,) = _jax_api.bind(step.eqn, operand, indices, slice_sizes=tuple(sizes))
    for axis, want in enumerate(wanted):
        if want is not None and axis not in numbers.offset_dims:
            if result.shape[axis] != len(want):
                result = _kept.take(result, axis, want)
    return [result]


@rule("gather", evaluate=_gather)
def gather(graph: Graph, eqn: JaxprEqn, value: Value, indices: Value) -> Passed:
    """Takes constant positions of an axis, or passes the axes that are taken whole."""
    numbers, aval = eqn.params["dimension_numbers"], _jax_api.result(eqn)
    batch = [a for a in range(len(aval.shape)) if a not in numbers.offset_dims]
    index = _static_index(eqn, value, indices)
    if index is not None and index.ndim == 1:
        axis = int(numbers.start_index_map[0])
        every: list[Any] = [None] * len(value.shape)
        every[axis] = index
        shape = (*value.shape[:axis], len(index), *value.shape[axis + 1 :])
        middle = indexed(graph, jax.ShapeDtypeStruct(shape, aval.dtype), value, every)
        rest = iter(a for a in range(len(shape)) if a != axis)
        axes = [axis if a in batch else next(rest) for a in range(len(aval.shape))]
        if middle.const is not None:
            out = _values.constant(aval, middle.const.transpose(axes))
        else:
            out = moved(aval, middle, axes, FIXED)
        return Passed([value, indices], [out], (every, middle, axes))
    value, indices = graph.resolve(value), graph.resolve(indices)
    paired = [
        (int(i), int(j))
        for i, j in zip(
            numbers.operand_batching_dims,
            numbers.start_indices_batching_dims,
            strict=True,
        )
    ]
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    whole = [
        n == m for n, m in zip(value.shape, eqn.params["slice_sizes"], strict=True)
    ]
    offsets = [axis for axis in range(len(value.shape)) if axis not in dropped]
    out = _values.fixed(aval)
    for place, axis in zip(map(int, numbers.offset_dims), offsets, strict=True):
        if whole[axis]:
            out = out.replace_dim(place, value.dims[axis])
        else:
            graph.pin_dim(value.dims[axis], _POINTED)
    for axis in numbers.collapsed_slice_dims:
        dim = value.dims[axis]
        if index is not None and isinstance(dim, Labels):
            if index.ndim == 0:
                graph.pin(dim.ids[index], "a slice takes this one position")
                continue
            settled = _values.settle(batch, dim.ids[index], dim.background[index])
            out = _values.with_labels(out, settled)
        else:
            graph.pin_dim(dim, _POINTED)
    if index is None:
        for place, dim in zip(batch, indices.dims, strict=False):
            out = out.replace_dim(place, _unknown(dim))
        for i, j in paired:
            reason = "a gather pairs it with a dimension that is fixed"
            value, indices, ids = graph.pair(value, i, indices, j, reason)
            if isinstance(ids, np.ndarray):
                background = _values.spread(value.along(i), ids.size)
                out = out.replace_dim(batch[j], Labels(ids, background))
        graph.pin_dim(indices.dims[-1], "it holds the coordinates of indices")
    return Passed([value, indices], [out], (None, None, None))


def _unknown(dim: Dim) -> Dim:
    if isinstance(dim, Labels):
        return Labels(dim.ids, np.full(dim.ids.size, np.nan))
    return Free(UNKNOWN) if isinstance(dim, Free) else FIXED


# Dynamic slices.


def _dynamic_slice(kept: Kept, step: Step, operand: Any, *starts: Any) -> list[Any]:
    if step.inner is not None:
        return [at(kept, operand, step.ins[0], step.outs[0], step.inner)]
    sizes = kept.shape(step.outs[0])
    return _jax_api.bind(step.eqn, operand, *starts, slice_sizes=sizes)


def _static_slice(
    value: Value, sizes: Sequence[Any], part: Sequence[int], starts: Sequence[Value]
) -> list[Any] | None:
    """Returns the positions that a slice at constants takes, if it is one."""
    index: list[Any] = [None] * len(sizes)
    for axis in part:
        const, size, full = starts[axis].const, sizes[axis], value.shape[axis]
        if const is None or not _jax_api.is_size(size) or not _jax_api.is_size(full):
            return None
        first = min(max(int(const), 0), full - size)
        index[axis] = np.arange(first, first + size)
    return index


@rule("dynamic_slice", evaluate=_dynamic_slice)
def dynamic_slice(graph: Graph, eqn: JaxprEqn, value: Value, *starts: Value) -> Passed:
    """Slices at constants as a slice does, and otherwise passes what is whole."""
    sizes, aval = eqn.params["slice_sizes"], _jax_api.result(eqn)
    part = [i for i, n in enumerate(value.shape) if n != sizes[i]]
    index = _static_slice(value, sizes, part, starts)
    if index is not None:
        return Passed([value, *starts], [indexed(graph, aval, value, index)], index)
    value = graph.resolve(value)
    dims = list(value.dims)
    for axis in part:
        graph.pin_dim(dims[axis], _POINTED)
        dims[axis] = FIXED
    return Passed([value, *starts], [Value(aval, tuple(dims))])


@rule("dynamic_update_slice")
def dynamic_update_slice(
    graph: Graph, eqn: JaxprEqn, value: Value, update: Value, *starts: Value
) -> Passed:
    """Joins the axes that are written whole."""
    pairs = [(axis, axis) for axis in range(len(value.shape))]
    return _written(graph, eqn, value, update, pairs, starts)


def _written(
    graph: Graph,
    eqn: JaxprEqn,
    value: Value,
    update: Value,
    pairs: Sequence[tuple[int, int]],
    rest: Sequence[Value],
) -> Passed:
    """Writes an update into a value, of which some axes correspond."""
    value, update = graph.resolve(value), graph.resolve(update)
    whole = [(i, j) for i, j in pairs if value.shape[i] == update.shape[j]]
    for own, taken in ((value, {i for i, _ in whole}), (update, {j for _, j in whole})):
        for axis, dim in enumerate(own.dims):
            if axis not in taken:
                graph.pin_dim(dim, "a part of it is written")
    dims: list[Dim] = [FIXED] * len(value.dims)
    name = eqn.primitive.name
    accumulates = name in ("scatter-add", "scatter-sub", "scatter-mul")
    for i, j in whole:
        reason = "it is written into a dimension that is fixed"
        value, update, ids = graph.pair(value, i, update, j, reason)
        own, new = value.along(i), update.along(j)
        same = own == new
        if accumulates:
            same = same & (own == 0)
        background = np.where(same, own, np.nan)
        if isinstance(ids, np.ndarray):
            dims[i] = Labels(ids, background)
        else:
            dims[i] = Free(background) if isinstance(ids, Free) else FIXED
    used = [value, *rest[:1], update] if "scatter" in name else [value, update, *rest]
    return Passed(used, [Value(_jax_api.result(eqn), tuple(dims))])


@rule(
    "scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"
)
def scatter(
    graph: Graph, eqn: JaxprEqn, value: Value, indices: Value, update: Value
) -> Passed:
    """Joins the axes that are written whole, and pins those that indices point into."""
    numbers = eqn.params["dimension_numbers"]
    indices = graph.pin_value(indices, "it holds indices")
    dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = [axis for axis in range(len(value.shape)) if axis not in dropped]
    pairs = [
        (i, j)
        for i, j in zip(windows, numbers.update_window_dims, strict=True)
        if i not in numbers.scatter_dims_to_operand_dims
    ]
    return _written(graph, eqn, value, update, pairs, [indices])


# What is made anew.


@rule("iota")
def iota(graph: Graph, eqn: JaxprEqn, *sizes: Value) -> Passed:
    """Counts along an axis."""
    aval, axis = _jax_api.result(eqn), eqn.params["dimension"]
    if not all(map(_jax_api.is_size, aval.shape)):
        return Passed(sizes, [_values.fixed(aval)])
    shape = [n if a == axis else 1 for a, n in enumerate(aval.shape)]
    count = np.arange(aval.shape[axis]).astype(jnp.dtype(aval.dtype)).reshape(shape)
    return Passed(sizes, [_values.constant(aval, np.broadcast_to(count, aval.shape))])


@rule("random_bits", "rng_bit_generator", "rng_uniform")
def draw(graph: Graph, eqn: JaxprEqn, *values: Value) -> Passed:
    """Draws in full; what is removed is cut away after, so the rest is the same."""
    used = [graph.pin_value(value, "random numbers depend on it") for value in values]
    *keys, last = map(_jax_api.aval, eqn.outvars)
    return Passed(used, [*map(_values.fixed, keys), _values.free(last)])


rule(
    "random_seed",
    "random_wrap",
    "random_unwrap",
    "random_split",
    "random_fold_in",
    "random_clone",
    "random_gamma",
    "threefry2x32",
)(pin_all("random numbers depend on it"))
rule("platform_index", "dim_as_value")(pin_all("it is a size or a platform"))
