"""Dynamic sparse reparameterisation: layers trade weights under one threshold."""

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from jprune import allocation as allocation_lib
from jprune.allocation import Allocation
from jprune.pruning import Sparsity
from jprune.sparse_training import _dynamic, _rules, _timing
from jprune.sparse_training._rules import Dropped, Event
from jprune.types import Masks, Prunable


def dsr(
    sparsity: Sparsity | None = None,
    *,
    target: int,
    every: int = 100,
    end: int | None = None,
    threshold: float = 1e-3,
    tolerance: float = 0.1,
    masks: Masks | None = None,
    allocation: Allocation | None = None,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
    seed: int | PRNGKeyArray = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes dynamic sparse reparameterisation, which moves weights between layers.

    At every event, all living weights below the threshold H are dropped, but the
    largest of each layer. Where the number K of them is above ``(1 + tolerance)
    target``, H is halved, and where it is below ``(1 - tolerance) target``, doubled.
    Then K weights grow at random among those that were dead before, and layer l gets
    the part ``R_l / sum(R)`` of them, with R_l its surviving weights; what a layer has
    no room for goes to others. New weights start at 0.

    Args:
        sparsity: the removed fraction of the network, in [0, 1).
        target: the number of weights to drop at an event, ``N_p``: the paper's is
            20,000 for a WRN-28-2 on CIFAR-10.
        every: the number of steps between events, which the authors double three times
            in the course of training.
        end: the step from which on masks stay; never unless given.
        threshold: H at the start.
        tolerance: ``delta``.
        masks: see :func:`dynamic`.
        allocation: of random masks; uniform unless given.
        prunable: see :func:`dynamic`.
        units: see :func:`dynamic`.
        seed: see :func:`dynamic`.

    Raises:
        ValueError: see :func:`dynamic`; or ``target`` or ``every`` is below 1.

    Example:
        >>> tx = dsr(0.5, target=2, every=10)
        >>> state = tx.init({"kernel": jnp.ones((4, 4))})

    Reference:
        Mostafa and Wang, Parameter efficient training of deep convolutional neural
        networks by dynamic sparse reparameterization, 2019, arXiv:1902.05967.

    Differs from the paper: what rounding leaves over goes to the largest remainders,
    not to a random layer. The total is constant as long as the dead weights before an
    event are at least as many as it drops.
    """
    if target < 1:
        raise ValueError(f"target: {target} is below 1")

    def drop(event: Event) -> Dropped:
        at = event.memory
        magnitudes = _rules.magnitudes(event)
        largest = event.top(magnitudes, event.living, jnp.minimum(living(event), 1))
        keeps = [
            best | (alive & (magnitude >= at))
            for best, alive, magnitude in zip(
                largest, event.living, magnitudes, strict=True
            )
        ]
        left = event.counts(keeps)
        dropped = jnp.sum(living(event) - left, dtype=left.dtype)
        room = jnp.asarray(event.layer_sizes(), left.dtype) - living(event)
        at = jnp.where(dropped > (1 + tolerance) * target, at / 2, at)
        at = jnp.where(dropped < (1 - tolerance) * target, event.memory * 2, at)
        return Dropped(keeps, _rules.shares(dropped, left, room), at)

    def living(event: Event) -> Int[Array, " layers"]:
        return event.counts(event.living)

    return _dynamic.dynamic(
        sparsity,
        drop=drop,
        due=_timing.every(every, end=end),
        regrow=False,
        allocation=allocation or allocation_lib.uniform(),
        units=units,
        prunable=prunable,
        masks=masks,
        memory=np.float32(threshold),
        seed=seed,
    )
