"""Rules of primitives that hold jaxprs: calls, loops and branches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from jprune.tracing import _jax_api
from jprune.tracing._graph import Graph
from jprune.tracing._interpreter import Frame, Passed, Step, analyse, evaluate, rule
from jprune.tracing._jax_api import JaxprEqn
from jprune.tracing._kept import Kept
from jprune.tracing._rules_layout import same_background
from jprune.tracing._values import FIXED, Fixed, Value


def analyse_inner(graph: Graph, jaxpr: Any, values: Sequence[Value]) -> Frame:
    """Analyses a jaxpr, closed or not, that an equation holds."""
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
    frame = analyse_inner(graph, jaxpr, values)
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
    frame = analyse_inner(graph, eqn.params["jaxpr"], values)
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
        frame = analyse_inner(graph, jaxpr, [*before, *carry, *after])
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
    condition = analyse_inner(graph, eqn.params["cond_jaxpr"], [*tested, *carry])
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
    frames = [analyse_inner(graph, jaxpr, values) for jaxpr in eqn.params["branches"]]
    reason = "a branch returns it where another returns a dimension that is fixed"
    outs = [
        _merge(graph, options, reason)
        for options in zip(*(frame.outs for frame in frames), strict=True)
    ]
    return Passed([index, *values], outs, frames)
