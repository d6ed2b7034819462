"""Methods whose pruned weights train on in plain sight, and are removed in the end.

After training, ``apply_masks(params, masks_of(opt_state))`` (or, of :func:`gsm`, a
pruning by magnitude) removes them for good.
"""

import functools

import jax.numpy as jnp
import optax

from jprune import selection
from jprune import units as units_lib
from jprune.sparse_training import _dynamic, _rules, _timing
from jprune.sparse_training._rules import Dropped, Event
from jprune.sparse_training._state import Storage
from jprune.types import Prunable


def soft_filter(
    rate: float,
    *,
    every: int,
    end: int | None = None,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes soft filter pruning: the smallest filters are set to zero, and train on.

    Every ``every`` steps the ``floor(rate n)`` filters of each layer with the smallest
    l2 norm are set to zero. Their gradients, moments and biases are not touched, so
    they may grow and come back. The masks say which were chosen last.

    Args:
        rate: the part of the filters to set to zero, ``P``, in [0, 1).
        every: the number of steps between updates, an epoch in the paper.
        end: the step from which on nothing is set to zero; never unless given.
        prunable: which leaves have filters; convolutions alone in the paper.
        units: what is set to zero at once; filters by their l2 norm unless given.

    Raises:
        ValueError: ``rate`` is outside [0, 1), or ``every`` is below 1.

    Example:
        >>> tx = soft_filter(0.3, every=100)
        >>> state = tx.init({"kernel": jnp.ones((3, 3, 4, 8))})

    Reference:
        He et al., Soft filter pruning for accelerating deep convolutional neural
        networks, 2018, arXiv:1808.06866.

    Differs from the paper: setting to zero takes the place of a gradient step (inside
    :func:`sparse`, which it needs).
    """
    selection.check_sparsity(rate, "rate")

    def drop(event: Event) -> Dropped:
        sizes = event.layer_sizes()
        counts = jnp.asarray([size - int(rate * size) for size in sizes], jnp.int32)
        return Dropped(event.top(_rules.magnitudes(event), None, counts))

    filters = functools.partial(units_lib.filters, prunable=prunable, how="l2")
    return _dynamic.dynamic(
        0.0,
        drop=drop,
        due=_timing.every(every, end=end),
        hold=True,
        storage=Storage.SOFT,
        units=units or filters,
    )


def gsm(
    sparsity: float,
    *,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes global sparse momentum: only the salient weights get the gradient.

    In every step the Q weights of the network with the largest ``|w g|`` are active;
    all others move by weight decay and momentum alone, and die away. To be followed by
    decay inside the momentum::

        optax.chain(gsm(0.9), optax.add_decayed_weights(5e-4),
                    optax.sgd(5e-3, momentum=0.98))

    Start from a trained network; in the end, keep the Q largest by
    ``prune(scores.magnitude(params), sparsity)``, which hardly changes the outputs.

    Args:
        sparsity: the passive fraction of the network, in [0, 1).
        prunable: see :func:`dynamic`; all other leaves train as usual.
        units: see :func:`dynamic`.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1).

    Example:
        >>> state = gsm(0.9).init({"kernel": jnp.ones((4, 4))})

    Reference:
        Ding et al., Global sparse momentum SGD for pruning very deep neural networks,
        2019, arXiv:1909.12778.
    """
    selection.check_sparsity(sparsity)

    def drop(event: Event) -> Dropped:
        kept = selection.keep_count(sum(event.layer_sizes()), sparsity)
        return Dropped(
            event.top_of_all(_rules.sensitivities(event), None, jnp.int32(kept))
        )

    return _dynamic.dynamic(
        0.0,
        drop=drop,
        due=lambda step: step >= 0,
        storage=Storage.DENSE,
        prunable=prunable,
        units=units,
    )
