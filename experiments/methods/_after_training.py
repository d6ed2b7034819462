"""Pruning after training: the dense network is trained, pruned, and trained on.

Both phases take the task's budget, so these methods see twice the epochs of those that
prune at initialisation; the dense network is one for all sparsities of a seed. The
second phase starts from a fresh optimiser and its full learning rate ("learning-rate
rewinding"; Renda et al., Comparing rewinding and fine-tuning in neural network pruning,
2020, arXiv:2003.02389), where the papers below retrain at a smaller one.
"""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

import jprune
from experiments import fit
from experiments.methods import _phases as phases
from experiments.task import Batch, Outcome, Task
from jprune.types import Masks


def _prune_then_finetune(
    task: Task,
    prune: Callable[[Outcome, PRNGKeyArray], Masks],
    trained: Outcome | None,
    *,
    key: PRNGKeyArray,
    epochs: int | None,
    on_epoch: fit.OnEpoch | None,
) -> Outcome:
    keys = phases.split(key)
    if trained is None:
        trained = phases.dense(task, key=key, epochs=epochs, on_epoch=on_epoch)
    return phases.train(
        task,
        trained.params,
        trained.state,
        prune(trained, keys.score),
        key=keys.finetune,
        epochs=epochs,
        phase="finetune",
        on_epoch=on_epoch,
        before=trained.history,
    )


def magnitude(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    trained: Outcome | None = None,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """Magnitude pruning: removes the smallest weights of the trained network.

    ``|w|``, ranked over the whole network, in one step.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights.
        key: decides on weights and the order of rows.
        trained: the outcome of ``dense`` with this key, which is trained if it is None.
        epochs: of each phase; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        Han et al., Learning both weights and connections for efficient neural networks,
        2015, arXiv:1506.02626.

    Differs from the paper: one threshold for the network instead of one a layer that is
    proportional to the standard deviation of its weights, one round instead of several,
    and the full learning rate afterwards.
    """

    def prune(trained, key):
        return jprune.prune(jprune.scores.magnitude(trained.params), sparsity)

    return _prune_then_finetune(
        task, prune, trained, key=key, epochs=epochs, on_epoch=on_epoch
    )


def obd(
    task: Task,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    trained: Outcome | None = None,
    rows: int = 500,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """Optimal Brain Damage: removes the weights whose removal costs least.

    To second order the cost is ``h_kk w_k^2 / 2`` at the trained network, with h the
    diagonal of the Gauss-Newton matrix: the paper's Levenberg-Marquardt approximation,
    which is never negative. It is ranked over the whole network.

    Args:
        task: what to train on.
        sparsity: the removed fraction of the prunable weights.
        key: decides on weights, rows and their order.
        trained: the outcome of ``dense`` with this key, which is trained if it is None.
        rows: of the training stream, to average the curvature over.
        epochs: of each phase; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Reference:
        LeCun, Denker & Solla, Optimal brain damage, 1989, NIPS.

    Differs from the paper: one round instead of several, at most ``rows`` training
    rows, and a diagonal that does not drop the interactions inside a layer.
    """

    def prune(trained, key):
        batch = phases.draw(task, key, rows)
        score_fn = phases.score_fn(
            jprune.scores.obd,
            phases.apply_fn(task),
            diagonal=_curvature(task.per_example_loss),
        )
        variables = phases.variables(trained.params, trained.state)
        scores = score_fn(variables, (batch["x"], batch))
        return jprune.prune(scores["params"], sparsity)

    return _prune_then_finetune(
        task, prune, trained, key=key, epochs=epochs, on_epoch=on_epoch
    )


@functools.cache
def _curvature(per_example_loss) -> Callable[..., Callable[..., PyTree]]:
    def loss(output: Array, row: Batch) -> Array:
        one = jax.tree.map(lambda leaf: leaf[None], (output, row))
        return per_example_loss(*one)[0]

    return functools.partial(jprune.scores.gauss_newton_diagonal, loss=loss)
