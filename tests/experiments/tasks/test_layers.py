import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from experiments.tasks import _layers

NUMBERS = ("NHWC", "HWIO", "NHWC")

# input shape, kernel shape, strides, padding
PLAIN = [
    ((2, 8, 8, 3), (3, 3, 3, 5), (1, 1), "SAME"),
    ((2, 9, 7, 3), (3, 3, 3, 5), (2, 2), "SAME"),
    ((2, 8, 8, 3), (3, 3, 3, 5), (2, 2), "SAME"),
    ((2, 9, 7, 2), (5, 3, 2, 4), (1, 1), "VALID"),
    ((2, 9, 8, 2), (3, 2, 2, 4), (2, 3), "VALID"),
    ((2, 6, 6, 4), (1, 1, 4, 2), (2, 2), "VALID"),
    ((1, 5, 6, 1), (4, 2, 1, 1), (1, 2), [(2, 0), (1, 3)]),
]


def operands(x_shape, w_shape):
    rng = np.random.default_rng(0)
    return [rng.normal(size=s).astype(np.float32) for s in (x_shape, w_shape)]


def assert_close(ours, theirs):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
    jax.tree.map(close, ours, theirs)


@pytest.mark.parametrize(("x_shape", "w_shape", "strides", "padding"), PLAIN)
def test_equals_lax_with_its_gradients(x_shape, w_shape, strides, padding):
    def outputs_and_grads(conv, x, w):
        def output(x, w):
            return conv(x, w, strides, padding, dimension_numbers=NUMBERS)

        # The sine makes the cotangents of the outputs differ from one another.
        grads = jax.grad(lambda *xw: jnp.sin(output(*xw)).sum(), argnums=(0, 1))
        return output(x, w), grads(x, w)

    x, w = operands(x_shape, w_shape)
    compiled = jax.jit(outputs_and_grads, static_argnums=0)
    assert_close(
        compiled(_layers.conv_general_dilated, x, w),
        compiled(lax.conv_general_dilated, x, w),
    )


def primitives(conv, x, w, **options):
    jaxpr = jax.make_jaxpr(lambda x, w: conv(x, w, (1, 1), "VALID", **options))(x, w)
    return {equation.primitive.name for equation in jaxpr.eqns}


def test_a_plain_convolution_is_a_product_of_matrices():
    x, w = operands((2, 8, 8, 3), (3, 3, 3, 5))
    used = primitives(_layers.conv_general_dilated, x, w, dimension_numbers=NUMBERS)
    assert "dot_general" in used
    assert "conv_general_dilated" not in used


def test_other_backends_convolve_themselves(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, w = operands((2, 8, 8, 3), (3, 3, 3, 5))
    used = primitives(_layers.conv_general_dilated, x, w, dimension_numbers=NUMBERS)
    assert used == {"conv_general_dilated"}


@pytest.mark.parametrize(
    ("w_shape", "options"),
    [
        ((3, 3, 1, 8), {"feature_group_count": 4}),
        ((3, 3, 4, 8), {"rhs_dilation": (2, 1)}),
        ((3, 3, 4, 8), {"lhs_dilation": (1, 2)}),
        ((8, 4, 3, 3), {"dimension_numbers": ("NHWC", "OIHW", "NHWC")}),
        ((8, 8, 3, 2), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
        ((8, 8, 3, 2), {"dimension_numbers": None}),
    ],
)
def test_other_convolutions_are_those_of_lax(w_shape, options):
    x, w = operands((2, 8, 7, 4), w_shape)
    options = {"dimension_numbers": NUMBERS} | options

    def jaxpr(conv):
        pads = [(1, 0), (0, 2)]
        return jax.make_jaxpr(lambda x, w: conv(x, w, (2, 1), pads, **options))(x, w)

    ours, theirs = jaxpr(_layers.conv_general_dilated), jaxpr(lax.conv_general_dilated)
    assert str(ours) == str(theirs)


def test_flax_takes_it():
    x, w = operands((2, 9, 9, 3), (3, 3, 3, 4))
    variables = {"params": {"kernel": w, "bias": np.arange(4, dtype=np.float32)}}
    ours = _layers.conv(4, 3, strides=2, name="conv1")
    theirs = nn.Conv(4, (3, 3), strides=2, name="conv1")
    assert_close(jax.jit(ours.apply)(variables, x), jax.jit(theirs.apply)(variables, x))


def test_patches_are_rows_of_the_window():
    x = jnp.arange(2.0 * 3 * 3 * 2).reshape(2, 3, 3, 2)
    patches = _layers.im2col(x, (2, 2))
    assert patches.shape == (2, 2, 2, 8)
    np.testing.assert_array_equal(patches[1, 0, 1], x[1, 0:2, 1:3].ravel())


@pytest.mark.parametrize("size", [4, 7])
def test_max_pool_equals_flax_with_its_gradient(size):
    x, _ = operands((2, size, size, 3), ())

    def outputs_and_grads(pool, x):
        return pool(x), jax.grad(lambda x: jnp.sin(pool(x)).sum())(x)

    compiled = jax.jit(outputs_and_grads, static_argnums=0)
    theirs = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    assert_close(compiled(_layers.max_pool, x), compiled(theirs, x))
