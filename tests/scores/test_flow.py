"""Synaptic flow: conservation, range, collapse, and paths by brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import scores


def relu_net(params, x):
    for kernel in params[:-1]:
        x = jax.nn.relu(x @ kernel)
    return x @ params[-1]


def draw(widths, seed=0):
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(widths)
    return [rng.normal(size=pair) / np.sqrt(pair[0]) for pair in pairs]


SYNFLOW = scores.synflow(relu_net)


def test_flow_is_conserved_by_neurons_and_by_layers():
    with jax.enable_x64(True):
        kernels = draw((5, 8, 7, 6, 3))
        masks = [
            jnp.asarray(np.random.default_rng(1).random(k.shape) < 0.6) for k in kernels
        ]
        found = SYNFLOW(kernels, np.zeros((1, 5)), masks=masks)
        positive = [abs(k) * np.asarray(m) for k, m in zip(kernels, masks, strict=True)]
        total = np.linalg.multi_dot([np.ones((1, 5)), *positive, np.ones((3, 1))])
        for before, after in itertools.pairwise(found):
            np.testing.assert_allclose(before.sum(0), after.sum(1), rtol=1e-12)
        for score, mask in zip(found, masks, strict=True):
            np.testing.assert_allclose(score.sum(), total[0, 0], rtol=1e-12)
            assert (np.asarray(score)[~np.asarray(mask)] == 0).all()


def residual_net(params, x):
    """Residual blocks with biases: a gain of some 2^7 a block."""
    for block in params:
        x = (
            x
            + jax.nn.relu(x @ block["a"]["kernel"] + block["a"]["bias"])
            @ block["b"]["w"]
        )
    return x


def residual_params(depth, width=64):
    rng = np.random.default_rng(0)
    return [
        {
            "a": {
                "kernel": rng.normal(size=(width, width)) * 0.25,
                "bias": rng.normal(size=width) * 0.1,
            },
            "b": {"w": rng.normal(size=(width, width)) * 0.25},
        }
        for _ in range(depth)
    ]


@pytest.mark.parametrize("depth", [2, 25])
def test_deep_nets_rank_in_float32_as_in_float64(depth):
    """Depth 25 has a flow of about 2^180, far beyond float32."""
    params = residual_params(depth)
    x = np.zeros((1, 64))
    with jax.enable_x64(True):
        positive = jax.tree.map(np.abs, params)
        flow, grads = jax.value_and_grad(
            lambda p: residual_net(p, np.ones((1, 64))).sum()
        )(positive)
        exact = jax.tree.map(jnp.multiply, positive, grads)
    assert (float(flow) > 2.0**150) == (depth == 25)
    single = jax.tree.map(np.float32, params)
    found = scores.synflow(residual_net)(single, np.float32(x))
    ratios = [
        np.asarray(f[layer][name], np.float64) / np.asarray(e[layer][name])
        for f, e in zip(found, exact, strict=True)
        for layer, name in (("a", "kernel"), ("b", "w"))
    ]
    scale = ratios[0].flat[0]
    assert np.log2(scale) == pytest.approx(round(np.log2(scale)), abs=1e-4)
    assert (abs(scale - 1) < 1e-4) == (depth == 2)
    for ratio in ratios:
        np.testing.assert_allclose(ratio, scale, rtol=2e-4)


def test_a_flow_out_of_all_range_is_nan_and_cannot_be_pruned_by():
    params = jax.tree.map(np.float32, residual_params(60))
    found = scores.synflow(residual_net)(params, np.zeros((1, 64), np.float32))
    with pytest.raises(ValueError, match="are NaN"):
        jprune.prune(found, 0.5)


def test_iterative_synflow_never_empties_a_layer_before_it_must():
    """At maximal compression every layer keeps a weight; one-shot scoring does not.

    The counterpart of the theorem: SNIP in one shot collapses at the same density.
    """
    kernels = [np.float32(k) for k in draw((20, 60, 60, 60, 4))]
    for keep in (4, 12, 40):
        total = sum(k.size for k in kernels)
        rounds = [
            max(round(total * (keep / total) ** (t / 100)), keep) for t in range(1, 101)
        ]
        masks = jprune.prune_iteratively(
            SYNFLOW, kernels, np.zeros((1, 20), np.float32), keep=rounds
        )
        assert [int(m.sum()) > 0 for m in masks] == [True] * 4
        assert sum(int(m.sum()) for m in masks) == keep

    def loss(params, batch):
        return jnp.mean(jax.nn.logsumexp(relu_net(params, batch), axis=1))

    batch = np.random.default_rng(1).normal(size=(32, 20)).astype(np.float32)
    collapsed = jprune.prune(scores.snip(loss)(kernels, batch), keep=40)
    assert min(int(m.sum()) for m in collapsed) == 0


def reachable(masks):
    """Brute force: the kept edges that inputs reach and that reach outputs."""
    forward = [np.ones(masks[0].shape[0], bool)]
    for mask in masks:
        forward.append((forward[-1][:, None] & mask).any(0))
    backward = [np.ones(masks[-1].shape[1], bool)]
    for mask in reversed(masks):
        backward.append((mask & backward[-1][None]).any(1))
    backward.reverse()
    return [
        mask & forward[i][:, None] & backward[i + 1][None]
        for i, mask in enumerate(masks)
    ]


@pytest.mark.parametrize("density", [0.5, 0.15, 0.08])
def test_effective_masks_are_the_reachable_edges(density):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        kernels = [np.float32(k) for k in draw((6, 9, 8, 7, 3), seed)]
        kernels[1][0] = 0.0  # weights that happen to be zero are edges all the same
        masks = [rng.random(k.shape) < density for k in kernels]
        found = scores.effective_masks(
            relu_net, kernels, [jnp.asarray(m) for m in masks], np.zeros((1, 6))
        )
        for mask, expected in zip(found, reachable(masks), strict=True):
            np.testing.assert_array_equal(mask, expected)


def test_report_names_collapsed_and_disconnected_layers():
    kernels = [np.float32(k) for k in draw((4, 5, 6, 2))]
    masks = [jnp.ones(k.shape, bool) for k in kernels]
    masks[1] = jnp.zeros((5, 6), bool)
    masks[0] = masks[0].at[0].set(False)
    report = scores.flow_report(relu_net, kernels, masks, np.zeros((1, 4)))
    assert report.collapsed == ("1",)
    assert report.disconnected == ("0", "2")
    assert report.kept == {"0": 15, "1": 0, "2": 12}
    assert report.active == {"0": 0, "1": 0, "2": 0}
    assert report.density == 27 / 62
    assert report.effective_density == 0


def test_an_output_that_is_no_array_is_named():
    with pytest.raises(TypeError, match="apply_fn: it returned a tuple"):
        scores.synflow(lambda p, x: (x @ p["w"], {}))(
            {"w": np.ones((2, 2))}, np.ones((1, 2))
        )
