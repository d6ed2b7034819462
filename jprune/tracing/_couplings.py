"""Which channels of a network are coupled: read from its jaxpr."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jprune import layouts, trees
from jprune._groups import Group, Member, Pinned, Units
from jprune.tracing import _jax_api, _values
from jprune.tracing._graph import Graph
from jprune.tracing._interpreter import Frame, analyse
from jprune.tracing._values import Dim, Labels, Value
from jprune.types import ApplyFn, Layouts, Params, Prunable

_HOW = ("sum", "mean", "max", "l1", "l2")
_STATISTICS = ("mean", "var", "average", "hidden", "counter", "count")

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


def couplings(
    apply_fn: ApplyFn,
    params: Params,
    *inputs: Any,
    mutable: Prunable = None,
    statistics: Prunable = None,
    how: str = "sum",
    layout: Layouts = None,
    unknown: str = "error",
) -> Units:
    """Returns the groups of channels that must be removed together.

    ``apply_fn(params, *inputs)`` is traced, not run; shapes are enough. A unit is a set
    of positions of axes of parameters: what makes a channel, shifts and scales it, and
    reads it, wherever residual connections, concatenations, reshapes and heads carry
    it. When all of a unit's entries are zero, the network computes what it would
    compute without them. Units with entries in the same axes of the same leaves form a
    group::

        units = jprune.couplings(apply_fn, params, x)
        masks = jprune.prune(scores, 0.5, units=units)
        small_apply_fn, small_params = jprune.shrink(apply_fn, params, masks, x)

    At least one unit of each group survives any pruning; ``units._replace(least=8)``
    asks for more.

    Args:
        apply_fn: any function of JAX.
        params: any pytree of arrays or their shapes, such as all variables of a model.
        *inputs: what else the function takes: arrays or shapes.
        mutable: which results are state, such as new BatchNorm statistics, and shrink
            with the network: path patterns, or a predicate ``(path, shape) -> bool``.
            All others keep their shape.
        statistics: which leaves of ``params`` are never masked, but cut with the
            channels that they describe. By default what is not floating, stands under
            ``batch_stats``, or is named as the statistics of Flax's and Haiku's norms.
        how: how the scores of a unit's entries are pooled: ``"sum"``, ``"mean"``,
            ``"max"``, ``"l1"`` or ``"l2"``.
        layout: the axes of the first leaf of each group, see
            :func:`jprune.layouts.layouts_of`.
        unknown: ``"error"``, or ``"pin"`` to keep all that a primitive without a rule
            touches.

    Returns:
        Units. ``units.pinned`` are the channels that cannot be removed, with reasons;
        :func:`jprune.tracing.summary` prints both.

    Raises:
        NotImplementedError: a primitive has no rule.
        ValueError: the function has effects, nothing can be removed, a pattern matches
            nothing, or ``how`` or ``unknown`` is not among the choices.

    Example:
        >>> def apply_fn(params, x):
        ...     h = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"])
        ...     return h @ params["out"]["kernel"]
        >>> kernels = jnp.ones((3, 4)), jnp.ones((4, 2))
        >>> params = {"in": {"kernel": kernels[0], "bias": jnp.ones(4)},
        ...           "out": {"kernel": kernels[1]}}
        >>> (group,) = couplings(apply_fn, params, jnp.ones((1, 3))).groups
        >>> [(member.leaf.path, member.axis) for member in group.members]
        [('in/bias', 0), ('in/kernel', 1), ('out/kernel', 0)]
    """
    if how not in _HOW:
        raise ValueError(f"how: {how!r} is none of {_HOW}")
    still = _matcher(statistics, trees.leaves_of(params), "statistics", _is_statistic)

    def background(leaf: trees.Leaf, axis: int) -> np.ndarray:
        return _values.UNKNOWN if still(leaf) else np.zeros(1)

    traced = trace(
        apply_fn, params, inputs, background, mutable=mutable, unknown=unknown
    )
    own = [leaf for leaf in traced.leaves if not still(leaf)]
    free, pinned = _clusters(traced, {leaf.place for leaf in own})
    if not free:
        raise ValueError(
            "apply_fn: no channel of it can be removed:\n" + reasons_of(pinned)
        )
    groups = tuple(_group(members, layout) for members in free)
    return Units(groups, how, least=1, tree=trees.shapes_of(params), pinned=pinned)


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
    shrinks = _matcher(mutable, results, "mutable", lambda leaf: False)
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


def _matcher(
    given: Prunable,
    leaves: Sequence[trees.Leaf],
    name: str,
    default: Callable[[trees.Leaf], bool],
) -> Callable[[trees.Leaf], bool]:
    if given is None:
        return default
    if callable(given):
        return lambda leaf: bool(given(leaf.path, leaf.value))
    patterns = (given,) if isinstance(given, str) else tuple(given)
    trees.check_patterns(patterns, leaves, name)
    return lambda leaf: any(trees.matches(p, leaf.path) for p in patterns)


def _is_statistic(leaf: trees.Leaf) -> bool:
    names = leaf.path.split("/")
    named = "batch_stats" in names or names[-1] in _STATISTICS
    return named or not trees.is_inexact(leaf.value)


# From components to groups.


def _clusters(
    traced: Traced, places: set[int]
) -> tuple[list[tuple[Member, ...]], tuple[Pinned, ...]]:
    """Returns the members of the groups, and what is pinned.

    Components with entries in the same axes of the same leaves form a cluster.

    Args:
        traced: the function on labels.
        places: the leaves that are masked; of the others, nothing is said.
    """
    axes: list[tuple[trees.Leaf, int, np.ndarray]] = [
        (leaf, axis, traced.component[ids])
        for leaf, own in zip(traced.leaves, traced.labels, strict=True)
        for axis, ids in enumerate(own)
        if ids is not None and leaf.place in places
    ]
    signature: dict[int, list[int]] = {}
    for number, (_, _, component) in enumerate(axes):
        # In the order of positions: that is the order of units.
        for own in dict.fromkeys(component.tolist()):
            signature.setdefault(own, []).append(number)
    clusters: dict[tuple, list[int]] = {}
    for own, numbers in signature.items():
        why = tuple(traced.reasons.get(own, ()))
        clusters.setdefault((tuple(numbers), why), []).append(own)
    free, pinned = [], []
    for (numbers, why), components in clusters.items():
        members = tuple(_member(axes[number], components) for number in numbers)
        if why:
            pinned.append(Pinned(members, why))
        else:
            free.append(members)
    return free, tuple(pinned)


def _member(
    labelled: tuple[trees.Leaf, int, np.ndarray], components: Sequence[int]
) -> Member:
    leaf, axis, component = labelled
    order = np.argsort(components)
    ranked = np.asarray(components)[order]
    place = np.minimum(np.searchsorted(ranked, component), len(ranked) - 1)
    found = ranked[place] == component
    return Member(leaf, axis, np.where(found, order[place], -1))


def _group(members: tuple[Member, ...], layout: Layouts) -> Group:
    leaves = {member.leaf.place: member.leaf for member in members}
    first = _first(members)
    ordered = [first, *(leaf for leaf in leaves.values() if leaf is not first)]
    by_leaf = [
        tuple(member for member in members if member.leaf.place == leaf.place)
        for leaf in ordered
    ]
    size = int(max(member.units.max() for member in members)) + 1
    sizes = sum((_sizes(own, size) for own in by_leaf), np.zeros(size, np.int64))
    (letters,) = layouts.layouts_of([first], layout)

    def pool(scores: Sequence[Array], how: str) -> Float[Array, " units"]:
        found = [
            _pool(own, score, size, how)
            for own, score in zip(by_leaf, scores, strict=True)
        ]
        if how == "max":
            return jnp.max(jnp.stack(found), axis=0)
        total = sum(found[1:], found[0])
        if how == "l2":
            return jnp.sqrt(total)
        return total / sizes if how == "mean" else total

    def expand(keep: Bool[Array, " units"]) -> list[Array]:
        return [_expand(own, keep) for own in by_leaf]

    return Group(tuple(ordered), letters, (size,), pool, expand, sizes, None, members)


def _first(members: Sequence[Member]) -> trees.Leaf:
    """Returns the leaf that makes the channels: a kernel that has them as outputs."""
    kernels = []
    for member in members:
        try:
            trees.prunable_leaves({member.leaf.path: member.leaf.value})
        except ValueError:
            continue
        kernels.append(member)
    for member in kernels:
        letters = layouts.default_layout(member.leaf.path, member.leaf.shape)
        if letters[member.axis] == "O":
            return member.leaf
    return (kernels or members)[0].leaf


def _apart(members: Sequence[Member], number: int) -> list[tuple[Member, Member]]:
    """Returns the pairs of axes in which an entry could be counted twice."""
    return [(members[i], members[number]) for i in range(number)]


def _pool(members: Sequence[Member], score: Array, size: int, how: str) -> Array:
    """Returns the pooled scores of a leaf, before roots and divisions."""
    values = score.astype(jnp.promote_types(score.dtype, jnp.float32))
    if how == "l1":
        values = jnp.abs(values)
    elif how == "l2":
        values = jnp.square(values)
    neutral = -jnp.inf if how == "max" else 0.0
    pooled = jnp.full(size, neutral, values.dtype)
    for number, member in enumerate(members):
        own = values
        for other, _ in _apart(members, number):
            own = jnp.where(_both(other, member, score.ndim), neutral, own)
        rest = tuple(axis for axis in range(score.ndim) if axis != member.axis)
        chosen = np.flatnonzero(member.units >= 0)
        places = member.units[chosen]
        if how == "max":
            pooled = pooled.at[places].max(jnp.max(own, axis=rest)[chosen])
        else:
            pooled = pooled.at[places].add(jnp.sum(own, axis=rest)[chosen])
    return pooled


def _both(a: Member, b: Member, rank: int) -> np.ndarray:
    """Returns which entries of a leaf belong to the same unit by both axes."""
    sides = [
        np.expand_dims(m.units, [axis for axis in range(rank) if axis != m.axis])
        for m in (a, b)
    ]
    return (sides[0] == sides[1]) & (sides[0] >= 0)


def _sizes(members: Sequence[Member], size: int) -> np.ndarray:
    """Returns how many entries of a leaf each unit has."""
    shape = members[0].leaf.shape
    sizes = np.zeros(size, np.int64)
    for number, member in enumerate(members):
        axes = [m.axis for m in members[: number + 1]]
        counted = np.ones([n if a in axes else 1 for a, n in enumerate(shape)], bool)
        for other, _ in _apart(members, number):
            counted = counted & ~_both(other, member, len(shape))
        rest = tuple(axis for axis in range(len(shape)) if axis != member.axis)
        times = np.prod([n for a, n in enumerate(shape) if a not in axes], dtype=int)
        chosen = np.flatnonzero(member.units >= 0)
        np.add.at(sizes, member.units[chosen], counted.sum(axis=rest)[chosen] * times)
    return sizes


def _expand(members: Sequence[Member], keep: Array) -> Array:
    mask = jnp.ones((), bool)
    for member in members:
        side = jnp.where(member.units >= 0, keep[member.units], True)
        rank = len(member.leaf.shape)
        mask = mask & jnp.expand_dims(
            side, [axis for axis in range(rank) if axis != member.axis]
        )
    return mask


# For people.


def summary(units: Units) -> str:
    """Returns a table for people: the groups, their members, and what is pinned.

    Args:
        units: what :func:`couplings` returned.

    Example:
        >>> def apply_fn(params, x):
        ...     return jnp.tanh(x @ params["a"]) @ params["b"]
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> print(summary(couplings(apply_fn, params, jnp.ones((1, 3)))))
        4 units of 5 entries: a[:, #] b[#, :]
        pinned: 3 of a[#, :]
            a matrix product sums over it together with a dimension that is fixed
        pinned: 2 of b[:, #]
            it is an output (the only)
    """
    lines = []
    for group in units.groups:
        least, most = int(np.min(group.sizes)), int(np.max(group.sizes))
        entries = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        lines.append(
            f"{group.shape[0]:,} units of {entries} entries: {_listed(group.members)}"
        )
    return "\n".join([*lines, reasons_of(units.pinned)] if units.pinned else lines)


def reasons_of(pinned: Sequence[Pinned]) -> str:
    """Returns what is pinned and why, in lines for people."""
    lines = []
    for members, reasons in pinned:
        size = max(int(member.units.max()) + 1 for member in members)
        lines.append(f"pinned: {size:,} of {_listed(members)}")
        lines += [f"    {reason}" for reason in reasons[:3]]
    return "\n".join(lines)


def _listed(members: Sequence[Member]) -> str:
    return " ".join(
        f"{member.leaf.path}[{', '.join(_marks(member))}]" for member in members
    )


def _marks(member: Member) -> list[str]:
    return [
        "#" if axis == member.axis else ":" for axis in range(len(member.leaf.shape))
    ]
