"""Pruning at initialisation: masks before the first step, then one phase of training.

All methods here train what they keep for the task's budget, which is also the budget of
the dense network. Biases and norms are not prunable, and scores are taken from the
model as it is deployed (BatchNorm with its running statistics), unless a method says
otherwise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

import jprune
from experiments import fit
from experiments.methods import _phases as phases
from experiments.task import Outcome, Task
from jprune.types import Masks

# (variables, key) -> masks of the variables
Prune = Callable[[PyTree, PRNGKeyArray], Masks]


def _prune_then_train(
    task: Task,
    prune: Prune,
    *,
    key: PRNGKeyArray,
    epochs: int | None,
    on_epoch: fit.OnEpoch | None,
) -> Outcome:
    keys = phases.split(key)
    params, state = phases.initialize(task, keys.init)
    masks = prune(phases.variables(params, state), keys.score)
    return phases.train(
        task,
        params,
        state,
        masks["params"],
        key=keys.train,
        epochs=epochs,
        phase="train",
        on_epoch=on_epoch,
    )


def random(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """Random pruning: the control of every other method.

    All prunable weights of the network have the same chance, so each layer's density is
    the network's but for chance.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights.
        key: decides on weights, masks and the order of rows.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.
    """

    def prune(variables, key):
        # One compilation for all leaves, which is faster than one for each.
        scores = jax.jit(jprune.scores.random)(variables, key=key)
        return jprune.prune(scores, sparsity)

    return _prune_then_train(task, prune, key=key, epochs=epochs, on_epoch=on_epoch)


def snip(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    batch_size: int = 128,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """SNIP: keeps the weights whose removal changes the loss of one batch most.

    ``|w dL/dw|``, ranked over the whole network.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights.
        key: decides on weights, batch and the order of rows.
        batch_size: rows to score on; 100 for MNIST and 128 for CIFAR in the paper.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        Lee et al., SNIP: single-shot network pruning based on connection sensitivity,
        2019, arXiv:1810.02340.

    Differs from the paper: biases are not pruned, and the weights start as the task
    says, not from Glorot's distribution.
    """

    def prune(variables, key):
        batch = phases.draw(task, key, batch_size)
        score_fn = phases.score_fn(jprune.scores.snip, phases.loss_fn(task))
        scores = score_fn(variables, batch)
        return jprune.prune(scores, sparsity)

    return _prune_then_train(task, prune, key=key, epochs=epochs, on_epoch=on_epoch)


def iterative_snip(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    rounds: int = 60,
    batch_size: int = 128,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """Iterative SNIP: SNIP in rounds of equal factors, each on a new batch.

    Round t keeps the fraction ``density^(t / rounds)``; what is removed stays removed.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights.
        key: decides on weights, batches and the order of rows.
        rounds: T of the paper.
        batch_size: rows to score on in a round.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        de Jorge et al., Progressive skeletonization: trimming more fat from a network
        at initialization, 2021, arXiv:2006.09081.
    """

    def prune(variables, key):
        return jprune.prune_iteratively(
            phases.score_fn(jprune.scores.snip, phases.loss_fn(task)),
            variables,
            batches=phases.draw(task, key, batch_size, batches=rounds),
            sparsity=sparsity,
            rounds=rounds,
        )

    return _prune_then_train(task, prune, key=key, epochs=epochs, on_epoch=on_epoch)


def force(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    rounds: int = 60,
    batch_size: int = 128,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """FORCE: foresight connection sensitivity, where removed weights may come back.

    Round t scores all weights by ``|w dL/dv|`` at ``v = w * mask`` of round t - 1 and
    keeps the fraction ``density^(t / rounds)`` of them, each round on a new batch.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights.
        key: decides on weights, batches and the order of rows.
        rounds: T of the paper.
        batch_size: rows to score on in a round.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        de Jorge et al., Progressive skeletonization: trimming more fat from a network
        at initialization, 2021, arXiv:2006.09081.
    """

    def prune(variables, key):
        return jprune.prune_iteratively(
            phases.score_fn(jprune.scores.snip, phases.loss_fn(task)),
            variables,
            batches=phases.draw(task, key, batch_size, batches=rounds),
            sparsity=sparsity,
            rounds=rounds,
            revive=True,
        )

    return _prune_then_train(task, prune, key=key, epochs=epochs, on_epoch=on_epoch)


def grasp(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    rows_per_class: int = 10,
    temperature: float = 200.0,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """GraSP: removes the weights whose removal increases the gradient's norm.

    ``w (H g)``, ranked over the whole network, on a batch with as many rows of each
    class and with the outputs divided by a temperature.

    Args:
        task: what to train on; a classification.
        sparsity: the removed fraction of the prunable weights.
        key: decides on weights, batch and the order of rows.
        rows_per_class: rows to score on for each class.
        temperature: what the outputs are divided by.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        Wang et al., Picking winning tickets before training by preserving gradient
        flow, 2020, arXiv:2002.07376.

    Differs from the paper: the batch is not split in two, and the weights start as the
    task says.
    """

    def prune(variables, key):
        batch = phases.draw_balanced(task, key, rows_per_class)
        score_fn = phases.score_fn(
            jprune.scores.grasp,
            phases.apply_fn(task),
            loss=phases.output_loss(task),
            temperature=temperature,
        )
        scores = score_fn(variables, (batch["x"], batch))
        return jprune.prune(scores, sparsity)

    return _prune_then_train(task, prune, key=key, epochs=epochs, on_epoch=on_epoch)


def synflow(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    rounds: int = 100,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """SynFlow: conserves the flow of ones through the absolute network, without data.

    Round t keeps the fraction ``density^(t / rounds)`` by ``|w dR/dw|``, where R is the
    sum of the outputs of the network of absolute weights for an input of ones.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights.
        key: decides on weights and the order of rows.
        rounds: of pruning.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        Tanaka et al., Pruning neural networks without any data by iteratively
        conserving synaptic flow, 2020, arXiv:2006.05467.
    """

    def prune(variables, key):
        x = task.streams["train"]["x"]
        return jprune.prune_iteratively(
            phases.score_fn(jprune.scores.synflow, phases.apply_fn(task)),
            variables,
            jnp.ones((1, *x.shape[1:]), x.dtype),
            sparsity=sparsity,
            rounds=rounds,
        )

    return _prune_then_train(task, prune, key=key, epochs=epochs, on_epoch=on_epoch)
