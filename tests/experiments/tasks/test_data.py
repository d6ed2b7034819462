import numpy as np
import pytest

from experiments.tasks import _data


@pytest.fixture(scope="module")
def digits():
    return _data.digits()


def arrays(train=12, test=5, shape=(4, 4, 3)):
    rng = np.random.default_rng(0)
    return {
        "train_x": rng.integers(0, 256, (train, *shape), np.uint8),
        "train_y": np.arange(train, dtype=np.int32),
        "test_x": rng.integers(0, 256, (test, *shape), np.uint8),
        "test_y": np.arange(test, dtype=np.int32),
    }


def test_digits_are_split_into_disjoint_streams_that_cover_all(digits):
    from sklearn import datasets

    sizes = {name: len(s["y"]) for name, s in digits.streams.items()}
    assert sizes == {"train": 1197, "valid": 300, "test": 300}
    x = np.concatenate([s["x"] for s in digits.streams.values()])
    y = np.concatenate([s["y"] for s in digits.streams.values()])
    pixels, labels = datasets.load_digits(return_X_y=True)
    theirs = np.column_stack([pixels, labels])
    ours = np.column_stack([x.reshape(len(x), -1) * 16, y])
    # No image occurs twice in the original, so equal sets of rows are a partition.
    assert len(np.unique(theirs, axis=0)) == len(theirs)
    np.testing.assert_array_equal(np.unique(ours, axis=0), np.unique(theirs, axis=0))


def test_digits_are_scaled_images(digits):
    for stream in digits.streams.values():
        assert stream["x"].shape[1:] == (8, 8, 1)
        assert stream["x"].dtype == np.float32
        assert stream["y"].dtype == np.int32
        assert (stream["x"].min(), stream["x"].max()) == (0, 1)


def test_digits_are_stratified(digits):
    shares = {
        name: np.bincount(s["y"], minlength=10) for name, s in digits.streams.items()
    }
    total = sum(shares.values())
    np.testing.assert_allclose(shares["valid"], total / 6, atol=1)
    np.testing.assert_allclose(shares["test"], total / 6, atol=1)


def test_digits_split_is_fixed(digits):
    again = _data.digits()
    for name, stream in digits.streams.items():
        np.testing.assert_array_equal(stream["x"], again.streams[name]["x"])
    # Results on another split cannot be compared with those on this one.
    sums = {name: int((s["x"] * 16).sum()) for name, s in digits.streams.items()}
    assert sums == {"train": 374_101, "valid": 93_896, "test": 93_721}


def test_the_last_training_rows_are_held_out():
    data = arrays()
    streams = _data.hold_out(data, valid=3)
    np.testing.assert_array_equal(streams["train"]["y"], np.arange(9))
    np.testing.assert_array_equal(streams["valid"]["y"], [9, 10, 11])
    np.testing.assert_array_equal(streams["test"]["y"], np.arange(5))
    np.testing.assert_allclose(
        streams["valid"]["x"], data["train_x"][9:] / 255, rtol=1e-6
    )
    assert all(s["x"].dtype == np.float32 for s in streams.values())


def test_images_are_standardised_by_channel():
    data = arrays()
    mean, deviation = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    streams = _data.hold_out(data, valid=3, mean=mean, deviation=deviation)
    expected = (data["test_x"] / 255 - mean) / deviation
    np.testing.assert_allclose(streams["test"]["x"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("valid", [0, 12, -1])
def test_holding_out_too_much_or_nothing_is_an_error(valid):
    with pytest.raises(
        ValueError, match=rf"valid must be between 1 and 11.*got {valid}"
    ):
        _data.hold_out(arrays(), valid=valid)
