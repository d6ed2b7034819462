import io
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import rich.console
from absl import flags

from experiments import compare, fit, methods, report, results, runs

NAMES = ["random", "magnitude"]


@pytest.fixture(scope="module")
def plan(tiny_task):
    return compare.configs(tiny_task, NAMES, [0.5, 0.75], seeds=2)


@pytest.fixture(scope="module")
def whole(tiny_task, plan, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, compare.compare(tiny_task, plan, workdir)


def names(records):
    return [
        (r["config"]["method"], r["config"]["sparsity"], r["config"]["seed"])
        for r in records
    ]


def stable(record):
    return {k: v for k, v in record.items() if k not in ("seconds", "date", "git")}


def interrupt_after(number):
    left = iter(range(number, -1, -1))

    def on_run(record):
        if next(left) == 1:
            raise KeyboardInterrupt

    return compare.Observer(on_run=on_run)


def test_a_seed_begins_with_its_dense_network(plan):
    assert [(run["method"], run["sparsity"], run["seed"]) for run in plan[:5]] == [
        ("dense", 0.0, 0),
        ("random", 0.5, 0),
        ("random", 0.75, 0),
        ("magnitude", 0.5, 0),
        ("magnitude", 0.75, 0),
    ]
    assert [run["seed"] for run in plan] == [0] * 5 + [1] * 5
    assert plan[0]["epochs"] == 2
    assert plan[0]["batch_size"] == 8


def test_a_config_holds_the_hyper_parameters_and_no_run_twice(tiny_task):
    plan = compare.configs(
        tiny_task, ["synflow", "dense", "synflow"], [0.5, 0.5], seeds=1, epochs=7
    )
    assert [run["method"] for run in plan] == ["dense", "synflow"]
    assert plan[1]["hyper"] == {"rounds": 100}
    assert plan[1]["epochs"] == 7
    for name in methods.__all__:
        hyper = runs.hyper_parameters(getattr(methods, name))
        json.dumps(hyper)
        assert not {"key", "sparsity", "trained", "epochs", "on_epoch"} & set(hyper)


def test_every_run_is_recorded(tiny_task, plan, whole):
    workdir, records = whole
    assert [record["config"] for record in records] == plan
    assert list(results.read(workdir / results.FILE).records) == records
    magnitude = next(r for r in records if r["config"]["method"] == "magnitude")
    assert magnitude["source"] == "made up"
    assert magnitude["live"] == 36
    assert magnitude["sparsity"] == 0.5
    density = magnitude["density"]
    assert density["fc1/kernel"] * 48 + density["fc2/kernel"] * 24 == pytest.approx(36)
    assert set(magnitude["history"]) == {"dense", "finetune"}
    assert len(magnitude["history"]["finetune"]["loss"]) == 2
    assert magnitude["valid"]["accuracy"] * 12 == pytest.approx(
        round(magnitude["valid"]["accuracy"] * 12)
    )
    seconds = magnitude["seconds"]
    parts = [seconds[name] for name in ("compilation", "scoring", "training")]
    assert sum(parts) == pytest.approx(seconds["total"], abs=1e-3)
    assert magnitude["versions"]["jprune"]


def test_test_metrics_are_those_of_the_outcome(tiny_task, whole):
    _, records = whole
    outcome = methods.random(tiny_task, 0.5, key=jax.random.key(1))
    test = tiny_task.streams["test"]
    outputs = outcome.apply(outcome.params, outcome.state, test["x"])
    (record,) = (r for r in records if names([r]) == [("random", 0.5, 1)])
    right = np.argmax(outputs, -1) == test["y"]
    assert record["test"]["accuracy"] == pytest.approx(right.mean())


def test_time_is_divided_between_marks():
    # begin, begin and end of two phases, end; wall time and compilation.
    marks = np.array([[0, 0], [3, 1], [10, 5], [11, 5], [13, 5], [14, 6.0]])
    assert runs._divided(marks) == {
        "total": 14.0,
        "compilation": 6.0,
        "training": 9 - 4.0,
        "scoring": 14 - 6 - 5.0,
    }
    assert runs._divided(marks[[0, -1]])["scoring"] == 8.0


@pytest.mark.parametrize("number", [1, 4, 8])
def test_an_interrupted_comparison_goes_on_where_it_stopped(
    tiny_task, plan, whole, tmp_path, number
):
    with pytest.raises(KeyboardInterrupt):
        compare.compare(tiny_task, plan, tmp_path, interrupt_after(number))
    saved = results.read(tmp_path / results.FILE).records
    assert [record["config"] for record in saved] == plan[:number]
    made = []
    records = compare.compare(
        tiny_task, plan, tmp_path, compare.Observer(on_run=made.append)
    )
    assert [record["config"] for record in made] == plan[number:]
    assert list(map(stable, records)) == list(map(stable, whole[1]))


def test_a_run_that_is_cut_short_leaves_nothing(tiny_task, plan, tmp_path):
    def on_epoch(phase, done, epochs):
        if phase == "train" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare.compare(tiny_task, plan, tmp_path, compare.Observer(on_epoch))
    saved = results.read(tmp_path / results.FILE).records
    assert names(saved) == [("dense", 0.0, 0)]


def test_the_run_of_a_half_written_line_is_made_again(tiny_task, plan, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / results.FILE
    os.truncate(path, path.stat().st_size - 40)
    made = []
    records = compare.compare(
        tiny_task, plan, tmp_path, compare.Observer(on_run=made.append)
    )
    assert names(made) == [("magnitude", 0.75, 1)]
    assert list(map(stable, records)) == list(map(stable, whole[1]))
    assert len(results.read(path).records) == len(plan)


def test_another_config_in_the_same_workdir_is_another_run(
    tiny_task, plan, whole, tmp_path
):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    more = compare.configs(tiny_task, ["random"], [0.5, 0.9], seeds=1)
    made = []
    compare.compare(tiny_task, more, tmp_path, compare.Observer(on_run=made.append))
    assert names(made) == [("random", 0.9, 0)]
    longer = compare.configs(tiny_task, ["random"], [0.5], seeds=1, epochs=1)
    compare.compare(tiny_task, longer, tmp_path, compare.Observer(on_run=made.append))
    assert names(made[1:]) == [("dense", 0.0, 0), ("random", 0.5, 0)]


def test_a_dense_network_that_was_deleted_is_trained_again(
    tiny_task, plan, whole, tmp_path
):
    shutil.copy(whole[0] / results.FILE, tmp_path)
    more = compare.configs(tiny_task, ["magnitude"], [0.5, 0.9], seeds=1)
    phases = []
    compare.compare(
        tiny_task,
        more,
        tmp_path,
        compare.Observer(on_epoch=lambda phase, *_: phases.append(phase)),
    )
    assert phases == ["dense"] * 3 + ["finetune"] * 3


def test_the_dense_network_is_trained_once_a_seed(tiny_task, plan, tmp_path):
    phases = []
    compare.compare(
        tiny_task,
        plan[:5],
        tmp_path,
        compare.Observer(on_epoch=lambda phase, done, _: phases.append((phase, done))),
    )
    assert phases.count(("dense", 0)) == 1
    assert phases.count(("finetune", 0)) == 2


def test_nothing_is_trained_for_a_workdir_that_cannot_be_used(
    tiny_task, plan, tmp_path, monkeypatch
):
    monkeypatch.setattr(fit, "fit", None)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="workdir: cannot write"):
        compare.compare(tiny_task, plan, tmp_path / "file" / "runs")


def test_progress_is_a_line_a_run_where_there_is_no_terminal(whole):
    console = rich.console.Console(file=io.StringIO(), width=100)
    with compare.progress(console, 10, 2) as observer:
        for record in whole[1][:2]:
            observer.on_run(record)
    first, second = console.file.getvalue().splitlines()
    assert first.startswith("1/10 dense at 0, seed 0: ")
    assert second.startswith("2/10 random at 0.5, seed 0: ")
    assert second.endswith(" s left")


def test_progress_moves_with_every_epoch_on_a_terminal(whole):
    console = rich.console.Console(
        file=io.StringIO(), width=100, force_terminal=True, legacy_windows=False
    )
    with compare.progress(console, 1, 2) as observer:
        observer.on_epoch("dense", 0, 2)
        observer.on_epoch("dense", 1, 2)
        observer.on_run(whole[1][0])
    text = console.file.getvalue()
    assert "50%" in text
    assert "1/1 dense at 0, seed 0" in text


def test_the_table_of_a_comparison_has_all_its_runs(tiny_task, whole):
    ((setting, records),) = report.by_setting(whole[1]).items()
    assert setting == ("tiny", 2, 8)
    assert len(records) == 10
    assert {s.seeds for s in report.summarize(records).values()} == {2}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--task=mist", "--task=mist"),
        ("--methods=snip,snap", "--methods"),
        ("--methods=", "--methods"),
        ("--sparsities=0.9,1", "--sparsities"),
        ("--sparsities=high", "--sparsities"),
        ("--seeds=0", "--seeds"),
        ("--epochs=0", "--epochs"),
    ],
)
def test_values_that_flags_do_not_take_are_errors(argument, message):
    values = flags.FlagValues()
    compare.define_flags(values)
    with pytest.raises(flags.IllegalFlagValueError, match=message):
        values(["compare", argument])


