"""Methods that keep the weights they prune, out of sight of the forward pass.

Their loss takes ``forward_params(params, opt_state)``; the gradient at the masks goes
to all weights, so that what was pruned too early can return. Masks that an update
computes are those of the next forward pass.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jprune import pruning, scores, selection, trees
from jprune import units as units_lib
from jprune.allocation import uniform
from jprune.sparse_training import _dynamic, _gradual, _rules, _timing
from jprune.sparse_training._rules import Dropped, Event
from jprune.sparse_training._state import Storage
from jprune.types import Layouts, Masks, Params, Prunable
from jprune.units import Units


def straight_through(
    sparsity: float,
    *,
    every: int = 1,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes magnitude pruning with a straight-through gradient.

    The forward pass sees the largest weights of the network at any time, ``m w``; all
    weights move by the gradient with respect to ``m w``.

    Args:
        sparsity: the removed fraction of the network, in [0, 1).
        every: the number of steps between mask updates.
        prunable: see :func:`dynamic`.
        units: see :func:`dynamic`.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1), or ``every`` is below 1.

    Example:
        >>> state = straight_through(0.5).init({"kernel": jnp.ones((4, 4))})
        >>> int(state.masks["kernel"].sum())
        8

    Reference:
        Bengio, Leonard and Courville, Estimating or propagating gradients through
        stochastic neurons for conditional computation, 2013, arXiv:1308.3432 (the
        straight-through gradient).
    """
    selection.check_sparsity(sparsity)

    def drop(event: Event) -> Dropped:
        kept = selection.keep_count(sum(event.layer_sizes()), sparsity)
        return Dropped(
            event.top_of_all(_rules.magnitudes(event), None, jnp.int32(kept))
        )

    def start(params: Params) -> Masks:
        own = units(params) if units else units_lib.weights(params, prunable=prunable)
        return pruning.prune(scores.magnitude(params), sparsity, units=own)

    return _dynamic.dynamic(
        drop=drop,
        due=_timing.every(every),
        storage=Storage.LATENT,
        masks=start,
        prunable=prunable,
        units=units,
    )


