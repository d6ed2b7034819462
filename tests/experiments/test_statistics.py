import math
import types

import numpy as np
import pytest
from scipy import stats

from experiments import intervals, report, results, statistics
from experiments.statistics import Interval

VALUES = [0.91, 0.93, 0.90, 0.96, 0.92, 0.94, 0.89, 0.95]


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_is_that_of_scipy(n, level):
    values = VALUES[:n]
    found = statistics.interval(values, level)
    low, high = stats.t.interval(level, n - 1, np.mean(values), stats.sem(values))
    assert found.seeds == n
    np.testing.assert_allclose(
        [found.mean - found.half, found.mean + found.half], [low, high], rtol=1e-12
    )


def test_a_difference_is_that_of_scipy_over_the_common_seeds():
    noise = np.random.default_rng(0).normal(scale=0.005, size=8)
    first = dict(enumerate(VALUES))
    second = dict(enumerate(np.asarray(VALUES) - 0.004 + noise))
    del first[0], second[3]
    common = [1, 2, 4, 5, 6, 7]
    expected = stats.ttest_rel(
        [first[s] for s in common], [second[s] for s in common]
    ).confidence_interval(0.95)
    found = statistics.paired(first, second)
    assert found.seeds == 6
    np.testing.assert_allclose(
        [found.mean - found.half, found.mean + found.half], expected, rtol=1e-12
    )
    assert statistics.paired({0: 1.0}, {1: 1.0}) is None


def test_the_interval_holds_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(1).normal(size=(4000, 5))
    found = [statistics.interval(row) for row in draws]
    held = np.mean([not entry.is_decided for entry in found])
    # Five standard deviations of a share of 0.95 over 4,000 draws.
    assert held == pytest.approx(0.95, abs=0.018)


def test_one_seed_decides_nothing():
    found = statistics.interval([0.9])
    assert (found.mean, found.half, found.seeds) == (0.9, math.inf, 1)
    assert not found.is_decided
    with pytest.raises(ValueError, match="values: there are none"):
        statistics.interval([])
    with pytest.raises(ValueError, match=r"level: 1\.0 is outside"):
        statistics.interval(VALUES, 1.0)


def test_a_diverged_run_decides_nothing():
    found = statistics.paired({0: 0.9, 1: math.nan}, {0: 0.1, 1: 0.1})
    assert not found.is_decided
    assert "too few to tell" in intervals.verdict(Interval(math.nan, math.nan, 2))


def record(method, sparsity, seed, accuracy):
    config = {"task": "digits_mlp", "epochs": 30, "batch_size": 64}
    run = {"method": method, "sparsity": sparsity, "seed": seed}
    return {
        "config": config | run,
        "source": "made up",
        "test": {"accuracy": accuracy},
    }


@pytest.fixture
def records():
    return [
        *(record("dense", 0.0, seed, 0.97 + 0.01 * seed) for seed in range(2)),
        *(record("static", 0.9, seed, 0.90 + 0.02 * seed) for seed in range(2)),
        *(record("rigl", 0.9, seed, 0.95 + 0.021 * seed) for seed in range(2)),
        record("rigl", 0.98, 0, 0.8),
    ]


def cells(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 1}


def test_the_tables_say_what_the_seeds_tell(records):
    (setting,) = report.by_setting(records)
    pairs = [("rigl", "static"), ("dense", "rigl")]
    text = intervals.tables(setting, records, pairs)
    found = cells(text)
    assert found["sparsity"] == ["90 %", "98 %"]
    t = stats.t.ppf(0.975, 1)  # the half width is t s / sqrt(2) = t difference / 2
    assert found["`static`"] == [f"91.00 ± {t:.2f}", "-"]
    assert found["`rigl`"] == [f"96.05 ± {t * 1.05:.2f}", "80.00 (n=1)"]
    half = f"{t * 0.05:.2f}"
    assert found["`rigl` - `static`"] == [f"**+5.05 ± {half}** (n=2)", "-"]
    assert found["`dense` - `rigl`"][1] == "+17.00 (n=1), too few to tell"
    assert "too few to tell" in found["`dense` - `rigl`"][0]
    assert f"the dense network reaches 97.50 ± {t * 0.5:.2f}" in text
    assert "(made up), 30 epochs: mean and 95 % interval over 2 seeds" in text


def test_single_seeds_are_said_to_be_too_few(records):
    alone = [one for one in records if one["config"]["seed"] == 0]
    (setting,) = report.by_setting(alone)
    text = intervals.tables(setting, alone)
    assert "one seed is too few for an interval" in text
    assert "±" not in text
    assert cells(text)["`rigl`"] == ["95.00", "80.00"]


def test_the_binary_prints_markdown(tmp_path, records, monkeypatch, capsys):
    values = types.SimpleNamespace(workdir=tmp_path, pairs=["rigl:static"])
    monkeypatch.setattr(intervals.flags, "FLAGS", values)
    with pytest.raises(SystemExit, match="error: workdir: no results in"):
        intervals.main(["intervals"])
    for one in records:
        results.append(tmp_path / results.FILE, one)
    intervals.main(["intervals"])
    assert "| `rigl` - `static` | **+5.05" in capsys.readouterr().out


@pytest.mark.parametrize("pair", ["rigl", "rigl:unheard", "rigl:set_:static"])
def test_a_pair_is_two_known_methods(pair):
    values = intervals.flags.FlagValues()
    intervals.define_flags(values)
    with pytest.raises(intervals.flags.IllegalFlagValueError, match="first:second"):
        values(["intervals", f"--pairs={pair}"])
