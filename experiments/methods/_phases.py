"""What the methods share: phases of training, scoring batches and score functions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

import jprune
from experiments import fit
from experiments.task import Batch, Outcome, Task
from jprune.types import ApplyFn, LossFn, Masks, Params, ScoreFn


class Keys(NamedTuple):
    """The keys of a run: methods with the same seed start from the same weights."""

    init: PRNGKeyArray
    score: PRNGKeyArray
    train: PRNGKeyArray
    finetune: PRNGKeyArray


def split(key: PRNGKeyArray) -> Keys:
    """Returns the keys of a run."""
    return Keys(*jax.random.split(key, len(Keys._fields)))


def train(
    task: Task,
    params: Params,
    state: PyTree,
    masks: Masks,
    *,
    key: PRNGKeyArray,
    epochs: int | None,
    phase: str,
    on_epoch: fit.OnEpoch | None,
    before: Mapping[str, Any] | None = None,
) -> Outcome:
    """Trains what the masks keep for the task's budget, from a fresh optimiser.

    Args:
        task: the task.
        params: where training starts.
        state: the model's state.
        masks: which weights live.
        key: decides on the order of the rows.
        epochs: how many; those of the task's budget if None.
        phase: the name of this phase of training.
        on_epoch: see :func:`experiments.fit.fit`.
        before: the history of the phases before this one.

    Returns:
        The network of the last epoch.
    """
    tx = fit.optimizer(task, epochs or task.budget.epochs)
    params = jprune.apply_masks(params, masks)
    return run(
        task,
        fit.default_step(task, tx),
        fit.Carry(params, state, tx.init(params), masks),
        masks_of=lambda carry: carry.masks,
        key=key,
        epochs=epochs,
        phase=phase,
        on_epoch=on_epoch,
        before=before,
    )


def run(
    task: Task,
    step: fit.Step,
    carry: fit.Carry,
    *,
    masks_of: Callable[[fit.Carry], Masks],
    key: PRNGKeyArray,
    epochs: int | None,
    phase: str,
    on_epoch: fit.OnEpoch | None,
    before: Mapping[str, Any] | None = None,
) -> Outcome:
    """Runs a phase of training, with a measurement on the valid stream every epoch.

    Args:
        task: the task.
        step: one update, see :func:`experiments.fit.fit`.
        carry: where training starts.
        masks_of: ``carry -> masks``, for the network of the last epoch.
        key: decides on the order of the rows.
        epochs: how many; those of the task's budget if None.
        phase: the name of this phase of training.
        on_epoch: see :func:`experiments.fit.fit`.
        before: the history of the phases before this one.

    Returns:
        The network of the last epoch.
    """
    predict = fit.predictor(task)
    valid = jax.tree.map(jnp.asarray, dict(task.streams["valid"]))

    def evaluate(carry: fit.Carry) -> fit.Metrics:
        measured = fit.evaluate(task, predict, carry.params, carry.state, valid)
        return {f"valid_{name}": value for name, value in measured.items()}

    carry, history = fit.fit(
        step,
        carry,
        task.streams["train"],
        epochs=epochs or task.budget.epochs,
        batch_size=task.budget.batch_size,
        key=key,
        evaluate=evaluate,
        phase=phase,
        on_epoch=on_epoch,
    )
    metrics = {
        name.removeprefix("valid_"): float(values[-1])
        for name, values in history.items()
        if name.startswith("valid_")
    }
    return Outcome(
        apply=predict,
        params=carry.params,
        state=carry.state,
        masks=masks_of(carry),
        bytes=None,
        metrics=metrics,
        history={**(before or {}), phase: history},
    )


def dense(
    task: Task,
    sparsity: float = 0.0,
    *,
    key: PRNGKeyArray,
    epochs: int | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> Outcome:
    """The network without pruning: the baseline of all methods.

    Args:
        task: what to train on.
        sparsity: 0; all methods take it.
        key: decides on the initial weights and the order of the rows.
        epochs: how long to train; the task's budget by default.
        on_epoch: see :func:`experiments.fit.fit`.

    Raises:
        ValueError: the sparsity is not 0.
    """
    if sparsity != 0.0:
        raise ValueError(f"sparsity: {sparsity} is not 0, and dense prunes nothing")
    keys = split(key)
    params, state = initialize(task, keys.init)
    return train(
        task,
        params,
        state,
        jprune.masks.dense(params),
        key=keys.train,
        epochs=epochs,
        phase="dense",
        on_epoch=on_epoch,
    )


def initialize(task: Task, key: PRNGKeyArray) -> tuple[Params, PyTree]:
    """Returns the initial parameters and state of the model."""
    return jax.jit(task.init)(key)


def draw(
    task: Task, key: PRNGKeyArray, rows: int, *, batches: int | None = None
) -> Batch:
    """Returns different rows of the training stream, all of them if there are fewer.

    Args:
        task: whose training stream.
        key: decides on the rows.
        rows: how many.
        batches: how many such batches to draw, independently, along a leading axis; one
            without such an axis if None.
    """
    stream = task.streams["train"]
    size = len(stream["y"])
    rng = _generator(key)
    chosen = [
        rng.choice(size, min(rows, size), replace=False) for _ in range(batches or 1)
    ]
    index = chosen[0] if batches is None else np.stack(chosen)
    return {name: field[index] for name, field in stream.items()}


def draw_balanced(task: Task, key: PRNGKeyArray, rows_per_class: int) -> Batch:
    """Returns as many rows of the training stream for each class.

    Raises:
        ValueError: a class has fewer rows.
    """
    stream = task.streams["train"]
    rng = _generator(key)
    chosen = []
    for label in np.unique(stream["y"]):
        rows = np.flatnonzero(stream["y"] == label)
        if len(rows) < rows_per_class:
            raise ValueError(
                f"rows_per_class: {rows_per_class} are asked for, but the class "
                f"{label} of {task.name!r} has only {len(rows)}"
            )
        chosen.append(rng.choice(rows, rows_per_class, replace=False))
    index = np.concatenate(chosen)
    return {name: field[index] for name, field in stream.items()}


def _generator(key: PRNGKeyArray) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def variables(params: Params, state: PyTree) -> PyTree:
    """Returns what the functions below take for parameters.

    The state is not prunable, but the model runs on it, and as an argument it needs no
    compilation of its own.
    """
    return {"params": params, "state": state}


def apply_fn(task: Task) -> ApplyFn:
    """Returns ``(variables, x) -> outputs``, the model as it is deployed.

    Like all functions from here on, it is the same object for the same task.
    """
    return _apply_fn(task.apply)


@functools.cache
def _apply_fn(apply) -> ApplyFn:
    def of_variables(variables: PyTree, x: Array) -> Array:
        return apply(variables["params"], variables["state"], x, train=False)[0]

    return of_variables


def output_loss(task: Task) -> Callable[[Array, Batch], Array]:
    """Returns ``(outputs, batch) -> scalar``, the mean loss."""
    return _output_loss(task.per_example_loss)


@functools.cache
def _output_loss(per_example_loss) -> Callable[[Array, Batch], Array]:
    return lambda outputs, batch: jnp.mean(per_example_loss(outputs, batch))


def loss_fn(task: Task) -> LossFn:
    """Returns ``(variables, batch) -> scalar``, the mean loss."""
    return _loss_fn(task.apply, task.per_example_loss)


@functools.cache
def _loss_fn(apply, per_example_loss) -> LossFn:
    model, loss = _apply_fn(apply), _output_loss(per_example_loss)
    return lambda variables, batch: loss(model(variables, batch["x"]), batch)


@functools.cache
def score_fn(criterion: Callable[..., ScoreFn], fn: Any, **hyper: Any) -> ScoreFn:
    """Returns ``criterion(fn, **hyper)``, compiled once for equal arguments."""
    return jax.jit(criterion(fn, **hyper))