def dpf(
    sparsity: float,
    *,
    end: int,
    start: int = 0,
    every: int = 16,
    initial: float = 0.0,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
    seed: int | PRNGKeyArray = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes DPF: dynamic model pruning with feedback.

    Every ``every`` steps from ``start`` on, the masks become the largest weights of the
    network at the sparsity ``s_t`` of the cubic schedule of :func:`gradual_magnitude`,
    which is ``sparsity`` from ``end`` on. All weights move by the gradient at the
    masks; the error of pruning is so fed back.

    Args:
        sparsity: the removed fraction of the network at the end, in [0, 1).
        end: the step from which on the sparsity is constant; masks still move.
        start: the step of the first mask update.
        every: the number of steps between mask updates, ``p``.
        initial: the removed fraction at the start; random weights, if it is not 0.
        prunable: see :func:`dynamic`.
        units: see :func:`dynamic`.
        seed: see :func:`dynamic`.

    Raises:
        ValueError: as :func:`gradual_magnitude`.

    Example:
        >>> tx = dpf(0.9, end=1000)
        >>> state = tx.init({"kernel": jnp.ones((4, 4))})

    Reference:
        Lin et al., Dynamic model pruning with feedback, 2020, arXiv:2006.07253.

    Differs from the paper: the sparsity rises at every mask update, not once an epoch.
    """
    cadence = _gradual.cubic_cadence(
        sparsity, initial, start=start, end=end, every=every
    )
    regular = _timing.every(every, start=start)

    def drop(event: Event) -> Dropped:
        (kept,) = _gradual.counts_at(cadence, [sum(event.layer_sizes())], event)
        return Dropped(event.top_of_all(_rules.magnitudes(event), None, kept))

    return _dynamic.dynamic(
        initial,
        drop=drop,
        due=lambda step: regular(step) | (step == end),
        storage=Storage.LATENT,
        prunable=prunable,
        units=units,
        seed=seed,
    )


def dynamic_network_surgery(
    c_rate: float | Mapping[str, float],
    *,
    gamma: float = 1e-4,
    power: float = 1.0,
    margin: float = 0.1,
    end: int | None = None,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes dynamic network surgery: pruning, and splicing what was pruned wrongly.

    A layer with magnitudes of mean mu and standard deviation sigma at the start has the
    threshold ``t = max(mu + c_rate sigma, 0)``. In an update of the masks a weight dies
    if ``|w| < (1 - margin) t``, lives if ``|w| >= (1 + margin) t``, and stays as it is
    in between. All weights move by the gradient at the masks, so a weight that is
    spliced returns with the value it has reached. Updates happen by chance, with
    probability ``(1 + gamma step)^-power``. The sparsity is what comes of it.

    Args:
        c_rate: ``c``, one number or a table of path patterns.
        gamma: how fast updates become rare.
        power: likewise.
        margin: half the width of the band, in parts of the threshold.
        end: the step from which on masks stay; never unless given.
        prunable: see :func:`dynamic`; the authors mask biases too.
        units: see :func:`dynamic`.
        seed: of the chance.

    Raises:
        ValueError: a number is negative, or (from ``init``) a pattern matches nothing.

    Example:
        >>> tx = dynamic_network_surgery(1.0)
        >>> state = tx.init({"kernel": jnp.ones((4, 4))})

    Reference:
        Guo, Yao and Chen, Dynamic network surgery for efficient DNNs, 2016,
        arXiv:1608.04493; thresholds and chances as in the authors' code.

    Differs from the paper: one draw decides for all layers of a step, and statistics
    are those of a layer's weights, without its biases.
    """
    for name, value in (("gamma", gamma), ("power", power), ("margin", margin)):
        if value < 0:
            raise ValueError(f"{name}: {value} is negative")

    def due(step: Array) -> Array:
        chance = (1.0 + gamma * step) ** -power
        draw = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), step))
        alive = True if end is None else step < end
        return (step > 0) & (draw < chance) & alive

    def thresholds(own: Units, params: Params) -> Array:
        leaves = [group.leaf for group in own.groups]
        table = c_rate if isinstance(c_rate, Mapping) else {"*": c_rate}
        rates = trees.lookup(table, leaves, 0.0, "c_rate")
        magnitudes = units_lib.pool(own, scores.magnitude(params))
        found = []
        for group, rate, pooled in zip(own.groups, rates, magnitudes, strict=True):
            others = tuple(i for i in range(pooled.ndim) if i != group.stack)
            level = pooled.mean(others) + rate * pooled.std(others)
            found.append(jnp.maximum(level, 0).ravel())
        return jnp.concatenate(found)

    def drop(event: Event) -> Dropped:
        parts = zip(
            _rules.magnitudes(event),
            event.living,
            event.along(event.memory),
            strict=True,
        )
        keeps = [
            jnp.where(alive, m >= (1 - margin) * at, m >= (1 + margin) * at)
            for m, alive, at in parts
        ]
        return Dropped(keeps)

    return _dynamic.dynamic(
        0.0,
        drop=drop,
        due=due,
        storage=Storage.LATENT,
        memory=thresholds,
        prunable=prunable,
        units=units,
    )


