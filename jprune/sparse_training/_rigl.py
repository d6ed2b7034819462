"""RigL: grow where the dense gradient is steepest."""

import optax
from jaxtyping import PRNGKeyArray

from jprune.allocation import Allocation
from jprune.pruning import Sparsity
from jprune.sparse_training import _dynamic, _rules, _timing
from jprune.types import Masks, Prunable


def rigl(
    sparsity: Sparsity | None = None,
    *,
    drop_fraction: float = 0.3,
    every: int = 100,
    end: int = 25_000,
    hold: bool = True,
    regrow: bool = True,
    masks: Masks | None = None,
    allocation: Allocation | None = None,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
    seed: int | PRNGKeyArray = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes RigL: drop the smallest weights, grow where the gradient is largest.

    Every ``every`` steps until ``end``, each layer drops ``floor(f(t) n)`` of its n
    living weights, the smallest in magnitude, with ``f(t) = drop_fraction / 2 (1 +
    cos(pi t / end))``, and grows as many with the largest dense gradient. New weights
    start at 0.

    Args:
        sparsity: the removed fraction, in [0, 1).
        drop_fraction: ``alpha`` in the paper.
        every: the number of steps between mask updates, ``Delta T``.
        end: the step at which mask updates end, ``T_end``: three quarters of the
            training; the default is the paper's for ImageNet.
        hold: whether mask updates take no gradient step, as in the authors' code.
        regrow: whether a weight may be grown in the update that dropped it, as in the
            authors' code; it then keeps its value.
        masks: see :func:`dynamic`.
        allocation: of random masks; Erdos-Renyi-Kernel unless given.
        prunable: see :func:`dynamic`.
        units: see :func:`dynamic`.
        seed: see :func:`dynamic`.

    Raises:
        ValueError: see :func:`dynamic`; or ``drop_fraction`` is outside [0, 1], or
            ``every`` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jprune.sparse_training import sparse
        >>> tx = sparse(optax.chain(rigl(0.5, every=10, end=75), optax.adam(1e-3)))
        >>> state = tx.init({"kernel": jnp.ones((4, 4))})

    Reference:
        Evci et al., Rigging the lottery: making all tickets winners, 2020,
        arXiv:1911.11134.

    Differs from the paper: the authors' code adds noise of 1e-5 to magnitudes; here
    ties go to the lower index.
    """
    return _dynamic.dynamic(
        sparsity,
        drop=_rules.smallest,
        grow=_rules.steepest,
        fraction=_timing.cosine_fraction(drop_fraction, end=end),
        due=_timing.every(every, end=end),
        hold=hold,
        regrow=regrow,
        allocation=allocation,
        units=units,
        prunable=prunable,
        masks=masks,
        seed=seed,
    )


def rigl_itop(
    sparsity: Sparsity | None = None,
    *,
    steps: int,
    drop_fraction: float = 0.5,
    final_fraction: float = 0.005,
    every: int = 4000,
    masks: Masks | None = None,
    allocation: Allocation | None = None,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
    seed: int | PRNGKeyArray = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes RigL-ITOP: RigL that explores rarely, much, and to the end of training.

    What counts is :func:`exploration_rate`, the share of weights that ever lived,
    provided that each is trained long enough before it is judged.

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
        ValueError: as :func:`rigl`.

    Example:
        >>> import jax.numpy as jnp
        >>> state = rigl_itop(0.5, steps=9000).init({"kernel": jnp.ones((4, 4))})

    Reference:
        Liu et al., Do we actually need dense over-parameterization? In-time
        over-parameterization in sparse training, 2021, arXiv:2102.02887.

    Differs from the paper: the authors' code drops ``ceil(f n)`` weights, and updates
    masks after a gradient step; here it is ``floor``, as in RigL, and before.
    """
    return _dynamic.dynamic(
        sparsity,
        drop=_rules.smallest,
        grow=_rules.steepest,
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
