"""Masks: the contract, the algebra, counting, packing, and clear errors."""

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jprune
from jprune import masks


def example():
    """Two layers, one masked by filter, and a bias and a key that never are."""
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
        "fc": {"kernel": jnp.arange(6.0).reshape(3, 2)},
        "rng": jax.random.key(0),
    }
    tree = {
        "conv": {
            "kernel": jnp.array([True, False, True, True]).reshape(1, 1, 1, 4),
            "bias": masks.never_pruned(),
        },
        "fc": {"kernel": jnp.array([[True, False], [False, False], [True, True]])},
        "rng": masks.never_pruned(),
    }
    return params, tree


def test_apply_zeroes_removed_weights_and_passes_the_rest():
    params, tree = example()
    params["fc"]["kernel"] = params["fc"]["kernel"].at[1].set(jnp.inf)
    applied = jprune.apply_masks(params, tree)
    assert applied["conv"]["kernel"].sum() == 3 * 18
    assert applied["fc"]["kernel"].tolist() == [[0, 0], [0, 0], [4, 5]]
    assert applied["conv"]["bias"] is params["conv"]["bias"]
    assert applied["rng"] is params["rng"]


def test_apply_keeps_dtypes_and_has_the_masked_gradient():
    tree = {"w": jnp.array([[True, False]])}
    for dtype in (jnp.bfloat16, jnp.float16, jnp.int8):
        params = {"w": jnp.ones((1, 2), dtype)}
        assert jprune.apply_masks(params, tree)["w"].dtype == dtype
    grads = jax.grad(lambda p: jprune.apply_masks(p, tree)["w"].sum() * 2.0)
    assert grads({"w": jnp.ones((1, 2))})["w"].tolist() == [[2, 0]]


def test_counts_and_densities_see_through_broadcasting():
    params, tree = example()
    counts = {path: int(n) for path, n in masks.counts(tree, params).items()}
    assert counts == {"conv/kernel": 54, "fc/kernel": 3}
    assert masks.sizes(tree, params) == {"conv/kernel": 72, "fc/kernel": 6}
    assert int(masks.count(tree, params)) == 57
    np.testing.assert_allclose(masks.density(tree, params), 57 / 78)
    np.testing.assert_allclose(masks.sparsity(tree, params), 21 / 78)
    densities = masks.densities(tree, params)
    np.testing.assert_allclose(densities["conv/kernel"], 0.75)
    np.testing.assert_allclose(densities["fc/kernel"], 0.5)


def test_comparisons():
    params, tree = example()
    other = masks.invert(tree)
    assert int(masks.hamming(tree, other, params)) == 78
    assert float(masks.overlap(tree, other, params)) == 0
    assert float(masks.overlap(tree, tree, params)) == 1
    nothing = masks.difference(tree, tree)
    assert int(masks.count(nothing, params)) == 0
    assert float(masks.overlap(nothing, nothing)) == 1


@hypothesis.given(hnp.arrays(bool, (3, 4)), hnp.arrays(bool, (3, 4)))
@hypothesis.settings(deadline=None, max_examples=30)
def test_set_algebra(a, b):
    keep = masks.never_pruned()
    x, y = {"w": jnp.array(a), "b": keep}, {"w": jnp.array(b), "b": keep}
    np.testing.assert_array_equal(masks.union(x, y)["w"], a | b)
    np.testing.assert_array_equal(masks.intersection(x, y)["w"], a & b)
    np.testing.assert_array_equal(masks.difference(x, y)["w"], a & ~b)
    np.testing.assert_array_equal(masks.invert(x)["w"], ~a)
    for tree in (masks.union(x, y), masks.difference(x, y), masks.invert(x)):
        assert tree["b"].shape == () and bool(tree["b"])


@hypothesis.given(
    hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)),
    st.booleans(),
)
@hypothesis.settings(deadline=None, max_examples=40)
def test_pack_and_unpack(array, by_shape):
    tree = {"w": jnp.array(array)}
    bits = masks.pack(tree)
    assert bits["w"].dtype == jnp.uint8 and bits["w"].size == -(-array.size // 8)
    like = jax.eval_shape(lambda: tree) if by_shape else tree
    np.testing.assert_array_equal(masks.unpack(bits, like)["w"], array)


def test_from_zeros_finds_the_masks_of_a_pruned_network():
    params, _ = example()
    found = masks.from_zeros(params)
    assert found["fc"]["kernel"].tolist() == [[False, True], [True] * 2, [True] * 2]
    assert bool(found["conv"]["kernel"].all())
    assert found["conv"]["bias"].shape == ()


def test_summary_lists_every_leaf():
    params, tree = example()
    lines = masks.summary(tree, params).splitlines()
    assert [line.split()[0] for line in lines] == [
        "leaf",
        "conv/bias",
        "conv/kernel",
        "fc/kernel",
        "rng",
        "total",
    ]
    assert lines[1].endswith("never pruned")
    assert lines[2].split()[-3:] == ["54", "72", "75.00%"]
    assert lines[-1].split()[-3:] == ["57", "78", "73.08%"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fc": {"weight": jnp.ones((3, 2), bool)}}, ValueError, "missing.*fc/kernel"),
        (
            {"fc": {"kernel": jnp.ones((3, 3), bool)}},
            ValueError,
            r"fc/kernel.*\(3, 3\)",
        ),
        ({"fc": {"kernel": jnp.ones(2, bool)}}, ValueError, r"fc/kernel.*\(2,\)"),
        ({"fc": {"kernel": jnp.ones((3, 2))}}, TypeError, "fc/kernel.*bool"),
    ],
)
def test_masks_that_do_not_fit(change, error, message):
    params, tree = example()
    with pytest.raises(error, match=message):
        jprune.apply_masks(params, tree | change)


def test_masks_of_different_ranks_do_not_combine():
    with pytest.raises(ValueError, match=r"at 'w' one mask has shape \(2,\)"):
        masks.union({"w": jnp.ones(2, bool)}, {"w": masks.never_pruned()})


def test_packed_masks_of_another_size():
    with pytest.raises(ValueError, match=r"bits: the leaf 'w'.*needs 2 bytes"):
        masks.unpack({"w": jnp.zeros(1, jnp.uint8)}, {"w": jnp.ones((3, 3))})
