"""Densities that fall while the network trains."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from jprune import schedules, selection
from jprune.sparse_training import _dynamic, _rules, _timing
from jprune.sparse_training._rules import Dropped, Event
from jprune.types import Prunable
from jprune.units import Units


def gradual_magnitude(
    sparsity: float,
    *,
    end: int,
    start: int = 0,
    every: int = 100,
    initial: float = 0.0,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
    seed: int | PRNGKeyArray = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes gradual magnitude pruning: every layer along a cubic schedule.

    At the steps ``start, start + every, ...`` and ``end``, each layer of n units keeps
    the ``n - round(s_t n)`` largest in magnitude, with ``s_t = sparsity + (initial -
    sparsity) (1 - (t - start) / (end - start))^3``.

    Args:
        sparsity: the removed fraction of every layer at the end, in [0, 1).
        end: the step of the last event.
        start: the step of the first event.
        every: the number of steps between events.
        initial: the removed fraction at the start; random weights, if it is not 0.
        prunable: see :func:`dynamic`.
        units: see :func:`dynamic`; N:M units end at exactly n of m, and are given the
            sparsity ``1 - n / m``.
        seed: see :func:`dynamic`.

    Raises:
        ValueError: a sparsity is outside [0, 1), ``end`` is not after ``start``, or
            ``every`` is below 1.

    Example:
        >>> tx = gradual_magnitude(0.9, end=1000)
        >>> state = tx.init({"kernel": jnp.ones((4, 4))})

    Reference:
        Zhu and Gupta, To prune, or not to prune: exploring the efficacy of pruning for
        model compression, 2017, arXiv:1710.01878.

    Differs from the paper: a removed weight is 0 and does not return; the authors' code
    keeps its last value and ranks it again.
    """
    cadence = cubic_cadence(sparsity, initial, start=start, end=end, every=every)

    def drop(event: Event) -> Dropped:
        counts = counts_at(cadence, event.layer_sizes(), event)
        magnitudes = _rules.magnitudes(event)
        if event.units.choose is not None:
            _check_n_m(event.units, sparsity)
            # What is to live in the end is never dropped on the way there.
            last = event.choose(magnitudes)
            magnitudes = [
                jnp.where(stays, jnp.inf, magnitude)
                for stays, magnitude in zip(last, magnitudes, strict=True)
            ]
        return Dropped(event.top(magnitudes, event.living, counts))

    return _dynamic.dynamic(
        initial,
        drop=drop,
        due=cadence.is_event,
        units=units,
        prunable=prunable,
        seed=seed,
    )


def granet(
    sparsity: float,
    *,
    end: int,
    steps: int,
    start: int = 0,
    every: int = 1000,
    initial: float = 0.5,
    drop_fraction: float = 0.5,
    final_fraction: float = 0.005,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
    seed: int | PRNGKeyArray = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes GraNet: gradual pruning with regeneration.

    At the steps ``start, start + every, ...`` of the training the network is first
    pruned to ``s_t`` by one global threshold on magnitudes, with the cubic schedule of
    :func:`gradual_magnitude`, that stays at ``sparsity`` from ``end`` on. Then every
    layer drops the ``ceil(r_t n)`` smallest of its n living weights and grows as many
    where the gradient is largest, with ``r_t`` on half a cosine from ``drop_fraction``
    to ``final_fraction`` at ``steps``.

    Args:
        sparsity: the removed fraction of the network at the end, in [0, 1).
        end: the step from which on the sparsity is constant.
        steps: the number of training steps.
        start: the step of the first event.
        every: the number of steps between events.
        initial: the removed fraction at the start, by random Erdos-Renyi-Kernel masks;
            0 starts dense.
        drop_fraction: of what to regenerate, at the start.
        final_fraction: of what to regenerate, at the end.
        prunable: see :func:`dynamic`.
        units: see :func:`dynamic`.
        seed: see :func:`dynamic`.

    Raises:
        ValueError: as :func:`gradual_magnitude`.

    Example:
        >>> tx = granet(0.9, end=500, steps=1000, every=50)
        >>> state = tx.init({"kernel": jnp.ones((4, 4))})

    Reference:
        Liu et al., Sparse training via boosting pruning plasticity with
        neuroregeneration, 2021, arXiv:2106.10404.

    Differs from the paper: random masks have exact counts, where the authors' code
    draws each weight on its own; masks are updated before the gradient step.
    """
    cadence = cubic_cadence(sparsity, initial, start=start, end=end, every=every)
    due = _timing.every(every, start=start, end=steps)

    def drop(event: Event) -> Dropped:
        magnitudes = _rules.magnitudes(event)
        (total,) = counts_at(cadence, [sum(event.layer_sizes())], event)
        left = event.top_of_all(magnitudes, event.living, total)
        counts = event.counts(left)
        regenerated = jnp.ceil(event.fraction * counts).astype(counts.dtype)
        return Dropped(event.top(magnitudes, left, counts - regenerated), regenerated)

    return _dynamic.dynamic(
        initial,
        drop=drop,
        grow=_rules.steepest,
        fraction=_timing.cosine_fraction(
            drop_fraction, end=steps, final=final_fraction
        ),
        due=lambda step: due(step) | cadence.is_event(step),
        units=units,
        prunable=prunable,
        seed=seed,
    )


def cubic_cadence(
    sparsity: float, initial: float, *, start: int, end: int, every: int
) -> schedules.Cadence:
    """Returns the events from start to end along a cubic schedule."""
    if end <= start:
        raise ValueError(f"end: {end} is not after the start {start}")
    cubic = schedules.cubic(sparsity, steps=end - start, start=start, initial=initial)
    return schedules.cadence(cubic, every=every, end=end, start=start)


def counts_at(
    cadence: schedules.Cadence, sizes: Sequence[int], event: Event
) -> Int[Array, " sizes"]:
    """Returns how many of so many units live at an event, exact as on the host."""
    table = [
        [selection.keep_count(n, float(cadence.sparsity(t))) for n in sizes]
        for t in cadence.events
    ]
    steps = jnp.asarray(cadence.events, jnp.int32)
    row = jnp.searchsorted(steps, event.step, side="right") - 1
    return jnp.asarray(table, jnp.int32)[row]


def _check_n_m(units: Units, sparsity: float) -> None:
    if units.density is not None and abs(1 - sparsity - units.density) > 1e-9:
        raise ValueError(
            f"sparsity: {sparsity} is not that of the units, {1 - units.density}"
        )
