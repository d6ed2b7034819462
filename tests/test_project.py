"""The project itself: style, types, layers, imports and the README's code."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BIN = pathlib.Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        [BIN / "ruff", "format", "--check", "."],
        [BIN / "ruff", "check", "."],
        [BIN / "lint-imports", "--no-cache"],
        [BIN / "pyright", "--pythonpath", sys.executable],
    ],
    ids=["format", "lint", "layers", "types"],
)
def test_static_checks(command):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_import_pulls_in_nothing_heavy():
    heavy = ["tensorflow_datasets", "orbax", "matplotlib", "sklearn", "flax", "chex"]
    heavy += ["safetensors"]
    program = f"""
import sys, time, jax, optax
begin, before = time.perf_counter(), set(sys.modules)
import jprune
seconds = time.perf_counter() - begin
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(seconds, sorted(new & set({heavy})))
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.split(maxsplit=1)
        for _ in range(3)
    ]
    assert all(found.strip() == "[]" for _, found in runs)
    assert min(float(seconds) for seconds, _ in runs) < 0.3


def test_import_runs_no_jax_computation():
    program = "import jprune; from jax._src import xla_bridge as b; print(b._backends)"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "{}"


def readme_programs():
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("page", ["sparse_training", "structured_pruning"])
def test_code_of_the_guides_runs(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(programs) >= 5
    # The programs of a page go on where the last one ended.
    exec(compile("\n".join(programs), f"docs/{page}.md", "exec"), {})


@pytest.mark.parametrize("number", range(len(readme_programs())))
def test_code_of_the_readme_runs(number):
    exec(compile(readme_programs()[number], f"README.md#{number}", "exec"), {})


def test_readme_has_the_three_ways_of_use():
    assert len(readme_programs()) >= 3


def test_public_names_are_documented_in_the_methods_table():
    import jprune

    table = (ROOT / "docs" / "methods.md").read_text()
    from experiments import methods

    for name in methods.__all__:
        assert f"`{name}`" in table, f"docs/methods.md has no row for {name}"
    for name in jprune.scores.__all__:
        assert f"`{name}`" in table, f"docs/methods.md does not name scores.{name}"
    for name in jprune.sparse_training.__all__:
        assert f"`{name}`" in table, f"docs/methods.md does not name {name}"
