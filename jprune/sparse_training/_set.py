"""Sparse evolutionary training: grow at random."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jprune import allocation as allocation_lib
from jprune.allocation import Allocation
from jprune.pruning import Sparsity
from jprune.sparse_training import _dynamic, _rules, _timing
from jprune.sparse_training._rules import Event
from jprune.types import Masks, Prunable


def set_(
    sparsity: Sparsity | None = None,
    *,
    every: int,
    zeta: float = 0.3,
    end: int | None = None,
    masks: Masks | None = None,
    allocation: Allocation | None = None,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
    seed: int | PRNGKeyArray = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes SET: drop the weights closest to zero on either side, grow at random.

    Every ``every`` steps each layer drops the ``floor(zeta n+)`` smallest of its n+
    positive weights, the ``floor(zeta n-)`` largest of its n- negative ones and those
    that are 0, and grows as many among those that were dead before. Where these are too
    few, the largest of the dropped stay. New weights start at 0.

    Args:
        sparsity: the removed fraction, in [0, 1).
        every: the number of steps between mask updates; the paper's is an epoch.
        zeta: the fraction to drop.
        end: the step from which on masks stay; never unless given.
        masks: see :func:`dynamic`.
        allocation: of random masks; Erdos-Renyi unless given.
        prunable: see :func:`dynamic`.
        units: see :func:`dynamic`.
        seed: see :func:`dynamic`.

    Raises:
        ValueError: see :func:`dynamic`; or ``zeta`` is outside [0, 1], or ``every`` is
            below 1.

    Example:
        >>> state = set_(0.5, every=10).init({"kernel": jnp.ones((4, 4))})
        >>> int(state.masks["kernel"].sum())
        8

    Reference:
        Mocanu et al., Scalable training of artificial neural networks with adaptive
        sparse connectivity inspired by network science, 2018, arXiv:1707.04780.

    Differs from the paper: new weights start at 0, not at small random values.
    """
    return _dynamic.dynamic(
        sparsity,
        drop=_rules.smallest_of_each_sign,
        grow=_elsewhere,
        fraction=zeta,
        due=_timing.every(every, end=end),
        allocation=allocation or allocation_lib.erdos_renyi(),
        units=units,
        prunable=prunable,
        masks=masks,
        seed=seed,
    )


def _elsewhere(event: Event) -> list[Array]:
    """Grows at random where nothing lived, and only then what was just dropped."""
    parts = zip(
        event.living, _rules.magnitudes(event), _rules.anywhere(event), strict=True
    )
    return [
        jnp.where(lived, magnitude / (1 + magnitude), 1 + draw)
        for lived, magnitude, draw in parts
    ]


def set_itop(
    sparsity: Sparsity | None = None,
    *,
    steps: int,
    drop_fraction: float = 0.5,
    final_fraction: float = 0.005,
    every: int = 1500,
    masks: Masks | None = None,
    allocation: Allocation | None = None,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
    seed: int | PRNGKeyArray = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes SET-ITOP: random growth, rarely, much, and to the end of training.

    Args:
        sparsity: the removed fraction, in [0, 1).
        steps: the number of training steps, over which the fraction falls.
        drop_fraction: the fraction at the start.
        final_fraction: the fraction at the end.
        every: the number of steps between mask updates.
        masks: see :func:`dynamic`.
        allocation: of random masks; Erdos-Renyi-Kernel unless given.
        prunable: see :func:`dynamic`.
        units: see :func:`dynamic`.
        seed: see :func:`dynamic`.

    Raises:
        ValueError: as :func:`set_`.

    Example:
        >>> state = set_itop(0.5, steps=9000).init({"kernel": jnp.ones((4, 4))})

    Reference:
        Liu et al., Do we actually need dense over-parameterization? In-time
        over-parameterization in sparse training, 2021, arXiv:2102.02887.

    Differs from the paper: growth has an exact count, where the authors' code draws
    each weight on its own; masks are updated before the gradient step.
    """
    return _dynamic.dynamic(
        sparsity,
        drop=_rules.smallest,
        grow=_rules.anywhere,
        fraction=_timing.cosine_fraction(
            drop_fraction, end=steps, final=final_fraction
        ),
        due=_timing.every(every, end=steps),
        allocation=allocation,
        units=units,
        prunable=prunable,
        masks=masks,
        seed=seed,
    )
