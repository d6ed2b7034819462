"""What is counted, and what it is charged to.

Mutations that these tests catch: a kernel of a grouped convolution counted for all
inputs, holes of a transposed convolution counted, a loop counted once, the cheaper
branch taken, a carry forgotten after the first turn, a side of parameters taken for
data, a mask read without its broadcast.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jprune

ACTIVATIONS = "activations x activations"


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def macs(fn, params, *inputs, **options):
    rows = jprune.cost(fn, params, *inputs, **options).rows
    return {path: row.macs for path, row in rows.items() if row.macs}


# One contraction.


def conv(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)


@pytest.mark.parametrize(
    ("kernel", "options", "per_channel", "places"),
    [
        ((3, 3, 4, 6), {}, 9 * 4, 8 * 8),
        ((3, 3, 4, 6), {"window_strides": (2, 2)}, 9 * 4, 4 * 4),
        ((3, 3, 4, 6), {"padding": "VALID"}, 9 * 4, 6 * 6),
        ((3, 3, 4, 6), {"padding": "VALID", "rhs_dilation": (2, 2)}, 9 * 4, 4 * 4),
        ((3, 3, 2, 6), {"feature_group_count": 2}, 9 * 2, 8 * 8),
        ((3, 3, 1, 4), {"feature_group_count": 4}, 9, 8 * 8),
    ],
    ids=["same", "strides", "valid", "dilated", "grouped", "depthwise"],
)
def test_convolutions(kernel, options, per_channel, places):
    """The formula of the textbook: places x taps x inputs of the group x outputs."""
    row = jprune.cost(
        lambda p, x: conv(x, p["w"], **options),
        {"w": struct(*kernel)},
        struct(2, 8, 8, 4),
    ).rows["w"]
    assert row.macs == 2 * places * per_channel * kernel[-1]
    assert row.outputs == 2 * places * kernel[-1]
    assert row.output_bytes == 4 * row.outputs


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_transposed_convolution_costs_what_its_inputs_cost(size):
    """Stride 2, SAME: that of the convolution that it is the transpose of."""
    found = macs(
        lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "SAME"),
        {"w": struct(size, size, 4, 6)},
        struct(1, 5, 5, 4),
    )
    assert found == {"w": 10 * 10 * size * size * 4 * 6 // 4}


def test_holes_that_do_not_divide_the_outputs():
    """Against the products counted one by one, VALID: 11 outputs, stride 2."""
    (found,) = macs(
        lambda p, x: lax.conv_transpose(x, p, (2,), "VALID", dimension_numbers=_NWC),
        struct(3, 4, 6),
        struct(1, 5, 4),
    ).values()
    holes = np.zeros(2 + 9 + 2)
    holes[::2] = 1  # Padding continues the grid of the data.
    assert found == 4 * 6 * sum(int(holes[i : i + 3].sum()) for i in range(11))


_NWC = ("NWC", "WIO", "NWC")


def test_products_of_matrices():
    params = {"w": struct(3, 4, 5)}
    batched = macs(lambda p, x: jnp.einsum("bnk,bkm->bnm", x, p["w"]), params, x334)
    assert batched == {"w": 3 * 3 * 4 * 5}
    outer = macs(lambda p, x: jnp.einsum("a,b->ab", x, p), struct(5), struct(7))
    assert outer == {"": 5 * 7}


x334 = struct(3, 3, 4)


def test_groups_of_a_batch():
    """The gradient of a grouped convolution by its kernel has as many MACs as it."""

    def loss(kernel, x):
        return jnp.sum(conv(x, kernel, feature_group_count=2, padding="VALID") ** 2)

    kernel, x = struct(3, 3, 2, 6), struct(2, 6, 6, 4)
    forward = macs(loss, kernel, x)[""]
    found = macs(jax.grad(loss), kernel, x)
    assert found == {"": forward, ACTIVATIONS: forward}


# What is charged.


def test_several_leaves_side_by_side_are_charged_by_size():
    params = {"a": struct(4, 3), "b": struct(4, 5), "c": struct(2, 8)}

    def fn(p, x, y):
        both = jnp.concatenate([p["a"], p["b"]], axis=1)
        return x @ both + y @ (2 * p["c"])

    found = jprune.cost(fn, params, struct(7, 4), struct(7, 2)).rows
    assert {k: row.macs for k, row in found.items()} == {
        "a": 7 * 12,
        "b": 7 * 20,
        "c": 7 * 16,
    }
    assert {k: row.outputs for k, row in found.items()} == {"a": 21, "b": 35, "c": 56}
    masks = {"a": jnp.eye(4, 3) > 0, "b": jnp.ones((1, 5), bool), "c": np.True_}
    pruned = macs(fn, params, struct(7, 4), struct(7, 2), masks=masks)
    assert pruned == {"a": 7 * 3, "b": 7 * 20, "c": 7 * 16}


def test_leaves_that_are_mixed_have_a_row_of_their_own():
    """W + A B: the product A B is of both too, and one mask leaves the sum dense."""
    params = {"w": struct(6, 5), "a": struct(6, 2), "b": struct(2, 5)}

    def fn(p, x):
        return x @ (p["w"] + p["a"] @ p["b"])

    none = {"w": np.True_, "a": np.True_, "b": np.True_}
    masks = [none | {name: np.zeros((1, 1), bool)} for name in none]
    for options in ({}, *({"masks": own} for own in masks)):
        found = macs(fn, params, struct(3, 6), **options)
        assert found == {"a + b": 6 * 2 * 5, "a + b + w": 3 * 6 * 5}


def test_a_scale_is_charged_nothing():
    """Weight normalisation, g v / |v|: zeros of v are zeros of the kernel."""
    params = {"v": struct(4, 6), "g": struct(6)}

    def fn(p, x):
        return x @ (p["v"] * (p["g"] / jnp.linalg.norm(p["v"], axis=0)))

    masks = {"v": np.arange(24).reshape(4, 6) < 6, "g": np.True_}
    assert macs(fn, params, struct(3, 4)) == {"v": 3 * 24}
    assert macs(fn, params, struct(3, 4), masks=masks) == {"v": 3 * 6}


def test_factors_of_one_size_are_mixed():
    params = {"u": struct(4, 6), "v": struct(4, 6)}
    found = macs(lambda p, x: x @ (p["u"] * p["v"]), params, struct(3, 4))
    assert found == {"u + v": 3 * 24}


def test_what_is_looked_up_is_data():
    """An embedding has no products; experts chosen by data are activations."""

    def fn(p, ids):
        x = p["embedding"][ids] @ p["kernel"]
        return jnp.einsum("ni,nij->nj", x, p["experts"][ids])

    params = {
        "embedding": struct(9, 4),
        "experts": struct(9, 5, 6),
        "kernel": struct(4, 5),
    }
    found = macs(fn, params, struct(7, dtype=jnp.int32))
    assert found == {"kernel": 7 * 20, ACTIVATIONS: 7 * 30}


def test_what_no_parameter_takes_part_in():
    def fn(p, x):
        table = jnp.cos(jnp.arange(4.0))[:, None] * jnp.arange(3.0)
        return (x @ x.T) @ (x @ table) + p["bias"]

    found = macs(fn, {"bias": struct(3)}, struct(5, 4))
    assert found == {ACTIVATIONS: 5 * 5 * 4 + 5 * 5 * 3, "constants": 5 * 4 * 3}


def test_a_gradient():
    """Backward costs twice forward, but for the input of the first layer."""

    def loss(p, x):
        return jnp.sum((jax.nn.relu(x @ p["a"]) @ p["b"]) ** 2)

    params, x = {"a": struct(4, 5), "b": struct(5, 3)}, struct(2, 4)
    found = macs(jax.grad(loss), params, x)
    assert found == {"a": 40, "b": 30 + 30, ACTIVATIONS: 40 + 30}


# Loops, branches, calls.


def test_a_loop_counts_as_often_as_it_turns():
    params = {"cell": struct(5, 5), "stack": struct(3, 5, 5)}

    def fn(p, x):
        def step(h, kernel):
            return jnp.tanh(h @ p["cell"] @ kernel), h

        return lax.scan(step, x, p["stack"])

    masks = {"cell": np.True_, "stack": np.arange(3)[:, None, None] > 0}
    x = struct(2, 5)
    assert macs(fn, params, x) == {"cell": 3 * 50, "stack": 3 * 50}
    assert macs(fn, params, x, masks=masks) == {"cell": 3 * 50, "stack": 2 * 50}


def test_loops_in_loops():
    def fn(p, x):
        def inner(h, _):
            return h @ p["w"], None

        def step(h, row):
            return row[None] + lax.scan(inner, h, None, length=2)[0], None

        return lax.scan(step, jnp.zeros((1, 4)), x)[0]

    assert macs(fn, {"w": struct(4, 4)}, struct(3, 4)) == {"w": 3 * 2 * 16}


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_what_a_carry_becomes(loop):
    """Data needs three turns to get to the product."""

    def step(carry, x):
        a, b, c = carry
        return (b, c, x), a @ a.T

    def fn(p, x):
        zeros = jnp.zeros((1, 4))
        if loop == "scan":
            return lax.scan(lambda carry, _: step(carry, x), (zeros,) * 3, None, 7)[1]
        body = lambda carry: step(carry[0], x)  # noqa: E731
        init = ((zeros,) * 3, zeros @ zeros.T)
        return lax.while_loop(lambda carry: carry[1].sum() < 9, body, init)

    found = macs(fn, {"w": struct(1)}, struct(1, 4))
    assert found[ACTIVATIONS] == {"scan": 7 * 4, "while": 4}[loop]


def test_a_kernel_in_a_carry_stays_one():
    def fn(p, x):
        def step(carry, _):
            h, kernel = carry
            return (h @ kernel, -kernel), None

        return lax.scan(step, (x, p["w"]), None, length=3)[0][0]

    assert macs(fn, {"w": struct(4, 4)}, struct(2, 4)) == {"w": 3 * 32}


def test_a_carry_that_collects_parameters_ends():
    def fn(p, x):
        def step(kernel, row):
            rows = jnp.concatenate([kernel[1:], p["new"]])
            return rows, row @ rows

        return lax.scan(step, p["old"], x)[1]

    params = {"new": struct(1, 3), "old": struct(4, 3)}
    found = macs(fn, params, struct(5, 4))
    assert found.keys() == {"new", "new + old"} and sum(found.values()) == 5 * 12


def test_while_counts_once_and_the_dearest_branch_counts():
    params = {"a": struct(4, 4), "b": struct(4, 4)}

    def fn(p, x):
        x = lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ p["a"], x)
        twice = lambda h: h @ p["b"] @ p["b"]  # noqa: E731
        return lax.cond(x.sum() > 0, lambda h: h @ p["a"], twice, x)

    assert macs(fn, params, struct(2, 4)) == {"a": 32, "b": 64}


def test_a_branch_may_choose_the_kernel():
    def fn(p, x):
        return x @ lax.cond(x.sum() > 0, lambda: p["a"], lambda: -p["b"])

    params = {"a": struct(4, 4), "b": struct(4, 4)}
    assert macs(fn, params, struct(2, 4)) == {"a + b": 32}


@jax.custom_vjp
def straight(x):
    return jnp.sign(x)


straight.defvjp(lambda x: (jnp.sign(x), None), lambda _, g: (g,))


@jax.custom_jvp
def gated(x, w):
    return jax.nn.relu(x @ w)


gated.defjvp(lambda primals, tangents: (gated(*primals), tangents[0] @ primals[1]))


def test_calls_are_entered():
    def fn(p, x):
        x = jax.jit(lambda x: x @ p["jit"])(x)
        x = jax.checkpoint(lambda x: x @ p["remat"])(x)
        return gated(straight(x), straight(p["custom"]))

    names = ("jit", "remat", "custom")
    params = {name: struct(4, 4) for name in names}
    assert macs(fn, params, struct(2, 4)) == dict.fromkeys(sorted(names), 32)


def test_primitives_without_contractions_are_known_or_named():
    def fn(p, x):
        return jnp.linalg.cholesky(x) @ p

    with pytest.raises(NotImplementedError, match="'cholesky'"):
        jprune.cost(fn, struct(4, 2), struct(4, 4))
    assert macs(fn, struct(4, 2), struct(4, 4), unknown="free") == {"": 32}
    with pytest.raises(ValueError, match="unknown: 'pin'"):
        jprune.cost(fn, struct(4, 2), struct(4, 4), unknown="pin")


# Parameters, bytes, masks.


def mlp(params, x):
    h = jax.nn.relu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    return h @ params["fc2"]["kernel"]


MLP = {
    "fc1": {"bias": struct(6), "kernel": struct(3, 6)},
    "fc2": {"kernel": struct(6, 2, dtype=jnp.bfloat16)},
}


def test_bytes_and_statistics():
    params = MLP | {
        "batch_stats": {"mean": struct(6)},
        "count": struct(dtype=jnp.int32),
    }
    found = jprune.cost(mlp, params, struct(5, 3))
    assert found.parameters == 6 + 18 + 12
    assert found.bytes == 4 * 24 + 2 * 12 + 4 * 6 + 4
    assert found.macs == 5 * 30 and found.flops == found.dense_flops == 300
    named = jprune.cost(mlp, params, struct(5, 3), statistics=["fc1/bias", "count"])
    assert named.parameters == 18 + 12 + 6
    wide = jprune.cost(mlp, MLP, struct(5, 3, dtype=jnp.float16))
    assert wide.rows["fc1/kernel"].output_bytes == 4 * 5 * 6


def test_masks_are_counted_as_they_broadcast():
    keep = np.arange(6) != 2
    masks = {
        "fc1": {"bias": keep, "kernel": keep[None]},
        "fc2": {"kernel": np.arange(12).reshape(6, 2) % 5 == 0},
    }
    found = jprune.cost(mlp, MLP, struct(5, 3), masks=masks)
    assert {path: row.parameters for path, row in found.rows.items()} == {
        "fc1/bias": 5,
        "fc1/kernel": 15,
        "fc2/kernel": 3,
    }
    assert found.macs == 5 * 15 + 5 * 3 and found.dense_macs == 5 * 30
    assert found.parameters == int(jprune.masks.count(masks, MLP))
    assert found.bytes == 4 * 20 + 2 * 3
    assert found.outputs == 5 * 6 + 5 * 2


def test_filter_masks_of_a_convolution():
    masks = {"w": np.arange(6)[None, None, None] < 2}
    fn = lambda p, x: conv(x, p["w"])  # noqa: E731
    params, x = {"w": struct(3, 3, 4, 6)}, struct(1, 8, 8, 4)
    assert macs(fn, params, x, masks=masks) == {"w": 64 * 9 * 4 * 2}


def test_masks_that_do_not_fit():
    masks = jax.tree.map(lambda p: np.ones(p.shape, bool), MLP)
    with pytest.raises(ValueError, match="'fc1/bias' has shape"):
        wrong = masks | {"fc1": {"bias": np.ones(5, bool), "kernel": np.True_}}
        jprune.cost(mlp, MLP, struct(5, 3), masks=wrong)
    with pytest.raises(ValueError, match="'fc1/bias' is traced"):
        jax.jit(lambda m: jprune.cost(mlp, MLP, struct(5, 3), masks=m).macs)(masks)


def test_the_table():
    masks = {"fc1": {"bias": np.True_, "kernel": np.arange(6)[None] < 3}}
    masks["fc2"] = {"kernel": np.True_}
    table = jprune.cost(mlp, MLP, struct(5, 3), masks=masks).summary().splitlines()
    assert len({len(line) for line in table}) == 1
    cells = [line.split("  ")[0].strip() for line in table]
    assert cells == ["leaf", "fc1/bias", "fc1/kernel", "fc2/kernel", "total"]
    assert "45 (50.0%)" in table[2] and "105 (70.0%)" in table[4]