def sr_ste(
    n: int = 2,
    m: int = 4,
    *,
    decay: float = 2e-4,
    axis: str = "I",
    prunable: Prunable = None,
    layout: Layouts = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes SR-STE, the training of N:M sparse networks from scratch.

    The forward pass sees the n largest of every m consecutive weights. All weights move
    by the straight-through gradient, and those that are not seen decay: ``g + decay (1
    - m) w``, so that masks settle.

    Args:
        n: how many of a group live.
        m: the size of a group.
        decay: ``lambda_W``.
        axis: see :func:`jprune.units.n_m`.
        prunable: see :func:`dynamic`.
        layout: see :func:`jprune.units.n_m`.

    Raises:
        ValueError: ``decay`` is negative, or what :func:`jprune.units.n_m` says.

    Example:
        >>> state = sr_ste(2, 4).init({"kernel": jnp.ones((4, 1))})
        >>> state.masks["kernel"].ravel().tolist()
        [True, True, False, False]

    Reference:
        Zhou et al., Learning N:M fine-grained structured sparse neural networks from
        scratch, 2021, arXiv:2102.04010.
    """
    if decay < 0:
        raise ValueError(f"decay: {decay} is negative")

    def units(params: Params) -> Units:
        return units_lib.n_m(params, n, m, axis=axis, prunable=prunable, layout=layout)

    def drop(event: Event) -> Dropped:
        return Dropped(event.choose(_rules.magnitudes(event)))

    def emit(event: Event) -> list[Array]:
        return [
            grad + jnp.where(alive, 0.0, decay * weight)
            for grad, alive, weight in zip(
                event.grads, event.living, event.weights, strict=True
            )
        ]

    return _dynamic.dynamic(
        drop=drop,
        due=lambda step: step > 0,
        storage=Storage.LATENT,
        emit=emit,
        masks=lambda params: pruning.prune(
            scores.magnitude(params), units=units(params)
        ),
        units=units,
    )


def top_kast(
    sparsity: float,
    *,
    backward_sparsity: float,
    penalty: float = 1e-4,
    every: int = 1,
    prunable: Prunable = None,
    units: _dynamic.UnitsOf | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes Top-KAST: a sparse forward pass, and a sparse but larger backward pass.

    In every layer the forward pass sees A, the largest weights at ``sparsity``; B, the
    largest at ``backward_sparsity``, get a gradient, and all others rest. The gradient
    of the exploration penalty is added: ``penalty w`` in A, and ``penalty w / D`` in B
    without A, with the density ``D = 1 - sparsity``.

    Args:
        sparsity: the removed fraction of each layer in the forward pass, in [0, 1).
        backward_sparsity: the same in the backward pass, at most ``sparsity``.
        penalty: of the squared weights.
        every: the number of steps between mask updates.
        prunable: see :func:`dynamic`.
        units: see :func:`dynamic`.

    Raises:
        ValueError: a sparsity is outside [0, 1), ``backward_sparsity`` is above
            ``sparsity``, ``penalty`` is negative, or ``every`` is below 1.

    Example:
        >>> tx = top_kast(0.9, backward_sparsity=0.5)
        >>> state = tx.init({"kernel": jnp.ones((4, 4))})

    Reference:
        Jayakumar et al., Top-KAST: top-K always sparse training, 2020,
        arXiv:2106.03517.

    Differs from the paper: UNVERIFIED against public code; the form above is
    implemented.
    """
    for name, value in (
        ("sparsity", sparsity),
        ("backward_sparsity", backward_sparsity),
    ):
        selection.check_sparsity(value, name)
    if backward_sparsity > sparsity:
        raise ValueError(
            f"backward_sparsity: {backward_sparsity} is above the sparsity {sparsity}"
        )
    if penalty < 0:
        raise ValueError(f"penalty: {penalty} is negative")

    def largest(own: Units, params: Params, removed: float) -> Masks:
        magnitudes = scores.magnitude(params)
        return pruning.prune(magnitudes, removed, units=own, allocation=uniform())

    def units_of(params: Params) -> Units:
        return units(params) if units else units_lib.weights(params, prunable=prunable)

    def backward(own: Units, params: Params) -> list[Array]:
        return units_lib.living(own, params, largest(own, params, backward_sparsity))

    def drop(event: Event) -> Dropped:
        magnitudes, sizes = _rules.magnitudes(event), event.layer_sizes()
        forward, back = (
            event.top(
                magnitudes,
                None,
                jnp.asarray([selection.keep_count(size, s) for size in sizes]),
            )
            for s in (sparsity, backward_sparsity)
        )
        return Dropped(forward, memory=back)

    def emit(event: Event) -> list[Array]:
        emitted = []
        for grad, weight, seen, active in zip(
            event.grads, event.weights, event.living, event.memory, strict=True
        ):
            pull = penalty * weight / jnp.where(seen, 1.0, 1 - sparsity)
            emitted.append(jnp.where(active, grad + pull, 0.0))
        return emitted

    return _dynamic.dynamic(
        drop=drop,
        due=_timing.every(every),
        storage=Storage.LATENT,
        emit=emit,
        memory=backward,
        masks=lambda params: largest(units_of(params), params, sparsity),
        prunable=prunable,
        units=units,
    )
