"""Sparse networks from scratch: momentum says where weights are missing."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jprune.allocation import Allocation
from jprune.pruning import Sparsity
from jprune.sparse_training import _dynamic, _rules, _timing
from jprune.sparse_training._rules import Dropped, Event
from jprune.types import Masks, Params, Prunable
from jprune.units import Units


def snfs(
    sparsity: Sparsity | None = None,
    *,
    every: int,
    steps: int,
    drop_fraction: float = 0.5,
    momentum: float = 0.9,
    masks: Masks | None = None,
    allocation: Allocation | None = None,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
    seed: int | PRNGKeyArray = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes SNFS: drop by magnitude, share out and grow by momentum.

    Every ``every`` steps each layer drops ``floor(f(t) n)`` of its n living weights,
    the smallest in magnitude, with ``f(t) = drop_fraction / 2 (1 + cos(pi t /
    steps))``. All that was dropped is shared out between the layers in proportion to
    the mean of ``|m|`` over their living weights, and grows where ``|m|`` is largest.
    Here ``m <- momentum m + (1 - momentum) g`` follows the dense gradient in every
    step. New weights start at 0; what a layer has no room for goes to others.

    Args:
        sparsity: the removed fraction of the network, in [0, 1).
        every: the number of steps between mask updates, an epoch in the paper.
        steps: the number of training steps, over which the fraction falls.
        drop_fraction: the fraction at the start, the paper's prune rate.
        momentum: of the average of gradients.
        masks: see :func:`dynamic`.
        allocation: of random masks; Erdos-Renyi-Kernel unless given.
        prunable: see :func:`dynamic`.
        units: see :func:`dynamic`.
        seed: see :func:`dynamic`.

    Raises:
        ValueError: see :func:`dynamic`; or ``every`` is below 1, or a fraction or the
            momentum is outside its range.

    Example:
        >>> tx = snfs(0.5, every=10, steps=100)
        >>> state = tx.init({"kernel": jnp.ones((4, 4))})

    Reference:
        Dettmers and Zettlemoyer, Sparse networks from scratch: faster training without
        losing performance, 2019, arXiv:1907.04840.

    Differs from the paper: the momentum is the method's own, whatever optimiser
    follows; shares are rounded to the largest remainders; random masks have
    Erdos-Renyi-Kernel densities.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: {momentum} is outside [0, 1)")

    def start(units: Units, params: Params) -> list[Array]:
        leaves = jax.tree.leaves(params)
        values = [leaves[leaf.place] for leaf in units.leaves]
        return [
            jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)) for x in values
        ]

    def track(averages: list[Array], grads: list[Array]) -> list[Array]:
        pairs = zip(averages, grads, strict=True)
        return [momentum * m + (1 - momentum) * g for m, g in pairs]

    def drop(event: Event) -> Dropped:
        keeps = _rules.smallest(event).keeps
        living = event.counts(event.living)
        pairs = zip(event.living, grow(event), strict=True)
        totals = event.sums([jnp.where(alive, m, 0.0) for alive, m in pairs])
        room = jnp.asarray(event.layer_sizes(), living.dtype) - event.counts(keeps)
        total = jnp.sum(living - event.counts(keeps), dtype=room.dtype)
        gains = _rules.shares(total, totals / jnp.maximum(living, 1), room)
        return Dropped(keeps, gains)

    def grow(event: Event) -> list[Array]:
        return event.pool([jnp.abs(m) for m in event.memory])

    return _dynamic.dynamic(
        sparsity,
        drop=drop,
        grow=grow,
        fraction=_timing.cosine_fraction(drop_fraction, end=steps),
        due=_timing.every(every, end=steps),
        track=track,
        memory=start,
        allocation=allocation,
        units=units,
        prunable=prunable,
        masks=masks,
        seed=seed,
    )
