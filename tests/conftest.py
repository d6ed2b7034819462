"""Shape checks on the whole library, and the networks of the golden data."""

import json
import pathlib
import sys
import types
from typing import NamedTuple

import beartype
import jaxtyping

# The import hook takes the name of a checker, and this one accepts an int for a float.
_checker = types.ModuleType("jprune_checker")
_checker.check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
sys.modules[_checker.__name__] = _checker

# Before anything imports jprune: its annotations are checked at every call.
with jaxtyping.install_import_hook("jprune", "jprune_checker.check"):
    import jprune

import jax
import jax.numpy as jnp
import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"


class GoldenNet(NamedTuple):
    """A fixed network, a batch of 64, and the reference outputs for it."""

    name: str
    params: dict
    batch: tuple
    apply: callable
    loss: callable
    objective: callable
    arrays: dict
    numbers: dict

    def golden(self, quantity):
        """The stored arrays of a quantity, by the path of their leaf."""
        prefix = f"{self.name}/{quantity}/"
        found = {
            key.removeprefix(prefix): value
            for key, value in self.arrays.items()
            if key.startswith(prefix)
        }
        assert found, f"no golden data for {prefix}"
        return found

    @property
    def weights(self):
        """The number of weights (without biases)."""
        return sum(x.size for x in jprune.trees.prunable_leaves(self.params))

    @property
    def unbiased(self):
        """The parameters with all biases at zero."""
        return {
            layer: {name: w * (name != "bias") for name, w in own.items()}
            for layer, own in self.params.items()
        }


def _mlp(params, x):
    for name in ("fc1", "fc2"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["fc3"]["kernel"] + params["fc3"]["bias"]


def _conv(params, x):
    for name in ("conv1", "conv2"):
        # A convolution in a loop is very slow on CPU; nine shifted products are not.
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = sum(
            padded[:, i : i + height, j : j + width] @ params[name]["kernel"][i, j]
            for i in range(3)
            for j in range(3)
        )
        x = jax.nn.relu(x + params[name]["bias"])
    n, height, width, channels = x.shape
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    return x.reshape(n, -1) @ params["fc"]["kernel"] + params["fc"]["bias"]


def cross_entropy(logits, labels):
    """The mean softmax cross-entropy."""
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(labels.size), labels])


@pytest.fixture(scope="session")
def golden_arrays():
    """All arrays and numbers of the golden data on criteria at initialisation."""
    arrays, numbers = {}, {"mlp": {}, "conv": {}}
    for name in ("nets", "init_synflow", "init_snip_grasp_force"):
        with np.load(GOLDEN / f"{name}.npz") as data:
            arrays |= dict(data)
        if name != "nets":
            loaded = json.loads((GOLDEN / f"{name}.json").read_text())
            for net, own in loaded.items():
                numbers[net] |= own
    return arrays, numbers


@pytest.fixture(params=["mlp", "conv"])
def golden_net(request, golden_arrays):
    """Each of the golden networks, in float64."""
    arrays, numbers = golden_arrays
    apply = {"mlp": _mlp, "conv": _conv}[request.param]
    with jax.enable_x64(True):
        params = {}
        for key, value in arrays.items():
            net, layer, *leaf = key.split("/")
            if net == request.param and leaf in (["kernel"], ["bias"]):
                params.setdefault(layer, {})[leaf[0]] = jnp.asarray(value, float)
        x = jnp.asarray(arrays[f"{request.param}/x"], float)
        batch = x, jnp.asarray(arrays[f"{request.param}/y"])
        yield GoldenNet(
            name=request.param,
            params=params,
            batch=batch,
            apply=apply,
            loss=lambda params, batch: cross_entropy(apply(params, batch[0]), batch[1]),
            objective=cross_entropy,
            arrays=arrays,
            numbers=numbers[request.param],
        )


@pytest.fixture
def by_path():
    """A function: the leaves of a tree as NumPy arrays by path."""
    return lambda tree: {
        leaf.path: np.asarray(leaf.value) for leaf in jprune.trees.leaves_of(tree)
    }
