import json
import pathlib

import pytest

from experiments import results

CONFIG = {"epochs": 2, "batch_size": 8}
CONFIG |= {"task": "tiny", "method": "snip", "sparsity": 0.9, "seed": 0}


def record(seed=0, **more):
    return {"config": {**CONFIG, "seed": seed}, "test": {"accuracy": 0.5}, **more}


def written(tmp_path, *lines):
    path = tmp_path / results.FILE
    path.write_bytes(b"".join(lines))
    return path


def line(seed):
    return json.dumps(record(seed)).encode() + b"\n"


def seeds(found):
    return [record["config"]["seed"] for record in found.records]


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / results.FILE
    assert results.read(path) == results.Results([], 0, False)
    for seed in range(3):
        results.append(path, record(seed))
    found = results.read(path)
    assert found.records == [record(0), record(1), record(2)]
    assert found.size == path.stat().st_size
    assert not found.torn


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    path = tmp_path / results.FILE
    losses = {"train": {"loss": [1.0, float("nan")]}}
    results.append(path, record(valid={"loss": float("inf")}, history=losses))
    assert "NaN" not in path.read_text()
    (found,) = results.read(path).records
    assert found["valid"] == {"loss": None}
    assert found["history"] == {"train": {"loss": [1.0, None]}}


@pytest.mark.parametrize("kept", [1, 20, -2])
def test_a_half_written_last_line_is_cut_off(tmp_path, kept):
    path = written(tmp_path, line(0), line(1), line(2)[:kept])
    found = results.read(path)
    assert seeds(found) == [0, 1]
    assert found.torn
    assert results.prepare(tmp_path).torn
    assert path.read_bytes() == line(0) + line(1)
    results.append(path, record(2))
    assert seeds(results.read(path)) == [0, 1, 2]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = written(tmp_path, line(0), line(1)[:-1])
    found = results.prepare(tmp_path)
    assert seeds(found) == [0, 1]
    assert not found.torn
    results.append(path, record(2))
    assert path.read_bytes() == line(0) + line(1) + line(2)


@pytest.mark.parametrize(
    "corrupt", [b'{"config": {"ta\n', b"\xff\xfe\x00\n", b"[1]\n", b'{"config": {}}\n']
)
def test_a_corrupt_line_in_the_middle_is_an_error(tmp_path, corrupt):
    path = written(tmp_path, line(0), corrupt, line(2))
    before = path.read_bytes()
    for act in (lambda: results.read(path), lambda: results.prepare(tmp_path)):
        with pytest.raises(ValueError, match=r"results\.jsonl, line 2: "):
            act()
    assert path.read_bytes() == before


def test_a_last_line_that_is_json_but_no_result_is_an_error(tmp_path):
    path = written(tmp_path, line(0), b'{"accuracy": 1}\n')
    with pytest.raises(ValueError, match="line 2: not a result"):
        results.read(path)


def test_a_workdir_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    workdir = tmp_path / "file" / "runs"
    with pytest.raises(ValueError, match=r"workdir: cannot write to '.*file/runs"):
        results.prepare(workdir)


def test_a_results_file_that_is_a_directory_is_named(tmp_path):
    (tmp_path / results.FILE).mkdir()
    with pytest.raises(ValueError, match="workdir: cannot write"):
        results.prepare(tmp_path)


def test_identity_is_that_of_the_config():
    reordered = dict(reversed(CONFIG.items()))
    assert results.identity(CONFIG) == results.identity(reordered)
    assert results.identity(json.loads(results.identity(CONFIG))) == results.identity(
        CONFIG
    )
    for name, value in (("seed", 1), ("sparsity", 0.91), ("hyper", {"rounds": 3})):
        assert results.identity({**CONFIG, name: value}) != results.identity(CONFIG)


def test_provenance_tells_versions_and_revision():
    provenance = results.provenance()
    assert set(provenance["versions"]) == {"python", "jax", "flax", "optax", "jprune"}
    assert provenance["git"] is None or set(provenance["git"]) == {"revision", "dirty"}


def test_outside_a_repository_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results._git(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results._git(pathlib.Path.cwd()) is None
