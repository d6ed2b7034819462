import io

import numpy as np
import pytest
from PIL import Image

from experiments.tasks import _cache, _data, _jpeg


def archive(path, images, labels, **options):
    """Writes images as JPEG and returns what a decoder should make of them."""
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "jpeg", **options)
        files.append(buffer.getvalue())
    data = np.frombuffer(b"".join(files), np.uint8)
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(path, jpeg=data, offsets=offsets, label=np.array(labels))
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


def smooth_images(count, size=32):
    """Images that JPEG keeps well: gradients in different colours."""
    ramp = np.linspace(0, 255, size)
    planes = np.stack(np.broadcast_arrays(ramp, ramp[:, None], 128.0), axis=-1)
    return np.stack([np.roll(planes, i, -1) for i in range(count)]).astype(np.uint8)


@pytest.fixture
def jpeg_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    directory = tmp_path / "jpeg"
    directory.mkdir()
    archive(directory / "cifar10_train.npz", smooth_images(6), [3, 1, 4, 1, 5, 9])
    archive(directory / "cifar10_test.npz", smooth_images(2), [2, 6])
    monkeypatch.setenv("JPRUNE_CIFAR10_JPEG", str(directory))
    return directory


def test_decodes_what_was_encoded(tmp_path):
    images = smooth_images(3)
    expected = archive(tmp_path / "a.npz", images, [7, 0, 2], quality=95)
    x, y = _jpeg.decode(tmp_path / "a.npz")
    assert (x.dtype, y.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_array_equal(y, [7, 0, 2])
    assert np.abs(x.astype(int) - images).mean() < 4


def test_grey_files_become_colour_images(tmp_path):
    archive(tmp_path / "a.npz", smooth_images(1)[..., 0], [1])
    x, _ = _jpeg.decode(tmp_path / "a.npz")
    assert x.shape == (1, 32, 32, 3)


def test_a_missing_array_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", jpeg=np.zeros(3, np.uint8), label=np.zeros(1))
    with pytest.raises(ValueError, match=r"a\.npz.*\['offsets'\] are missing"):
        _jpeg.decode(tmp_path / "a.npz")


@pytest.mark.parametrize("offsets", [[0, 3], [1, 2, 3], [0, 2, 4]])
def test_offsets_that_do_not_fit_are_an_error(tmp_path, offsets):
    data = np.zeros(3, np.uint8)
    np.savez(tmp_path / "a.npz", jpeg=data, offsets=offsets, label=np.zeros(2))
    with pytest.raises(ValueError, match=r"offsets must run from 0 to the 3 bytes"):
        _jpeg.decode(tmp_path / "a.npz")


def test_cifar10_is_decoded_once(jpeg_dir, monkeypatch):
    first = _jpeg.cifar10(jpeg_dir)
    np.testing.assert_array_equal(first["train_y"], [3, 1, 4, 1, 5, 9])
    assert first["test_x"].shape == (2, 32, 32, 3)
    monkeypatch.setattr(_jpeg, "decode", None)
    again = _jpeg.cifar10(jpeg_dir)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])


def test_other_archives_are_decoded_anew(jpeg_dir):
    first = _jpeg.cifar10(jpeg_dir)
    archive(jpeg_dir / "cifar10_test.npz", smooth_images(2)[::-1], [8, 8])
    again = _jpeg.cifar10(jpeg_dir)
    np.testing.assert_array_equal(again["test_y"], [8, 8])
    np.testing.assert_array_equal(again["train_x"], first["train_x"])
    assert len(list((_cache.data_dir() / "jprune").iterdir())) == 2


def test_a_missing_archive_is_named(jpeg_dir):
    (jpeg_dir / "cifar10_test.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"JPRUNE_CIFAR10_JPEG=.*cifar10_test"):
        _data.cifar10()


def test_the_source_says_that_jpeg_is_lossy(jpeg_dir, monkeypatch):
    monkeypatch.setattr(_data, "hold_out", lambda arrays, **options: arrays)
    data = _data.cifar10()
    assert data.source == "CIFAR-10 re-encoded as JPEG (lossy), from local files"
    assert data.streams["train_x"].shape == (6, 32, 32, 3)
