"""The law on random networks: residual, concatenated, split, grouped, shuffled, tied.

Mutations that these tests catch: labels of a concatenation in another order than its
operands, groups of a convolution tied to those of its neighbour, a shuffle that ties.
"""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jprune
from tests.tracing import law

OPERATIONS = (
    "dense",
    "grouped",
    "residual",
    "concatenate",
    "product",
    "split",
    "shuffle",
    "reverse",
    "heads",
    "norm",
    "activation",
    "reuse",
)


class Builder:
    """Values of rank 2 with an even number of channels, made one from others.

    The same plan is run twice: with ``params`` empty to draw them, and to evaluate.
    """

    def __init__(self, params, rng=None):
        self.params, self.rng, self.count = params, rng, 0

    def parameter(self, *shape):
        name = f"p{self.count:02}"
        self.count += 1
        if self.rng is not None:
            self.params[name] = jnp.asarray(self.rng.normal(size=shape) / 2)
        return self.params[name]

    def dense(self, x, width):
        return x @ self.parameter(x.shape[1], width) + self.parameter(width)


def apply_plan(builder, plan, x):
    values = [builder.dense(x, 4), builder.dense(x, 8)]
    for operation, first, second, width in plan:
        a, b = values[first % len(values)], values[second % len(values)]
        n, c = a.shape
        if operation == "dense":
            value = builder.dense(a, width)
        elif operation == "grouped":
            kernel = builder.parameter(2, c // 2, width // 2)
            value = jnp.einsum("ngi,gio->ngo", a.reshape(n, 2, -1), kernel)
            value = value.reshape(n, width)
        elif operation == "residual":
            value = a + builder.dense(b, c)
        elif operation == "concatenate":
            value = jnp.concatenate([a, b], axis=1)
        elif operation == "product":
            value = a * jax.nn.sigmoid(builder.dense(b, c))
        elif operation == "split":
            value = a[:, : c // 2] if width == 4 else a[:, c // 2 :]
            value = value if c > 2 else a
        elif operation == "shuffle":
            value = a.reshape(n, 2, c // 2).swapaxes(1, 2).reshape(n, c)
        elif operation == "reverse":
            value = jnp.tanh(a) + a[:, ::-1]
        elif operation == "heads":
            heads = a.reshape(n, 2, c // 2)
            weights = jax.nn.softmax(jnp.einsum("nhd,mhd->hnm", heads, heads))
            value = jnp.einsum("hnm,mhd->nhd", weights, heads).reshape(n, c)
        elif operation == "norm":
            scale = builder.parameter(c)
            value = a * jax.lax.rsqrt(1e-3 + jnp.mean(a**2, 1, keepdims=True)) * scale
        elif operation == "activation":
            value = jax.nn.silu(a) if width == 4 else jnp.cos(a)
        else:
            value = jax.nn.relu(a) @ builder.parameter(c, c) @ builder.parameter(c, 4)
        values.append(value)
    return sum(builder.dense(value, 3) for value in values)


plans = st.lists(
    st.tuples(
        st.sampled_from(OPERATIONS),
        st.integers(0, 9),
        st.integers(0, 9),
        st.sampled_from([4, 8]),
    ),
    min_size=2,
    max_size=8,
)


@given(plans, st.integers(0, 2**16))
@settings(deadline=None, max_examples=12)
def test_shrunk_equals_masked(plan, seed):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        x = jnp.asarray(rng.normal(size=(3, 5)))
        params = {}
        apply_plan(Builder(params, rng), plan, x)

        def apply_fn(params, x):
            return apply_plan(Builder(params), plan, x)

        units = jprune.couplings(apply_fn, params, x)
        keeps = [
            jnp.asarray(rng.random(group.shape) < 0.6).at[0].set(True)
            for group in units.groups
        ]
        law.check(apply_fn, params, (x,), keeps, units)