def test_the_default_is_the_eight_methods_that_prune_once():
    values = flags.FlagValues()
    compare.define_flags(values)
    values(["compare"])
    assert values.methods == [
        *("random", "magnitude", "snip", "iterative_snip"),
        *("grasp", "synflow", "force", "obd"),
    ]
    assert values.task == "digits_mlp"
    assert [float(s) for s in values.sparsities] == [0.8, 0.9, 0.95, 0.98, 0.99]
    assert values.seeds == 3


@pytest.fixture
def main(tiny_task, monkeypatch, capsys):
    """Runs the binary's main on the tiny task; returns exit code and output."""
    monkeypatch.setattr(compare.tasks, "digits_mlp", lambda: tiny_task)

    def run(*arguments):
        values = flags.FlagValues()
        compare.define_flags(values)
        rest = values(["compare", "--seeds=2", *arguments])
        monkeypatch.setattr(compare.flags, "FLAGS", values)
        code = 0
        try:
            compare.main(rest)
        except SystemExit as stop:
            code = stop.code
        return code, " ".join(capsys.readouterr().out.split())

    return run


def flags_of(workdir):
    return f"--workdir={workdir}", "--methods=random,magnitude", "--sparsities=0.5,0.75"


def test_the_binary_says_how_to_go_on_after_an_interrupt(main, tmp_path, monkeypatch):
    real = results.append

    def append(path, record):
        real(path, record)
        if len(results.read(path).records) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(results, "append", append)
    code, text = main(*flags_of(tmp_path))
    assert code == 130
    assert text.endswith(
        f"interrupted: 3 runs are saved in {tmp_path / results.FILE}; the same "
        "command goes on from there"
    )
    monkeypatch.undo()
    assert len(results.read(tmp_path / results.FILE).records) == 3


