"""Rules of primitives that hold jaxprs: calls, loops, branches, custom derivatives."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jprune.tracing import _jax_api, _kept, _values
from jprune.tracing._graph import Graph
from jprune.tracing._interpreter import Frame, Passed, Step, analyse, evaluate, rule
from jprune.tracing._jax_api import JaxprEqn
from jprune.tracing._kept import Kept
from jprune.tracing._rules_layout import same_background
from jprune.tracing._values import FIXED, Fixed, Free, Labels, Value


def _analyse(graph: Graph, jaxpr: Any, values: Sequence[Value]) -> Frame:
    return analyse(graph, *_jax_api.as_closed(jaxpr), values)


def _merge(graph: Graph, values: Sequence[Value], reason: str) -> Value:
    """Returns a value that each of some values can be cut to."""
    values = [graph.resolve(value) for value in values]
    used, kinds = graph.align(values, reason)
    dims = [
        same_background(kind, [value.along(axis) for value in used])
        for axis, kind in enumerate(kinds)
    ]
    return Value(values[0].aval, tuple(dims))


# Calls.


def _call(kept: Kept, step: Step, *operands: Any) -> list[Any]:
    return evaluate(kept, step.inner, operands)


@rule("jit", "pjit", "closed_call", "core_call", evaluate=_call)
def call(graph: Graph, eqn: JaxprEqn, *values: Value) -> Passed:
    """Goes into the function; it is inlined."""
    jaxpr = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
    frame = _analyse(graph, jaxpr, values)
    return Passed(values, frame.outs, frame)


def _remat(kept: Kept, step: Step, *operands: Any) -> list[Any]:
    params = step.eqn.params
    wrapped = jax.checkpoint(
        lambda *values: evaluate(kept, step.inner, values),
        prevent_cse=params["prevent_cse"],
        policy=params["policy"],
    )
    return wrapped(*operands)


@rule("remat", "remat2", "checkpoint", evaluate=_remat)
def remat(graph: Graph, eqn: JaxprEqn, *values: Value) -> Passed:
    """Goes into the function, and wraps it again."""
    frame = _analyse(graph, eqn.params["jaxpr"], values)
    return Passed(values, frame.outs, frame)


# Loops and branches.

_CARRY = "a loop carries it together with a dimension that is fixed"


def _settle_carry(
    graph: Graph,
    jaxpr: Any,
    init: Sequence[Value],
    before: Sequence[Value],
    after: Sequence[Value],
) -> tuple[Frame, list[Value]]:
    """Analyses the body of a loop until what it carries stays as it is.

    Args:
        graph: collects joins and pins.
        jaxpr: the body.
        init: the first carry.
        before: the arguments of the body before the carry.
        after: those after it.
    """
    carry = [dataclasses.replace(graph.resolve(v), const=None) for v in init]
    while True:
        frame = _analyse(graph, jaxpr, [*before, *carry, *after])
        # A dimension goes from free to labelled to fixed, a background from known to
        # unknown, so this ends.
        pairs = zip(carry, frame.outs, strict=False)
        merged = [_merge(graph, pair, _CARRY) for pair in pairs]
        if all(map(_alike, carry, merged)):
            return frame, carry
        carry = merged


def _alike(a: Value, b: Value) -> bool:
    return all(
        type(x) is type(y)
        and (
            isinstance(x, Fixed)
            or isinstance(y, Fixed)
            or np.array_equal(x.background, y.background, equal_nan=True)
        )
        for x, y in zip(a.dims, b.dims, strict=True)
    )


def _scan(kept: Kept, step: Step, *operands: Any) -> list[Any]:
    params, (frame, ys) = step.eqn.params, step.inner
    n, m = params["num_consts"], params["num_carry"]
    consts, init, xs = operands[:n], operands[n : n + m], operands[n + m :]
    wanted = [*step.ins[n : n + m], *ys]

    def body(carry: Sequence[Any], x: Sequence[Any]) -> tuple[Any, Any]:
        outs = evaluate(kept, frame, [*consts, *carry, *x])
        outs = [
            kept.cut(out, have, want)
            for out, have, want in zip(outs, frame.outs, wanted, strict=True)
        ]
        return outs[:m], outs[m:]

    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    carry, stacked = lax.scan(body, list(init), list(xs), **options)
    return [*carry, *stacked]


@rule("scan", evaluate=_scan)
def scan(graph: Graph, eqn: JaxprEqn, *values: Value) -> Passed:
    """Joins what is carried in and out; a scan is over a fixed axis."""
    n, m = eqn.params["num_consts"], eqn.params["num_carry"]
    jaxpr = eqn.params["jaxpr"]
    consts, init = values[:n], values[n : n + m]
    xs = [graph.resolve(value) for value in values[n + m :]]
    for value in xs:
        graph.pin_dim(value.dims[0], "a scan runs over it")
    rows = [
        Value(_jax_api.aval(var), value.dims[1:])
        for var, value in zip(jaxpr.jaxpr.invars[n + m :], xs, strict=True)
    ]
    frame, carry = _settle_carry(graph, jaxpr, init, consts, rows)
    ys = [graph.resolve(value) for value in frame.outs[m:]]
    stacked = [
        Value(_jax_api.aval(var), (FIXED, *value.dims))
        for var, value in zip(eqn.outvars[m:], ys, strict=True)
    ]
    return Passed([*consts, *carry, *xs], [*carry, *stacked], (frame, ys))


def _while(kept: Kept, step: Step, *operands: Any) -> list[Any]:
    n, m = step.eqn.params["cond_nconsts"], step.eqn.params["body_nconsts"]
    frame, condition = step.inner

    def body(carry: Sequence[Any]) -> list[Any]:
        outs = evaluate(kept, frame, [*operands[n : n + m], *carry])
        triples = zip(outs, frame.outs, step.ins[n + m :], strict=True)
        return [kept.cut(*triple) for triple in triples]

    def test(carry: Sequence[Any]) -> Any:
        return evaluate(kept, condition, [*operands[:n], *carry])[0]

    return lax.while_loop(test, body, list(operands[n + m :]))


@rule("while", evaluate=_while)
def while_(graph: Graph, eqn: JaxprEqn, *values: Value) -> Passed:
    """Joins what is carried in and out."""
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    tested, consts, init = values[:n], values[n : n + m], values[n + m :]
    frame, carry = _settle_carry(graph, eqn.params["body_jaxpr"], init, consts, [])
    condition = _analyse(graph, eqn.params["cond_jaxpr"], [*tested, *carry])
    return Passed([*tested, *consts, *carry], carry, (frame, condition))


def _switch(kept: Kept, step: Step, index: Any, *operands: Any) -> list[Any]:
    def branch(frame: Frame) -> Any:
        def run(*values: Any) -> list[Any]:
            outs = evaluate(kept, frame, values)
            triples = zip(outs, frame.outs, step.outs, strict=True)
            return [kept.cut(*triple) for triple in triples]

        return run

    return lax.switch(index, [branch(frame) for frame in step.inner], *operands)


@rule("cond", evaluate=_switch)
def cond(graph: Graph, eqn: JaxprEqn, index: Value, *values: Value) -> Passed:
    """Joins the results of the branches."""
    frames = [_analyse(graph, jaxpr, values) for jaxpr in eqn.params["branches"]]
    reason = "a branch returns it where another returns a dimension that is fixed"
    outs = [
        _merge(graph, options, reason)
        for options in zip(*(frame.outs for frame in frames), strict=True)
    ]
    return Passed([index, *values], outs, frames)


# Custom derivatives. Inlined, a ReLU would have another gradient at its kink, and a
# straight-through estimator none at all: the rules of the user are kept. They are
# traced at the shapes of the unpruned network and analysed as any other function, when
# a derivative is taken.


def _rerun(
    kept: Kept, name: str, unknown: str, jaxpr: Any, values: Sequence[Value]
) -> tuple[Frame, Kept]:
    """Analyses another jaxpr on labels of which is known what is kept."""
    own = [
        kept.component[labels.ids].ravel()
        for value in values
        for labels in value.labelled
    ]
    known = np.unique(np.concatenate(own)) if own else np.zeros(0, int)

    def renumber(labels: Any) -> Any:
        if not isinstance(labels, Labels | _values.Joint):
            return labels
        ids = np.searchsorted(known, kept.component[labels.ids])
        return dataclasses.replace(labels, ids=ids)

    renumbered = [
        dataclasses.replace(
            value,
            dims=tuple(map(renumber, value.dims)),
            joint=renumber(value.joint),
        )
        for value in values
    ]
    graph = Graph(unknown, len(known))
    frame = _analyse(graph, jaxpr, renumbered)
    component = graph.components()
    removed = np.zeros(graph.size, bool)
    removed[component[: len(known)][kept.removed[known]]] = True
    if np.any(removed[component[: len(known)]] & ~kept.removed[known]):
        raise ValueError(
            f"tracing: the derivative of {name!r} couples channels that the function "
            "does not, so some of them cannot be removed alone"
        )
    for ids, reason in graph.pins:
        if removed[component[ids]].any():
            raise ValueError(
                f"tracing: in the derivative of {name!r}, channels cannot be removed: "
                f"{reason}"
            )
    return frame, Kept(component, removed)


def _fit(array: Any, have: Sequence[Any], want: Sequence[Any], shape: Any) -> Any:
    """Returns an array that is held at some positions as it is held at others."""
    for axis, (own, other) in enumerate(zip(have, want, strict=True)):
        if own is None and other is not None:
            array = _kept.take(array, axis, other)
        elif own is not None and other is None:
            array = _kept.scatter(array, axis, own, shape[axis])
    return array


def _is_real(var: Any) -> bool:
    return jnp.issubdtype(_jax_api.aval(var).dtype, jnp.inexact)


def _struct(var: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(_jax_api.aval(var).shape, _jax_api.aval(var).dtype)


def _no_tangent(shape: Sequence[int]) -> np.ndarray:
    return np.zeros(tuple(shape), jax.dtypes.float0)


def _tangent(value: Value) -> Value:
    """What is known of a tangent: where the value is a constant, it is 0."""
    dims = [
        dim
        if isinstance(dim, Fixed)
        else dataclasses.replace(dim, background=dim.background * 0)
        for dim in value.dims
    ]
    joint = value.joint
    if joint is not None:
        joint = dataclasses.replace(joint, background=joint.background * 0)
    return Value(value.aval, tuple(dims), joint)


def _cotangent(value: Value) -> Value:
    """What is known of a cotangent: nothing reads what is removed, so it is 0."""
    dims = [
        dataclasses.replace(dim, background=dim.background * 0)
        if isinstance(dim, Free)
        else dim
        if isinstance(dim, Fixed)
        else Labels(dim.ids, np.zeros(dim.ids.size))
        for dim in value.dims
    ]
    joint = value.joint
    if joint is not None:
        joint = dataclasses.replace(joint, background=np.zeros(joint.ids.shape))
    return Value(value.aval, tuple(dims), joint)


def _with_jvp(kept: Kept, step: Step, *operands: Any) -> Sequence[Any]:
    frame, unknown = step.inner
    eqn = step.eqn
    moving = [i for i, var in enumerate(eqn.invars) if _is_real(var)]
    real = [i for i, var in enumerate(eqn.outvars) if _is_real(var)]

    @jax.custom_jvp
    def function(*values: Any) -> list[Any]:
        return evaluate(kept, frame, values)

    def in_full(primals: Sequence[Any], some: Sequence[Any]) -> list[Any]:
        tangents = [_no_tangent(_jax_api.aval(var).shape) for var in eqn.invars]
        for i, tangent in zip(moving, some, strict=True):
            tangents[i] = tangent
        run = lambda *values: _jax_api.bind(eqn, *values)  # noqa: E731
        outs, changes = jax.jvp(run, tuple(primals), tuple(tangents))
        return [*outs, *(changes[i] for i in real)]

    @function.defjvp
    def rule_of_user(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        structs = [_struct(var) for var in eqn.invars]
        jaxpr, _ = _jax_api.trace(in_full, structs, [structs[i] for i in moving])
        values = [*step.ins, *(_tangent(step.ins[i]) for i in moving)]
        own, again = _rerun(kept, _name(eqn), unknown, jaxpr, values)
        found = evaluate(again, own, [*primals, *(tangents[i] for i in moving)])
        wanted = [*step.outs, *(step.outs[i] for i in real)]
        found = [
            _fit(out, again.positions(have), kept.positions(want), want.shape)
            for out, have, want in zip(found, own.outs, wanted, strict=True)
        ]
        outs, changes = found[: len(eqn.outvars)], found[len(eqn.outvars) :]
        every = [_no_tangent(out.shape) for out in outs]
        for i, change in zip(real, changes, strict=True):
            every[i] = change
        return outs, every

    return function(*operands)


@rule("custom_jvp_call", evaluate=_with_jvp)
def custom_jvp(graph: Graph, eqn: JaxprEqn, *values: Value) -> Passed:
    """Goes into the function, and keeps the user's rule for its tangents."""
    frame = _analyse(graph, eqn.params["call_jaxpr"], values)
    return Passed(values, frame.outs, (frame, graph.unknown))


