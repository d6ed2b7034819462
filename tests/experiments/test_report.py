import io
import types

import numpy as np
import pytest
import rich.console
from matplotlib import image

from experiments import methods, report, results

ACCURACIES = {
    ("dense", 0.0): (0.96, 0.98),
    ("random", 0.9): (0.90, 0.92),
    ("random", 0.98): (0.50, 0.70),
    ("snip", 0.9): (0.93, 0.95),
    ("snip", 0.98): (0.85,),
}
SETTING = report.Setting("digits_mlp", 30, 64)


def record(method, sparsity, seed, accuracy, *, after=False, **config):
    return {
        "config": {
            "task": "digits_mlp",
            "method": method,
            "sparsity": sparsity,
            "seed": seed,
            "epochs": 30,
            "batch_size": 64,
            **config,
        },
        "source": "made up",
        "test": {"accuracy": accuracy},
        "history": {"dense": {}, "finetune": {}} if after else {"train": {}},
        "density": {"fc1/kernel": 1 - sparsity, "fc2/kernel": 0.1 * seed},
    }


@pytest.fixture
def records():
    return [
        record(method, sparsity, seed, accuracy)
        for (method, sparsity), values in ACCURACIES.items()
        for seed, accuracy in enumerate(values)
    ]


def printed(table):
    console = rich.console.Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()


def test_summaries_are_those_of_numpy(records):
    summary = report.summarize(records)
    assert set(summary) == set(ACCURACIES)
    for run, values in ACCURACIES.items():
        std = np.std(values, ddof=1) if len(values) > 1 else 0.0
        assert summary[run] == pytest.approx((np.mean(values), std, len(values)))


def test_the_table_has_a_row_a_method_and_a_column_a_sparsity(records):
    lines = printed(report.table(SETTING, records)).splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert cells["sparsity"] == ["0.9", "0.98"]
    assert cells["random"] == ["91.0", "±", "1.4", "60.0", "±", "14.1"]
    assert cells["snip"] == ["94.0", "±", "1.4", "85.0", "(n=1)"]
    text = " ".join(" ".join(lines).split())
    assert "digits_mlp: test accuracy in %, mean ± std of 2 seeds" in text
    assert "dense: 97.0 ± 1.4; 30 epochs; made up" in text


def test_the_caption_tells_who_was_trained_twice(records):
    more = [record(name, 0.9, 0, 0.9, after=True) for name in ("obd", "magnitude")]
    text = " ".join(printed(report.table(SETTING, [*records, *more])).split())
    assert "30 epochs; as many before pruning for magnitude, obd; made up" in text


def test_the_best_of_each_column_is_bold(records):
    columns = report.table(SETTING, records).columns[1:]
    random, snip = (column._cells for column in columns)
    assert random == ["91.0 ± 1.4", "[bold]94.0 ± 1.4[/bold]"]
    assert snip == ["60.0 ± 14.1", "[bold]85.0 (n=1)[/bold]"]


def test_a_run_that_is_missing_or_diverged_shows(records):
    diverged = record("grasp", 0.9, 0, None)
    lines = printed(report.table(SETTING, [*records, diverged])).splitlines()
    (grasp,) = (line.split() for line in lines if line.split()[:1] == ["grasp"])
    assert grasp == ["grasp", "nan", "(n=1)", "-"]


def test_methods_stand_in_the_order_of_the_registry():
    names = ["unheard", "obd", "snip", "dense", "snip"]
    assert report.ordered(names) == ["dense", "snip", "obd", "unheard"]


def test_settings_are_kept_apart_and_the_last_of_equal_runs_counts(records):
    again = record("snip", 0.9, 0, 0.5)
    other = record("snip", 0.9, 0, 0.3, epochs=2)
    groups = report.by_setting([*records, other, again])
    assert set(groups) == {SETTING, SETTING._replace(epochs=2)}
    assert len(groups[SETTING]) == len(records)
    assert report.summarize(groups[SETTING])["snip", 0.9].mean == pytest.approx(0.725)
    assert groups[SETTING._replace(epochs=2)] == [other]


