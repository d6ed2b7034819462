"""Compares methods on a task: every method at every sparsity with every seed.

``python -m experiments.compare --task=digits_mlp --workdir=runs/compare`` trains the
dense network of each seed, then prunes and trains by each method, judges all of them
by the same code on the test stream, and ends with a table and two pictures. Runs that
the workdir already holds are not made again, so a comparison that was interrupted goes
on where it stopped, and one with more methods or sparsities adds to it.
"""

import contextlib
import functools
import inspect
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
import rich.progress
from absl import app, flags
from jaxtyping import PyTree

import jprune
from experiments import checkpoints, fit, methods, report, results, tasks
from experiments.results import Config, Record
from experiments.task import Outcome, Task

# Arguments of methods that are not hyper-parameters.
_NOT_HYPER = ("sparsity", "epochs", "trained", "on_epoch")


class Observer(NamedTuple):
    """Who is told about progress.

    Attributes:
        on_epoch: see :func:`experiments.fit.fit`.
        on_run: called with the record of each run once it is on disk.
    """

    on_epoch: fit.OnEpoch = lambda *_: None
    on_run: Callable[[Record], None] = lambda _: None


def configs(
    task: Task,
    names: Sequence[str],
    sparsities: Sequence[float],
    seeds: int,
    epochs: int | None = None,
) -> list[Config]:
    """Returns what identifies each run, in the order of running.

    The dense run of a seed comes before the seed's other runs.

    Args:
        task: the task.
        names: methods; ``dense`` is run in any case.
        sparsities: what each of the others is run at.
        seeds: how many seeds, from 0.
        epochs: of each phase of training; those of the task's budget by default.

    Example:
        >>> runs = configs(tasks.digits_mlp(), ["snip"], [0.9], seeds=1)
        >>> [(run["method"], run["sparsity"]) for run in runs]
        [('dense', 0.0), ('snip', 0.9)]
    """
    sparse = [name for name in dict.fromkeys(names) if name != report.DENSE]
    pairs = list(itertools.product(sparse, dict.fromkeys(sparsities)))
    return [
        {
            "task": task.name,
            "method": name,
            "sparsity": sparsity,
            "seed": seed,
            "epochs": epochs or task.budget.epochs,
            "batch_size": task.budget.batch_size,
            "hyper": hyper_parameters(getattr(methods, name)),
        }
        for seed in range(seeds)
        for name, sparsity in [(report.DENSE, 0.0), *pairs]
    ]


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


def compare(
    task: Task,
    runs: Sequence[Config],
    workdir: pathlib.Path,
    observer: Observer = Observer(),  # noqa: B008
) -> list[Record]:
    """Makes the runs that the workdir does not hold, and stores each as it ends.

    Args:
        task: the task of all runs.
        runs: the configs, see :func:`configs`.
        workdir: holds ``results.jsonl`` and the dense networks.
        observer: is told about progress.

    Returns:
        The records of ``runs``, in their order.

    Raises:
        ValueError: the workdir cannot be used.
    """
    found = {
        results.identity(record["config"]): record
        for record in results.prepare(workdir).records
    }
    dense = {run["seed"]: run for run in runs if run["method"] == report.DENSE}

    @functools.lru_cache(maxsize=1)
    def trained(seed: int) -> Outcome:
        path, run = _checkpoint(workdir, dense[seed]), dense[seed]
        if path.exists():
            return _restored(task, path, found[results.identity(run)])
        outcome, _ = _timed(task, run, {}, observer.on_epoch)
        return _stored(path, outcome)

    for run in runs:
        if results.identity(run) in found:
            continue
        method = getattr(methods, run["method"])
        takes_dense = "trained" in inspect.signature(method).parameters
        start = {"trained": trained(run["seed"])} if takes_dense else {}
        outcome, seconds = _timed(task, run, start, observer.on_epoch)
        if run["method"] == report.DENSE:
            _stored(_checkpoint(workdir, run), outcome)
        record = _record(task, run, outcome, seconds)
        results.append(workdir / results.FILE, record)
        found[results.identity(run)] = record
        observer.on_run(record)
    return [found[results.identity(run)] for run in runs]


def _checkpoint(workdir: pathlib.Path, run: Config) -> pathlib.Path:
    name = "{task}-epochs{epochs}-batch{batch_size}-seed{seed}".format_map(run)
    return workdir / report.DENSE / name


def _stored(path: pathlib.Path, outcome: Outcome) -> Outcome:
    checkpoints.save(path, {"params": outcome.params, "state": outcome.state})
    return outcome


def _restored(task: Task, path: pathlib.Path, record: Record) -> Outcome:
    params, state = jax.eval_shape(task.init, jax.random.key(0))
    network = checkpoints.restore(path, {"params": params, "state": state})
    return Outcome(
        apply=fit.predictor(task),
        params=network["params"],
        state=network["state"],
        masks=jprune.masks.dense(network["params"]),
        bytes=None,
        metrics=record["valid"],
        history=record["history"],
    )