def _with_vjp(kept: Kept, step: Step, *operands: Any) -> Sequence[Any]:
    frame, unknown = step.inner
    eqn = step.eqn
    moving = [i for i, var in enumerate(eqn.invars) if _is_real(var)]
    real = [i for i, var in enumerate(eqn.outvars) if _is_real(var)]

    @jax.custom_vjp
    def function(*values: Any) -> list[Any]:
        return evaluate(kept, frame, values)

    def forward(*values: Any) -> tuple[list[Any], Any]:
        return evaluate(kept, frame, values), values

    def in_full(values: Sequence[Any], some: Sequence[Any]) -> list[Any]:
        def run(*chosen: Any) -> list[Any]:
            every = list(values)
            for i, value in zip(moving, chosen, strict=True):
                every[i] = value
            return _jax_api.bind(eqn, *every)

        cotangents = [_no_tangent(_jax_api.aval(var).shape) for var in eqn.outvars]
        for i, cotangent in zip(real, some, strict=True):
            cotangents[i] = cotangent
        return list(jax.vjp(run, *(values[i] for i in moving))[1](cotangents))

    def backward(values: Sequence[Any], cotangents: Sequence[Any]) -> tuple[Any, ...]:
        structs = [_struct(var) for var in eqn.invars]
        changes = [_struct(eqn.outvars[i]) for i in real]
        jaxpr, _ = _jax_api.trace(in_full, structs, changes)
        known = [*step.ins, *(_cotangent(step.outs[i]) for i in real)]
        own, again = _rerun(kept, _name(eqn), unknown, jaxpr, known)
        found = evaluate(again, own, [*values, *(cotangents[i] for i in real)])
        every: list[Any] = [_no_tangent(np.shape(value)) for value in values]
        for i, cotangent, have in zip(moving, found, own.outs, strict=True):
            want = step.ins[i]
            every[i] = _fit(
                cotangent, again.positions(have), kept.positions(want), want.shape
            )
        return tuple(every)

    function.defvjp(forward, backward)
    return function(*operands)


@rule("custom_vjp_call", "custom_vjp_call_jaxpr", evaluate=_with_vjp)
def custom_vjp(graph: Graph, eqn: JaxprEqn, *values: Value) -> Passed:
    """Goes into the function, and keeps the user's rule for its cotangents.

    The backward pass runs the user's forward rule again.
    """
    key = "call_jaxpr" if "call_jaxpr" in eqn.params else "fun_jaxpr"
    frame = _analyse(graph, eqn.params[key], values)
    return Passed(values, frame.outs, (frame, graph.unknown))


def _name(eqn: JaxprEqn) -> str:
    jaxpr = eqn.params.get("call_jaxpr")
    info = getattr(getattr(jaxpr, "jaxpr", None), "debug_info", None)
    return getattr(info, "func_name", eqn.primitive.name)
