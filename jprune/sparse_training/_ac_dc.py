"""Alternating compressed and decompressed training."""

import jax.numpy as jnp
import optax

from jprune import selection
from jprune.sparse_training import _dynamic, _rules
from jprune.sparse_training._rules import Dropped, Event
from jprune.types import Prunable


def ac_dc(
    sparsity: float,
    *,
    warm_up: int,
    period: int,
    end: int,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes AC/DC: sparse and dense phases in turn, ending sparse.

    Training is dense for ``warm_up`` steps. Then phases of ``period`` steps alternate:
    in a compressed one only the largest weights of the network live, chosen at its
    start; in a decompressed one all do, those that were removed starting from 0 and
    with fresh moments. From ``end`` on the network stays compressed.

    Args:
        sparsity: the removed fraction in compressed phases, in [0, 1).
        warm_up: the number of dense steps at the beginning; 10 of the paper's 100
            epochs.
        period: the number of steps of a phase; 5 epochs in the paper.
        end: the first step of the last phase; 15 epochs before the end in the paper.
        prunable: see :func:`dynamic`.
        units: see :func:`dynamic`.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1), ``period`` is below 1, or ``end`` is
            before ``warm_up``.

    Example:
        >>> tx = ac_dc(0.9, warm_up=100, period=50, end=850)
        >>> state = tx.init({"kernel": jnp.ones((4, 4))})

    Reference:
        Peste et al., AC/DC: alternating compressed/decompressed training of deep neural
        networks, 2021, arXiv:2106.12379.

    Differs from the paper: a phase begins before the gradient step, not after it.
    """
    selection.check_sparsity(sparsity)
    if period < 1:
        raise ValueError(f"period: {period} is below 1")
    if end < warm_up:
        raise ValueError(f"end: {end} is before the end {warm_up} of the warm-up")

    def due(step):
        turns = (step > 0) & (step >= warm_up) & (step < end)
        return (turns & ((step - warm_up) % period == 0)) | (step == end)

    def drop(event: Event) -> Dropped:
        size = sum(event.layer_sizes())
        even = (event.step - warm_up) // period % 2 == 0
        compressed = even | (event.step >= end)
        kept = jnp.where(compressed, selection.keep_count(size, sparsity), size)
        magnitudes = _rules.magnitudes(event)
        return Dropped(event.top_of_all(magnitudes, None, kept))

    return _dynamic.dynamic(0.0, drop=drop, due=due, prunable=prunable, units=units)
