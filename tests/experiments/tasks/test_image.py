"""The contract that all tasks keep."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import tasks
from experiments.tasks import _data, _image, _models

SHAPES = {"mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


@pytest.fixture
def tiny_data(monkeypatch):
    """Replaces every data set that is not embedded by a few rows."""
    for name, shape in SHAPES.items():
        rows = {"x": np.zeros((4, *shape), np.float32), "y": np.arange(4) % 10}
        data = _data.Data(name, {s: rows for s in ("train", "valid", "test")})
        monkeypatch.setattr(_data, name, lambda data=data: data)


@pytest.mark.parametrize("name", tasks.__all__)
def test_every_export_is_a_task_of_its_name(name, tiny_data):
    make = getattr(tasks, name)
    assert make.__name__ == name
    assert not inspect.signature(make).parameters
    task = make()
    assert task.name == name
    assert set(task.streams) == {"train", "valid", "test"}
    assert task.budget.epochs > 0
    assert task.budget.batch_size > 0
    x = task.streams["train"]["x"]
    params, state = jax.eval_shape(task.init, jax.random.key(0))
    out, _ = jax.eval_shape(task.apply, params, state, x)
    assert out.shape == (len(x), 10)
    updates, _ = jax.eval_shape(
        lambda params: (tx := task.optimizer(10)).update(
            params, tx.init(params), params
        ),
        params,
    )
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_exports_are_all_tasks_of_the_module():
    functions = inspect.getmembers(_image, inspect.isfunction)
    own = {
        name
        for name, function in functions
        if function.__module__ == _image.__name__
        and not name.startswith("_")
        and not inspect.signature(function).parameters
    }
    assert own == set(tasks.__all__)


def test_a_task_made_twice_has_the_same_functions():
    first, again = tasks.digits_mlp(), tasks.digits_mlp()
    for field in ("init", "apply", "per_example_loss", "metrics", "optimizer"):
        assert getattr(first, field) is getattr(again, field)


def test_the_package_imports_no_data_library():
    code = (
        "import sys, experiments.tasks; print([m for m in ('sklearn', "
        "'tensorflow_datasets', 'PIL', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_loss_and_metrics_by_example():
    out = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    batch = {"y": jnp.array([0, 2])}
    np.testing.assert_allclose(
        _image.cross_entropy(out, batch),
        [np.log(np.exp(2) + 2) - 2, np.log(np.exp(1) + 2)],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(_image.accuracy(out, batch)["accuracy"], [1, 0])


def test_momentum_decays_weights_and_its_rate():
    tx = _image.momentum(0.1, 0.01)(2)
    params, grads = jnp.array([2.0]), jnp.array([1.0])
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    np.testing.assert_allclose(updates, [-0.1 * (1 + 0.01 * 2)], rtol=1e-6)
    params = optax.apply_updates(params, updates)
    updates, _ = tx.update(grads, state, params)
    velocity = 0.9 * 1.02 + 1 + 0.01 * params
    np.testing.assert_allclose(updates, -0.05 * velocity, rtol=1e-6)


def test_init_follows_the_key():
    init, _ = _image.pure(_models.MLP(hidden=()), (3,))
    kernels = [init(jax.random.key(seed))[0]["fc1"]["kernel"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.allclose(kernels[0], kernels[2])
