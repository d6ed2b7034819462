"""The results of runs: one JSON object a line in ``results.jsonl``.

A line holds

==============  ====================================================================
``config``      what identifies the run: task, method, sparsity, seed, epochs, batch
                size and the method's hyper-parameters
``source``      where the task's data comes from
``test``        metrics on the test stream
``valid``       metrics on the validation stream
``sparsity``    the removed fraction of the prunable weights, as counted
``density``     the kept fraction of each prunable leaf, by path
``live``        the number of prunable weights that are kept
``history``     metrics by epoch of each phase of training
``seconds``     wall time in all and its parts: compilation, scoring, training
``versions``    of Python, JAX, Flax, Optax and jprune
``git``         the revision and whether tracked files differ from it, or null
``date``        when the run ended (UTC)
==============  ====================================================================

Every finished run is on disk before the next one begins. A process that is killed can
leave half of a last line behind; that line is dropped and its run made again.
"""

import datetime
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jprune

FILE = "results.jsonl"
Config = Mapping[str, Any]
Record = Mapping[str, Any]

_PACKAGES = ("jax", "flax", "optax")
_CONFIG = ("task", "method", "sparsity", "seed", "epochs", "batch_size")


class Results(NamedTuple):
    """What a results file holds.

    Attributes:
        records: the runs, in order of their lines.
        size: the bytes of the file up to the end of the last whole line.
        torn: whether a half-written line follows.
    """

    records: Sequence[Record]
    size: int
    torn: bool


def identity(config: Config) -> str:
    """Returns a string that is the same for equal configs and for no others.

    Example:
        >>> identity({"seed": 0, "method": "snip"})
        '{"method": "snip", "seed": 0}'
    """
    return json.dumps(config, sort_keys=True)


def read(path: pathlib.Path) -> Results:
    """Reads a results file; one that does not exist is empty.

    Args:
        path: the file.

    Raises:
        ValueError: a line is not a result. Only the last line may be half-written.
    """
    if not path.exists():
        return Results([], 0, False)
    lines = path.read_bytes().splitlines(keepends=True)
    records, size = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_parsed(line))
        except ValueError as error:
            if number == len(lines) and not _is_json(line):
                return Results(records, size, True)
            raise ValueError(
                f"{path}, line {number}: {error}; mend or delete this line"
            ) from error
        size += len(line)
    return Results(records, size, False)


def _parsed(line: bytes) -> Record:
    record = json.loads(line)
    config = record.get("config") if isinstance(record, dict) else None
    if not isinstance(config, dict) or not all(name in config for name in _CONFIG):
        raise ValueError("not a result, which has a config")
    return record


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def prepare(workdir: pathlib.Path) -> Results:
    """Makes a directory ready to take results, and reads those that it holds.

    A half-written last line is cut off.

    Args:
        workdir: the directory, made if it does not exist.

    Raises:
        ValueError: nothing can be written there, or a line is not a result.
    """
    path = workdir / FILE
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise ValueError(
            f"workdir: cannot write to {str(path)!r} ({error.strerror}); "
            "choose another directory"
        ) from error
    results = read(path)
    if results.torn:
        os.truncate(path, results.size)
    elif results.size and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return results


def append(path: pathlib.Path, record: Record) -> None:
    """Adds a run to a results file and waits until it is on disk."""
    line = json.dumps(_finite(record), allow_nan=False) + "\n"
    with path.open("ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    """Returns ``value`` with null for the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def now() -> str:
    """Returns the time as ISO 8601 in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache
def provenance() -> Record:
    """Returns the versions and the git revision of what is running."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    own = {"python": platform.python_version(), "jprune": jprune.__version__}
    return {
        "versions": {**own, **versions},
        "git": _git(pathlib.Path(__file__).parent),
    }


def of_other_code(records: Sequence[Record]) -> list[str]:
    """Returns the revisions that made some of the records, other than this one.

    Where no revision is known, nothing is said; a revision with changes on top is none
    that could be told from itself.
    """
    here = provenance()["git"]
    found = {record["git"]["revision"] for record in records if record.get("git")}
    return sorted(found - {here["revision"]}) if here else []


def _git(directory: pathlib.Path) -> Record | None:
    revision = _output("git", "-C", str(directory), "rev-parse", "HEAD")
    if revision is None:
        return None
    status = ("status", "--porcelain", "--untracked-files=no")
    changes = _output("git", "-C", str(directory), *status)
    return {"revision": revision, "dirty": bool(changes)}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
