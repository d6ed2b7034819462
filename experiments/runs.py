"""Making one run: a method on a task at a sparsity with a seed, and its record."""

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

import jprune
from experiments import fit, methods, results
from experiments.results import Config, Record
from experiments.task import Outcome, Task

# Arguments of methods that are not hyper-parameters.
_NOT_HYPER = ("sparsity", "epochs", "trained", "on_epoch")


def config(
    task: Task, method: str, sparsity: float, seed: int, epochs: int | None = None
) -> Config:
    """Returns what identifies a run.

    Args:
        task: the task.
        method: a name in ``methods.__all__``.
        sparsity: the removed fraction of the prunable weights.
        seed: the seed.
        epochs: of each phase of training; those of the task's budget if None.
    """
    return {
        "task": task.name,
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "epochs": epochs or task.budget.epochs,
        "batch_size": task.budget.batch_size,
        "hyper": hyper_parameters(getattr(methods, method)),
    }


def hyper_parameters(method: Callable[..., Outcome]) -> dict[str, Any]:
    """Returns the hyper-parameters of a method with their defaults.

    Example:
        >>> hyper_parameters(methods.synflow)
        {'rounds': 100}
    """
    return {
        name: parameter.default
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.default is not parameter.empty and name not in _NOT_HYPER
    }


def starts_from_dense(method: str) -> bool:
    """Whether a method prunes the trained dense network.

    Example:
        >>> starts_from_dense("magnitude"), starts_from_dense("snip")
        (True, False)
    """
    return "trained" in inspect.signature(getattr(methods, method)).parameters


def make(
    task: Task,
    run: Config,
    *,
    trained: Outcome | None = None,
    on_epoch: fit.OnEpoch | None = None,
) -> tuple[Outcome, Record]:
    """Makes a run and judges its outcome on the test stream.

    Args:
        task: the task of the run.
        run: see :func:`config`.
        trained: the dense network of the seed, for methods that start from it.
        on_epoch: see :func:`experiments.fit.fit`.

    Returns:
        The outcome, and what :mod:`experiments.results` stores of it.
    """
    options = {} if trained is None else {"trained": trained}
    notify = on_epoch or (lambda *_: None)
    marks = []

    def mark() -> None:
        marks.append((time.perf_counter(), _compiled()[0]))

    def mark_phases(phase: str, done: int, epochs: int) -> None:
        if done in (0, epochs):
            mark()
        notify(phase, done, epochs)

    mark()
    outcome = getattr(methods, run["method"])(
        task,
        run["sparsity"],
        key=jax.random.key(run["seed"]),
        epochs=run["epochs"],
        on_epoch=mark_phases,
        **run["hyper"],
        **options,
    )
    mark()
    return outcome, _record(task, run, outcome, _divided(np.array(marks)))


def _divided(marks: np.ndarray) -> dict[str, float]:
    """Divides the time between marks of (wall time, time spent in compilation).

    The marks are the begin, the begin and end of each phase of training, and the end.
    """
    total, compilation = marks[-1] - marks[0]
    wall, compiling = (marks[2::2] - marks[1:-1:2]).sum(axis=0)
    training = wall - compiling
    return {
        "total": round(total, 4),
        "compilation": round(compilation, 4),
        "scoring": round(total - compilation - training, 4),
        "training": round(training, 4),
    }


@functools.cache
def _compiled() -> list[float]:
    """Returns a list of one number: the seconds that JAX has spent compiling so far.

    Counted are lowering and the compiler proper, since the first call.
    """
    seconds = [0.0]
    events = ("jaxpr_to_mlir_module_duration", "backend_compile_duration")

    def add(event: str, duration: float, **_: Any) -> None:
        if event.endswith(events):
            seconds[0] += duration

    jax.monitoring.register_event_duration_secs_listener(add)
    return seconds


def _record(
    task: Task, run: Config, outcome: Outcome, seconds: Mapping[str, float]
) -> Record:
    judged = fit.evaluate(
        task, outcome.apply, outcome.params, outcome.state, task.streams["test"]
    )
    sizes = jprune.masks.sizes(outcome.masks, outcome.params)
    live = {
        path: int(count)
        for path, count in jprune.masks.counts(outcome.masks, outcome.params).items()
    }
    return {
        "config": run,
        "source": task.source,
        "test": {name: float(value) for name, value in judged.items()},
        "valid": dict(outcome.metrics),
        "sparsity": 1 - sum(live.values()) / sum(sizes.values()),
        "live": sum(live.values()),
        "density": {path: live[path] / size for path, size in sizes.items()},
        "seconds": dict(seconds),
        "date": results.now(),
        **results.provenance(),
        "history": _curves(outcome.history),
    }


def _curves(history: PyTree) -> PyTree:
    """Returns histories as lists of numbers of six digits."""
    return jax.tree.map(
        lambda values: [float(f"{value:.6g}") for value in np.asarray(values, float)],
        history,
        is_leaf=lambda node: isinstance(node, list),
    )
