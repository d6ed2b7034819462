"""Data sets in memory: scaled images with labels, split into streams.

The validation rows are part of the original training set, and always the same.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from experiments import task
from experiments.tasks import _debian, _jpeg, _tfds


class Data(NamedTuple):
    """The streams of a task and where they come from."""

    source: str
    streams: Mapping[str, task.Stream]


def digits() -> Data:
    """Returns scikit-learn's 1,797 digits of 8 x 8 pixels, scaled to [0, 1].

    The rows of each class are dealt out in turn: of every six, one goes to ``valid``,
    one to ``test`` and four to ``train``. That is a stratified split into 1,197, 300
    and 300 rows which no random generator can change.
    """
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    y = labels.astype(np.int32)
    rows = np.argsort(y, kind="stable")
    turn = np.arange(len(y)) % 6
    splits = {"train": turn > 1, "valid": turn == 0, "test": turn == 1}
    return Data(
        source="scikit-learn's digits (1,797 images of 8 x 8 pixels)",
        streams={s: {"x": x[rows[of]], "y": y[rows[of]]} for s, of in splits.items()},
    )


def mnist() -> Data:
    """Returns MNIST from TFDS: 50,000, 10,000 and 10,000 rows."""
    return Data(
        source="MNIST, from TensorFlow Datasets",
        streams=hold_out(_tfds.load("mnist"), valid=10_000),
    )


def fashion_mnist() -> Data:
    """Returns Fashion-MNIST from TFDS: 50,000, 10,000 and 10,000 rows.

    Where Debian's package ``dataset-fashion-mnist`` is installed, TFDS prepares it
    from the package's files, without a network.
    """
    arrays = _tfds.load(
        "fashion_mnist",
        local=_debian.fashion_mnist,
        advice="install Debian's package dataset-fashion-mnist",
    )
    return Data(
        source="Fashion-MNIST, from TensorFlow Datasets",
        streams=hold_out(arrays, valid=10_000),
    )


def cifar10() -> Data:
    """Returns CIFAR-10: 45,000, 5,000 and 10,000 rows.

    From TFDS; or, where the environment variable ``JPRUNE_CIFAR10_JPEG`` names a
    directory with ``cifar10_train.npz`` and ``cifar10_test.npz``, from the JPEG files
    in these (the format is that of :func:`experiments.tasks._jpeg.decode`). JPEG
    loses detail, so figures on such data are not figures on CIFAR-10.
    """
    directory = os.environ.get("JPRUNE_CIFAR10_JPEG")
    if directory:
        source = "CIFAR-10 re-encoded as JPEG (lossy), from local files"
        arrays = _jpeg.cifar10(pathlib.Path(directory).expanduser())
    else:
        source = "CIFAR-10, from TensorFlow Datasets"
        advice = (
            "set JPRUNE_CIFAR10_JPEG to a directory that holds the images as JPEG in "
            "cifar10_train.npz and cifar10_test.npz"
        )
        arrays = _tfds.load("cifar10", advice=advice)
    # The usual means and standard deviations of the channels of the training images.
    mean, deviation = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return Data(source, hold_out(arrays, valid=5_000, mean=mean, deviation=deviation))


def hold_out(
    arrays: Mapping[str, np.ndarray],
    *,
    valid: int,
    mean: tuple[float, ...] = (0.0,),
    deviation: tuple[float, ...] = (1.0,),
) -> dict[str, task.Stream]:
    """Returns the streams of 8-bit images, the last training rows held out.

    Args:
        arrays: ``train_x``, ``train_y``, ``test_x`` and ``test_y``.
        valid: how many of the last training rows make the stream ``valid``.
        mean: subtracted from the pixels, by channel, once they are in [0, 1].
        deviation: then divides them.

    Raises:
        ValueError: ``valid`` leaves no training rows.
    """
    train = len(arrays["train_y"]) - valid
    if not 0 < valid < len(arrays["train_y"]):
        raise ValueError(
            f"valid must be between 1 and {len(arrays['train_y']) - 1}, one less than "
            f"the training rows; got {valid}"
        )
    scale = np.float32(1 / 255) / np.array(deviation, np.float32)
    offset = np.array(mean, np.float32) / np.array(deviation, np.float32)

    def stream(split, rows):
        x = arrays[f"{split}_x"][rows] * scale - offset
        return {"x": x, "y": arrays[f"{split}_y"][rows]}

    return {
        "train": stream("train", slice(train)),
        "valid": stream("train", slice(train, None)),
        "test": stream("test", slice(None)),
    }
