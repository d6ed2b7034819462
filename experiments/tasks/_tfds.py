"""Image data sets of TensorFlow Datasets (TFDS), prepared without TensorFlow."""

import contextlib
import http.client
import importlib.util
import io
import pathlib
import sys
import tempfile
import threading
import types
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments.tasks import _cache


def load(
    name: str,
    *,
    local: Callable[[pathlib.Path], bool] = lambda into: False,
    advice: str = "",
) -> dict[str, np.ndarray]:
    """Returns the splits ``train`` and ``test`` of a TFDS image data set.

    The data set is prepared if it is not, from files given by hand, files that
    ``local`` finds, or the network, and decoded once.

    Args:
        name: the name of the data set in TFDS.
        local: a function that writes the original files to a directory if this
            machine has them, and returns whether it has.
        advice: what to do when ``local`` finds nothing, for the error message.

    Returns:
        ``train_x`` and ``test_x`` in uint8, ``train_y`` and ``test_y`` in int32.

    Raises:
        FileNotFoundError: the data set is not prepared and its host is out of reach.
        ValueError: the data set is prepared in another file format.
    """

    def make():
        builder = _builder(name)
        if not builder.is_prepared():
            prepare(builder, local=local, advice=advice)
        arrays = {}
        for split in ("train", "test"):
            rows = list(_rows(builder.as_data_source(split=split)))
            arrays[f"{split}_x"] = np.stack([row["image"] for row in rows])
            arrays[f"{split}_y"] = np.array([row["label"] for row in rows], np.int32)
        return arrays

    return _cache.cached(name, make)


def _rows(source: Any, at_once: int = 1000) -> Iterator[dict[str, Any]]:
    # One row at a time takes half as long again.
    for start in range(0, len(source), at_once):
        yield from source.__getitems__(
            list(range(start, min(start + at_once, len(source))))
        )


def _builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(
            name, data_dir=_cache.data_dir(), file_format="array_record"
        )
    except ValueError as error:
        raise ValueError(
            f"{name} under {_cache.data_dir()} must be stored as array_record: set "
            "TFDS_DATA_DIR to another directory, in which it will be prepared anew"
        ) from error


def prepare(
    builder: Any,
    *,
    local: Callable[[pathlib.Path], bool] = lambda into: False,
    advice: str = "",
) -> None:
    """Prepares a data set with checksums enforced.

    Args:
        builder: a TFDS builder.
        local: see :func:`load`.
        advice: see :func:`load`.

    Raises:
        FileNotFoundError: neither files at hand nor the network can provide it.
    """
    import tensorflow_datasets as tfds

    downloads = _cache.data_dir() / "downloads"
    # By name: the files of MNIST and of Fashion-MNIST have the same names.
    manual = downloads / "manual" / builder.name
    files = sorted(info.filename for info in (builder.url_infos or {}).values())
    with contextlib.ExitStack() as stack:
        if not all((manual / file).is_file() for file in files):
            given = manual
            manual = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if not local(manual):
                _check_reachable(builder, given, files, advice)
        stack.enter_context(lend_tensorflow(builder))
        builder.download_and_prepare(
            download_dir=downloads,
            download_config=tfds.download.DownloadConfig(
                manual_dir=manual,
                extract_dir=downloads / "extracted" / builder.name,
                try_download_gcs=False,
                force_checksums_validation=True,
            ),
        )


@contextlib.contextmanager
def lend_tensorflow(builder: Any) -> Iterator[None]:
    """Lends TFDS what it needs of TensorFlow to prepare images, if that is absent.

    Only what the extractor, the image feature and the builders of MNIST, CIFAR and
    their relatives call: files and PNG encoding. These are private modules of TFDS
    4.9.
    """
    if importlib.util.find_spec("tensorflow"):
        yield
        return
    from etils import epath
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.core.features import image_feature
    from tensorflow_datasets.core.utils import tf_utils

    gfile = types.SimpleNamespace(GFile=lambda path, mode: epath.Path(path).open(mode))
    stand_in = types.SimpleNamespace(
        compat=types.SimpleNamespace(as_text=str),
        executing_eagerly=lambda: True,
        image=types.SimpleNamespace(encode_png=_encode_png),
        io=types.SimpleNamespace(gfile=gfile),
    )
    modules = (extractor, image_feature, tf_utils, sys.modules[builder.__module__])
    originals = [(module, module.tf) for module in modules if hasattr(module, "tf")]
    try:
        for module, _ in originals:
            module.tf = stand_in
        yield
    finally:
        for module, original in originals:
            module.tf = original


def _encode_png(image: np.ndarray) -> Any:
    from PIL import Image

    buffer = io.BytesIO()
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(pixels).save(buffer, format="png")
    return types.SimpleNamespace(numpy=buffer.getvalue)


def _check_reachable(
    builder: Any, manual: pathlib.Path, files: list[str], advice: str
) -> None:
    """Raises at once where TFDS would retry for minutes."""
    url = min(builder.url_infos)
    if is_reachable(url):
        return
    ways = [
        "connect to the network and call again",
        f"put {', '.join(files)} from {urllib.parse.urlsplit(url).hostname} into "
        f"{manual}",
        f"copy {_cache.data_dir() / builder.name} from a machine that has it "
        "(TFDS_DATA_DIR sets another place)",
    ]
    if advice:
        ways.insert(0, advice)
    raise FileNotFoundError(
        f"{builder.name} is not prepared under {_cache.data_dir()}, and {url} is out "
        f"of reach. Do one of these: {'; '.join(ways)}."
    )


def is_reachable(url: str, *, seconds: float = 3.0) -> bool:
    """Whether ``url`` answers a HEAD request within ``seconds``."""
    answers = []

    def ask():
        request = urllib.request.Request(url, method="HEAD")
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            urllib.request.urlopen(request, timeout=seconds) as answer,
        ):
            answers.append(answer.status)

    # In a thread, as the look-up of the name heeds no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)
