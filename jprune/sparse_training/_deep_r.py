"""Deep rewiring: a weight that crosses zero gives its place to another."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jprune.allocation import Allocation
from jprune.pruning import Sparsity
from jprune.sparse_training import _dynamic, _rules
from jprune.sparse_training._rules import Dropped, Event
from jprune.types import Masks, Params, Prunable
from jprune.units import Units


def deep_r(
    sparsity: Sparsity | None = None,
    *,
    learning_rate: float,
    l1: float = 1e-4,
    temperature: float = 0.0,
    masks: Masks | None = None,
    allocation: Allocation | None = None,
    prunable: Prunable = None,
    seed: int | PRNGKeyArray = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes DeepR: noisy descent under fixed signs, rewired at zero.

    Every connection has a sign for life. With ``optax.sgd(learning_rate)`` behind it, a
    living weight w moves by ``-eta (g + l1 sign(w)) + sqrt(2 eta T) nu`` with ``nu ~
    N(0, 1)``. In every step the weights that have crossed zero are dropped, and as many
    grow anywhere in the network among those that were dead, at 0 and with a random
    sign.

    Args:
        sparsity: the removed fraction, in [0, 1).
        learning_rate: ``eta``, of the optimiser that follows; scales the noise alone.
        l1: the pull towards zero, ``alpha``.
        temperature: of the noise, ``T``; none by default.
        masks: see :func:`dynamic`.
        allocation: of random masks; Erdos-Renyi-Kernel unless given.
        prunable: see :func:`dynamic`.
        seed: of masks, signs, growth and noise, see :func:`dynamic`.

    Raises:
        ValueError: see :func:`dynamic`; or a number is negative.

    Example:
        >>> tx = deep_r(0.5, learning_rate=0.1)
        >>> state = tx.init({"kernel": jnp.ones((4, 4))})

    Reference:
        Bellec et al., Deep rewiring: training very sparse deep networks, 2018,
        arXiv:1711.05136.

    Differs from the paper: a weight that has crossed zero takes part in one more
    gradient before it is dropped; a new one is drawn from those that were dead before
    the step. UNVERIFIED against public code: the form above is implemented.
    """
    for name, value in (("l1", l1), ("temperature", temperature)):
        if value < 0:
            raise ValueError(f"{name}: {value} is negative")
    if learning_rate <= 0:
        raise ValueError(f"learning_rate: {learning_rate} is not positive")
    noise = (2 * temperature / learning_rate) ** 0.5

    def signs(units: Units, params: Params) -> list[Array]:
        leaves = jax.tree.leaves(params)
        return [leaves[group.leaf.place] >= 0 for group in units.groups]

    def drop(event: Event) -> Dropped:
        positive = event.memory
        keeps = [
            alive & jnp.where(plus, weight >= 0, weight <= 0)
            for alive, plus, weight in zip(
                event.living, positive, event.weights, strict=True
            )
        ]
        lost = jnp.sum(event.counts(event.living) - event.counts(keeps))
        dead = [~alive for alive in event.living]
        grown = event.top_of_all(_rules.anywhere(event), dead, lost)
        coins = jax.random.split(jax.random.fold_in(event.key, 1), len(keeps))
        positive = [
            jnp.where(new, jax.random.bernoulli(coin, shape=new.shape), plus)
            for new, coin, plus in zip(grown, coins, positive, strict=True)
        ]
        chosen = [keep | new for keep, new in zip(keeps, grown, strict=True)]
        return Dropped(chosen, memory=positive)

    def emit(event: Event) -> list[Array]:
        keys = jax.random.split(jax.random.fold_in(event.key, 2), len(event.living))
        emitted = []
        for key, alive, plus, grad in zip(
            keys, event.living, event.memory, event.grads, strict=True
        ):
            pulled = grad + jnp.where(plus, l1, -l1)
            if noise:
                pulled += noise * jax.random.normal(key, grad.shape, grad.dtype)
            emitted.append(jnp.where(alive, pulled, 0.0))
        return emitted

    return _dynamic.dynamic(
        sparsity,
        drop=drop,
        due=lambda step: step > 0,
        emit=emit,
        memory=signs,
        allocation=allocation,
        prunable=prunable,
        masks=masks,
        seed=seed,
    )
