"""How a budget of surviving units is spread over the layers.

An :class:`Allocation` either gives every layer its own integer count, which sum exactly
to the budget, or leaves the layers to compete under one global threshold. Counts are
decided on the host, in float64 and from shapes alone.

A published rule gives every layer a density that rises with one free multiplier.
:attr:`Allocation.densities` solves the multiplier for the budget. Counts solve it once
more, for the densities rounded to whole units, so that a smaller budget never gives a
layer more: masks pruned step by step stay nested. (Largest remainders may give more:
along the last 400 of 1,000 steps of a cubic schedule on ResNet-50, 1 to 4 % of the
steps did for weights, and 6 to 22 % for filters.) Where the budget counts structured
units, a rule still reads the shape of the layer's *parameter*; its multiplier makes the
*units* add up.

A pattern is one of :mod:`jprune.trees`. The layers of a stack ``"blocks/kernel[0]"``,
``"blocks/kernel[1]"``, ... match the patterns of ``"blocks/kernel"``, and each its own
path.
"""

import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jprune import layouts, selection, trees

T = TypeVar("T")

Patterns = str | Sequence[str]
Floor = float | int | Mapping[str, float | int]

# exp of either end is a finite float64, and so many halvings exhaust its precision.
_LOG_RANGE = 700.0
_BISECTIONS = 64

_STACK_INDEX = re.compile(r"\[\d+\]$")


class Layer(NamedTuple):
    """One prunable layer; a scanned stack of n layers is n of them.

    Attributes:
        path: ``"conv1/kernel"``, or ``"blocks/kernel[3]"`` in a stack.
        shape: the shape of this one layer's parameter, without the stack axis.
        size: the number of removable units in it.
        layout: the letters of the axes of ``shape``, see :mod:`jprune.layouts`.
    """

    path: str
    shape: tuple[int, ...]
    size: int
    layout: str


class Allocation(NamedTuple):
    """How many units of which layer survive.

    Attributes:
        counts: ``(layers, keep) -> int64``: one count per layer, which sum to ``keep``;
            or a single one for a global threshold.
        normalize: the scores of one layer -> the scores to rank globally; None leaves
            them as they are. May be traced.
        floors: ``layers -> int64 (n,)``, the units of each layer that survive in any
            case, beside a global threshold. Per-layer counts have theirs included.
        densities: ``(layers, keep) -> float64 (n,)``, the real-valued densities behind
            per-layer counts.
        budget: ``layers -> keep``, where the allocation itself fixes the budget.
    """

    counts: Callable[..., np.ndarray]
    normalize: Callable[[Array], Array] | None = None
    floors: Callable[[Sequence[Layer]], np.ndarray] | None = None
    densities: Callable[..., np.ndarray] | None = None
    budget: Callable[[Sequence[Layer]], int] | None = None


def global_threshold() -> Allocation:
    """Returns the allocation in which all units compete under one threshold.

    Example:
        >>> global_threshold().counts([Layer("fc", (4, 2), 8, "IO")], 3)
        array([3])
    """
    return Allocation(_one_count(lambda layers: np.zeros(len(layers), np.int64)))


def uniform(*, exempt: Patterns = ()) -> Allocation:
    """Returns the allocation that gives all layers the same density.

    ``d_l = keep / n``, or 1 for the exempt layers and for the others what is left of
    the budget. Uniform+ of Gale et al. exempts the first convolution and keeps a fifth
    of the last layer: ``with_floor(uniform(exempt="conv1"), {"fc": 0.2})``.

    Args:
        exempt: path patterns of layers that stay dense, such as the first and last.

    Raises:
        ValueError: (from the counts) a pattern matches nothing, or the budget is out of
            reach, as when the exempt layers alone exceed it.

    Example:
        >>> layers = [Layer("a", (4, 4), 16, "IO"), Layer("b", (8, 8), 64, "IO")]
        >>> uniform().counts(layers, 40)
        array([ 8, 32])
        >>> uniform(exempt="a").counts(layers, 40)
        array([16, 24])

    Reference:
        Gale, Elsen and Hooker, The state of sparsity in deep neural networks, 2019,
        arXiv:1902.09574.
    """
    return _per_layer(lambda layer: 1.0, _proportional, exempt)


