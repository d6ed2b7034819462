"""Selection over leaves on a mesh of eight devices, in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parent / "programs" / "eight_devices.py"


@pytest.fixture(scope="module")
def report():
    flags = "--xla_force_host_platform_device_count=8"
    ran = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
@pytest.mark.parametrize("groups", ["together", "each", "stack"])
class TestSelection:
    def test_masks_are_those_of_a_stable_sort(self, report, axes, groups):
        assert report[f"{axes}/{groups}"]["wrong"] == 0

    def test_only_counts_are_communicated(self, report, axes, groups):
        found = report[f"{axes}/{groups}"]
        assert found["largest_all_reduce"] <= found["groups"]
        assert found["other_collectives"] == []

    def test_masks_are_sharded_as_scores(self, report, axes, groups):
        assert report[f"{axes}/{groups}"]["moved"] == []


def test_prune_of_sharded_scores(report):
    assert report["prune"] == {"wrong": 0, "other_collectives": [], "moved": []}


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_sparse_training_on_a_mesh(report, axes):
    found = report[f"{axes}/rigl"]
    assert found["wrong"] == 0 and found["changed"] > 0
    assert found["other_collectives"] == []
    assert found["largest_all_reduce"] <= 2
