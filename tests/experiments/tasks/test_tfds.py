import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import tarfile
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import download_manager, extractor

from experiments import tasks
from experiments.tasks import _cache, _data, _debian, _tfds

SHAPE = (5, 4, 1)


class TinyDigits(tfds.core.GeneratorBasedBuilder):
    """A data set that asks TFDS to encode its images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=SHAPE),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(7), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": np.full(SHAPE, 20 * i, np.uint8), "label": i}


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", refuse)


def test_prepares_reads_and_caches(monkeypatch):
    first = _tfds.load("tiny_digits")
    for split, count in (("train", 7), ("test", 3)):
        labels = first[f"{split}_y"]
        assert sorted(labels) == list(range(count))
        assert first[f"{split}_x"].shape == (count, *SHAPE)
        assert (first[f"{split}_x"] == 20 * labels[:, None, None, None]).all()
    assert first["train_x"].dtype == np.uint8
    assert first["train_y"].dtype == np.int32
    monkeypatch.setattr(_tfds, "_builder", None)
    again = _tfds.load("tiny_digits")
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])


def test_rows_are_read_in_blocks_and_in_order():
    _tfds.load("tiny_digits")
    rows = _tfds._builder("tiny_digits").as_data_source("train")
    labels = [row["label"] for row in _tfds._rows(rows, at_once=3)]
    assert labels == [rows[i]["label"] for i in range(7)]


def test_a_prepared_data_set_is_read_without_preparing(monkeypatch):
    builder = _tfds._builder("tiny_digits")
    _tfds.prepare(builder)
    monkeypatch.setattr(_tfds, "prepare", None)
    assert len(_tfds.load("tiny_digits")["train_y"]) == 7


def test_another_file_format_is_an_error_that_says_what_to_do():
    builder = _tfds._builder("tiny_digits")
    _tfds.prepare(builder)
    path = builder.data_path / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"array_record: set TFDS_DATA_DIR"):
        _tfds.load("tiny_digits")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_keeps_every_pixel(channels):
    image = np.random.default_rng(0).integers(0, 256, (6, 5, channels), np.uint8)
    data = _tfds._encode_png(image).numpy()
    decoded = np.asarray(Image.open(io.BytesIO(data))).reshape(image.shape)
    np.testing.assert_array_equal(decoded, image)


def test_the_loan_ends_with_the_block_and_after_an_error():
    builder = _tfds._builder("mnist")
    original = extractor.tf
    with pytest.raises(RuntimeError), _tfds.lend_tensorflow(builder):
        assert extractor.tf is not original
        raise RuntimeError
    assert extractor.tf is original


def test_nothing_is_lent_where_tensorflow_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    original = extractor.tf
    with _tfds.lend_tensorflow(_tfds._builder("mnist")):
        assert extractor.tf is original


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tasks.mnist_mlp, ["mnist", "train-images-idx3-ubyte.gz"]),
        (tasks.cifar10_resnet8, ["JPRUNE_CIFAR10_JPEG", "cifar-10-binary.tar.gz"]),
        (tasks.fashion_mnist_mlp, ["dataset-fashion-mnist"]),
    ],
)
def test_an_unprepared_data_set_offline_says_what_to_do_at_once(
    make, words, data_dir, offline, monkeypatch
):
    monkeypatch.setattr(_debian, "FASHION_MNIST", data_dir / "absent")
    monkeypatch.delenv("JPRUNE_CIFAR10_JPEG", raising=False)
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as error:
        make()
    assert time.perf_counter() - start < 5
    for word in [*words, str(data_dir), "TFDS_DATA_DIR", "connect", "manual"]:
        assert word in str(error.value)


def test_a_look_up_that_hangs_is_given_up(monkeypatch):
    release = threading.Event()

    def hang(*args, **kwargs):
        release.wait(30)
        raise OSError

    monkeypatch.setattr("socket.getaddrinfo", hang)
    start = time.perf_counter()
    assert not _tfds.is_reachable("http://a.test/file", seconds=0.2)
    assert time.perf_counter() - start < 2
    release.set()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200 if self.path == "/file" else 404)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_reachable_is_what_answers():
    with http.server.HTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            assert _tfds.is_reachable(f"{url}/file")
            assert not _tfds.is_reachable(f"{url}/absent")
        finally:
            server.shutdown()
            thread.join()
    assert not _tfds.is_reachable(f"{url}/file")


def cifar_archive(path):
    """Writes CIFAR-10's archive with two images in each file; returns the images."""
    rng = np.random.default_rng(0)
    images, files = {"train": [], "test": []}, {}
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for name in names:
        split = "test" if name.startswith("test") else "train"
        content = b""
        for label in (1, 8):
            image = rng.integers(0, 256, (3, 32, 32), np.uint8)
            images[split].append(image.transpose(1, 2, 0))
            content += bytes([label]) + image.tobytes()
        files[name] = content
    files["batches.meta.txt"] = "\n".join(f"class{i}" for i in range(10)).encode()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return images