def erdos_renyi(*, power_scale: float = 1.0, exempt: Patterns = ()) -> Allocation:
    """Returns the allocation of sparse evolutionary training: large layers sparser.

    ``d_l = min(1, eps ((n_in + n_out) / (n_in n_out))^power_scale)``, with ``eps`` such
    that the budget is met. ``n_in`` and ``n_out`` are the input and output channels, of
    whichever axes the layout names so; spatial axes do not enter, and an axis of
    attention heads counts with the side that it splits.

    Args:
        power_scale: the exponent; 0 gives the uniform allocation.
        exempt: as in :func:`uniform`, which raises the same errors.

    Example:
        >>> layers = [Layer("a", (4, 4), 16, "IO"), Layer("b", (8, 8), 64, "IO")]
        >>> erdos_renyi().counts(layers, 24)
        array([ 8, 16])

    Reference:
        Mocanu et al., Scalable training of artificial neural networks with adaptive
        sparse connectivity inspired by network science, 2018, arXiv:1707.04780.

    Differs from the paper: the paper draws every connection independently; here the
    expected counts are rounded, so that the total is exact.
    """

    def ratio(layer: Layer) -> float:
        fan_in, fan_out = _fans(layer)
        return ((fan_in + fan_out) / max(fan_in * fan_out, 1)) ** power_scale

    return _per_layer(ratio, _proportional, exempt)


def erdos_renyi_kernel(
    *, power_scale: float = 1.0, exempt: Patterns = ()
) -> Allocation:
    """Returns the allocation of RigL (ERK), which counts kernel sizes too.

    ``d_l = min(1, eps (sum(shape) / prod(shape))^power_scale)``, with ``eps`` such that
    the budget is met: layers whose density would exceed 1 are dense, and ``eps`` is
    solved again for the others.

    Args:
        power_scale: the exponent; 0 gives the uniform allocation.
        exempt: as in :func:`uniform`, which raises the same errors.

    Example:
        >>> conv = Layer("conv", (3, 3, 4, 8), 288, "HWIO")
        >>> fc = Layer("fc", (64, 10), 640, "IO")
        >>> erdos_renyi_kernel().counts([conv, fc], 92)
        array([18, 74])

    Reference:
        Evci et al., Rigging the lottery: making all tickets winners, 2020,
        arXiv:1911.11134.
    """

    def ratio(layer: Layer) -> float:
        return (sum(layer.shape) / max(math.prod(layer.shape), 1)) ** power_scale

    return _per_layer(ratio, _proportional, exempt)


def ideal_gas(*, exempt: Patterns = ()) -> Allocation:
    """Returns the ideal gas quotas (IGQ): the smaller the layer, the denser.

    ``d_l = 1 / (1 + F n_l)`` for a layer of ``n_l`` parameters, with the force ``F``
    such that the budget is met.

    Args:
        exempt: as in :func:`uniform`, which raises the same errors.

    Example:
        >>> layers = [Layer("a", (4, 4), 16, "IO"), Layer("b", (8, 8), 64, "IO")]
        >>> ideal_gas().counts(layers, 24)
        array([ 9, 15])

    Reference:
        Vysogorets and Kempe, Connectivity matters: neural network pruning through the
        lens of effective sparsity, 2023, arXiv:2107.02306.
    """
    return _per_layer(
        lambda layer: float(math.prod(layer.shape)),
        lambda sizes, z: 1.0 / (1.0 + sizes * np.exp(-z)),
        exempt,
    )


def lamp() -> Allocation:
    """Returns the layer-adaptive global threshold on magnitudes (LAMP).

    A score ``s`` becomes ``s^2 / sum of s'^2`` over the scores ``s'`` of its layer that
    are at least as large, and all layers compete under one threshold. The largest score
    of every layer becomes 1, so a budget of a unit per layer already empties none.

    Equal scores are split by their order: the lower index gets the smaller sum and so
    the larger value. Scores below 0, infinities and NaN stay as they are and enter no
    sum. The normalisation is scaled by a power of two so that no square overflows.

    Example:
        >>> lamp().normalize(jnp.array([1.0, 2.0, 2.0]))
        Array([0.11111111, 1.        , 0.5       ], dtype=float32)

    Reference:
        Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, 2021,
        arXiv:2010.07611.
    """
    return global_threshold()._replace(normalize=_lamp)


