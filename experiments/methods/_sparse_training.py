"""Sparse training: the masks live in the optimiser and move while the network trains.

All methods here train for the task's budget, once, from the initial weights that the
dense network of the same key starts from. Of one key and sparsity, ``static``,
``set_``, ``rigl`` and ``rigl_itop`` also start from the same random masks, which have
Erdos-Renyi-Kernel densities; so seeds make pairs.

**Cadence.** The papers' numbers of steps belong to long trainings, so here the cadence
is relative to the training: masks are updated every ``steps / updates`` steps, but not
more often than every 10th, up to the part ``end`` of the training.

**Compilation.** Masks and randomness are data, so all seeds share a compiled epoch, and
where no count depends on the sparsity (``static``, ``set_``, ``rigl``, ``rigl_itop``)
all sparsities do.
"""

import functools
from collections.abc import Callable
from typing import Any

import optax
from jaxtyping import PRNGKeyArray, PyTree

import jprune
from experiments import fit
from experiments.methods import _phases as phases
from experiments.task import Outcome, Task
from jprune import allocation
from jprune.types import Params

# A weight that was grown must have had time to become larger than those that are
# dropped, also in a training of few steps.
_SHORTEST_PERIOD = 10

# (sparsity, seed=...) -> a transformation that holds masks
Holder = Callable[..., optax.GradientTransformationExtraArgs]


def _train(
    task: Task,
    sparsity: float,
    holder: Holder,
    *,
    key: PRNGKeyArray,
    epochs: int | None,
    on_epoch: fit.OnEpoch | None,
    any_sparsity: bool = False,
    **hyper: Any,
) -> Outcome:
    """Trains with ``holder(sparsity, seed=..., **hyper)`` before the task's optimiser.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights.
        holder: makes the transformation that holds the masks.
        key: decides on weights, masks and the order of rows.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.
        any_sparsity: whether the sparsity decides on the initial state alone.
        **hyper: other arguments of ``holder``, hashable.
    """
    keys = phases.split(key)
    params, state = phases.initialize(task, keys.init)
    inner = fit.optimizer(task, epochs or task.budget.epochs)
    own = _chain(holder, sparsity, inner, seed=keys.score, **hyper)
    opt_state = own.init(params)
    # The seed decides on the initial state alone, so one update serves all seeds.
    shared = _shared_chain(holder, 0.0 if any_sparsity else sparsity, inner, **hyper)
    step = fit.default_step(task, shared, forward=_as_it_is, constrain=_as_it_is)
    params = jprune.apply_masks(params, jprune.masks_of(opt_state))
    return phases.run(
        task,
        step,
        fit.Carry(params, state, opt_state, masks=()),
        masks_of=lambda carry: jprune.masks_of(carry.opt_state),
        key=keys.train,
        epochs=epochs,
        phase="train",
        on_epoch=on_epoch,
    )


def _chain(
    holder: Holder, sparsity: float, inner: optax.GradientTransformation, **options: Any
) -> optax.GradientTransformationExtraArgs:
    return jprune.sparse(optax.chain(holder(sparsity, **options), inner))


# The same object for the same arguments, so that its step is compiled once.
_shared_chain = functools.cache(_chain)


def _as_it_is(params: Params, masks: PyTree) -> Params:
    # The transformation `sparse` has the masks, and keeps the weights outside at zero.
    del masks
    return params


def _cadence(
    task: Task, epochs: int | None, updates: int, end: float
) -> dict[str, int]:
    """Returns the period of mask updates and the step of their end, both in steps."""
    if updates < 1:
        raise ValueError(f"updates: {updates} is below 1")
    steps = fit.steps_of(task, epochs or task.budget.epochs)
    return {
        "every": max(round(steps / updates), _SHORTEST_PERIOD),
        "end": _step_at("end", end, steps),
    }


def _step_at(name: str, part: float, steps: int) -> int:
    if not 0 <= part < 1:
        raise ValueError(f"{name}: {part} is not a part of the training, in [0, 1)")
    return int(part * steps)


