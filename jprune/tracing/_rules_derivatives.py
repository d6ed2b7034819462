"""Rules of custom derivatives, which are kept.

Inlined, a ReLU would have another gradient at its kink, and a straight-through
estimator none at all. The rule of the user is traced at the shapes of the unpruned
network and analysed as any other function, when a derivative is taken.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.tracing import _jax_api, _kept, _values
from jprune.tracing._graph import Graph
from jprune.tracing._interpreter import Frame, Passed, Step, evaluate, rule
from jprune.tracing._jax_api import JaxprEqn
from jprune.tracing._kept import Kept
from jprune.tracing._rules_control import analyse_inner
from jprune.tracing._values import Fixed, Labels, Value


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
    frame = analyse_inner(graph, jaxpr, renumbered)
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
    return _with_backgrounds(value, lambda x: np.where(np.isnan(x), np.nan, 0.0))


def _cotangent(value: Value) -> Value:
    """What is known of a cotangent: nothing reads what is removed, so it is 0."""
    return _with_backgrounds(value, np.zeros_like)


def _with_backgrounds(value: Value, change: Callable[..., np.ndarray]) -> Value:
    """Returns the value with other backgrounds, and unknown."""

    def changed(labels: Any) -> Any:
        if labels is None or isinstance(labels, Fixed):
            return labels
        return dataclasses.replace(labels, background=change(labels.background))

    dims = tuple(map(changed, value.dims))
    return Value(value.aval, dims, changed(value.joint))


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
    frame = analyse_inner(graph, eqn.params["call_jaxpr"], values)
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
    frame = analyse_inner(graph, eqn.params[key], values)
    return Passed(values, frame.outs, (frame, graph.unknown))


def _name(eqn: JaxprEqn) -> str:
    jaxpr = eqn.params.get("call_jaxpr")
    info = getattr(getattr(jaxpr, "jaxpr", None), "debug_info", None)
    return getattr(info, "func_name", eqn.primitive.name)
