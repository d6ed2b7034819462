"""Files of arrays with a manifest, in the format safetensors."""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jprune._version import __version__

Path = str | os.PathLike[str]
Tensors = dict[str, np.ndarray]

_FORMAT = "jprune"
_FORMAT_VERSION = "1"

# The dtypes that NumPy can read back.
DTYPES = {
    *("bool", "bfloat16", "float16", "float32", "float64", "complex64"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
}


def write(path: Path, tensors: Tensors, manifest: Mapping[str, Any]) -> None:
    """Writes arrays and a manifest; the file appears when it is complete.

    Raises:
        OSError: the file cannot be written; what was there before is as it was.
    """
    # Here and below: whoever neither saves nor loads does not import it.
    import safetensors
    import safetensors.numpy

    metadata = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "library_version": __version__,
        "manifest": json.dumps(manifest),
    }
    with _replacing(path) as partial:
        try:
            safetensors.numpy.save_file(tensors, partial, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(
                f"path: {os.fspath(path)!r} could not be written: {error}"
            ) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """The name of a new file that takes the place of ``path`` when it is whole."""
    path = os.path.realpath(path)  # The file that a link points at, not the link.
    partial = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        made = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = os.fstat(made).st_mode
        os.close(made)
    except OSError as error:
        reason = f"path: the file cannot be written ({error.strerror})"
        raise OSError(error.errno, reason, path) from error
    try:
        yield partial
        os.chmod(partial, mode)  # safetensors makes files that only their owner reads.
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        raise


def read(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Returns the manifest and the arrays of a file.

    Raises:
        ValueError: another file, another version of the format, or damaged.
        OSError: the file cannot be read.
    """
    import safetensors

    path = os.fspath(path)
    with open(path, "rb"):
        pass  # The errors of the system name what is wrong.
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_origin(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"path: {path!r} is truncated, damaged or no file of jprune.save: {error}"
        ) from error
    return json.loads(metadata["manifest"]), tensors


def _check_origin(path: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"path: {path!r} was not written by jprune.save")
    if metadata["format_version"] != _FORMAT_VERSION:
        raise ValueError(
            f"path: {path!r} has version {metadata['format_version']} of the format, "
            f"written by jprune {metadata['library_version']}; this jprune reads "
            f"version {_FORMAT_VERSION}"
        )