def static(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """Static sparse training: random masks that stay, the control of this family.

    Unlike ``random``, whose layers all have the network's density, its layers have
    Erdos-Renyi-Kernel densities.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights.
        key: decides on weights, masks and the order of rows.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        Evci et al., Rigging the lottery: making all tickets winners, 2020,
        arXiv:1911.11134 (the baseline "Static").
    """
    return _train(
        task,
        sparsity,
        jprune.static,
        key=key,
        epochs=epochs,
        on_epoch=on_epoch,
        any_sparsity=True,
    )


def set_(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    zeta: float = 0.3,
    updates: int = 40,
    end: float = 0.75,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """SET: drops the weights closest to zero on either side, grows at random.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights.
        key: decides on weights, masks, growth and the order of rows.
        zeta: the fraction of a layer's living weights to drop.
        updates: how many periods between mask updates the training has.
        end: the part of the training after which masks stay.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        Mocanu et al., Scalable training of artificial neural networks with adaptive
        sparse connectivity inspired by network science, 2018, arXiv:1707.04780.

    Differs from the paper: densities and the end of the updates are RigL's, so that
    the two differ in what they drop and grow alone; the paper starts from Erdos-Renyi
    densities and updates after every epoch but the last, of 500 and more.
    """
    return _train(
        task,
        sparsity,
        jprune.set_,
        key=key,
        epochs=epochs,
        on_epoch=on_epoch,
        any_sparsity=True,
        zeta=zeta,
        allocation=_erk(),
        **_cadence(task, epochs, updates, end),
    )


@functools.cache
def _erk() -> allocation.Allocation:
    return allocation.erdos_renyi_kernel()


def rigl(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    drop_fraction: float = 0.3,
    updates: int = 40,
    end: float = 0.75,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """RigL: drops the smallest weights, grows where the dense gradient is largest.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights.
        key: decides on weights, masks and the order of rows.
        drop_fraction: of a layer's living weights, at the start; it falls along half a
            cosine to 0 at the end.
        updates: how many periods between mask updates the training has.
        end: the part of the training after which masks stay.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        Evci et al., Rigging the lottery: making all tickets winners, 2020,
        arXiv:1911.11134.

    Differs from the paper: 30 mask updates in a training, with a 40th of it between
    them; in the paper some 240 and 100 steps (ImageNet).
    """
    return _train(
        task,
        sparsity,
        jprune.rigl,
        key=key,
        epochs=epochs,
        on_epoch=on_epoch,
        any_sparsity=True,
        drop_fraction=drop_fraction,
        **_cadence(task, epochs, updates, end),
    )


def rigl_itop(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    drop_fraction: float = 0.5,
    final_fraction: float = 0.005,
    updates: int = 25,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """RigL-ITOP: RigL that explores rarely, much, and to the end of the training.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights.
        key: decides on weights, masks and the order of rows.
        drop_fraction: of a layer's living weights, at the start.
        final_fraction: the same at the end.
        updates: how many periods between mask updates the training has; in the paper
            4,000 steps of the 98,000 of CIFAR.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        Liu et al., Do we actually need dense over-parameterization? In-time
        over-parameterization in sparse training, 2021, arXiv:2102.02887.

    Differs from the paper: the period is as long in proportion to the training, but
    not in steps, and it is these that give a grown weight its time.
    """
    period = _cadence(task, epochs, updates, 0.0)["every"]
    return _train(
        task,
        sparsity,
        jprune.rigl_itop,
        key=key,
        epochs=epochs,
        on_epoch=on_epoch,
        any_sparsity=True,
        drop_fraction=drop_fraction,
        final_fraction=final_fraction,
        every=period,
        steps=fit.steps_of(task, epochs or task.budget.epochs),
    )


def dsr(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    target: float = 0.1,
    threshold: float = 1e-3,
    updates: int = 40,
    end: float = 0.75,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """Dynamic sparse reparameterisation: layers trade weights under one threshold.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights.
        key: decides on weights, masks, growth and the order of rows.
        target: the part of the living weights that the threshold is steered to drop at
            an update.
        threshold: at the start; it doubles or halves from update to update.
        updates: how many periods between mask updates the training has.
        end: the part of the training after which masks stay.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        Mostafa and Wang, Parameter efficient training of deep convolutional neural
        networks by dynamic sparse reparameterization, 2019, arXiv:1902.05967.

    Differs from the paper: the target is a part of the living weights, where the paper
    has 20,000 of the 150,000 that a WRN-28-2 has at 90 %; all periods have one length;
    updates end as RigL's do, not shortly before the training; and no layer is dense.
    """
    params, _ = phases.initialize(task, phases.split(key).init)
    leaves = jprune.trees.prunable_leaves(params)
    living = jprune.selection.keep_count(sum(leaf.size for leaf in leaves), sparsity)
    return _train(
        task,
        sparsity,
        jprune.dsr,
        key=key,
        epochs=epochs,
        on_epoch=on_epoch,
        target=max(round(target * living), 1),
        threshold=threshold,
        **_cadence(task, epochs, updates, end),
    )


def granet(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    initial: float = 0.5,
    drop_fraction: float = 0.5,
    final_fraction: float = 0.005,
    updates: int = 40,
    end: float = 0.75,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """GraNet: gradual global pruning with regeneration.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights, at the end.
        key: decides on weights, masks and the order of rows.
        initial: the removed fraction at the start, ``sparsity`` if that is smaller.
        drop_fraction: of what to regenerate, at the start.
        final_fraction: of what to regenerate, at the end.
        updates: how many periods between mask updates the training has.
        end: the part of the training after which the sparsity stays; regeneration goes
            on.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        Liu et al., Sparse training via boosting pruning plasticity with
        neuroregeneration, 2021, arXiv:2106.10404.

    Differs from the paper: the cadence is relative to the training. It trains more
    weights than the methods of constant sparsity, as the paper's does.
    """
    return _train(
        task,
        sparsity,
        jprune.granet,
        key=key,
        epochs=epochs,
        on_epoch=on_epoch,
        initial=min(initial, sparsity),
        drop_fraction=drop_fraction,
        final_fraction=final_fraction,
        steps=fit.steps_of(task, epochs or task.budget.epochs),
        **_cadence(task, epochs, updates, end),
    )


def gradual_magnitude(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    start: float = 0.25,
    end: float = 0.75,
    updates: int = 40,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """Gradual magnitude pruning: a dense start, then smaller along a cubic schedule.

    Every layer of n weights ends with ``n - round(sparsity n)`` of them. The total is
    their sum, which differs from the other methods' by less than one weight a layer.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights, at the end.
        key: decides on weights and the order of rows.
        start: the part of the training after which pruning begins.
        end: the part of the training after which masks stay.
        updates: how many periods between mask updates the training has.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        Zhu and Gupta, To prune, or not to prune: exploring the efficacy of pruning for
        model compression, 2017, arXiv:1710.01878.

    Differs from the paper: all layers have the same sparsity, also the first and the
    last, and the cadence is relative to the training. The network is dense in the
    beginning, so it trains more weights than the other methods of this family.
    """
    steps = fit.steps_of(task, epochs or task.budget.epochs)
    return _train(
        task,
        sparsity,
        jprune.gradual_magnitude,
        key=key,
        epochs=epochs,
        on_epoch=on_epoch,
        start=_step_at("start", start, steps),
        **_cadence(task, epochs, updates, end),
    )
