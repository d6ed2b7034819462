"""Criteria of channels: against golden data, and by brute force in NumPy."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jprune
from jprune import scores
from jprune.allocation import uniform
from tests.conftest import cross_entropy

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LAYERS = {"conv1": 8, "conv2": 16}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


# Golden data. A convolution is a product of patches and the flattened kernel.


def golden_apply(params, x):
    for name in LAYERS:
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifts = [(i, j) for i in range(3) for j in range(3)]
        patches = jnp.concatenate(
            [padded[:, i : i + height, j : j + width] for i, j in shifts], axis=-1
        )
        x = jax.nn.relu(patches @ kernel.reshape(-1, kernel.shape[-1]) + bias)
    n, height, width, channels = x.shape
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    return x.reshape(n, -1) @ params["fc"]["kernel"] + params["fc"]["bias"]


def golden_loss(params, batch):
    return cross_entropy(golden_apply(params, batch[0]), batch[1])


@pytest.fixture(scope="module")
def golden():
    """Parameters, a batch of 64, and a function that gives golden scores by layer."""
    with np.load(GOLDEN / "filters.npz") as data:
        stored = dict(data)
    with np.load(GOLDEN / "nets.npz") as data:
        nets = dict(data)
    with jax.enable_x64(True):
        params = {
            layer: {
                leaf: jnp.asarray(nets[f"conv/{layer}/{leaf}"], float)
                for leaf in ("kernel", "bias")
            }
            for layer in ("conv1", "conv2", "fc")
        }
        batch = jnp.asarray(nets["conv/x"], float), jnp.asarray(nets["conv/y"])
    return params, batch, lambda name: {k: stored[f"conv/{k}/{name}"] for k in LAYERS}


CONVS = list(LAYERS)


def of_conv(found):
    """The scores of the channels of the two convolutions."""
    for layer, size in LAYERS.items():
        assert found[layer]["kernel"].shape == (1, 1, 1, size)
        assert found[layer]["bias"].shape == ()
    return {layer: np.ravel(found[layer]["kernel"]) for layer in LAYERS}


def assert_golden(found, expected, rtol=1e-9):
    for layer in LAYERS:
        np.testing.assert_allclose(found[layer], expected[layer], rtol, atol=1e-15)


@pytest.mark.parametrize(
    ("criterion", "quantity"),
    [
        (lambda: scores.apoz, "apoz"),
        (lambda: scores.mean_activation, "mean_act"),
        (lambda: scores.hrank, "hrank_f64"),
    ],
    ids=["apoz", "mean", "hrank"],
)
def test_golden_activations(golden, criterion, quantity):
    params, batch, of = golden
    score_fn = jax.jit(criterion()(golden_apply, sites=CONVS))
    found = of_conv(score_fn(params, batch[0]))
    expected = of(quantity)
    if quantity == "apoz":  # the library keeps what is not zero
        expected = {layer: 1 - value for layer, value in expected.items()}
    assert_golden(found, expected)


FISHER = functools.partial(scores.channel_fisher, chunk=64)
TAYLOR = functools.partial(scores.taylor_activation, chunk=64)
UNSCALED = functools.partial(TAYLOR, normalize=False)
BATCH = 64


@pytest.mark.parametrize(
    ("criterion", "place", "quantity", "scale"),
    [
        (scores.taylor_gate, "after_bias", "taylor19_gate_conv_sq", 1),
        (scores.taylor_gate, "after_activation", "taylor19_gate_relu_sq", 1),
        (FISHER, "after_bias", "taylor19_gate_conv_FG", BATCH),
        (FISHER, "after_activation", "taylor19_gate_relu_FG", BATCH),
        (UNSCALED, "after_bias", "taylor17_paper_conv", 1),
        (UNSCALED, "after_activation", "taylor17_paper_relu", 1),
    ],
)
def test_golden_gates(golden, criterion, place, quantity, scale):
    params, batch, of = golden
    found = jax.jit(criterion(golden_loss, sites=CONVS, at=place))(params, batch)
    found = {layer: own / scale for layer, own in of_conv(found).items()}
    assert_golden(found, of(quantity))


def test_golden_taylor_normalised(golden):
    """The reference adds 1e-8 to the norm of a layer."""
    params, batch, of = golden
    found = of_conv(jax.jit(TAYLOR(golden_loss, sites=CONVS))(params, batch))
    norms = {k: np.linalg.norm(v) for k, v in of("taylor17_paper_relu").items()}
    found = {k: v * norms[k] / (norms[k] + 1e-8) for k, v in found.items()}
    assert_golden(found, of("taylor17_paper_relu_l2norm"))


def test_golden_taylor_of_weights(golden):
    """The weight form is the criterion of single weights, summed over filters."""
    params, batch, of = golden
    units = jprune.units.filters(params, prunable="conv*/kernel")
    weights = jax.jit(scores.taylor(golden_loss))(params, batch)
    found = jprune.units.pool(units, weights)
    found = dict(zip(LAYERS, map(np.ravel, found), strict=True))
    assert_golden(found, of("taylor19_weight_sum_sq"))


@pytest.mark.parametrize("how", ["l1", "l2"])
def test_golden_norms(golden, how):
    params, _, of = golden
    units = jprune.units.filters(params, prunable="conv*/kernel", how=how)
    found = jprune.units.pool(units, scores.magnitude(params))
    assert_golden(dict(zip(LAYERS, map(np.ravel, found), strict=True)), of(how))


def test_golden_distances(golden):
    params, _, of = golden
    found = of_conv(scores.fpgm(prunable="conv*/kernel")(params))
    assert_golden(found, of("fpgm_sum_dist"))


@pytest.mark.parametrize(("norm", "distance"), [(1.0, 0.5), (1.0, 0.25), (0.75, 0.25)])
def test_golden_masks_of_distances(golden, norm, distance):
    """With the step by norms: both steps remove what they say, of all filters."""
    params, _, of = golden
    units = jprune.units.filters(params, prunable="conv*/kernel")
    found = scores.fpgm(prunable="conv*/kernel", norm_rate=norm)(params)
    sparsity = 1 - norm + distance
    masks = jprune.prune(found, sparsity, units=units, allocation=uniform(exempt=()))
    by_norm = of(f"norm_codebook_{norm}")
    by_distance = of(f"fpgm_codebook_norm{norm}_dist{distance}")
    for layer in LAYERS:
        expected = by_norm[layer] & by_distance[layer]
        np.testing.assert_array_equal(np.ravel(masks[layer]["kernel"]), expected)


# Brute force.


def small(params, x):
    """A residual block with a depthwise convolution, as products of one pixel."""
    h = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
    r = jax.nn.relu(h @ params["b"]["kernel"])
    h = h + r @ params["c"]["kernel"]
    h = lax.conv_general_dilated(
        h,
        params["d"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    return (h * h).mean((1, 2)) @ params["e"]["kernel"]


def small_params():
    shapes = {"a": (2, 3), "b": (3, 4), "c": (4, 3), "d": (3, 3, 1, 3), "e": (3, 2)}
    params = {
        name: {"kernel": drawn(*shape, seed=i)}
        for i, (name, shape) in enumerate(shapes.items())
    }
    params["a"]["bias"] = drawn(3, seed=7)
    return params


def small_loss(params, batch):
    x, y = batch
    return jnp.mean((small(params, x) - y) ** 2)


def small_batch(n=5):
    return drawn(n, 3, 2, 2, seed=8), drawn(n, 2, seed=9)


def test_statistics_by_brute_force():
    params, (x, _) = small_params(), small_batch()
    a = np.maximum(np.asarray(x @ params["a"]["kernel"] + params["a"]["bias"]), 0)
    flat = a.reshape(-1, 3)

    def entropy(means):
        counts, _ = np.histogram(means, bins=4)
        p = counts[counts > 0] / counts.sum()
        return -np.sum(p * np.log(p))

    expected = {
        scores.apoz: (flat != 0).mean(0),
        scores.mean_activation: np.abs(flat).mean(0),
        scores.activation_variance: flat.var(0),
        functools.partial(scores.activation_entropy, bins=4): [
            entropy(a[..., c].mean((1, 2))) for c in range(3)
        ],
        scores.hrank: [
            np.mean([np.linalg.matrix_rank(image[..., c]) for image in a])
            for c in range(3)
        ],
    }
    for criterion, own in expected.items():
        found = jax.jit(criterion(small, sites="a"))(params, x)
        assert found["a"]["kernel"].shape == (1, 3)
        np.testing.assert_allclose(found["a"]["kernel"][0], own, rtol=1e-12)


def test_rank_falls_back_to_the_mean_where_there_are_no_maps():
    params, (x, _) = small_params(), small_batch()
    rank = scores.hrank(small, sites="e")(params, x)["e"]["kernel"]
    mean = scores.mean_activation(small, sites="e")(params, x)["e"]["kernel"]
    np.testing.assert_array_equal(rank, mean)


def test_rank_of_an_outer_product_and_of_noise():
    x = jnp.stack([jnp.outer(drawn(5), drawn(6, seed=1)), drawn(5, 6)], -1)[None]
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    found = scores.hrank(fn)({"w": jnp.eye(2)}, x)["w"]
    np.testing.assert_array_equal(found, [[1, 5]])


def gated_by_hand(params, batch, gates):
    """The loss of one example with a gate behind each channel's activation."""
    x, y = batch
    h = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"]) * gates["a"]
    r = jax.nn.relu(h @ params["b"]["kernel"]) * gates["b"]
    h = (h + r @ params["c"]["kernel"]) * 1.0
    h = lax.conv_general_dilated(
        h,
        params["d"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    out = (h * h).mean((1, 2)) @ params["e"]["kernel"]
    return jnp.mean((out - y) ** 2)


def test_gates_by_brute_force():
    """One gradient for each example; chunks that do not divide the batch."""
    params, (x, y) = small_params(), small_batch()
    open_ = {"a": jnp.ones(3), "b": jnp.ones(4)}
    grad = jax.jit(jax.grad(gated_by_hand, argnums=2))
    q = [grad(params, (x[n : n + 1], y[n : n + 1]), open_) for n in range(5)]
    make = {"sites": ["a", "b"], "chunk": 2}
    fisher, first, normal, whole = (
        jax.jit(score_fn)(params, (x, y))
        for score_fn in (
            scores.channel_fisher(small_loss, **make),
            scores.taylor_activation(small_loss, normalize=False, **make),
            scores.taylor_activation(small_loss, **make),
            scores.taylor_gate(small_loss, sites=["a", "b"], at="after_activation"),
        )
    )
    for name in ("a", "b"):
        own = np.stack([one[name] for one in q])
        np.testing.assert_allclose(fisher[name]["kernel"][0], (own**2).sum(0))
        absolute = np.abs(own / 6).mean(0)
        np.testing.assert_allclose(first[name]["kernel"][0], absolute)
        np.testing.assert_allclose(np.sum(normal[name]["kernel"] ** 2), 1)
        np.testing.assert_allclose(whole[name]["kernel"][0], own.mean(0) ** 2)


def test_a_coupled_unit_has_the_sum_of_its_gradients_squared():
    """A mask shared by all that read the residual stream, the depthwise one too."""
    params, (x, y) = small_params(), small_batch()
    units = jprune.couplings(small, params, x)
    assert sorted(group.shape for group in units.groups) == [(3,), (4,)]
    found = jax.jit(scores.group_fisher(small_loss, units, chunk=2))(params, (x, y))

    def masked(masks, params, x, y):
        h = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
        r = jax.nn.relu((h * masks[3]) @ params["b"]["kernel"])
        h = h + (r * masks[4]) @ params["c"]["kernel"]
        h = lax.conv_general_dilated(
            h * masks[3],
            params["d"]["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=3,
        )
        h = (h * h).mean((1, 2)) * masks[3]
        return jnp.mean((h @ params["e"]["kernel"] - y) ** 2)

    grad = jax.jit(jax.grad(masked))
    ones = {3: jnp.ones(3), 4: jnp.ones(4)}
    q = [grad(ones, params, x[n : n + 1], y[n : n + 1]) for n in range(5)]
    for group, own in zip(units.groups, found, strict=True):
        (size,) = group.shape
        expected = np.sum(np.stack([one[size] for one in q]) ** 2, axis=0)
        np.testing.assert_allclose(own, expected, rtol=1e-10)
    masks = jprune.prune(found, 0.5, units=units)
    assert jprune.masks.sparsity(masks) > 0


def test_shared_kernels_and_loops():
    """Uses of a kernel have one gate; stacked layers have scores of their own."""

    def fn(params, x):
        for _ in range(2):
            x = jnp.tanh(x @ params["shared"]["kernel"])
        step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return lax.scan(step, x, params["deep"]["kernel"])[0]

    loss = lambda params, x: jnp.mean(fn(params, x) ** 2)  # noqa: E731
    params = {"shared": {"kernel": drawn(3, 3)}, "deep": {"kernel": drawn(4, 3, 3)}}
    x = drawn(5, 3, seed=1)
    found = jax.jit(scores.taylor_gate(loss))(params, x)
    # The gate stands before tanh, so it is a scale of the kernel's outputs.
    grads = jax.jit(jax.grad(loss))(params, x)
    for name, shape in {"shared": (1, 3), "deep": (4, 1, 3)}.items():
        product = params[name]["kernel"] * grads[name]["kernel"]
        expected = jnp.sum(product, axis=-2, keepdims=True) ** 2
        assert found[name]["kernel"].shape == shape
        np.testing.assert_allclose(found[name]["kernel"], expected)
    mean = jax.jit(scores.mean_activation(fn))(params, x)["shared"]["kernel"]
    first = jnp.tanh(x @ params["shared"]["kernel"])
    second = jnp.tanh(first @ params["shared"]["kernel"])
    both = (jnp.abs(first).mean(0) + jnp.abs(second).mean(0)) / 2
    np.testing.assert_allclose(mean[0], both)


def test_scores_have_the_axes_of_the_leaf():
    """Channels that the function takes in another order than the leaf has them."""

    def fn(params, x):
        return x @ params["w"].transpose(2, 1, 0).reshape(4, 6)

    w, x = drawn(2, 3, 4), drawn(5, 4)
    found = scores.mean_activation(fn)({"w": w}, x)["w"]
    expected = jnp.abs(jnp.einsum("bi,hdi->bhd", x, w)).mean(0)
    np.testing.assert_allclose(found, expected[..., None])


def test_scores_at_masks_and_under_jit():
    params, (x, y) = small_params(), small_batch()
    masks = {name: {k: jnp.array(True) for k in own} for name, own in params.items()}
    masks["a"] = {
        "kernel": jnp.array([[True, False, True]]),
        "bias": jnp.arange(3) != 1,
    }
    criteria = [
        (scores.apoz(small, sites="a"), x),
        (scores.taylor_gate(small_loss, sites="a"), (x, y)),
        (scores.channel_fisher(small_loss, sites="a"), (x, y)),
        (scores.fpgm(), None),
    ]
    for score_fn, batch in criteria:
        score_fn = jax.jit(score_fn)
        at_product = score_fn(jprune.apply_masks(params, masks), batch)
        found = score_fn(params, batch, masks=masks)
        for a, b in zip(*map(jax.tree.leaves, (found, at_product)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_distances_by_brute_force():
    kernel = drawn(2, 3, 4, 5)
    rows = np.asarray(kernel).reshape(-1, 5).T
    expected = np.linalg.norm(rows[:, None] - rows[None], axis=-1).sum(1)
    found = scores.fpgm()({"kernel": kernel})["kernel"]
    np.testing.assert_allclose(found[0, 0, 0], expected)
    # OIHW, and layers of a stack apart, whatever axis it is.
    turned = scores.fpgm(layout="OIHW")({"kernel": kernel.transpose(3, 2, 0, 1)})
    np.testing.assert_allclose(turned["kernel"].ravel(), expected)
    deep = drawn(3, 4, 5)
    for layout, shape in {"LIO": (3, 1, 5), "ILO": (1, 4, 5)}.items():
        stacked = scores.fpgm(layout=layout)({"kernel": deep})["kernel"]
        assert stacked.shape == shape
        for layer in range(shape["LI".index("L") if layout == "LIO" else 1]):
            axis = layout.index("L")
            alone = scores.fpgm()({"kernel": jnp.take(deep, layer, axis)})["kernel"]
            np.testing.assert_allclose(
                jnp.take(stacked, layer, axis).ravel(), alone.ravel()
            )


def test_the_median_filter_goes_first():
    """The mean of the others has the lowest score, and moving all changes nothing."""
    kernel = drawn(4, 6)
    kernel = kernel.at[:, 2].set(jnp.delete(kernel, 2, axis=1).mean(1))
    found = scores.fpgm()({"kernel": kernel})["kernel"][0]
    assert found.argmin() == 2
    moved = scores.fpgm()({"kernel": kernel + drawn(4, 1, seed=1)})["kernel"][0]
    np.testing.assert_allclose(moved, found)


# Into masks.


def net_with_norm(params, x):
    h = x @ params["conv"]["kernel"]
    h = jax.nn.relu(h * params["bn"]["scale"] + params["bn"]["bias"])
    return h @ params["fc"]["kernel"]


def norm_params():
    return {
        "conv": {"kernel": drawn(3, 4)},
        "bn": {"scale": jnp.array([0.1, -3.0, 0.2, 1.0]), "bias": drawn(4)},
        "fc": {"kernel": drawn(4, 2)},
    }


def test_scales_of_norms_prune_coupled_channels():
    params, x = norm_params(), drawn(2, 3)
    found = scores.norm_scale(params)
    units = jprune.couplings(net_with_norm, params, x)
    masks = jprune.prune(found, 0.5, units=units)
    keep = np.array([False, True, False, True])
    np.testing.assert_array_equal(masks["conv"]["kernel"], keep[None])
    np.testing.assert_array_equal(masks["bn"]["bias"], keep)
    np.testing.assert_array_equal(masks["fc"]["kernel"], keep[:, None])
    # Scale and shift at zero leave nothing of a channel: masked is shrunk.
    small_fn, small_params = jprune.shrink(net_with_norm, params, masks, x)
    np.testing.assert_allclose(
        small_fn(small_params, x), net_with_norm(jprune.apply_masks(params, masks), x)
    )
    with pytest.raises(ValueError, match="accepts none of the leaves"):
        scores.norm_scale({"kernel": drawn(2, 3)})


def test_scores_of_channels_with_filters_and_with_couplings():
    params, (x, _) = small_params(), small_batch()
    found = jax.jit(scores.mean_activation(small))(params, x)
    filters = jprune.units.filters(params)
    by_leaf = jprune.units.pool(filters, found)
    for group, own in zip(filters.groups, by_leaf, strict=True):
        np.testing.assert_array_equal(own, found[group.leaf.path[0]]["kernel"])
    masks = jprune.prune(found, 0.5, units=filters)
    assert masks["d"]["kernel"].shape == (1, 1, 1, 3)
    again = jprune.prune(found, 0.5, units=filters, within=masks)
    assert all(map(jnp.array_equal, jax.tree.leaves(masks), jax.tree.leaves(again)))
    # The channels of a, c and d are one stream, and the inputs of b and e no scores.
    units = jprune.couplings(small, params, x, how="sum")
    (stream,) = (own for own in jprune.units.pool(units, found) if own.size == 3)
    kernels = [np.ravel(found[name]["kernel"]) for name in "acd"]
    np.testing.assert_allclose(stream, sum(kernels))
    for how, pooled in {"mean": np.mean, "max": np.max}.items():
        units = units._replace(how=how)
        (stream,) = (own for own in jprune.units.pool(units, found) if own.size == 3)
        np.testing.assert_allclose(stream, pooled(kernels, axis=0))


def test_rounds_of_structured_pruning():
    """Scores of channels, and in unit space: the second round scores what is left."""
    params, x = norm_params(), drawn(5, 3)
    loss = lambda params, x: jnp.mean(net_with_norm(params, x) ** 2)  # noqa: E731
    units = jprune.couplings(net_with_norm, params, x)
    for criterion in (scores.taylor_gate(loss), scores.group_fisher(loss, units)):
        masks = jprune.prune_iteratively(criterion, params, x, keep=(3, 2), units=units)
        criterion = jax.jit(criterion)
        first = jprune.prune(criterion(params, x), keep=3, units=units)
        again = criterion(params, x, masks=first)
        expected = jprune.prune(again, keep=2, units=units, within=first)
        for a, b in zip(*map(jax.tree.leaves, (masks, expected)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_bad_input():
    params, (x, y) = small_params(), small_batch()
    found = scores.apoz(small, sites="b")(params, x)
    with pytest.raises(ValueError, match=r"3 of 3 coupled units .* no channel with a"):
        jprune.prune(found, 0.5, units=jprune.couplings(small, params, x))
    with pytest.raises(ValueError, match=r"those of 'b/kernel' have shape \(1, 4\)"):
        units = jprune.units.input_channels(params, prunable="b/kernel")
        jprune.prune(found, 0.5, units=units)
    with pytest.raises(ValueError, match="matches none of"):
        scores.apoz(small, sites="z")(params, x)
    with pytest.raises(ValueError, match="chunk: 0 is below 1"):
        scores.channel_fisher(small_loss, chunk=0)
    with pytest.raises(ValueError, match="bins: 0 is below 1"):
        scores.activation_entropy(small, bins=0)
    with pytest.raises(ValueError, match=r"norm_rate: 0\.0 is not in"):
        scores.fpgm(norm_rate=0.0)
    with pytest.raises(ValueError, match="they are not coupled channels"):
        scores.group_fisher(small_loss, jprune.units.filters(params))
    with pytest.raises(ValueError, match="has no examples"):
        scores.taylor_activation(small_loss)(params, (x[:0], y[:0]))
    tied = lambda params, x: (x @ params["w"]) @ params["w"].T  # noqa: E731
    with pytest.raises(ValueError, match="different axes of one leaf"):
        scores.apoz(tied)({"w": drawn(2, 3)}, drawn(4, 2))
    sliced = lambda params, x: x @ params["w"][:, 1:]  # noqa: E731
    with pytest.raises(ValueError, match="cannot be told which entries of 'w'"):
        scores.apoz(sliced)({"w": drawn(2, 3)}, drawn(4, 2))
