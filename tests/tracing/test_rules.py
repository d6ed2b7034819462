"""The rule of each primitive, in a small function: units, and the law.

A case is a function of kernels ``a`` (3, 6) and ``b`` (6, 2), a bias ``c`` (6,) and an
input ``x`` (4, 3). What stands between the two kernels decides how the six channels
between them are coupled; ``expected`` is the number of units of each group.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jprune
from tests.tracing import law

CASES = []


def case(*expected, **shapes):
    """Enters a function; ``shapes`` replace those of the parameters."""

    def enter(fn):
        CASES.append(pytest.param(fn, list(expected), shapes, id=fn.__name__))
        return fn

    return enter


def draw(shapes):
    rng = np.random.default_rng(3)
    return {k: jnp.asarray(rng.normal(size=s) / 2) for k, s in sorted(shapes.items())}


def problem(shapes):
    full = {"a": (3, 6), "b": (6, 2), "c": (6,)} | shapes
    shape = full.pop("x", (4, 3))
    return draw(full), draw({"x": shape})["x"]


# Elementwise.


@case(6)
def elementwise_functions(p, x):
    h = x @ p["a"] + p["c"]
    h = jnp.sign(h) * jnp.sqrt(jnp.abs(h)) + jnp.sin(h) ** 3 + lax.erf(h)
    h = jnp.clip(jnp.tanh(h), -0.5, 0.8) + lax.square(jax.nn.softplus(h) - np.log(2))
    return jnp.where(h > 0.1, h, 0.3 * h) @ p["b"]


@case(6)
def a_constant_before_a_contraction(p, x):
    # cos(0) = 1, but the rows of b are masked.
    return jnp.cos(x @ p["a"] + p["c"]) @ p["b"]


@case()
def a_constant_before_a_sum(p, x):
    return jnp.cos(x @ p["a"] + p["c"]).sum(1)


@case()
def a_constant_before_a_contraction_with_another(p, x):
    h = jnp.cos(x @ p["a"])
    return h @ h.T


@case(1, 6)
def a_gate_that_is_half(p, x):
    h = x @ p["a"]
    return (h * jax.nn.sigmoid(h * p["c"])).sum(1) + h @ p["b"][:, 0]


@case(2, 6)
def infinities_are_neutral_for_a_maximum(p, x):
    h = x @ p["a"]
    return jnp.where(p["c"] == 0, -jnp.inf, h).max(1) + (h @ p["b"]).sum(1)


@case(6)
def a_softmax_over_masked_channels(p, x):
    h = jnp.where(p["c"] == 0, -jnp.inf, x @ p["a"])
    return jax.nn.softmax(h) @ p["b"]


@case()
def a_softmax_over_channels(p, x):
    return jax.nn.softmax(x @ p["a"]) @ p["b"]


@case(6)
def booleans(p, x):
    h = x @ p["a"]
    some = (h > 0) & (p["c"] > 0) | ~(h >= -10)
    return (h * some) @ p["b"] + jnp.any(some & (h != 0), axis=1, keepdims=True)


# Layout.


@case(6)
def transposed(p, x):
    return (p["b"].T @ (p["a"].T @ x.T)).T


@case(2)
def heads(p, x):
    h = (x @ p["a"]).reshape(4, 2, 3)
    return jnp.einsum("nhd,mhd->nm", h, h) @ (x @ p["a"] @ p["b"])


@case(3, b=(3, 2))
def a_maximum_of_pairs(p, x):
    return (x @ p["a"]).reshape(4, 3, 2).max(-1) @ p["b"]


@case(6)
def repeated_channels(p, x):
    return jnp.repeat(jnp.tanh(x @ p["a"]), 2, axis=1) @ jnp.repeat(p["b"], 2, axis=0)


@case(6, b=(18, 2))
def flattened(p, x):
    h = jnp.tanh(x[:, :, None] * p["c"])
    return h.reshape(4, 18) @ p["b"]


@case(6)
def shuffled(p, x):
    h = (x @ p["a"]).reshape(4, 2, 3).swapaxes(1, 2).reshape(4, 6)
    return jnp.tanh(h) @ p["b"]


@case(6)
def shuffled_inside_an_activation(p, x):
    h = jnp.tanh((x @ p["a"]).reshape(4, 2, 3)).swapaxes(1, 2).reshape(4, 6)
    return h @ p["b"]


@case(3, b=(3, 2))
def halves(p, x):
    a, b = jnp.split(x @ p["a"], 2, axis=1)
    return (a * jax.nn.sigmoid(b)) @ p["b"]


@case(2, 4, b=(4, 2))
def every_other(p, x):
    h = x @ p["a"]
    return h[:, ::3] @ p["b"][:2] + jnp.tanh(h[:, 1::3]) @ p["b"][2:4]


@case(3)
def reversed_halves(p, x):
    h = x @ p["a"]
    return (h + h[:, ::-1]) @ p["b"]


@case(2, 3, 6, d=(3, 3), b=(17, 2))
def concatenated(p, x):
    h = x @ p["a"]
    zeros = jnp.zeros((4, 2))
    h = jnp.concatenate([h, zeros, jnp.tanh(x @ p["d"]), h], axis=1)
    return h @ p["b"]


@case(6)
def stacked(p, x):
    h = x @ p["a"]
    return jnp.stack([h, jnp.tanh(h) * p["c"]], axis=1).sum(1) @ p["b"]


@case(6)
def tiled(p, x):
    return jnp.tile(x @ p["a"], (1, 2)) @ jnp.tile(p["b"], (2, 1))


@case(3, 6, b=(9, 2))
def padded(p, x):
    h = lax.pad(x @ p["a"], 0.0, [(0, 0, 0), (2, 1, 0)])
    return h @ p["b"]


@case(4, 5, b=(9, 2))
def padded_between_and_cut_off(p, x):
    h = lax.pad(x @ p["a"], 0.0, [(0, 0, 0), (-1, -1, 1)])
    return h @ p["b"]


@case(6)
def a_row_of_padding(p, x):
    h = jnp.tanh(jnp.pad(x @ p["a"], [(1, 1), (0, 0)]))
    return h @ p["b"]


@case()
def a_row_of_padding_that_is_summed(p, x):
    return jnp.pad(x @ p["a"], [(1, 1), (0, 0)], constant_values=1.0).sum(1)


@case(5)
def one_channel_taken_out(p, x):
    h = x @ p["a"]
    return h @ p["b"] + h[:, 2:3]


@case(2, 2, 6, d=(6, 4))
def two_splits(p, x):
    # Both axes of c are split: a value carries one joint.
    h = jnp.einsum("ni,io->no", x, p["a"])
    w = p["d"].reshape(2, 3, 2, 2)
    return jnp.tanh(h) @ p["b"] + jnp.sum(w * w)


# Contractions, convolutions, windows.


@case(6)
def a_batched_product(p, x):
    h = x @ p["a"]
    return jnp.einsum("nc,ncd->cnd", h, h[:, :, None] * x[:, None]).sum(0)


@case(6, a=(6, 3, 3), b=(2, 6, 3), x=(2, 3, 5))
def a_convolution_with_channels_first(p, x):
    numbers = ("NCW", "OIW", "NCW")
    h = jnp.tanh(lax.conv_general_dilated(x, p["a"], (1,), "SAME", None, None, numbers))
    return lax.conv_general_dilated(h, p["b"], (1,), "SAME", None, None, numbers)


@case(3, c=(3, 2, 9), b=(9, 2), x=(2, 5, 3))
def a_grouped_convolution(p, x):
    numbers = ("NWC", "WIO", "NWC")
    h = jnp.tanh(x @ p["a"])
    h = lax.conv_general_dilated(
        h, p["c"], (1,), "SAME", None, None, numbers, feature_group_count=3
    )
    return jnp.tanh(h) @ p["b"]


@case(6, c=(3, 1, 12), b=(12, 2), x=(2, 5, 3))
def a_depthwise_convolution_of_two(p, x):
    numbers = ("NWC", "WIO", "NWC")
    h = lax.conv_general_dilated(
        x @ p["a"], p["c"], (1,), "SAME", None, None, numbers, feature_group_count=6
    )
    return jnp.tanh(h) @ p["b"]


@case(6)
def windows(p, x):
    h = (x @ p["a"])[None]
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "SAME")
    h = lax.reduce_window(h, 0.0, lax.add, (1, 2, 1), (1, 2, 1), "SAME")
    return h[0] @ p["b"]


@case(6)
def the_gradient_of_a_maximum(p, x):
    def pooled(h):
        h = lax.reduce_window(h, -jnp.inf, lax.max, (2, 1), (2, 1), "VALID")
        return jnp.sum(jnp.tanh(h) @ p["b"])

    return jax.grad(pooled)(x @ p["a"]) @ p["b"]


@case(3, 3, 6, h=(3, 18))
def a_kernel_that_is_made(p, x):
    kernel = (p["c"][:3] @ p["h"]).reshape(3, 6)
    return jnp.tanh(x @ kernel) @ p["b"]


@case()
def a_window_over_channels(p, x):
    h = x @ p["a"]
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME")
    return h @ p["b"]


@case(6)
def reductions_of_other_axes(p, x):
    h = x @ p["a"]
    r = h.max(0) + h.min(0) + jnp.prod(h, axis=0) + jnp.argmax(h, axis=0) * p["c"]
    return jnp.cumsum(h * r, axis=0) @ p["b"]


@case(6)
def sums_over_channels(p, x):
    h = jnp.tanh(x @ p["a"])
    return jnp.cumsum(h, axis=1) @ p["b"] / (1 + jnp.sum(h**2, axis=1, keepdims=True))


@case()
def orders(p, x):
    h = x @ p["a"]
    return jnp.sort(h, axis=1) @ p["b"] + lax.top_k(h, 2)[0]


@case(6)
def orders_of_rows(p, x):
    h = x @ p["a"]
    return jnp.sort(h, axis=0) @ p["b"] + jnp.take_along_axis(
        h, jnp.argsort(h, axis=0), axis=0
    ).sum(1, keepdims=True)


# Indices.


@case(6)
def permuted_by_constants(p, x):
    h = jnp.tanh(x @ p["a"])
    return h[:, np.array([3, 1, 0, 5, 4, 2])] @ p["b"]


@case(2, 2, b=(4, 2))
def gathered_in_a_table(p, x):
    h = jnp.tanh(x @ p["a"])[:, np.array([[0, 2], [3, 5]])]
    return jnp.einsum("nij,ijo->no", h * h, p["b"].reshape(2, 2, 2)) + x[:, :2]


@case(6)
def an_embedding(p, x):
    return p["a"][jnp.argmax(x, axis=1)] @ p["b"]


@case(6)
def a_row_at_an_index(p, x):
    h = x @ p["a"]
    row = lax.dynamic_slice_in_dim(h, jnp.argmax(x[0]), 2, axis=0)
    return (h[1:3] + row) @ p["b"] + h[0] @ p["b"]


@case(3, 3, b=(3, 2))
def a_static_window_of_a_dynamic_slice(p, x):
    h = lax.dynamic_slice(x @ p["a"], (0, 3), (4, 3))
    return jnp.tanh(h) @ p["b"]


@case(6)
def rows_that_are_written(p, x):
    h = x @ p["a"]
    h = lax.dynamic_update_slice(h, jnp.tanh(h[:2]), (jnp.argmax(x[0]), 0))
    h = h.at[jnp.argmax(x[1])].add(h[0] ** 2).at[1].set(0.0).at[2].multiply(h[0])
    return h @ p["b"]


@case()
def channels_that_are_written(p, x):
    return (x @ p["a"]).at[:, jnp.argmax(x[0])].set(1.0) @ p["b"]


@case()
def channels_at_computed_indices(p, x):
    return (x @ p["a"])[:, jnp.argmax(x, axis=1)] + x[:, :1]


@case()
def windows_at_computed_indices(p, x):
    def window(row, i):
        return lax.dynamic_slice(row, (i,), (2,))

    return jax.vmap(window)(x @ p["a"], jnp.argmax(x, axis=1))


@case()
def a_window_at_a_computed_index(p, x):
    return lax.dynamic_slice_in_dim(x @ p["a"], jnp.argmax(x[0]), 2, axis=1)


# Control flow.


@case(6)
def a_scan(p, x):
    def body(h, row):
        h = jnp.tanh(row @ p["a"] + h * p["c"])
        return h, h * 2

    h, every = lax.scan(body, jnp.zeros(6), x, reverse=True)
    return h @ p["b"] + every @ p["b"]


@case(6)
def a_loop(p, x):
    h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h * p["c"]) + i * h, x @ p["a"])
    return h @ p["b"]


@case(6)
def a_loop_until(p, x):
    h = lax.stop_gradient(x @ p["a"])
    h = lax.while_loop(lambda h: jnp.sum(h**2) > 0.1, lambda h: h * 0.5, h)
    return (h * p["c"]) @ p["b"]


@case(6)
def branches(p, x):
    h = x @ p["a"]
    h = lax.cond(x[0, 0] > 0, jnp.tanh, lambda h: h * p["c"], h)
    return lax.switch(jnp.argmax(x[0]), [jnp.sin, jnp.square, jnp.tanh], h) @ p["b"]


@case()
def a_branch_with_a_constant(p, x):
    h = x @ p["a"]
    return lax.cond(x[0, 0] > 0, lambda h: h, lambda h: h * 0 + 1.0, h).sum(1)


@case(6)
def rematerialised(p, x):
    block = jax.checkpoint(
        lambda h: jnp.tanh(h) * p["c"],
        policy=jax.checkpoint_policies.nothing_saveable,
    )
    return block(x @ p["a"]) @ p["b"]


@case(6)
def dropout(p, x):
    h = x @ p["a"]
    keep = jax.random.bernoulli(jax.random.key(3), 0.5, h.shape)
    noise = jax.random.normal(jax.random.key(4), h.shape)
    return (jnp.where(keep, h, 0) + noise * p["c"]) @ p["b"]


@pytest.mark.parametrize("fn, expected, shapes", CASES)
def test_units_and_the_law(fn, expected, shapes):
    with jax.enable_x64(True):
        params, x = problem(shapes)
        if not expected:
            with pytest.raises(ValueError, match="no channel of it can be removed"):
                jprune.couplings(fn, params, x)
            return
        units = jprune.couplings(fn, params, x)
        found = sorted(group.shape[0] for group in units.groups)
        assert found == sorted(expected), jprune.tracing.summary(units)
        law.check(fn, params, (x,), law.removals(units), units)
