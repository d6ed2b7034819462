"""Static sparse training: random masks that stay."""

import optax
from jaxtyping import PRNGKeyArray

from jprune.allocation import Allocation
from jprune.pruning import Sparsity
from jprune.sparse_training import _dynamic
from jprune.sparse_training._rules import Dropped
from jprune.types import Masks, Prunable


def static(
    sparsity: Sparsity | None = None,
    *,
    masks: Masks | None = None,
    allocation: Allocation | None = None,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
    seed: int | PRNGKeyArray = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes the transformation that trains at masks which never change.

    The control of all dynamic methods; with ``masks``, it trains what any criterion has
    chosen at initialisation.

    Args:
        sparsity: see :func:`dynamic`.
        masks: see :func:`dynamic`.
        allocation: of random masks; Erdos-Renyi-Kernel unless given.
        prunable: see :func:`dynamic`.
        units: see :func:`dynamic`.
        seed: see :func:`dynamic`.

    Raises:
        ValueError: see :func:`dynamic`.

    Example:
        >>> import jax.numpy as jnp
        >>> state = static(0.75).init({"kernel": jnp.ones((4, 4))})
        >>> int(state.masks["kernel"].sum())
        4

    Reference:
        Evci et al., Rigging the lottery: making all tickets winners, 2020,
        arXiv:1911.11134 (the baseline "Static").
    """
    return _dynamic.dynamic(
        sparsity,
        drop=lambda event: Dropped(event.living),
        due=lambda step: step < 0,
        allocation=allocation,
        units=units,
        prunable=prunable,
        masks=masks,
        seed=seed,
    )