def test_the_official_builder_takes_files_given_by_hand(data_dir, offline, monkeypatch):
    path = data_dir / "downloads" / "manual" / "cifar10" / "cifar-10-binary.tar.gz"
    path.parent.mkdir(parents=True)
    images = cifar_archive(path)
    # TFDS would take what it once extracted from a file of the same name.
    (data_dir / "downloads" / "extracted" / f"TAR_GZ.{path.name}").mkdir(parents=True)
    builder = _tfds._builder("cifar10")
    (url,) = builder.url_infos
    content = path.read_bytes()
    info = tfds.core.download.checksums.UrlInfo(
        size=len(content),
        checksum=hashlib.sha256(content).hexdigest(),
        filename=path.name,
    )
    monkeypatch.setitem(builder.url_infos, url, info)
    arrays = _tfds.load("cifar10")
    for split, expected in images.items():
        ours = arrays[f"{split}_x"].reshape(len(expected), -1)
        theirs = np.stack(expected).reshape(len(expected), -1)
        np.testing.assert_array_equal(
            np.unique(ours, axis=0), np.unique(theirs, axis=0)
        )


def test_checksums_are_enforced(data_dir, offline):
    manual = data_dir / "downloads" / "manual" / "mnist"
    manual.mkdir(parents=True)
    for name in _debian.FASHION_MNIST_TIMES:
        (manual / name).write_bytes(gzip.compress(b"not MNIST"))
    with pytest.raises(
        download_manager.NonMatchingChecksumError, match="has wrong checksum"
    ):
        _tfds.load("mnist")


def gzip_file(content, name="", time=0):
    """Compresses as ``gzip`` does, or with neither name nor time as Debian does."""
    buffer = io.BytesIO()
    with gzip.GzipFile(name, "wb", fileobj=buffer, mtime=time) as file:
        file.write(content)
    return buffer.getvalue()


def test_restored_headers_are_those_of_gzip():
    content = b"text" * 100
    bare = gzip_file(content)
    restored = _debian.restore_gzip_header(bare, "a-file", 1504176606)
    assert restored == gzip_file(content, "a-file", 1504176606)
    assert restored != bare


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04" + b"\0" * 20])
def test_other_files_have_no_header_to_restore(data):
    with pytest.raises(ValueError, match="data must be a gzip file"):
        _debian.restore_gzip_header(data, "a-file", 0)


def test_a_header_with_a_name_is_not_given_another():
    named = gzip_file(b"text", "a-file")
    with pytest.raises(ValueError, match="begins with '1f 8b 08 08'"):
        _debian.restore_gzip_header(named, "a-file", 0)


def test_without_the_package_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(_debian, "FASHION_MNIST", tmp_path / "absent")
    assert not _debian.fashion_mnist(tmp_path)
    assert not list(tmp_path.iterdir())


needs_package = pytest.mark.skipif(
    not _debian.FASHION_MNIST.is_dir(),
    reason="Debian's package dataset-fashion-mnist is not installed",
)


@needs_package
def test_restored_files_have_the_checksums_of_the_release(tmp_path):
    assert _debian.fashion_mnist(tmp_path)
    expected = {
        info.filename: (info.size, info.checksum)
        for info in _tfds._builder("fashion_mnist").url_infos.values()
    }
    restored = {path.name: path.read_bytes() for path in tmp_path.glob("*.gz")}
    assert expected == {
        name: (len(data), hashlib.sha256(data).hexdigest())
        for name, data in restored.items()
    }


@pytest.mark.slow
@needs_package
def test_fashion_mnist_from_the_package(offline):
    data = _data.fashion_mnist()
    sizes = {name: len(stream["y"]) for name, stream in data.streams.items()}
    assert sizes == {"train": 50_000, "valid": 10_000, "test": 10_000}
    y = np.concatenate([data.streams[s]["y"] for s in ("train", "valid")])
    np.testing.assert_array_equal(np.bincount(y), [6000] * 10)
    np.testing.assert_array_equal(np.bincount(data.streams["test"]["y"]), [1000] * 10)
    # The pixels themselves, whatever the order: TFDS shuffles the rows.
    with gzip.open(_debian.FASHION_MNIST / "t10k-images-idx3-ubyte.gz") as file:
        raw = np.frombuffer(file.read()[16:], np.uint8).reshape(10_000, -1)
    ours = np.rint(data.streams["test"]["x"] * 255).astype(np.uint8)
    ours = ours.reshape(10_000, -1)
    np.testing.assert_array_equal(np.unique(ours, axis=0), np.unique(raw, axis=0))
    assert (_cache.data_dir() / "jprune" / "fashion_mnist.npz").exists()
