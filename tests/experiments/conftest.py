"""A task small enough to train in no time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.task import Budget, Task


class _Streams(dict):
    """Streams of which one must not be read."""

    def __getitem__(self, name):
        if name == "test":
            raise AssertionError("a method has read the test stream")
        return super().__getitem__(name)


def _stream(rng, rows):
    y = np.arange(rows, dtype=np.int32) % 3
    x = rng.normal(size=(rows, 6)).astype(np.float32) + 2 * np.eye(3, 6)[y]
    return {"x": x.astype(np.float32), "y": y}


def _init(key):
    first, second = jnp.split(jax.random.normal(key, (6 * 8 + 8 * 3,)), [6 * 8])
    return {
        "fc1": {"kernel": first.reshape(6, 8) / np.sqrt(6), "bias": jnp.zeros(8)},
        "fc2": {"kernel": second.reshape(8, 3) / np.sqrt(8), "bias": jnp.zeros(3)},
    }, {}


def _apply(params, state, x, *, train=False, key=None):
    x = jax.nn.relu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    return x @ params["fc2"]["kernel"] + params["fc2"]["bias"], state


@pytest.fixture(scope="session")
def tiny_task():
    """Three blobs in six dimensions; 20 rows to train on and batches of 8."""
    rng = np.random.default_rng(0)
    return Task(
        name="tiny",
        source="made up",
        init=_init,
        apply=_apply,
        per_example_loss=lambda out, batch: (
            optax.softmax_cross_entropy_with_integer_labels(out, batch["y"])
        ),
        metrics=lambda out, batch: {
            "accuracy": (jnp.argmax(out, -1) == batch["y"]).astype(jnp.float32)
        },
        streams={"train": _stream(rng, 20), "valid": _stream(rng, 12)}
        | {"test": _stream(rng, 15)},
        optimizer=lambda steps: optax.adam(optax.cosine_decay_schedule(0.02, steps)),
        budget=Budget(epochs=2, batch_size=8),
    )


@pytest.fixture(scope="session")
def blind_task(tiny_task):
    """The tiny task, with a test stream that raises when it is read."""
    return tiny_task._replace(streams=_Streams(tiny_task.streams))
