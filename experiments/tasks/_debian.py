"""Fashion-MNIST from Debian's package ``dataset-fashion-mnist``.

Debian compressed the four files anew: the deflated bytes are those of the original
release, only the name and the time in the gzip header are gone. With these restored
the files have the checksums that TFDS demands.
"""

import pathlib
import struct

FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")

# The original release's files, with the times (Unix seconds) in their headers.
FASHION_MNIST_TIMES = {
    "train-images-idx3-ubyte.gz": 1504176606,
    "train-labels-idx1-ubyte.gz": 1504176606,
    "t10k-images-idx3-ubyte.gz": 1504176627,
    "t10k-labels-idx1-ubyte.gz": 1504176627,
}

_HEADER = struct.Struct("<3sBIBB")
_FNAME = 8  # The flag that says that the header holds the file's name.


def restore_gzip_header(data: bytes, name: str, time: int) -> bytes:
    r"""Returns a gzip file with a file name and a time put into its header.

    Args:
        data: a gzip file whose header has no optional fields (``gzip --no-name``).
        name: the name of the uncompressed file.
        time: its modification time in Unix seconds.

    Raises:
        ValueError: ``data`` is no such file.

    Example:
        >>> import gzip
        >>> data = restore_gzip_header(gzip.compress(b"text"), "a.txt", 1504176606)
        >>> data[10:16], gzip.decompress(data)
        (b'a.txt\x00', b'text')
    """
    if len(data) < _HEADER.size or data[:4] != b"\x1f\x8b\x08\x00":
        raise ValueError(
            "data must be a gzip file without optional header fields, that is begin "
            f"with 1f 8b 08 00; it begins with {data[:4].hex(' ')!r}"
        )
    magic, _, _, level, system = _HEADER.unpack_from(data)
    header = _HEADER.pack(magic, _FNAME, time, level, system)
    return header + name.encode("latin-1") + b"\0" + data[_HEADER.size :]


def fashion_mnist(into: pathlib.Path) -> bool:
    """Writes the original release's four files to ``into``, if the package is there.

    Returns:
        Whether the package is installed.
    """
    if not all((FASHION_MNIST / name).is_file() for name in FASHION_MNIST_TIMES):
        return False
    for name, time in FASHION_MNIST_TIMES.items():
        data = (FASHION_MNIST / name).read_bytes()
        restored = restore_gzip_header(data, name.removesuffix(".gz"), time)
        (into / name).write_bytes(restored)
    return True
