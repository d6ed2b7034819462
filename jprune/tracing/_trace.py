"""A function on labels: traced, analysed, with its components and pins."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from jprune import trees
from jprune.tracing import _jax_api, _values
from jprune.tracing._graph import Graph
from jprune.tracing._interpreter import Frame, analyse
from jprune.tracing._values import Dim, Labels, Value
from jprune.types import ApplyFn, Params, Prunable

# A closed-over array of this size is probably a weight.
_LARGE = 256

# (leaf, axis) -> what fills a slice when it is removed.
Background = Callable[[trees.Leaf, int], np.ndarray]


class Traced(NamedTuple):
    """A function on labels.

    Attributes:
        leaves: the parameters, as ``ShapeDtypeStruct``.
        labels: for each of them and each axis the labels, or None.
        frame: the analysed jaxpr.
        graph: the joins and pins.
        component: the component of each label.
        reasons: for each pinned component, why it is.
        outputs: the shapes of the results, as a pytree.
    """

    leaves: list[trees.Leaf]
    labels: list[list[np.ndarray | None]]
    frame: Frame
    graph: Graph
    component: np.ndarray
    reasons: dict[int, list[str]]
    outputs: PyTree


def trace(
    apply_fn: ApplyFn,
    params: Params,
    inputs: Sequence[Any],
    background: Background,
    *,
    mutable: Prunable = None,
    unknown: str = "error",
) -> Traced:
    """Traces a function and passes labels through it.

    Args:
        apply_fn: the function.
        params: its parameters.
        inputs: its other arguments.
        background: what fills a slice of a parameter when it is removed.
        mutable: which results shrink, see :func:`couplings`.
        unknown: see :func:`couplings`.
    """
    if unknown not in ("error", "pin"):
        raise ValueError(f"unknown: {unknown!r} is neither 'error' nor 'pin'")
    closed, outputs = _jax_api.trace(apply_fn, params, *inputs)
    if closed.effects:
        raise ValueError(
            f"apply_fn: it has effects, {sorted(map(str, closed.effects))}; what it "
            "prints, writes or calls back cannot be evaluated on fewer channels"
        )
    _warn_of_constants(closed.consts)
    graph = Graph(unknown)
    leaves = trees.leaves_of(trees.shapes_of(params))
    variables = closed.jaxpr.invars
    args, labels = [], []
    read = _jax_api.variables_read(closed.jaxpr)
    for leaf, var in zip(leaves, variables, strict=False):
        value, own = _parameter(graph, leaf, _jax_api.aval(var), background)
        if var not in read:
            graph.pin_value(value, "the function does not use it")
        args.append(value)
        labels.append(own)
    args += [_values.fixed(_jax_api.aval(var)) for var in variables[len(leaves) :]]
    frame = analyse(graph, closed.jaxpr, closed.consts, args)
    results = trees.leaves_of(outputs)
    shrinks = trees.selector(mutable, results, "mutable", lambda leaf: False)
    frame = frame._replace(
        outs=[
            graph.resolve(value)
            if shrinks(leaf)
            else graph.pin_value(value, f"it is an output ({leaf.path or 'the only'})")
            for leaf, value in zip(results, frame.outs, strict=True)
        ]
    )
    component = graph.components()
    reasons: dict[int, list[str]] = {}
    for ids, reason in graph.pins:
        for own in np.unique(component[ids]).tolist():
            known = reasons.setdefault(own, [])
            if reason not in known:
                known.append(reason)
    return Traced(leaves, labels, frame, graph, component, reasons, outputs)


def _parameter(
    graph: Graph, leaf: trees.Leaf, aval: Any, background: Background
) -> tuple[Value, list[np.ndarray | None]]:
    """Returns what is known of a parameter, and its new labels."""
    value, labels = _values.fixed(aval), []
    for axis, size in enumerate(leaf.shape):
        # A size of 1 broadcasts, and a key is one thing.
        if size < 2 or _jax_api.is_key(aval):
            labels.append(None)
            continue
        ids = graph.fresh(size)
        dim: Dim = Labels(ids, _values.spread(background(leaf, axis), size))
        value = value.replace_dim(axis, dim)
        labels.append(ids)
    return value, labels


def _warn_of_constants(consts: Iterable[Any]) -> None:
    for const in consts:
        large = trees.is_inexact(const) and np.ndim(const) > 1 and const.size >= _LARGE
        if large:
            warnings.warn(
                f"apply_fn closes over an array of shape {const.shape}. If it is a "
                "weight, pass it with the parameters: what is closed over is a "
                "constant, and is neither pruned nor trained",
                stacklevel=4,
            )