def by_pattern(table: Mapping[str, float]) -> Allocation:
    """Returns the allocation that a table of sparsities prescribes.

    The first pattern that matches a layer decides; a layer that none matches keeps
    everything (end the table with ``"*"`` to prune the rest too). The table fixes the
    budget, so ``keep`` has to agree with it: ask ``budget(layers)``.

    Args:
        table: path pattern -> sparsity, the removed fraction, in [0, 1).

    Raises:
        ValueError: a sparsity is outside [0, 1); or (from the counts) a pattern matches
            nothing, or the budget is not that of the table.

    Example:
        >>> layers = [Layer("a", (4, 4), 16, "IO"), Layer("b", (8, 8), 64, "IO")]
        >>> allocation = by_pattern({"b": 0.75})
        >>> allocation.budget(layers), allocation.counts(layers, 32)
        (32, array([16, 16]))
    """
    for pattern, sparsity in table.items():
        selection.check_sparsity(sparsity, f"table[{pattern!r}]")

    def counts(layers: Sequence[Layer], keep: int) -> np.ndarray:
        fixed = keep_of(table, layers)
        if keep != fixed.sum():
            raise ValueError(
                f"keep: the table {dict(table)} keeps {fixed.sum()} units, not {keep}"
            )
        return fixed

    return Allocation(counts, budget=lambda layers: int(keep_of(table, layers).sum()))


def keep_of(table: Mapping[str, float], layers: Sequence[Layer]) -> np.ndarray:
    """Returns how many units of each layer survive under a table of sparsities.

    Args:
        table: path pattern -> sparsity; the first match decides, and a layer that no
            pattern matches keeps everything.
        layers: the layers.

    Returns:
        int64 ``(len(layers),)``, rounded by :func:`jprune.selection.keep_count`.

    Raises:
        ValueError: a pattern matches nothing, or a sparsity is outside [0, 1).

    Example:
        >>> keep_of({"a": 0.9}, [Layer("a", (5, 4), 20, "IO")])
        array([2])
    """
    sparsities = _lookup(table, layers, 0.0, "table")
    return np.array(
        [
            selection.keep_count(layer.size, sparsity)
            for layer, sparsity in zip(layers, sparsities, strict=True)
        ],
        np.int64,
    )


