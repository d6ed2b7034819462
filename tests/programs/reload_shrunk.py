"""Loads a shrunk network in a process that has seen nothing else of it.

Arguments: the saved network, a file of inputs, the file to write its outputs to.
"""

import sys

import jax
import numpy as np
from flax import linen as nn

import jprune


class Net(nn.Module):
    """Two convolutions with a residual connection, a norm and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = x + nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3))(x))
        return nn.Dense(3)(nn.relu(x).mean((1, 2)))


if __name__ == "__main__":
    saved, inputs, outputs = sys.argv[1:]
    x = np.load(inputs)
    module = Net()
    like = jax.eval_shape(module.init, jax.random.key(0), x)
    small_apply_fn, small_params = jprune.load_shrunk(saved, like, module.apply)
    np.save(outputs, jax.jit(small_apply_fn)(small_params, x))