def _timed(
    task: Task, run: Config, start: Mapping[str, Outcome], on_epoch: fit.OnEpoch
) -> tuple[Outcome, dict[str, float]]:
    """Makes a run, and says how its wall time divides."""
    marks = []

    def mark(phase: str = "", done: int = 0, epochs: int = 0) -> None:
        if done in (0, epochs):
            marks.append((time.perf_counter(), _compiled()[0]))
        if phase:
            on_epoch(phase, done, epochs)

    mark()
    outcome = getattr(methods, run["method"])(
        task,
        run["sparsity"],
        key=jax.random.key(run["seed"]),
        epochs=run["epochs"],
        on_epoch=mark,
        **start,
    )
    mark()
    return outcome, _divided(np.array(marks))


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


@contextlib.contextmanager
def progress(
    console: rich.console.Console, runs: int, epochs: int
) -> Iterator[Observer]:
    """Shows how far a comparison has come, and the time left.

    A bar that moves with every epoch on a terminal, elsewhere a line for each run.

    Args:
        console: where to.
        runs: how many runs there are to make.
        epochs: the epochs of each.
    """
    if not console.is_terminal:
        yield Observer(on_run=_lines(console, runs))
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console) as bars:
        bar = bars.add_task("training", total=runs * epochs)
        made = itertools.count(1)

        def on_epoch(phase: str, done: int, epochs: int) -> None:
            bars.advance(bar, 1 if done else 0)

        def on_run(record: Record) -> None:
            text = f"{next(made)}/{runs} {_name(record['config'])}"
            bars.update(bar, description=text)

        yield Observer(on_epoch, on_run)


def _lines(console: rich.console.Console, runs: int) -> Callable[[Record], None]:
    begin, made = time.perf_counter(), itertools.count(1)

    def on_run(record: Record) -> None:
        number = next(made)
        left = (time.perf_counter() - begin) / number * (runs - number)
        accuracy = 100 * record["test"]["accuracy"]
        console.print(
            f"{number}/{runs} {_name(record['config'])}: {accuracy:.1f} %, "
            f"{record['seconds']['total']:.1f} s; {left:.0f} s left",
            highlight=False,
            soft_wrap=True,
        )

    return on_run


def _name(run: Config) -> str:
    return "{method} at {sparsity:g}, seed {seed}".format_map(run)


def main(argv: Sequence[str]) -> None:
    """Runs the comparison that the flags describe."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    console = rich.console.Console()
    values = flags.FLAGS
    workdir = pathlib.Path(values.workdir)
    path = workdir / results.FILE
    try:
        found = results.prepare(workdir)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if found.torn:
        console.print(f"{path}: the last line was half-written and has been cut off")
    task = getattr(tasks, values.task)()
    sparsities = [float(text) for text in values.sparsities]
    runs = configs(task, values.methods, sparsities, values.seeds, values.epochs)
    wanted = {results.identity(run) for run in runs}
    saved = {results.identity(record["config"]) for record in found.records}
    if wanted & saved:
        console.print(f"{len(wanted & saved)} of {len(wanted)} runs are in {path}")
    try:
        with progress(console, len(wanted - saved), runs[0]["epochs"]) as observer:
            records = compare(task, runs, workdir, observer)
    except KeyboardInterrupt:
        saved = {results.identity(r["config"]) for r in results.read(path).records}
        console.print(
            f"interrupted: {len(wanted & saved)} of {len(wanted)} runs are saved in "
            f"{path}; the same command goes on from there"
        )
        sys.exit(130)
    report.write(workdir, records, console)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the binary."""
    names = [name for name in methods.__all__ if name != report.DENSE]
    flags.DEFINE_enum(
        "task", "digits_mlp", tasks.__all__, "What to train on.", flag_values=values
    )
    flags.DEFINE_list(
        "methods",
        names,
        f"Which methods to compare, of {', '.join(methods.__all__)}.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "sparsities",
        ["0.8", "0.9", "0.95", "0.98", "0.99"],
        "The removed fractions of the prunable weights.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "seeds",
        3,
        "How many seeds.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "epochs",
        None,
        "The epochs of each phase of training; the task's by default.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_string(
        "workdir",
        "runs/compare",
        "Where results, dense networks and pictures are kept.",
        flag_values=values,
    )
    flags.register_validator(
        "methods",
        lambda given: given and set(given) <= set(methods.__all__),
        f"must be names out of {', '.join(methods.__all__)}",
        flag_values=values,
    )
    flags.register_validator(
        "sparsities",
        lambda given: given and all(_is_sparsity(text) for text in given),
        "must be numbers in [0, 1)",
        flag_values=values,
    )


def _is_sparsity(text: str) -> bool:
    try:
        jprune.selection.check_sparsity(float(text))
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    define_flags()
    app.run(main)
