"""Exact top-k against a stable sort, for every dtype, tie and special value."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jprune import selection, trees

top_k = jax.jit(selection.top_k)


def largest(scores, k):
    """The k largest by a stable sort: NaN last, -0.0 equal to 0.0."""
    flat = np.asarray(scores).astype(np.float64).ravel()
    isnan = np.isnan(flat)
    order = np.lexsort((np.arange(flat.size), -np.where(isnan, 0, flat), isnan))
    mask = np.zeros(flat.size, bool)
    mask[order[:k]] = True
    return mask.reshape(np.shape(scores))


def draw(kind, n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    if kind == "positive":
        x = np.abs(x)
    elif kind == "ties":
        x = np.round(2 * x) / 2 * rng.choice([1.0, -0.0], n)
    elif kind == "special":
        for value in (np.nan, np.inf, -np.inf):
            x[rng.random(n) < 0.2] = value
    elif kind == "subnormal":
        x = x * 1e-41
    elif kind == "heavy":
        x = x * np.exp(8 * rng.normal(size=n))
    elif kind == "constant":
        x = np.full(n, 0.5)
    elif kind == "mostly zero":
        x = np.where(rng.random(n) < 0.97, 0.0, x)
    return x


KINDS = [
    "normal",
    "positive",
    "ties",
    "special",
    "subnormal",
    "heavy",
    "constant",
    "mostly zero",
]


@pytest.mark.parametrize("n", [1, 7, 1000, 40_000])
def test_top_k_is_a_stable_sort(n):
    for kind in KINDS:
        scores = draw(kind, n).astype(np.float32)
        for k in sorted({0, 1, n // 10, n // 2, n - 1, n}):
            expected = largest(scores, k)
            np.testing.assert_array_equal(top_k(scores, k), expected, f"{kind} {k}")


def test_top_k_of_many_finds_ties_inside_a_block():
    """Above 2^20 entries ties are settled in blocks, not by whole passes."""
    n = 2**20 + 40_003
    for kind in ("ties", "normal", "special"):
        scores = draw(kind, n).astype(np.float32)
        for k in (1, n // 10, n - 5):
            np.testing.assert_array_equal(top_k(scores, k), largest(scores, k), kind)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32"])
def test_top_k_of_other_dtypes(dtype):
    for kind in ("normal", "ties") if dtype == "int32" else KINDS:
        values = 100 * draw(kind, 777) if dtype == "int32" else draw(kind, 777)
        scores = jnp.asarray(values).astype(dtype)
        for k in (0, 100, 777):
            expected = largest(np.asarray(scores.astype(jnp.float32)), k)
            np.testing.assert_array_equal(top_k(scores, k), expected, f"{kind} {k}")


def test_top_k_of_float64_tells_apart_what_float32_cannot():
    with jax.enable_x64(True):
        for kind in KINDS:
            scores = 1 + 1e-12 * draw(kind, 777)
            for k in (0, 100, 777):
                found = top_k(jnp.asarray(scores), k)
                np.testing.assert_array_equal(found, largest(scores, k), f"{kind} {k}")


@hypothesis.given(
    st.lists(st.floats(width=32), min_size=37, max_size=37), st.integers(0, 37)
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_top_k_of_any_floats(scores, k):
    scores = np.array(scores, np.float32)
    np.testing.assert_array_equal(top_k(scores, k), largest(scores, k))


SHAPES = [(30, 40), (7, 5, 6), (100,), (), (3, 0), (4, 1000)]
STACKS = [None, 2, None, None, None, 0]


@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
def test_select_together_and_by_layer(kind):
    rng = np.random.default_rng(1)
    arrays = [draw(kind, s, seed=3).astype(np.float32) for s in SHAPES]
    arrays = [np.asarray(x, np.float32) for x in arrays]
    flat = np.concatenate([x.ravel() for x in arrays])
    for k in (0, 1, 2000, flat.size):
        masks = _together(arrays, jnp.array([k]))
        found = np.concatenate([np.ravel(mask) for mask in masks])
        np.testing.assert_array_equal(found, largest(flat, k))
        assert [m.shape for m in masks] == SHAPES

    layers = [_layers(x, axis) for x, axis in zip(arrays, STACKS, strict=True)]
    keep = [[int(rng.integers(0, x.size + 1)) for x in own] for own in layers]
    masks = _by_layer(arrays, jnp.array([k for own in keep for k in own]))
    for mask, axis, own, counts in zip(masks, STACKS, layers, keep, strict=True):
        for found, x, k in zip(
            _layers(np.asarray(mask), axis), own, counts, strict=True
        ):
            np.testing.assert_array_equal(found, largest(x, k))


_together = jax.jit(functools.partial(selection.select, together=True))
_by_layer = jax.jit(functools.partial(selection.select, stacks=STACKS))


def _layers(array, axis):
    return [array] if axis is None else list(np.moveaxis(array, axis, 0))


def test_mixed_dtypes_are_compared_in_the_common_one():
    a, b = jnp.array([1.0, 3.0], jnp.bfloat16), jnp.array([2.0, 0.5], jnp.float32)
    masks = selection.select([a, b], jnp.array([2]), together=True)
    assert [mask.tolist() for mask in masks] == [[False, True], [True, False]]


def test_top_k_under_vmap_over_scores_and_counts():
    scores = draw("ties", (5, 300)).astype(np.float32)
    counts = np.array([0, 3, 150, 299, 300])
    masks = jax.jit(jax.vmap(selection.top_k))(scores, counts)
    for mask, own, k in zip(masks, scores, counts, strict=True):
        np.testing.assert_array_equal(mask, largest(own, k))


def test_one_compilation_for_all_counts():
    compiled = jax.jit(lambda scores, k: selection.top_k(scores, k))
    for k in (1, 20, 50):
        compiled(draw("normal", 64).astype(np.float32), jnp.int32(k))
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    ("n", "sparsity", "keep"),
    # Half rounds to even; in float32 the last would be 2,555,704.
    [(10, 0.0, 10), (5, 0.5, 3), (7, 0.5, 3), (25_557_032, 0.9, 2_555_703)],
)
def test_keep_count(n, sparsity, keep):
    assert selection.keep_count(n, sparsity) == keep


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), 90])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"sparsity: .* outside \[0, 1\)"):
        selection.keep_count(10, sparsity)


def test_wrong_number_of_groups():
    with pytest.raises(ValueError, match=r"keep: shape \(2,\), but there are 1 groups"):
        selection.select([jnp.ones(3)], jnp.array([1, 2]))


def test_nan_is_named_outside_jit_and_ranks_lowest_inside():
    leaf = trees.Leaf(0, "fc/kernel", jnp.array([[1.0, jnp.nan, -jnp.inf]]))
    message = r"scores: 1 of the 3 scores of 'fc/kernel' are NaN"
    with pytest.raises(ValueError, match=message):
        selection.check_no_nan([leaf])

    @jax.jit
    def inside(value):
        selection.check_no_nan([leaf._replace(value=value)])
        return selection.top_k(value, 2)

    assert inside(leaf.value).tolist() == [[True, False, True]]
