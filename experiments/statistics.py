"""Means over seeds with their intervals, and pairs of methods over the same seeds."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from experiments.results import Record

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean over seeds and its Student-t interval.

    Attributes:
        mean: the mean.
        half: half of the interval's width; infinite for one seed.
        seeds: how many values the mean is of.
    """

    mean: float
    half: float
    seeds: int

    @property
    def is_decided(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return abs(self.mean) > self.half


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Returns the mean of independent values and the interval that holds it.

    ``mean ± t s / sqrt(n)``, with s the standard deviation (n - 1) and t the quantile
    of Student's distribution with n - 1 degrees of freedom at ``(1 + level) / 2``.

    Args:
        values: one a seed; at least one.
        level: the chance that such an interval holds the true mean, if the values are
            normal.

    Raises:
        ValueError: there are no values, or the level is outside (0, 1).

    Example:
        >>> found = interval([0.90, 0.92, 0.94])
        >>> round(found.mean, 3), round(found.half, 3), found.seeds
        (0.92, 0.05, 3)
    """
    if not len(values):
        raise ValueError("values: there are none")
    if not 0 < level < 1:
        raise ValueError(f"level: {level} is outside (0, 1)")
    n = len(values)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, math.inf, 1)
    t = float(special.stdtrit(n - 1, (1 + level) / 2))
    return Interval(mean, t * float(np.std(values, ddof=1)) / math.sqrt(n), n)


def paired(
    first: Mapping[int, float], second: Mapping[int, float], level: float = LEVEL
) -> Interval | None:
    """Returns the mean of ``first - second`` over the seeds that both have.

    What the seeds have in common, initial weights and the order of rows, drops out of
    the differences.

    Args:
        first: values by seed.
        second: likewise.
        level: see :func:`interval`.

    Returns:
        The interval of the mean difference; None if no seed is common.

    Example:
        >>> found = paired({0: 0.9, 1: 0.8, 2: 0.5}, {0: 0.8, 1: 0.7})
        >>> round(found.mean, 3), found.half < 1e-9, found.seeds
        (0.1, True, 2)
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        return None
    return interval([first[seed] - second[seed] for seed in common], level)


def by_seed(
    records: Sequence[Record], metric: str = "accuracy"
) -> dict[tuple[str, float], dict[int, float]]:
    """Returns the test metric by method and sparsity, and there by seed.

    A run without a finite value counts as nan.

    Example:
        >>> config = {"method": "snip", "sparsity": 0.9, "seed": 3}
        >>> by_seed([{"config": config, "test": {"accuracy": 0.8}}])
        {('snip', 0.9): {3: 0.8}}
    """
    values = collections.defaultdict(dict)
    for record in records:
        config, value = record["config"], record["test"][metric]
        run = config["method"], config["sparsity"]
        values[run][config["seed"]] = math.nan if value is None else value
    return dict(values)
