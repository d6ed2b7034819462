"""Costs as polynomials in the widths of coupled groups."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jprune import trees
from jprune._groups import Units
from jprune.tracing import _contractions, _couplings, _trace, _values
from jprune.tracing._interpreter import Frame, Step
from jprune.tracing._trace import Traced
from jprune.tracing._values import Labels, Value
from jprune.types import ApplyFn, Params, Prunable


class WidthCost(NamedTuple):
    """What a network of given widths costs.

    Attributes:
        macs: the multiply-accumulate operations of a call.
        parameters: the parameters.
    """

    macs: Any
    parameters: Any


class _Length(NamedTuple):
    """The length of an axis: ``fixed + sum over groups of slopes * widths``."""

    fixed: int
    slopes: np.ndarray


class _Polynomial(NamedTuple):
    """A sum of products of lengths: ``times`` (n), ``fixed`` (n, m), ``slopes``."""

    times: np.ndarray
    fixed: np.ndarray
    slopes: np.ndarray

    def __call__(self, widths: Any) -> Any:
        if isinstance(widths, np.ndarray):
            lengths = self.fixed + self.slopes @ widths
            return float(self.times @ np.prod(lengths, axis=1))
        slopes = jnp.asarray(self.slopes, widths.dtype)
        # Accelerators would multiply in a lower precision.
        lengths = jnp.matmul(slopes, widths, precision="highest") + self.fixed
        products = functools.reduce(operator.mul, jnp.moveaxis(lengths, 1, 0))
        return jnp.sum(products * self.times)


def cost_of_widths(
    units: Units,
    apply_fn: ApplyFn,
    params: Params,
    *inputs: Any,
    statistics: Prunable = None,
    unknown: str = "error",
) -> Callable[[Any], WidthCost]:
    """Returns MACs and parameters as a function of the widths of coupled groups.

    Every axis of every contraction is as long as the channels that are kept along it,
    so the MACs of a network are a polynomial in the widths of its groups, as are its
    parameters. At whole widths the function returns what :func:`cost` counts for the
    network that :func:`shrink` makes, at any others it interpolates, and ``jax.grad``
    differentiates it: a budget of operations can be a penalty on expected widths::

        of_widths = cost_of_widths(units, apply_fn, params, x)
        penalty = jax.nn.relu(of_widths(expected_widths).macs / budget - 1)

    Args:
        units: coupled groups, from :func:`couplings` of the same function.
        apply_fn: the function.
        params: its parameters or their shapes.
        *inputs: what else it takes: arrays or shapes. MACs are for these.
        statistics: which leaves are no parameters, see :func:`couplings`.
        unknown: ``"error"`` or ``"pin"``, see :func:`couplings`.

    Returns:
        ``widths -> WidthCost``. ``widths`` are an array or a sequence, the number of
        kept units for each of ``units.groups``; a fraction is allowed. Numbers of
        Python and NumPy give floats that are exact below 2**53, arrays of JAX give
        arrays of JAX in their own precision. Where the units of a group differ in how
        many positions of an axis they have, they count as their mean.

    Raises:
        ValueError: the units have no members or are not of these parameters, or there
            is another number of widths than of groups.
        NotImplementedError: a primitive has no rule.

    Example:
        >>> from jprune import couplings
        >>> def apply_fn(params, x):
        ...     return jnp.tanh(x @ params["a"]) @ params["b"]
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> units = couplings(apply_fn, params, jnp.ones((1, 3)))
        >>> cost_of_widths(units, apply_fn, params, jnp.ones((1, 3)))([2])
        WidthCost(macs=10.0, parameters=10.0)
    """
    _check(units, params)
    masked = {
        m.leaf.place for own in (*units.groups, *units.pinned) for m in own.members
    }

    def background(leaf: trees.Leaf, axis: int) -> np.ndarray:
        return np.zeros(1) if leaf.place in masked else _values.UNKNOWN

    traced = _trace.trace(apply_fn, params, inputs, background, unknown=unknown)
    owner = _owners(traced, units)
    sizes = np.asarray([group.shape[0] for group in units.groups])

    def length(size: int, ids: np.ndarray | None) -> _Length:
        owners = np.zeros(0, int) if ids is None else owner[traced.component[ids]]
        owned = owners[owners >= 0]
        counts = np.bincount(owned, minlength=len(sizes))
        return _Length(size - owned.size, counts / sizes)

    still = trees.selector(
        statistics, traced.leaves, "statistics", _couplings.is_statistic
    )
    parameters = _polynomial(
        [
            (1, list(map(length, leaf.shape, labels)))
            for leaf, labels in zip(traced.leaves, traced.labels, strict=True)
            if not still(leaf)
        ],
        len(sizes),
    )

    def lengths(value: Value) -> list[_Length]:
        ids = [dim.ids if isinstance(dim, Labels) else None for dim in value.dims]
        return list(map(length, value.shape, ids))

    macs = _polynomial(
        [
            (times, _contractions.factors(step.eqn, *map(lengths, step.ins)))
            for times, step in _steps(traced.frame)
        ],
        len(sizes),
    )

    def of_widths(widths: Any) -> WidthCost:
        known = not any(isinstance(w, jax.Array) for w in jax.tree.leaves(widths))
        found: Any = np.asarray(widths, np.float64) if known else jnp.asarray(widths)
        if found.shape != sizes.shape:
            raise ValueError(
                f"widths: shape {found.shape}; there is one for each of the "
                f"{len(sizes)} groups"
            )
        if not known:
            found = found.astype(jnp.result_type(found, float))
        return WidthCost(macs(found), parameters(found))

    return of_widths


def _check(units: Units, params: Params) -> None:
    if not all(group.members for group in units.groups):
        raise ValueError(
            "units: they are not of coupled channels, see jprune.couplings"
        )
    own, other = (jax.tree.flatten(t) for t in (trees.shapes_of(params), units.tree))
    if own != other:
        raise ValueError("units: they are of other parameters than `params`")


def _owners(traced: Traced, units: Units) -> np.ndarray:
    """Returns for each component the group it is a unit of, or -1."""
    owner = np.full(traced.component.max(initial=-1) + 1, -1)
    for number, group in enumerate(units.groups):
        for member in group.members:
            ids = traced.labels[member.leaf.place][member.axis]
            assert ids is not None
            owner[traced.component[ids[member.units >= 0]]] = number
    return owner


def _steps(frame: Frame, times: int = 1) -> list[tuple[int, Step]]:
    """Returns the contractions of a function, and how often each is evaluated."""
    found = []
    for step in frame.steps:
        if _contractions.is_contraction(step.eqn):
            found.append((times, step))
            continue
        frames = _frames(step.inner)
        length = step.eqn.params["length"] if step.eqn.primitive.name == "scan" else 1
        runs = [_steps(own, times * length) for own in frames]
        if step.eqn.primitive.name == "cond":
            runs = [max(runs, key=_dense_macs)]
        found += [own for run in runs for own in run]
    return found


def _frames(inner: Any) -> list[Frame]:
    if isinstance(inner, Frame):
        return [inner]
    some = inner if isinstance(inner, list | tuple) else []
    return [own for own in some if isinstance(own, Frame)]


def _dense_macs(steps: Iterable[tuple[int, Step]]) -> int:
    return sum(
        times
        * math.prod(
            _contractions.factors(step.eqn, *(value.shape for value in step.ins))
        )
        for times, step in steps
    )


def _polynomial(terms: Sequence[tuple[int, Sequence[Any]]], groups: int) -> _Polynomial:
    """Returns a sum of products of lengths and numbers as arrays."""
    degree = max((len(factors) for _, factors in terms), default=0)
    fixed = np.ones((len(terms), max(degree, 1)))
    slopes = np.zeros((*fixed.shape, groups))
    for row, (_, factors) in enumerate(terms):
        for column, factor in enumerate(factors):
            if isinstance(factor, _Length):
                fixed[row, column] = factor.fixed
                slopes[row, column] = factor.slopes
            else:
                fixed[row, column] = factor
    return _Polynomial(np.asarray([n for n, _ in terms], float), fixed, slopes)
