"""Sparsity as a function of the step, and the steps at which to prune.

A schedule is a function ``step -> sparsity`` (the removed fraction). A step that is a
Python or NumPy number gives a float64 on the host, from which exact counts can be
taken; a JAX array, traced or not, gives JAX's default float. Every schedule is
``initial`` up to its start, and exactly the ``sparsity`` it was given from its end on.

:func:`cadence` prunes at some of the steps only, and never misses the end.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jprune.types import Schedule

# A step behind the end of any schedule, and still an int32.
_FOREVER = 2**31 - 1


class Cadence(NamedTuple):
    """The steps at which to prune, and how far.

    Attributes:
        is_event: ``step -> bool``, whether masks are updated at this step.
        sparsity: ``step -> sparsity`` of the last event at or before the step; 0 before
            the first. It is a schedule itself: a staircase.
        events: the steps of all events, int64 ``(n,)``, to tabulate exact counts.
    """

    is_event: Callable[[jax.typing.ArrayLike], Any]
    sparsity: Schedule
    events: np.ndarray


def one_shot(sparsity: float, *, at: int = 0) -> Schedule:
    """Returns the schedule that is 0 before the step ``at`` and ``sparsity`` from then.

    Args:
        sparsity: the removed fraction, in [0, 1).
        at: the step.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1).

    Example:
        >>> schedule = one_shot(0.9, at=5)
        >>> float(schedule(4)), float(schedule(5))
        (0.0, 0.9)
    """
    _check_sparsity("sparsity", sparsity)

    def schedule(step: jax.typing.ArrayLike) -> Any:
        xp, now = _on_host_or_device(step)
        return xp.where(now >= at, _float(xp, sparsity), 0.0)[()]

    return schedule


def linear(
    sparsity: float, *, steps: int, start: int = 0, initial: float = 0.0
) -> Schedule:
    """Returns the schedule that rises in a straight line.

    With ``t = (step - start) / steps`` clipped to [0, 1]::

        s(t) = initial + (sparsity - initial) t

    Args:
        sparsity: the removed fraction at the end, in [0, 1).
        steps: the number of steps from the start to the end.
        start: the step at which it leaves ``initial``.
        initial: the removed fraction at the start, in [0, 1).

    Raises:
        ValueError: a sparsity is outside [0, 1), or ``steps`` is below 1.

    Example:
        >>> schedule = linear(0.8, steps=4)
        >>> [float(schedule(k)) for k in (0, 1, 4, 9)]
        [0.0, 0.2, 0.8, 0.8]
    """
    return _ramp(
        lambda xp, t: initial + (sparsity - initial) * t,
        sparsity,
        steps=steps,
        start=start,
        initial=initial,
    )


def cubic(
    sparsity: float, *, steps: int, start: int = 0, initial: float = 0.0
) -> Schedule:
    """Returns the schedule of gradual magnitude pruning: fast first, flat at the end.

    With ``t = (step - start) / steps`` clipped to [0, 1]::

        s(t) = sparsity + (initial - sparsity) (1 - t)^3

    Args:
        sparsity: the removed fraction at the end, in [0, 1).
        steps: the number of steps from the start to the end, ``n dt`` in the paper.
        start: the step at which it leaves ``initial``.
        initial: the removed fraction at the start, in [0, 1).

    Raises:
        ValueError: a sparsity is outside [0, 1), or ``steps`` is below 1.

    Example:
        >>> schedule = cubic(0.8, steps=2, start=10)
        >>> [round(float(schedule(k)), 6) for k in (10, 11, 12)]
        [0.0, 0.7, 0.8]

    Reference:
        Zhu and Gupta, To prune, or not to prune: exploring the efficacy of pruning for
        model compression, 2017, arXiv:1710.01878.
    """
    return _ramp(
        lambda xp, t: sparsity + (initial - sparsity) * (1.0 - t) ** 3,
        sparsity,
        steps=steps,
        start=start,
        initial=initial,
    )


def exponential(
    sparsity: float, *, steps: int, start: int = 0, initial: float = 0.0
) -> Schedule:
    """Returns the schedule whose density falls by the same factor in every step.

    With ``t = (step - start) / steps`` clipped to [0, 1] and densities ``d = 1 - s``::

        s(t) = 1 - d_initial (d_final / d_initial)^t

    From 0, round k of n keeps ``d_final^(k/n)`` (SynFlow, FORCE). To remove 20 % of
    what is left in each of n rounds (lottery tickets): ``exponential(1 - 0.8**n,
    steps=n)``.

    Args:
        sparsity: the removed fraction at the end, in [0, 1).
        steps: the number of steps, or rounds, from the start to the end.
        start: the step at which it leaves ``initial``.
        initial: the removed fraction at the start, in [0, 1).

    Raises:
        ValueError: a sparsity is outside [0, 1), or ``steps`` is below 1.

    Example:
        >>> schedule = exponential(0.75, steps=2)
        >>> [float(schedule(k)) for k in (0, 1, 2)]
        [0.0, 0.5, 0.75]

    References:
        Tanaka et al., Pruning neural networks without any data by iteratively
        conserving synaptic flow, 2020, arXiv:2006.05467.

        de Jorge et al., Progressive skeletonization: trimming more fat from a network
        at initialization, 2021, arXiv:2006.09081.
    """
    first, last = 1.0 - initial, 1.0 - sparsity
    return _ramp(
        lambda xp, t: 1.0 - first * (last / first) ** t,
        sparsity,
        steps=steps,
        start=start,
        initial=initial,
    )


def cosine(
    sparsity: float, *, steps: int, start: int = 0, initial: float = 0.0
) -> Schedule:
    """Returns the schedule that rises along half a cosine, flat at both ends.

    With ``t = (step - start) / steps`` clipped to [0, 1]::

        s(t) = sparsity + (initial - sparsity) (1 + cos(pi t)) / 2

    Args:
        sparsity: the removed fraction at the end, in [0, 1).
        steps: the number of steps from the start to the end.
        start: the step at which it leaves ``initial``.
        initial: the removed fraction at the start, in [0, 1).

    Raises:
        ValueError: a sparsity is outside [0, 1), or ``steps`` is below 1.

    Example:
        >>> schedule = cosine(0.8, steps=2)
        >>> [round(float(schedule(k)), 6) for k in (0, 1, 2)]
        [0.0, 0.4, 0.8]
    """
    return _ramp(
        lambda xp, t: sparsity + (initial - sparsity) * (1.0 + xp.cos(np.pi * t)) / 2.0,
        sparsity,
        steps=steps,
        start=start,
        initial=initial,
    )


def gap_halving(
    sparsity: float, *, steps: int = 7, start: int = 0, first: float = 0.5
) -> Schedule:
    """Returns the schedule of SNIP-it: every round halves the gap to the target.

    Round k after the start has::

        s(k) = sparsity - (sparsity - first) 2^(1 - k)      for 1 <= k < steps

    and round ``steps`` the target itself; before the first round nothing is removed.

    Args:
        sparsity: the removed fraction at the end, in [0, 1).
        steps: the number of rounds, the last one included.
        start: the step before the first round.
        first: the removed fraction of the first round, in [0, ``sparsity``].

    Raises:
        ValueError: a sparsity is outside its range, or ``steps`` is below 1.

    Example:
        >>> schedule = gap_halving(0.9, steps=4)
        >>> [round(float(schedule(k)), 6) for k in range(5)]
        [0.0, 0.5, 0.7, 0.8, 0.9]

    Reference:
        Verdenius et al., Pruning via iterative ranking of sensitivity statistics, 2020,
        arXiv:2006.00896.
    """
    _check_sparsity("first", first)
    if first > sparsity:
        raise ValueError(f"first: {first} is above the final sparsity {sparsity}")

    def curve(xp: Any, t: Any) -> Any:
        rounds = xp.round(t * steps)
        return xp.where(
            rounds < 1.0, 0.0, sparsity - (sparsity - first) * 2.0 ** (1.0 - rounds)
        )

    return _ramp(curve, sparsity, steps=steps, start=start, initial=0.0)


def cadence(schedule: Schedule, *, every: int, end: int, start: int = 0) -> Cadence:
    """Returns the events ``start, start + every, ...`` before ``end``, and ``end``.

    The step ``end`` is always the last event, even when the interval before it is
    shorter than the others, so the target is reached whatever the cadence.

    Args:
        schedule: the sparsity as a function of the step. It must not rise after
            ``end``: the last event would miss its target.
        every: the number of steps between events.
        end: the step of the last event.
        start: the step of the first event.

    Raises:
        ValueError: ``every`` is below 1, ``end`` is before ``start``, or the schedule
            still rises after ``end``.

    Example:
        >>> events = cadence(cubic(0.9, steps=25), every=10, end=25)
        >>> events.events
        array([ 0, 10, 20, 25])
        >>> bool(events.is_event(20)), bool(events.is_event(24))
        (True, False)
        >>> float(events.sparsity(25)), float(events.sparsity(0))
        (0.9, 0.0)
    """
    if every < 1:
        raise ValueError(f"every: {every} is below 1")
    if end < start:
        raise ValueError(f"end: {end} is before the start {start}")
    reached, target = float(schedule(end)), float(schedule(_FOREVER))
    if reached < target:
        raise ValueError(
            f"schedule: it rises from {reached} at the end {end} to {target} later; "
            "let it reach its target by the last event"
        )

    def is_event(step: jax.typing.ArrayLike) -> Any:
        _, now = _on_host_or_device(step)
        inside = (now >= start) & (now <= end)
        return inside & (((now - start) % every == 0) | (now == end))

    def sparsity(step: jax.typing.ArrayLike) -> Any:
        xp, now = _on_host_or_device(step)
        elapsed = xp.clip(now, start, end) - start
        event = xp.where(now >= end, end, start + elapsed // every * every)
        return xp.where(now < start, 0.0, schedule(event[()]))[()]

    regular = np.arange(start, end, every, dtype=np.int64)
    return Cadence(is_event, sparsity, np.append(regular, np.int64(end)))


def _ramp(
    curve: Callable[[Any, Any], Any],
    sparsity: float,
    *,
    steps: int,
    start: int,
    initial: float,
) -> Schedule:
    _check_sparsity("sparsity", sparsity)
    _check_sparsity("initial", initial)
    if steps < 1:
        raise ValueError(f"steps: {steps} is below 1")

    def schedule(step: jax.typing.ArrayLike) -> Any:
        xp, now = _on_host_or_device(step)
        # Clipped before the subtraction, which would wrap an unsigned step around.
        t = (xp.clip(now, start, start + steps) - start) / steps
        # No curve is trusted to land on its last value exactly.
        return xp.where(t >= 1.0, _float(xp, sparsity), curve(xp, t))[()]

    return schedule


def _on_host_or_device(step: Any) -> tuple[Any, Any]:
    if isinstance(step, jax.Array):
        return jnp, step
    # A NumPy scalar, not an array of rank 0: its powers are those of the C library.
    return np, np.asarray(step, np.float64)[()]


def _float(xp: Any, value: float) -> Any:
    # A Python float alone would make weakly typed results, and two compilations.
    return xp.asarray(value, float)


def _check_sparsity(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: {value} is outside [0, 1)")