def test_an_interrupt_waits_for_its_time_and_a_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    with compare.deferred_interrupt() as check:
        check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_ignored_interrupt_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with compare.deferred_interrupt() as check:
            signal.raise_signal(signal.SIGINT)
            check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_binary_goes_on_and_reports(main, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / results.FILE
    os.truncate(path, path.stat().st_size - 40)
    code, text = main(*flags_of(tmp_path))
    assert code == 0
    assert "the last line was half-written and has been cut off" in text
    assert f"9 of 10 runs are in {path}" in text
    assert "1/1 magnitude at 0.75, seed 1" in text
    assert "tiny: test accuracy in %, mean ± std of 2 seeds" in text
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [
        "tiny-epochs2-batch8-accuracy.png",
        "tiny-epochs2-batch8-density.png",
    ]


def test_the_report_has_what_other_commands_have_added(main, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    arguments = f"--workdir={tmp_path}", "--methods=random", "--sparsities=0.5"
    code, text = main(*arguments)
    assert code == 0
    assert "4 of 4 runs are in" in text
    assert "magnitude" in text


def test_the_binary_stops_at_a_workdir_that_cannot_be_used(main, tmp_path):
    (tmp_path / "file").touch()
    code, _ = main(f"--workdir={tmp_path / 'file' / 'runs'}")
    assert code.startswith("error: workdir: cannot write to")
    (tmp_path / results.FILE).write_text("{}\n{}\n")
    code, _ = main(f"--workdir={tmp_path}")
    assert "results.jsonl, line 1: not a result" in code


def test_runs_of_other_code_are_pointed_out(main, whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    here = {"revision": "now", "dirty": False}
    monkeypatch.setattr(results, "provenance", lambda: {"versions": {}, "git": here})
    path = tmp_path / results.FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for revision, expected in (("before", True), ("now", False)):
        made = [line | {"git": {"revision": revision}} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in made))
        arguments = f"--workdir={tmp_path}", "--methods=random", "--sparsities=0.5"
        code, text = main(*arguments)
        assert code == 0
        assert ("made by other code: before" in text) == expected
