"""When masks are updated, and how much of them: functions of the step."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

Steps = Callable[[Any], Any]


def every(period: int, *, start: int | None = None, end: int | None = None) -> Steps:
    """Returns the function that is true every ``period`` steps.

    Args:
        period: the number of steps from one event to the next.
        start: the first event; ``period`` unless given.
        end: the step from which on there is no event; never unless given.

    Raises:
        ValueError: ``period`` is below 1.

    Example:
        >>> due = every(2, end=6)
        >>> [step for step in range(9) if due(step)]
        [2, 4]
    """
    if period < 1:
        raise ValueError(f"every: {period} is below 1")
    first = period if start is None else start

    def due(step: Any) -> Any:
        inside = (step >= first) if end is None else (step >= first) & (step < end)
        return inside & ((step - first) % period == 0)

    return due


def cosine_fraction(initial: float, *, end: int, final: float = 0.0) -> Steps:
    """Returns the fraction that falls along half a cosine.

    ``f(t) = final + (initial - final) (1 + cos(pi t / end)) / 2``, and ``final`` after
    the end.

    Example:
        >>> fraction = cosine_fraction(0.3, end=100)
        >>> [round(float(fraction(t)), 4) for t in (0, 50, 100)]
        [0.3, 0.15, 0.0]
    """
    _check_fall(initial, final)

    def fraction(step: Any) -> Any:
        t = jnp.minimum(step, end) / end
        return final + (initial - final) * (1 + jnp.cos(jnp.pi * t)) / 2

    return fraction


def linear_fraction(initial: float, *, end: int, final: float = 0.0) -> Steps:
    """Returns the fraction that falls in a straight line.

    ``f(t) = initial + (final - initial) t / end``, and ``final`` after the end.

    Example:
        >>> fraction = linear_fraction(0.3, end=100)
        >>> [round(float(fraction(t)), 4) for t in (0, 50, 200)]
        [0.3, 0.15, 0.0]
    """
    _check_fall(initial, final)
    return lambda step: initial + (final - initial) * (jnp.minimum(step, end) / end)


def inverse_power_fraction(initial: float, *, end: int, power: float = 3.0) -> Steps:
    """Returns the fraction that falls as a power of the steps that are left.

    ``f(t) = initial (1 - t / end)^power``, and 0 after the end.

    Example:
        >>> fraction = inverse_power_fraction(0.4, end=100, power=1)
        >>> [round(float(fraction(t)), 4) for t in (0, 50, 200)]
        [0.4, 0.2, 0.0]

    Reference:
        Evci et al., Rigging the lottery: making all tickets winners, 2020,
        arXiv:1911.11134 (appendix G).
    """
    _check_fall(initial, 0.0)
    return lambda step: initial * (1 - jnp.minimum(step, end) / end) ** power


def _check_fall(initial: float, final: float) -> None:
    if not 0 <= final <= initial <= 1:
        raise ValueError(f"fraction: {initial} to {final} does not fall within [0, 1]")
