"""Rules of contractions, convolutions, reductions and windows.

What is summed over must be 0 where it is removed, what is maximised over minus
infinity, and so on: otherwise the reduction sees that it is gone, and it is pinned.
"""

import math
from typing import Any

import jax
import numpy as np

from jprune.tracing import _jax_api, _values
from jprune.tracing._graph import Graph
from jprune.tracing._interpreter import Passed, Step, pin_all, rule
from jprune.tracing._jax_api import JaxprEqn
from jprune.tracing._kept import Kept
from jprune.tracing._values import FIXED, UNKNOWN, Dim, Fixed, Free, Labels, Value


def _zeros(*backgrounds: np.ndarray) -> np.ndarray:
    """Returns 0 where one of the factors is 0, and unknown elsewhere."""
    some = np.zeros(1, bool)
    for background in backgrounds:
        some = some | (background == 0)
    return np.where(some, 0.0, np.nan)


def _times(dim: Dim) -> Dim:
    """Returns the dimension that a linear map of the other axes leaves."""
    if isinstance(dim, Labels):
        return Labels(dim.ids, _zeros(dim.background))
    return Free(_zeros(dim.background)) if isinstance(dim, Free) else FIXED


def _contract(
    graph: Graph, a: Value, i: int, b: Value, j: int, name: str
) -> tuple[Value, Value]:
    """Sums over an axis of each of two values; one must be 0 where it is removed."""
    reason = f"{name} sums over it together with a dimension that is fixed"
    a, b, ids = graph.pair(a, i, b, j, reason)
    if isinstance(ids, np.ndarray):
        unknown = np.isnan(_zeros(a.along(i), b.along(j)))
        reason = f"{name} sums over it, and it is not 0 when it is removed"
        graph.pin(ids[unknown], reason)
    return a, b


@rule("dot_general")
def dot_general(graph: Graph, eqn: JaxprEqn, lhs: Value, rhs: Value) -> Passed:
    """Joins what is contracted and what is batched."""
    numbers = jax.tree.map(int, eqn.params["dimension_numbers"])
    (own, other), (own_batch, other_batch) = numbers
    avoid = [i for i, j in zip(own, other, strict=True) if rhs.is_fixed(j)]
    lhs = graph.resolve(lhs, own_batch, avoid)
    avoid = [j for i, j in zip(own, other, strict=True) if lhs.is_fixed(i)]
    rhs = graph.resolve(rhs, other_batch, avoid)
    for i, j in zip(own, other, strict=True):
        lhs, rhs = _contract(graph, lhs, i, rhs, j, "a matrix product")
    dims: list[Dim] = []
    for i, j in zip(own_batch, other_batch, strict=True):
        reason = "a batched product pairs it with a dimension that is fixed"
        lhs, rhs, ids = graph.pair(lhs, i, rhs, j, reason)
        background = _zeros(lhs.along(i), rhs.along(j))
        if isinstance(ids, np.ndarray):
            dims.append(Labels(ids, background))
        else:
            dims.append(Free(background) if isinstance(ids, Free) else FIXED)
    for value, used in ((lhs, (*own, *own_batch)), (rhs, (*other, *other_batch))):
        dims += [_times(dim) for i, dim in enumerate(value.dims) if i not in used]
    return Passed([lhs, rhs], [Value(_jax_api.result(eqn), tuple(dims))])


def _convolve(kept: Kept, step: Step, lhs: Any, rhs: Any) -> list[Any]:
    groups = step.eqn.params["feature_group_count"]
    if groups > 1:
        inputs = step.eqn.params["dimension_numbers"].lhs_spec[1]
        size = step.ins[0].shape[inputs]
        groups = groups * lhs.shape[inputs] // size
    return _jax_api.bind(step.eqn, lhs, rhs, feature_group_count=groups)


@rule("conv_general_dilated", evaluate=_convolve)
def convolution(graph: Graph, eqn: JaxprEqn, lhs: Value, rhs: Value) -> Passed:
    """Joins input features; a group of a grouped convolution goes as a whole.

    Only the dimension numbers matter, so a transposed convolution is no special case.
    """
    if eqn.params["batch_group_count"] > 1:
        return pin_all("a convolution groups the batch")(graph, eqn, lhs, rhs)
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    (batch, inputs, *window), (outputs, inner, *kernel) = (
        numbers.lhs_spec,
        numbers.rhs_spec,
    )
    lhs, rhs = graph.resolve(lhs, [inputs]), graph.resolve(rhs, [outputs])
    for axis in window:
        graph.pin_dim(lhs.dims[axis], "a convolution slides over it")
    for axis in kernel:
        graph.pin_dim(rhs.dims[axis], "it is a spatial axis of a convolution")
    if groups == 1:
        lhs, rhs = _contract(graph, lhs, inputs, rhs, inner, "a convolution")
        features = _times(rhs.dims[outputs])
    else:
        graph.pin_dim(rhs.dims[inner], "it is an axis within a group of a convolution")
        lhs, rhs, features = _grouped(graph, lhs, inputs, rhs, outputs, groups)
    dims: list[Dim] = [FIXED] * len(lhs.dims)
    dims[numbers.out_spec[0]] = _times(lhs.dims[batch])
    dims[numbers.out_spec[1]] = features
    return Passed([lhs, rhs], [Value(_jax_api.result(eqn), tuple(dims))])