def test_the_accuracy_picture_shows_a_line_and_a_band_a_method(records):
    (axes,) = report.accuracy_figure(SETTING, records).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["dense", "random", "snip"]
    np.testing.assert_allclose(lines["random"].get_xdata(), [10, 50])
    np.testing.assert_allclose(lines["random"].get_ydata(), [91, 60])
    np.testing.assert_allclose(lines["dense"].get_ydata(), [97, 97])
    (random, _) = axes.collections
    low, high = random.get_datalim(axes.transData).intervaly
    std = 100 * np.std([0.5, 0.7], ddof=1)
    np.testing.assert_allclose([low, high], [60 - std, 91 + np.sqrt(2)])
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10x", "50x"]
    assert "1 / density" in axes.get_xlabel()
    assert axes.get_ylabel().startswith("test accuracy in %")
    bottom, top = axes.get_ylim()
    assert bottom < 60 - std
    assert 97 + np.sqrt(2) < top <= 100
    assert len({line.get_color() for line in axes.lines}) == 3
    assert len({line.get_marker() for line in axes.lines}) == 3


def test_every_method_has_a_style_of_its_own():
    styles = {
        str(report._style(name)) for name in methods.__all__ if name != report.DENSE
    }
    assert len(styles) == len(methods.__all__) - 1
    family = methods.__all__[methods.__all__.index("static") :]
    assert len({report._style(name)["color"] for name in family}) == len(family)


def test_the_density_picture_shows_a_panel_a_method_and_a_line_a_sparsity(records):
    random, snip = report.density_figure(SETTING, records).axes
    assert [axes.get_title(loc="left") for axes in (random, snip)] == ["random", "snip"]
    assert [line.get_label() for line in random.lines] == ["0.9", "0.98"]
    np.testing.assert_allclose(random.lines[0].get_ydata(), [0.1, 0.05])
    np.testing.assert_allclose(snip.lines[1].get_ydata(), [0.02, 0.0], atol=1e-12)
    assert [label.get_text() for label in random.get_xticklabels()] == ["fc1", "fc2"]
    assert snip.get_yscale() == "symlog"


def test_pictures_are_saved_beside_the_results(tmp_path, records):
    for one in records:
        results.append(tmp_path / results.FILE, one)
    console = rich.console.Console(file=io.StringIO(), width=100)
    found = results.read(tmp_path / results.FILE).records
    paths = report.write(tmp_path, found, console)
    assert [path.name for path in paths] == [
        "digits_mlp-epochs30-batch64-accuracy.png",
        "digits_mlp-epochs30-batch64-density.png",
    ]
    for path in paths:
        pixels = image.imread(path)
        assert pixels.shape[0] > 300
        assert pixels.std() > 0.05
        assert str(path) in console.file.getvalue()


def test_the_binary_needs_nothing_but_the_results(
    tmp_path, records, monkeypatch, capsys
):
    monkeypatch.setattr(report.flags, "FLAGS", types.SimpleNamespace(workdir=tmp_path))
    with pytest.raises(SystemExit, match="error: workdir: no results in"):
        report.main(["report"])
    for one in records:
        results.append(tmp_path / results.FILE, one)
    with (tmp_path / results.FILE).open("a") as file:
        file.write('{"config": {"ta')
    report.main(["report"])
    text = capsys.readouterr().out
    assert "the last line is half-written and left out" in text
    assert "94.0 ± 1.4" in text
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert len(results.read(tmp_path / results.FILE).records) == len(records)


def test_dense_runs_alone_have_a_table_but_no_pictures(tmp_path, records):
    console = rich.console.Console(file=io.StringIO(), width=100)
    assert report.write(tmp_path, records[:2], console) == []
    assert "dense: 97.0 ± 1.4" in console.file.getvalue()


def test_both_pictures_say_where_the_data_comes_from(records):
    accuracy = report.accuracy_figure(SETTING, records)
    assert "made up" in accuracy.axes[0].get_title(loc="left")
    assert "made up" in report.density_figure(SETTING, records).get_suptitle()
