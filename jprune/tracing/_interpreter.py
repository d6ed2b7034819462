"""One interpreter over jaxprs with one table of rules.

A rule says two things about a primitive: how the labels of its operands pass to its
results (:mod:`jprune.tracing._values`), and how to evaluate it on what is left of the
operands. ``docs/add_a_primitive.md`` shows how to write one. :func:`analyse` runs the
first half over a jaxpr and returns a :class:`Frame`; :func:`evaluate` runs the second
over the frame, as often as wanted, equation by equation.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jprune.tracing import _jax_api, _values
from jprune.tracing._graph import Graph
from jprune.tracing._jax_api import Jaxpr, JaxprEqn, Literal, Var
from jprune.tracing._kept import Kept
from jprune.tracing._values import Value


class Passed(NamedTuple):
    """What the first half of a rule returns.

    Attributes:
        ins: the operands as they are used: joints resolved, free dimensions cut.
        outs: the results.
        inner: whatever the second half wants to know.
    """

    ins: Sequence[Value]
    outs: Sequence[Value]
    inner: Any = None


class Step(NamedTuple):
    """An analysed equation.

    Attributes:
        eqn: the equation.
        evaluate: the second half of its rule, ``(kept, step, *operands) -> results``.
        stored: the operands as they are stored.
        ins: the operands as they are used.
        outs: the results.
        inner: what the first half of the rule left for the second.
    """

    eqn: JaxprEqn
    evaluate: Callable[..., Sequence[Any]]
    stored: Sequence[Value]
    ins: Sequence[Value]
    outs: Sequence[Value]
    inner: Any


class Frame(NamedTuple):
    """An analysed jaxpr: one call of it, with its own labels.

    Attributes:
        jaxpr: the jaxpr.
        consts: its constants.
        steps: its equations.
        ins: its arguments.
        outs: its results.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]
    steps: Sequence[Step]
    ins: Sequence[Value]
    outs: Sequence[Value]


class Rule(NamedTuple):
    """A row of the table; see :func:`rule`."""

    labels: Callable[..., Passed]
    evaluate: Callable[..., Sequence[Any]]


RULES: dict[str, Rule] = {}


def rebind(kept: Kept, step: Step, *operands: Any) -> Sequence[Any]:
    """Evaluates the equation as it is, on smaller operands."""
    del kept
    return _jax_api.bind(step.eqn, *operands)


def rule(
    *names: str, evaluate: Callable[..., Sequence[Any]] = rebind
) -> Callable[[Callable[..., Passed]], Callable[..., Passed]]:
    """Enters a rule into the table.

    Args:
        names: the names of the primitives that it is for.
        evaluate: the second half, ``(kept, step, *operands) -> results``; by default
            the equation with the same parameters.

    Returns:
        A decorator for the first half, ``(graph, eqn, *operands) -> Passed``.
    """

    def enter(labels: Callable[..., Passed]) -> Callable[..., Passed]:
        RULES.update(dict.fromkeys(names, Rule(labels, evaluate)))
        return labels

    return enter


def analyse(
    graph: Graph, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Value]
) -> Frame:
    """Passes labels through a jaxpr.

    Args:
        graph: collects the joins and pins.
        jaxpr: the jaxpr.
        consts: its constants.
        args: what is known of its arguments.

    Raises:
        NotImplementedError: a primitive has no rule, and ``graph.unknown`` is
            ``"error"``.
    """
    known = [
        _values.constant(_jax_api.aval(var), const)
        for var, const in zip(jaxpr.constvars, consts, strict=True)
    ]
    env: dict[Var, Value] = dict(zip(jaxpr.constvars, known, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Var | Literal) -> Value:
        if isinstance(atom, Literal):
            return _values.constant(_jax_api.aval(atom), atom.val)
        return env[atom]

    steps = []
    outer = graph.where
    for eqn in jaxpr.eqns:
        stored = [read(atom) for atom in eqn.invars]
        module = _jax_api.module_of(eqn)
        graph.where = f" (in {module})" if module else outer
        own = RULES.get(eqn.primitive.name) or _unknown(graph, eqn)
        ins, outs, inner = own.labels(graph, eqn, *stored)
        steps.append(Step(eqn, own.evaluate, stored, ins, outs, inner))
        env.update(zip(eqn.outvars, outs, strict=True))
    graph.where = outer
    outs = [read(atom) for atom in jaxpr.outvars]
    return Frame(jaxpr, consts, steps, args, outs)


def _unknown(graph: Graph, eqn: JaxprEqn) -> Rule:
    name = eqn.primitive.name
    if graph.unknown != "pin":
        raise NotImplementedError(
            f"tracing: there is no rule for the primitive {name!r}{graph.where}; "
            "unknown='pin' keeps all that it touches, and docs/add_a_primitive.md "
            "shows how to write one"
        )
    return Rule(pin_all(f"the primitive {name!r} has no rule"), rebind)


def pin_all(reason: str) -> Callable[..., Passed]:
    """Returns the first half of a rule that lets nothing be removed."""

    def labels(graph: Graph, eqn: JaxprEqn, *ins: Value) -> Passed:
        pinned = [graph.pin_value(value, reason) for value in ins]
        return Passed(
            pinned, [_values.fixed(_jax_api.aval(var)) for var in eqn.outvars]
        )

    return labels


def evaluate(kept: Kept, frame: Frame, args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr on what is kept, equation by equation.

    A ``kept.hook`` is called in place of every equation, as ``hook(step, operands,
    run)`` with ``run(*operands)`` the evaluation itself, and returns the results.
    Without one, an equation of which nothing is removed is bound as it is, inner
    jaxprs and all.

    Args:
        kept: which labels are kept.
        frame: the analysed jaxpr.
        args: its arguments, as they are held (see :meth:`Kept.positions`).

    Returns:
        Its results, as they are held.
    """
    env: dict[Var, Any] = dict(zip(frame.jaxpr.constvars, frame.consts, strict=True))
    env.update(zip(frame.jaxpr.invars, args, strict=True))

    def read(atom: Var | Literal) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for step in frame.steps:
        operands = [
            kept.cut(read(atom), stored, used)
            for atom, stored, used in zip(
                step.eqn.invars, step.stored, step.ins, strict=True
            )
        ]
        outs = _evaluate_step(kept, step, operands)
        env.update(zip(step.eqn.outvars, outs, strict=True))
    return [read(atom) for atom in frame.jaxpr.outvars]


def _evaluate_step(kept: Kept, step: Step, operands: Sequence[Any]) -> Sequence[Any]:
    if kept.hook is not None:
        run = lambda *values: step.evaluate(kept, step, *values)  # noqa: E731
        return kept.hook(step, operands, run)
    if not kept.touches([*step.ins, *step.outs]):
        return _jax_api.bind(step.eqn, *operands)
    return step.evaluate(kept, step, *operands)