def with_floor(allocation: Allocation, floor: Floor) -> Allocation:
    """Returns the allocation with a minimum for every layer.

    A per-layer rule is solved again with the minima, so the layers above theirs share
    the rest of the budget by the same rule. Under a global threshold the best units of
    every layer, as many as its minimum, survive in any case.

    Args:
        allocation: per layer or global.
        floor: a density in [0, 1] (a float; fractions of units are rounded up), a
            number of units (an int; a smaller layer then keeps all it has), or a table
            of either by path pattern, of which the first match decides.

    Raises:
        TypeError: a minimum is no number.
        ValueError: a minimum is negative or a density above 1, or the allocation is a
            table that fixes its counts; or (from the counts) a pattern matches nothing,
            or the minima alone exceed the budget.

    Example:
        >>> layers = [Layer("a", (4, 4), 16, "IO"), Layer("b", (8, 8), 64, "IO")]
        >>> with_floor(uniform(), {"a": 0.5}).counts(layers, 20)
        array([ 8, 12])
        >>> with_floor(global_threshold(), 1).floors(layers)
        array([1, 1])
    """
    if allocation.budget is not None:
        raise ValueError(
            "allocation: its table fixes every count; raise those in place of a floor"
        )
    table: Mapping[str, float | int] = (
        floor if isinstance(floor, Mapping) else {"*": floor}
    )
    for pattern, value in table.items():
        _check_floor(pattern, value)

    def floors(layers: Sequence[Layer]) -> np.ndarray:
        values = _lookup(table, layers, 0, "floor")
        least = [_units(v, layer) for v, layer in zip(values, layers, strict=True)]
        given = 0 if allocation.floors is None else allocation.floors(layers)
        return np.maximum(np.array(least, np.int64), given)

    if allocation.densities is None:
        return allocation._replace(counts=_one_count(floors), floors=floors)

    def raised(rule: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        return lambda layers, keep, more=0: rule(
            layers, keep, np.maximum(floors(layers), more)
        )

    return Allocation(raised(allocation.counts), densities=raised(allocation.densities))


def apportion(
    targets: np.ndarray, caps: np.ndarray, floors: np.ndarray, total: int
) -> np.ndarray:
    """Returns the integers nearest to real targets that sum exactly to a total.

    Largest remainder: every target is rounded down, and what is missing goes one by one
    to the largest fractional parts, ties to the lower index. Targets whose sum misses
    the total are shifted evenly, as far as the bounds let them.

    Args:
        targets: float64 ``(n,)``.
        caps: int64 ``(n,)``, the upper bounds.
        floors: int64 ``(n,)``, the lower bounds.
        total: the sum to reach.

    Returns:
        int64 ``(n,)`` within the bounds.

    Raises:
        ValueError: a floor is above its cap, or the total is outside the bounds' sums.

    Example:
        >>> bounds = np.array([9, 9, 1]), np.array([0, 0, 0])
        >>> apportion(np.array([1.5, 2.5, 1.0]), *bounds, total=5)
        array([2, 2, 1])
    """
    caps, floors = np.asarray(caps, np.int64), np.asarray(floors, np.int64)
    if np.any(floors > caps):
        raise ValueError(f"floors: {floors} are not all within the caps {caps}")
    if not floors.sum() <= total <= caps.sum():
        raise ValueError(
            f"total: {total} is out of reach; it can be {floors.sum()} to {caps.sum()}"
        )
    # A solver's last bits must not decide between equal remainders.
    targets = np.round(np.clip(np.asarray(targets, np.float64), floors, caps), 6)
    counts = np.floor(targets).astype(np.int64)
    order = np.argsort(counts - targets, kind="stable")
    while missing := int(total - counts.sum()):
        bounds, queue = (caps, order) if missing > 0 else (floors, order[::-1])
        queue = queue[counts[queue] != bounds[queue]]
        part = max(abs(missing) // len(queue), 1)
        chosen = queue[: abs(missing)]
        counts[chosen] += np.clip(bounds[chosen] - counts[chosen], -part, part)
    return counts


def _per_layer(
    coefficient: Callable[[Layer], float],
    curve: Callable[[np.ndarray, float], np.ndarray],
    exempt: Patterns,
) -> Allocation:
    """Densities ``curve(coefficients, z)`` that rise with z, solved for the budget."""
    patterns = (exempt,) if isinstance(exempt, str) else tuple(exempt)

    def curve_of(
        layers: Sequence[Layer], keep: float, floors: np.ndarray | int
    ) -> Callable[[float], np.ndarray]:
        sizes = _sizes(layers)
        dense = _lookup(dict.fromkeys(patterns, True), layers, False, "exempt")
        least = np.where(np.array(dense, bool), sizes, floors)
        _check_reach(layers, keep, least)
        coefficients = np.array([coefficient(layer) for layer in layers])
        coefficients /= coefficients.max(initial=np.finfo(np.float64).tiny)
        low = least / np.maximum(sizes, 1)
        return lambda z: np.clip(curve(coefficients, z), low, 1.0)

    def densities(
        layers: Sequence[Layer], keep: float, floors: np.ndarray | int = 0
    ) -> np.ndarray:
        sizes, at = _sizes(layers), curve_of(layers, keep, floors)
        return at(_bracket(lambda z: float(at(z) @ sizes), keep)[1])

    def counts(
        layers: Sequence[Layer], keep: int, floors: np.ndarray | int = 0
    ) -> np.ndarray:
        sizes, at = _sizes(layers), curve_of(layers, keep, floors)
        low, high = (
            np.rint(at(z) * sizes).astype(np.int64)
            for z in _bracket(lambda z: float(np.rint(at(z) * sizes).sum()), keep)
        )
        # Layers that gain a unit at the same multiplier: the lower index has it first.
        return apportion(high, high, np.minimum(low, high), keep)

    return Allocation(counts, densities=densities)


def _proportional(ratios: np.ndarray, z: float) -> np.ndarray:
    return ratios * np.exp(z)


def _bracket(rising: Callable[[float], float], goal: float) -> tuple[float, float]:
    """Returns neighbours (low, high) with ``rising(low) < goal <= rising(high)``."""
    # In log space, so that a multiplier of any magnitude keeps its relative precision.
    low, high = -_LOG_RANGE, _LOG_RANGE
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < goal else (low, middle)
    return low, high


def _one_count(
    floors: Callable[[Sequence[Layer]], np.ndarray],
) -> Callable[[Sequence[Layer], int], np.ndarray]:
    def counts(layers: Sequence[Layer], keep: int) -> np.ndarray:
        _check_reach(layers, keep, floors(layers))
        return np.array([keep], np.int64)

    return counts


def _check_reach(layers: Sequence[Layer], keep: float, least: np.ndarray) -> None:
    total, lowest = int(_sizes(layers).sum()), int(least.sum())
    if lowest <= keep <= total:
        return
    names = [layer.path for layer, n in zip(layers, least, strict=True) if n > 0]
    reason = f"; the exempt or floored layers {names[:12]} alone keep {lowest}"
    raise ValueError(
        f"keep: {keep} units are out of reach, it can be {lowest} to {total}"
        f"{reason if 0 <= keep < lowest else ''}"
    )


def _sizes(layers: Sequence[Layer]) -> np.ndarray:
    return np.array([layer.size for layer in layers], np.int64)


def _fans(layer: Layer) -> tuple[int, int]:
    heads = layer.layout.find("N") < layer.layout.find("I")
    ins, outs = ("IN", "O") if heads else ("I", "ON")
    return _extent(layer, ins), _extent(layer, outs)


def _extent(layer: Layer, letters: str) -> int:
    return math.prod(layer.shape[a] for a in layouts.axes_of(layer.layout, letters))


@jax.jit
def _lamp(scores: Array) -> Float[Array, "..."]:
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    flat = scores.ravel()
    valid = (flat > 0) & jnp.isfinite(flat)
    sizes = jnp.where(valid, flat, 0.0)
    _, exponent = jnp.frexp(jnp.max(sizes, initial=0.0))
    squares = jnp.ldexp(sizes, -exponent) ** 2
    order = jnp.argsort(-sizes, stable=True)
    # A parallel prefix sum may fall by a rounding error, which would swap neighbours.
    sums = lax.cummax(jnp.cumsum(squares[order]))
    sums = jnp.zeros_like(sums).at[order].set(sums)
    return jnp.where(valid, squares / jnp.where(valid, sums, 1.0), flat).reshape(
        scores.shape
    )


def _matches(pattern: str, path: str) -> bool:
    stack = _STACK_INDEX.sub("", path)
    return pattern == path or any(trees.matches(pattern, p) for p in (path, stack))


def _lookup(
    table: Mapping[str, T], layers: Sequence[Layer], default: T, name: str
) -> list[T]:
    paths = [layer.path for layer in layers]
    for pattern in table:
        if not any(_matches(pattern, path) for path in paths):
            raise ValueError(
                f"{name}: the pattern {pattern!r} matches none of the layers "
                f"{paths[:12]}"
            )
    return [
        next((v for p, v in table.items() if _matches(p, path)), default)
        for path in paths
    ]


def _check_floor(pattern: str, value: float | int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"floor: {value!r} of {pattern!r} is no density and no number")
    if value < 0 or (not isinstance(value, numbers.Integral) and not value <= 1.0):
        raise ValueError(
            f"floor: {value!r} of {pattern!r} is neither a density in [0, 1] nor a "
            "number of units"
        )


def _units(floor: float | int, layer: Layer) -> int:
    if isinstance(floor, numbers.Integral):
        return min(int(floor), layer.size)
    # 0.07 * 100 is 7.000000000000001, and means 7 units.
    return math.ceil(round(float(floor) * layer.size, 9))
