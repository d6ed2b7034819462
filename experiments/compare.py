"""Compares methods on a task: every method at every sparsity with every seed.

``python -m experiments.compare --task=digits_mlp --workdir=runs/compare`` trains the
dense network of each seed, then prunes and trains by each method, judges all of them
by the same code on the test stream, and ends with a table and two pictures. Runs that
the workdir already holds are not made again, so a comparison that was interrupted goes
on where it stopped, and one with more methods or sparsities adds to it.
"""

import contextlib
import functools
import itertools
import pathlib
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import rich.console
import rich.progress
from absl import app, flags, logging

import jprune
from experiments import checkpoints, fit, methods, report, results, runs, tasks
from experiments.results import Config, Record
from experiments.task import Outcome, Task

# Those that prune once, before or after training.
DEFAULT_METHODS = (
    "random",
    "magnitude",
    "snip",
    "iterative_snip",
    "grasp",
    "synflow",
    "force",
    "obd",
)


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
        >>> plan = configs(tasks.digits_mlp(), ["snip"], [0.9], seeds=1)
        >>> [(run["method"], run["sparsity"]) for run in plan]
        [('dense', 0.0), ('snip', 0.9)]
    """
    sparse = [name for name in dict.fromkeys(names) if name != report.DENSE]
    pairs = list(itertools.product(sparse, dict.fromkeys(sparsities)))
    return [
        runs.config(task, name, sparsity, seed, epochs)
        for seed in range(seeds)
        for name, sparsity in [(report.DENSE, 0.0), *pairs]
    ]


def compare(
    task: Task,
    plan: Sequence[Config],
    workdir: pathlib.Path,
    observer: Observer | None = None,
) -> list[Record]:
    """Makes the runs that the workdir does not hold, and stores each as it ends.

    Args:
        task: the task of all runs.
        plan: the configs, see :func:`configs`.
        workdir: holds ``results.jsonl`` and the dense networks.
        observer: is told about progress.

    Returns:
        The records of the plan, in its order.

    Raises:
        ValueError: the workdir cannot be used.
    """
    on_epoch, on_run = observer or Observer()
    found = {
        results.identity(record["config"]): record
        for record in results.prepare(workdir).records
    }
    dense = {run["seed"]: run for run in plan if run["method"] == report.DENSE}

    @functools.lru_cache(maxsize=1)
    def trained(seed: int) -> Outcome:
        run = dense[seed]
        path = _checkpoint(workdir, run)
        if path.exists():
            return _restored(task, path, found[results.identity(run)])
        outcome, _ = runs.make(task, run, on_epoch=on_epoch)
        return _stored(path, outcome)

    for run in plan:
        if results.identity(run) in found:
            continue
        starts_from_dense = runs.starts_from_dense(run["method"])
        start = trained(run["seed"]) if starts_from_dense else None
        outcome, record = runs.make(task, run, trained=start, on_epoch=on_epoch)
        if run["method"] == report.DENSE:
            _stored(_checkpoint(workdir, run), outcome)
        results.append(workdir / results.FILE, record)
        found[results.identity(run)] = record
        on_run(record)
    return [found[results.identity(run)] for run in plan]


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


@contextlib.contextmanager
def progress(
    console: rich.console.Console, count: int, epochs: int
) -> Iterator[Observer]:
    """Shows how far a comparison has come, and the time left.

    A bar that moves with every epoch on a terminal, elsewhere a line for each run.

    Args:
        console: where to.
        count: how many runs there are to make.
        epochs: the epochs of each.
    """
    if not console.is_terminal:
        yield Observer(on_run=_lines(console, count))
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
        bar = bars.add_task("training", total=count * epochs)
        made = itertools.count(1)

        def on_epoch(phase: str, done: int, epochs: int) -> None:
            bars.advance(bar, 1 if done else 0)

        def on_run(record: Record) -> None:
            text = f"{next(made)}/{count} {_name(record['config'])}"
            bars.update(bar, description=text)

        yield Observer(on_epoch, on_run)


def _lines(console: rich.console.Console, count: int) -> Callable[[Record], None]:
    begin, made = time.perf_counter(), itertools.count(1)

    def on_run(record: Record) -> None:
        number = next(made)
        left = (time.perf_counter() - begin) / number * (count - number)
        accuracy = 100 * record["test"]["accuracy"]
        console.print(
            f"{number}/{count} {_name(record['config'])}: {accuracy:.1f} %, "
            f"{record['seconds']['total']:.1f} s; {left:.0f} s left",
            highlight=False,
            soft_wrap=True,
        )

    return on_run


def _name(run: Config) -> str:
    return "{method} at {sparsity:g}, seed {seed}".format_map(run)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Puts Ctrl-C off until a function is called that raises KeyboardInterrupt then.

    An exception in the midst of a compilation can get lost, or crash the interpreter
    when it ends. A second Ctrl-C raises at once.
    """
    asked = []

    def ask(number: int, frame: types.FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # such as ignored, under nohup
        yield check
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv: Sequence[str]) -> None:
    """Runs the comparison that the flags describe."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    console = rich.console.Console()
    workdir = pathlib.Path(flags.FLAGS.workdir)
    path = workdir / results.FILE
    try:
        found = results.prepare(workdir)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if found.torn:
        text = f"{path}: the last line was half-written and has been cut off"
        console.print(text, soft_wrap=True)
    try:
        _run(flags.FLAGS, console, workdir, found.records)
    except KeyboardInterrupt:
        saved = len(results.read(path).records)
        console.print(
            f"interrupted: {saved} runs are saved in {path}; the same command goes on "
            "from there",
            soft_wrap=True,
        )
        sys.exit(130)


def _run(
    values: flags.FlagValues,
    console: rich.console.Console,
    workdir: pathlib.Path,
    records: Sequence[Record],
) -> None:
    task = getattr(tasks, values.task)()
    sparsities = [float(text) for text in values.sparsities]
    plan = configs(task, values.methods, sparsities, values.seeds, values.epochs)
    wanted = {results.identity(run) for run in plan}
    left = wanted - {results.identity(record["config"]) for record in records}
    if len(left) < len(wanted):
        done = len(wanted) - len(left)
        text = f"{done} of {len(wanted)} runs are in {workdir / results.FILE}"
        console.print(text, soft_wrap=True)
        kept = [r for r in records if results.identity(r["config"]) in wanted]
        if others := results.of_other_code(kept):
            text = f"some of them were made by other code: {', '.join(others)}"
            console.print(f"{text}; another --workdir makes all anew", soft_wrap=True)
    with (
        deferred_interrupt() as check,
        progress(console, len(left), plan[0]["epochs"]) as shown,
    ):

        def on_epoch(phase: str, done: int, epochs: int) -> None:
            check()
            shown.on_epoch(phase, done, epochs)

        def on_run(record: Record) -> None:
            shown.on_run(record)
            check()

        made = compare(task, plan, workdir, Observer(on_epoch, on_run))
    # What other commands have added to the same table is part of the report.
    (setting,) = report.by_setting(made)
    stored = report.by_setting(results.read(workdir / results.FILE).records)
    report.write(workdir, stored[setting], console)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the binary."""
    flags.DEFINE_enum(
        "task", "digits_mlp", tasks.__all__, "What to train on.", flag_values=values
    )
    flags.DEFINE_list(
        "methods",
        list(DEFAULT_METHODS),
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
    # Orbax tells of every step of every checkpoint.
    logging.set_verbosity(logging.WARNING)
    app.run(main)
