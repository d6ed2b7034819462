"""Images stored as JPEG files one after the other in an ``.npz`` archive."""

import hashlib
import io
import itertools
import pathlib

import numpy as np

from experiments.tasks import _cache


def decode(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and the labels of an archive of JPEG files.

    Args:
        path: an ``.npz`` file with the arrays ``jpeg`` (uint8: the bytes of all
            files, one after the other), ``offsets`` (``n + 1`` integers: where each
            file begins, and the end) and ``label`` (``n`` integers).

    Returns:
        Images ``(n, h, w, 3)`` in uint8 and labels ``(n,)`` in int32.

    Raises:
        ValueError: an array is missing, or the offsets do not fit the other arrays.
    """
    from PIL import Image

    with np.load(path) as file:
        missing = {"jpeg", "offsets", "label"} - set(file)
        if missing:
            raise ValueError(f"{path}: the arrays {sorted(missing)} are missing")
        data, offsets, label = file["jpeg"], file["offsets"], file["label"]
    if len(offsets) != len(label) + 1 or offsets[0] != 0 or offsets[-1] != len(data):
        raise ValueError(
            f"{path}: offsets must run from 0 to the {len(data)} bytes of jpeg in "
            f"{len(label)} steps, one per label; got {len(offsets)} offsets from "
            f"{offsets[0]} to {offsets[-1]}"
        )
    images = [
        np.asarray(Image.open(io.BytesIO(data[start:stop].tobytes())).convert("RGB"))
        for start, stop in itertools.pairwise(offsets)
    ]
    return np.stack(images), label.astype(np.int32)


def cifar10(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns CIFAR-10 from ``cifar10_train.npz`` and ``cifar10_test.npz``.

    The archives are decoded once; later calls read the decoded copy, which is known
    by the contents of the archives.

    Args:
        directory: where the two archives are (their format: :func:`decode`).

    Raises:
        FileNotFoundError: an archive is missing.
    """
    paths = {s: directory / f"cifar10_{s}.npz" for s in ("train", "test")}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(
                f"JPRUNE_CIFAR10_JPEG={str(directory)!r} must be a directory that "
                f"holds cifar10_train.npz and cifar10_test.npz; {path} does not exist"
            )
    digest = hashlib.sha256()
    for path in paths.values():
        digest.update(path.read_bytes())

    def make():
        arrays = {}
        for split, path in paths.items():
            arrays[f"{split}_x"], arrays[f"{split}_y"] = decode(path)
        return arrays

    return _cache.cached(f"cifar10-jpeg-{digest.hexdigest()[:12]}", make)