def _grouped(
    graph: Graph, lhs: Value, inputs: int, rhs: Value, outputs: int, groups: int
) -> tuple[Value, Value, Dim]:
    """Ties the channels of each group of a convolution."""
    sides = []
    for value, axis in ((lhs, inputs), (rhs, outputs)):
        dim = value.dims[axis]
        sides.append(dim.ids.reshape(groups, -1) if isinstance(dim, Labels) else None)
    reason = "a grouped convolution pairs it with a dimension that is fixed"
    if any(isinstance(v.dims[a], Fixed) for v, a in ((lhs, inputs), (rhs, outputs))):
        graph.pin_dim(lhs.dims[inputs], reason)
        graph.pin_dim(rhs.dims[outputs], reason)
        return lhs, rhs, FIXED
    if sides[0] is None and sides[1] is None:
        return lhs, rhs, FIXED
    leader = sides[0] if sides[0] is not None else sides[1]
    assert leader is not None
    for side in sides:
        for column in range(0 if side is None else side.shape[1]):
            assert side is not None
            graph.join(leader[:, 0], side[:, column])
    new = []
    for value, axis in ((lhs, inputs), (rhs, outputs)):
        dim = value.dims[axis]
        if isinstance(dim, Free):
            size = value.shape[axis]
            ids = np.repeat(leader[:, 0], size // groups)
            labels = Labels(ids, _values.spread(dim.background, size))
            value = value.replace_dim(axis, labels)
        new.append(value)
    lhs, rhs = new
    own, other = lhs.along(inputs), rhs.along(outputs)
    silent = (own.reshape(groups, -1) == 0).all(axis=1)
    feed = np.where(np.repeat(silent, len(other) // groups), 0.0, np.nan)
    features = rhs.dims[outputs]
    assert isinstance(features, Labels)
    return lhs, rhs, Labels(features.ids, _zeros(feed, other))


# Reductions.

IDENTITY = {
    "sum": 0.0,
    "prod": 1.0,
    "max": -math.inf,
    "min": math.inf,
    "and": 1.0,
    "or": 0.0,
    "xor": 0.0,
    "logsumexp": -math.inf,
}
# A reduction of equal numbers is that number, or at least if it is one of these.
_IDEMPOTENT = ("max", "min", "and", "or")
_FIXED_POINTS = {"sum": (0.0,), "prod": (0.0, 1.0), "xor": (0.0,), "logsumexp": ()}


def _left(dim: Dim, kind: str) -> Dim:
    """Returns what a reduction of the other axes leaves of a dimension."""
    if isinstance(dim, Fixed):
        return FIXED
    background = dim.background
    if kind not in _IDEMPOTENT:
        stays = np.isin(background, _FIXED_POINTS.get(kind, ()))
        background = np.where(stays, background, np.nan)
    if isinstance(dim, Labels):
        return Labels(dim.ids, background)
    return Free(background)


def _pin_seen(graph: Graph, dim: Dim, kind: str) -> None:
    """Pins what a reduction would miss."""
    if isinstance(dim, Labels):
        seen = dim.background != IDENTITY.get(kind, np.nan)
        identity = f"{IDENTITY[kind]:g}" if kind in IDENTITY else "neutral"
        reason = f"a reduction ({kind}) sees that it is removed: it is not {identity}"
        graph.pin(dim.ids[seen], reason)


def _reduced(graph: Graph, eqn: JaxprEqn, value: Value, kind: str) -> Passed:
    axes = eqn.params["axes"]
    rest = [axis for axis in range(len(value.shape)) if axis not in axes]
    value = graph.resolve(value, rest)
    for axis in axes:
        _pin_seen(graph, value.dims[axis], kind)
    dims = tuple(_left(value.dims[axis], kind) for axis in rest)
    return Passed([value], [Value(_jax_api.result(eqn), dims)])


@rule(*(f"reduce_{kind}" for kind in IDENTITY if kind != "logsumexp"))
def reduction(graph: Graph, eqn: JaxprEqn, value: Value) -> Passed:
    """Reduces axes; what is removed must be neutral."""
    kind = eqn.primitive.name.removeprefix("reduce_")
    return _reduced(graph, eqn, value, kind)


@rule("argmax", "argmin")
def best(graph: Graph, eqn: JaxprEqn, value: Value) -> Passed:
    """Pins the axis, because positions are results."""
    return _reduced(graph, eqn, value, eqn.primitive.name)


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(graph: Graph, eqn: JaxprEqn, value: Value) -> Passed:
    """Accumulates along an axis; what is removed must be neutral."""
    kind, along = eqn.primitive.name.removeprefix("cum"), eqn.params["axis"]
    value = graph.resolve(value)
    _pin_seen(graph, value.dims[along], kind)
    dims = [_left(dim, kind) for dim in value.dims]
    dim = dims[along]
    if isinstance(dim, Labels):
        dims[along] = Labels(dim.ids, np.full(dim.ids.size, np.nan))
    elif isinstance(dim, Free):
        dims[along] = Free(UNKNOWN)
    return Passed([value], [Value(_jax_api.result(eqn), tuple(dims))])


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def window(graph: Graph, eqn: JaxprEqn, value: Value) -> Passed:
    """Passes the axes over which no window slides."""
    kind = eqn.primitive.name.removeprefix("reduce_window_")
    value = graph.resolve(value)
    params = eqn.params
    dims: list[Dim] = []
    for axis, dim in enumerate(value.dims):
        still = (
            params["window_dimensions"][axis] == 1
            and params["window_strides"][axis] == 1
            and params["base_dilation"][axis] == 1
            and tuple(params["padding"][axis]) == (0, 0)
        )
        if not still:
            graph.pin_dim(dim, "a window slides over it")
        dims.append(_left(dim, kind) if still else FIXED)
    return Passed([value], [Value(_jax_api.result(eqn), tuple(dims))])


@rule("select_and_scatter_add", "select_and_gather_add")
def window_gradient(graph: Graph, eqn: JaxprEqn, a: Value, b: Value) -> Passed:
    """Passes the axes over which no window slides, in gradients of maxima."""
    sizes, steps = eqn.params["window_dimensions"], eqn.params["window_strides"]
    slides = [i for i, (n, m) in enumerate(zip(sizes, steps, strict=True)) if n * m > 1]
    a, b = graph.resolve(a), graph.resolve(b)
    for axis in slides:
        for value in (a, b):
            graph.pin_dim(value.dims[axis], "a window slides over it")
    used, kinds = graph.align([a, b], "a window pairs it with a fixed one", slides)
    dims: list[Dim] = []
    for axis, kind in enumerate(kinds):
        if axis in slides or isinstance(kind, Fixed):
            dims.append(FIXED)
        elif isinstance(kind, np.ndarray):
            # Of the first operand, entries are chosen or summed.
            dims.append(Labels(kind, _zeros(a.along(axis))))
        else:
            dims.append(Free(UNKNOWN))
    return Passed(used, [Value(_jax_api.result(eqn), tuple(dims))])


# Orders.


@rule("sort")
def sort(graph: Graph, eqn: JaxprEqn, *values: Value) -> Passed:
    """Pins the axis that is sorted; the others join."""
    along = eqn.params["dimension"]
    values = tuple(graph.resolve(value) for value in values)
    for value in values:
        graph.pin_dim(value.dims[along], "it is sorted")
    used, kinds = graph.align(values, "it is sorted with others", skip=[along])
    dims: list[Dim] = []
    for kind in kinds:
        if isinstance(kind, np.ndarray):
            dims.append(Labels(kind, np.full(kind.size, np.nan)))
        else:
            dims.append(FIXED if isinstance(kind, Fixed) else Free(UNKNOWN))
    dims[along] = FIXED
    return Passed(used, [Value(_jax_api.aval(var), tuple(dims)) for var in eqn.outvars])


@rule("top_k")
def top_k(graph: Graph, eqn: JaxprEqn, value: Value) -> Passed:
    """Pins the axis of which the largest are taken."""
    along = eqn.params.get("axis", len(value.shape) - 1)
    value = graph.resolve(value)
    graph.pin_dim(value.dims[along], "its largest entries are taken")
    dims = [_left(dim, "top_k") for dim in value.dims]
    dims[along] = FIXED
    results = map(_jax_api.aval, eqn.outvars)
    return Passed([value], [Value(aval, tuple(dims)) for aval in results])
