"""Rules of elementwise primitives: dimensions join, backgrounds are computed."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jprune.tracing import _backgrounds, _jax_api, _values
from jprune.tracing._graph import Graph
from jprune.tracing._interpreter import Passed, rule
from jprune.tracing._jax_api import JaxprEqn
from jprune.tracing._values import FIXED, Dim, Fixed, Free, Joint, Labels, Value

# A constant that is made of constants is known up to this size.
_LARGEST_FOLDED = 2**16

REASON = "an elementwise operation pairs it with a dimension that is fixed"


def joined(
    graph: Graph,
    aval: object,
    values: Sequence[Value],
    background: _backgrounds.Function,
    eqn: JaxprEqn,
) -> tuple[Sequence[Value], Value]:
    """Joins values of one shape position by position.

    Returns:
        The operands as they are used and the result, whose background is
        ``background(eqn, *backgrounds)``.
    """
    joints = [value.joint for value in values if value.shape]
    common = _common_joint(joints)
    if common is None:
        prefer = _labelled_axes(values)
        values = [graph.resolve(value, prefer) for value in values]
    used, kinds = graph.align(values, REASON)
    dims: list[Dim] = []
    with np.errstate(all="ignore"):
        for axis, kind in enumerate(kinds):
            if isinstance(kind, Fixed):
                dims.append(FIXED)
                continue
            found = background(eqn, *(value.along(axis) for value in values))
            if isinstance(kind, np.ndarray):
                dims.append(Labels(kind, _values.spread(found, kind.size)))
            else:
                dims.append(Free(found))
        out = Value(aval, tuple(dims))
        if common is not None:
            filled = [
                value.joint.background if value.joint is not None else value.along(0)
                for value in values
            ]
            found = np.broadcast_to(background(eqn, *filled), common.ids.shape)
            joint = Joint(common.axes, common.ids, found)
            out = dataclasses.replace(out, joint=joint)
    return used, out


def _common_joint(joints: Sequence[Joint | None]) -> Joint | None:
    """Returns the joint that all operands have, if they have the same."""
    first = joints[0] if joints else None
    if first is None:
        return None
    for other in joints[1:]:
        if other is None or other.axes != first.axes:
            return None
        if not np.array_equal(other.ids, first.ids):
            return None
    return first


def _labelled_axes(values: Sequence[Value]) -> list[int]:
    return [
        axis
        for value in values
        for axis, dim in enumerate(value.dims)
        if isinstance(dim, Labels)
    ]


def _folded(
    eqn: JaxprEqn, values: Sequence[Value], background: _backgrounds.Function
) -> Value | None:
    """Returns the result, if it is made of small constants alone."""
    consts = [value.const for value in values if value.const is not None]
    aval = _jax_api.result(eqn)
    if len(consts) < len(values) or background is _backgrounds.unknown:
        return None
    if max((const.size for const in consts), default=0) > _LARGEST_FOLDED:
        return None
    if any(const.dtype.kind not in "biufV" for const in consts):
        return None
    with np.errstate(all="ignore"):
        floats = [np.atleast_1d(const.astype(float)) for const in consts]
        found = background(eqn, *floats).reshape(aval.shape)
        if np.dtype(aval.dtype).kind in "biu":
            if not np.isfinite(found).all():
                return None
        return _values.constant(aval, found.astype(aval.dtype))


@rule(*_backgrounds.TABLE)
def elementwise(graph: Graph, eqn: JaxprEqn, *values: Value) -> Passed:
    """Joins all operands."""
    background = _backgrounds.TABLE[eqn.primitive.name]
    known = _folded(eqn, values, background)
    if known is not None:
        return Passed(values, [known])
    aval = _jax_api.result(eqn)
    if len(aval.shape) != max(len(value.shape) for value in values):
        # A bitcast to another width.
        pinned = [graph.pin_value(value, REASON) for value in values]
        return Passed(pinned, [_values.fixed(aval)])
    used, out = joined(graph, aval, values, background, eqn)
    return Passed(used, [out])


@rule("optimization_barrier", "device_put")
def each(graph: Graph, eqn: JaxprEqn, *values: Value) -> Passed:
    """Passes each operand on."""
    return Passed(values, list(values))
