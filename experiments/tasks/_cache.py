"""Where data sets are stored, and decoded copies that load fast."""

import os
import pathlib
from collections.abc import Callable, Mapping

import numpy as np


def data_dir() -> pathlib.Path:
    """Returns the directory of data sets: TFDS's own, which ``TFDS_DATA_DIR`` sets."""
    default = pathlib.Path.home() / "tensorflow_datasets"
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR", default)).expanduser()


def cached(
    name: str, make: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the arrays of ``make()``, computed once and then read from disk.

    Args:
        name: the name of the copy, ``jprune/<name>.npz`` under :func:`data_dir`.
        make: a function that computes the arrays.
    """
    path = data_dir() / "jprune" / f"{name}.npz"
    if not path.exists():
        arrays = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renaming is atomic: whoever else reads sees the whole file or none.
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)
    with np.load(path) as file:
        return dict(file)
