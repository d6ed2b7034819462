"""Diagonals of the curvature against golden data, brute force and their own laws."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jprune import masks as mask_trees
from jprune.scores import _curvature

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "second_order.npz"

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as data:
        return dict(data)


def tree_of(golden, name):
    """A quantity of the golden net as a tree, kernels being (in, out)."""
    return {
        layer: {
            leaf: np.float64(golden[f"tiny_split/{name}_jax/{layer}/{leaf}"])
            for leaf in ("kernel", "bias")
        }
        for layer in ("fc1", "fc2")
    }


def apply(params, x, activation=jnp.tanh):
    hidden = activation(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    return hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"]


def loss(params, batch):
    x, y = batch
    return jnp.mean(cross_entropy(apply(params, x), y))


def batch_of(golden):
    return np.float64(golden["tiny/x"]), golden["tiny/y"]


def assert_close(actual, expected, rtol=1e-10, atol=1e-13):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        actual,
        expected,
    )


# Every diagonal of the golden net's loss, by the size of its chunks.
DIAGONALS = {
    "exact": lambda chunk=32: _curvature.exact_diagonal(loss, chunk=chunk),
    "hutchinson": lambda chunk=32: _curvature.hutchinson_diagonal(loss, probes=3),
    "gauss_newton": lambda chunk=8: _curvature.gauss_newton_diagonal(
        apply, cross_entropy, chunk=chunk
    ),
    "fisher": lambda chunk=32: _curvature.fisher_diagonal(loss, chunk=chunk),
}
every_diagonal = pytest.mark.parametrize("name", DIAGONALS)


# Chunk 5 divides neither 16 examples nor 43 weights: catches a filled-up last chunk
# that counts. The Fisher's golden values catch (mean g)^2 for mean g^2 and the sum
# for the mean; Gauss-Newton's a missing output Hessian and its diagonal alone.
golden_diagonals = pytest.mark.parametrize(
    "name, expected",
    [
        ("exact", "hess_diag"),
        ("gauss_newton", "gauss_newton_diag"),
        ("fisher", "empirical_fisher_diag"),
    ],
)


@golden_diagonals
def test_golden_diagonal(golden, name, expected):
    diagonal_fn = jax.jit(DIAGONALS[name](5))
    actual = diagonal_fn(tree_of(golden, "param"), batch_of(golden))
    assert_close(actual, tree_of(golden, expected))


@golden_diagonals
def test_golden_diagonal_in_one_chunk_under_vmap(golden, name, expected):
    params = tree_of(golden, "param")
    ensemble = jax.tree.map(lambda w: np.stack([w / 2, w, 2 * w]), params)
    diagonal_fn = jax.vmap(DIAGONALS[name](64), (0, None))
    actual = jax.jit(diagonal_fn)(ensemble, batch_of(golden))
    assert_close(
        jax.tree.map(lambda h: np.asarray(h)[1], actual), tree_of(golden, expected)
    )


def test_golden_diagonal_of_relu_net(golden):
    def relu_loss(params, batch):
        x, y = batch
        return jnp.mean(cross_entropy(apply(params, x, jax.nn.relu), y))

    h = jax.jit(_curvature.exact_diagonal(relu_loss))(
        tree_of(golden, "param"), batch_of(golden)
    )
    # The golden vector is in the order of torch, with weights (out, in).
    flat = [
        part
        for layer in ("fc1", "fc2")
        for part in (np.ravel(np.asarray(h[layer]["kernel"]).T), h[layer]["bias"])
    ]
    np.testing.assert_allclose(
        np.concatenate(flat), golden["tiny_relu/hess_diag"], rtol=1e-10, atol=1e-13
    )


# The exact saliency has negative entries: catches an absolute value or a clip.
@pytest.mark.parametrize(
    "diagonal, expected",
    [
        (_curvature.exact_diagonal, "obd_saliency"),
        (_curvature.fisher_diagonal, "fisher_saliency_half_F_w2"),
    ],
)
def test_golden_saliency(golden, diagonal, expected):
    score_fn = jax.jit(_curvature.obd(loss, diagonal=diagonal))
    actual = score_fn(tree_of(golden, "param"), batch_of(golden))
    assert_close(actual, tree_of(golden, expected))


def test_saliency_by_gauss_newton(golden):
    diagonal = functools.partial(_curvature.gauss_newton_diagonal, loss=cross_entropy)
    params = tree_of(golden, "param")
    actual = jax.jit(_curvature.obd(apply, diagonal=diagonal))(params, batch_of(golden))
    h = tree_of(golden, "gauss_newton_diag")
    assert_close(actual, jax.tree.map(lambda h, w: h * w**2 / 2, h, params))


def test_hutchinson_is_exact_for_a_diagonal_hessian():
    # Catches Gaussian probes: their squares are 1 only in the mean.
    h = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([-1.0, 4.0])}

    def quadratic(params, _):
        terms = jax.tree.map(lambda h, w: jnp.sum(h * w**2) / 2, h, params)
        return sum(jax.tree.leaves(terms))

    params = jax.tree.map(np.ones_like, h)
    diagonal_fn = jax.jit(_curvature.hutchinson_diagonal(quadratic, probes=1))
    assert_close(diagonal_fn(params, key=jax.random.key(3)), h)


def test_hutchinson_converges_like_one_over_sqrt_probes(golden):
    # Catches one key for all probes (the error then stays) and a missing 1/probes.
    hessian = golden["tiny/hessian"]
    off_diagonal = hessian - np.diag(np.diag(hessian))
    deviation = np.sqrt(np.mean(np.sum(off_diagonal**2, axis=1)))
    params, batch = tree_of(golden, "param"), batch_of(golden)
    diagonal_fn = _curvature.hutchinson_diagonal(loss, probes=100)
    keys = jax.random.split(jax.random.key(0), 36)
    draws = jax.jit(jax.vmap(lambda key: diagonal_fn(params, batch, key=key)))(keys)

    def error(select):
        differences = jax.tree.map(
            lambda h, exact: select(np.asarray(h)) - exact,
            draws,
            tree_of(golden, "hess_diag"),
        )
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(differences)])
        return np.sqrt(np.mean(flat**2))

    for i in range(36):
        assert 0.5 < error(lambda h, i=i: h[i]) / (deviation / 10) < 2
    # The mean of 36 is an estimate from 3600 probes.
    assert 0.5 < error(lambda h: h.mean(0)) / (deviation / 60) < 2


def test_the_papers_recursion_is_exact_for_one_hidden_relu_layer():
    # The recursion of LeCun, Denker & Solla in NumPy: squared error, linear outputs.
    rng = np.random.default_rng(0)
    params = {
        "fc1": {"kernel": rng.normal(size=(4, 6)), "bias": rng.normal(size=6)},
        "fc2": {"kernel": rng.normal(size=(6, 3)), "bias": rng.normal(size=3)},
    }
    x, target = rng.normal(size=(20, 4)), rng.normal(size=(20, 3))
    relu_apply = functools.partial(apply, activation=jax.nn.relu)

    def squared_error(y, target):
        return jnp.sum((y - target) ** 2)

    def mean_loss(params, batch):
        return jnp.mean(jax.vmap(squared_error)(relu_apply(params, batch[0]), batch[1]))

    before = x @ params["fc1"]["kernel"] + params["fc1"]["bias"]
    hidden = np.maximum(before, 0)
    at_output = np.full((20, 3), 2.0)
    at_hidden = (before > 0) * (at_output @ params["fc2"]["kernel"].T ** 2)
    recursion = {
        "fc1": {"kernel": (x**2).T @ at_hidden / 20, "bias": at_hidden.mean(0)},
        "fc2": {"kernel": (hidden**2).T @ at_output / 20, "bias": at_output.mean(0)},
    }
    exact = _curvature.exact_diagonal(mean_loss)
    assert_close(jax.jit(exact)(params, (x, target)), recursion)
    gauss_newton = _curvature.gauss_newton_diagonal(relu_apply, squared_error)
    assert_close(jax.jit(gauss_newton)(params, (x, target)), recursion)


def test_a_negative_output_curvature_counts_as_none():
    def saddle(y, _):
        return y[0] ** 2 - y[1] ** 2

    diagonal_fn = _curvature.gauss_newton_diagonal(lambda w, x: x * w, saddle)
    h = jax.jit(diagonal_fn)(np.ones(2), (np.array([[3.0, 5.0]]), np.zeros(1)))
    np.testing.assert_allclose(h, [18.0, 0.0], atol=1e-12)


def masks_of(params, seed=0):
    rng = np.random.default_rng(seed)
    return {
        layer: {
            "kernel": rng.random(leaves["kernel"].shape) < 0.5,
            "bias": np.True_,
        }
        for layer, leaves in params.items()
    }


@every_diagonal
def test_masks_are_applied_before_the_derivative(golden, name):
    # Catches masks ignored, and a derivative by the dense weights (0 where removed).
    params, batch, key = tree_of(golden, "param"), batch_of(golden), jax.random.key(0)
    masks = masks_of(params)
    diagonal_fn = jax.jit(DIAGONALS[name]())
    actual = diagonal_fn(params, batch, masks=masks, key=key)
    product = jax.jit(mask_trees.apply)(params, masks)
    keep_all = jax.tree.map(np.ones_like, masks)
    assert_close(actual, diagonal_fn(product, batch, masks=keep_all, key=key))
    removed = ~masks["fc1"]["kernel"]
    assert np.any(np.asarray(actual["fc1"]["kernel"])[removed] != 0)


def test_exact_diagonal_at_masks_by_finite_differences(golden):
    params, batch = tree_of(golden, "param"), batch_of(golden)
    masks = masks_of(params)
    product = jax.tree.map(np.array, jax.jit(mask_trees.apply)(params, masks))
    score_fn = jax.jit(_curvature.obd(loss, diagonal=_curvature.exact_diagonal))
    scores = np.asarray(score_fn(params, batch, masks=masks)["fc1"]["kernel"])
    loss_of, step = jax.jit(loss), 1e-4
    for i, j in [(0, 0), (1, 2), (2, 1), (3, 3), (3, 4)]:
        losses = []
        for delta in (-step, 0.0, step):
            moved = jax.tree.map(np.copy, product)
            moved["fc1"]["kernel"][i, j] += delta
            losses.append(float(loss_of(moved, batch)))
        second = (losses[0] - 2 * losses[1] + losses[2]) / step**2
        # The weight is the one given, also where the mask removes it.
        expected = second * params["fc1"]["kernel"][i, j] ** 2 / 2
        np.testing.assert_allclose(scores[i, j], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["hutchinson", "gauss_newton"])
def test_leaves_that_are_not_floating_pass_through(golden, name):
    params = tree_of(golden, "param")
    rest = {"steps": np.arange(3), "key": jax.random.key(1), "depth": 2}
    batch, key = batch_of(golden), jax.random.key(0)

    def whole(fn):
        return lambda params, *args: fn(params["net"], *args) * params["steps"][2]

    diagonals = {
        "hutchinson": _curvature.hutchinson_diagonal(whole(loss), probes=3),
        "gauss_newton": _curvature.gauss_newton_diagonal(whole(apply), cross_entropy),
    }
    tree = {"net": params, **rest}
    masks = {"net": masks_of(params), **dict.fromkeys(rest, np.True_)}
    score_fn = _curvature.obd(loss, diagonal=lambda _: diagonals[name])
    scores = jax.jit(score_fn)(tree, batch, masks=masks, key=key)
    assert jax.tree.structure(scores) == jax.tree.structure(tree)
    for leaf in rest:
        assert scores[leaf].shape == () and scores[leaf] == 0
    assert jnp.all(scores["net"]["fc2"]["bias"] != 0)


def test_half_precision_is_squared_and_summed_in_float32():
    # In bfloat16 the square of this number is rounded, and 300 ones add up to 256.
    number = 1 + 2**-7
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    inputs = jnp.full((300, 2), number, jnp.bfloat16)
    fisher = _curvature.fisher_diagonal(lambda p, x: jnp.mean(x @ p["w"]), chunk=1)
    gauss_newton = _curvature.gauss_newton_diagonal(
        lambda p, x: x @ p["w"], lambda y, _: y**2 / 2, chunk=1
    )

    def quadratic(params, _):
        return jnp.sum(params["w"] ** 2) / 2

    hutchinson = _curvature.hutchinson_diagonal(quadratic, probes=300)
    exact = _curvature.exact_diagonal(quadratic)
    for h, expected in (
        (jax.jit(fisher)(params, inputs), number**2),
        (jax.jit(gauss_newton)(params, (inputs, inputs[:, 0])), number**2),
        (jax.jit(hutchinson)(params, key=jax.random.key(0)), 1.0),
        (jax.jit(exact)(params), 1.0),
    ):
        assert h["w"].dtype == jnp.float32
        np.testing.assert_allclose(h["w"], expected, rtol=1e-5)


def test_each_example_has_its_own_key():
    def noisy(params, batch, key):
        return jnp.mean(batch) * params["w"] * jax.random.normal(key)

    key = jax.random.key(0)
    params, batch = {"w": np.array(2.0)}, np.ones(7)
    noise = jax.vmap(jax.random.normal)(jax.random.split(key, 7))
    h = jax.jit(_curvature.fisher_diagonal(noisy, chunk=2))(params, batch, key=key)
    np.testing.assert_allclose(h["w"], jnp.mean(noise**2))


@pytest.mark.parametrize(
    "noisy",
    [
        lambda params, batch, rng: params**2 * jax.random.normal(rng),
        lambda params, batch, key=None: params**2 * jax.random.normal(key),
        lambda params, batch, *, key: params**2 * jax.random.normal(key),
    ],
)
def test_a_loss_that_takes_a_key_gets_it(noisy):
    key = jax.random.key(5)
    h = _curvature.exact_diagonal(noisy)(np.array(1.0), key=key)
    np.testing.assert_allclose(h, 2 * jax.random.normal(key))


def test_an_option_of_the_loss_is_not_taken_for_a_key():
    def decayed(params, batch, decay=3.0):
        return decay * params**2

    h = _curvature.exact_diagonal(decayed)(np.array(1.0), key=jax.random.key(0))
    np.testing.assert_allclose(h, 6.0)


@every_diagonal
def test_no_hessian_is_formed(name):
    inputs, weights = 4, 8000
    params = {
        "fc1": {"kernel": np.ones((inputs, 1000)), "bias": np.ones(1000)},
        "fc2": {"kernel": np.ones((1000, 3)), "bias": np.ones(3)},
    }
    batch = (np.ones((2, inputs)), np.zeros(2, int))
    compiled = (
        jax.jit(DIAGONALS[name](1))
        .lower(params, batch, key=jax.random.key(0))
        .compile()
    )
    memory = compiled.memory_analysis().temp_size_in_bytes
    assert memory < 40 * 8 * weights


PARAMS = {"fc1": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
"""A tree for calls that fail before they compute."""


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: _curvature.obd(loss)(PARAMS, None), "key: "),
        (
            lambda: _curvature.hutchinson_diagonal(loss, probes=0),
            "probes: .* got 0",
        ),
        (lambda: _curvature.exact_diagonal(loss, chunk=0), "chunk: .* got 0"),
        (lambda: _curvature.fisher_diagonal(loss, chunk=0), "chunk: .* got 0"),
        (
            lambda: _curvature.exact_diagonal(loss)({"n": 3}, None),
            "params: none .* floating",
        ),
        (
            lambda: _curvature.fisher_diagonal(loss)(PARAMS, None),
            "batch: .* leading axis",
        ),
        (
            lambda: _curvature.fisher_diagonal(loss)(
                PARAMS, (np.ones((3, 2)), np.ones(2))
            ),
            r"batch: .* leading axis, got the shapes .*\(3, 2\).*\(2,\)",
        ),
        (
            lambda: _curvature.gauss_newton_diagonal(apply, cross_entropy)(
                PARAMS, np.ones((3, 2))
            ),
            r"batch: .* pair \(inputs, targets\)",
        ),
        (
            lambda: _curvature.gauss_newton_diagonal(
                lambda params, x: x @ params["fc1"]["kernel"],
                lambda y, target: (y - target) ** 2,
            )(PARAMS, (np.ones((3, 2)), np.ones((3, 2)))),
            r"loss: .* shape \(2,\)",
        ),
        (
            lambda: _curvature.exact_diagonal(loss)(PARAMS, None, masks=PARAMS["fc1"]),
            "masks: the tree differs",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@every_diagonal
def test_a_batch_without_examples(golden, name):
    batch = (np.ones((0, 4)), np.ones(0, int))
    with pytest.raises(ValueError, match=r"batch: .* \(0, 4\) has no examples"):
        DIAGONALS[name]()(tree_of(golden, "param"), batch, key=jax.random.key(0))


def test_gauss_newton_needs_a_loss():
    with pytest.raises(TypeError, match="loss"):
        _curvature.obd(apply, diagonal=_curvature.gauss_newton_diagonal)


def test_complex_weights():
    with pytest.raises(TypeError, match="'w' is complex"):
        _curvature.exact_diagonal(lambda p, _: jnp.sum(jnp.abs(p["w"])))(
            {"w": jnp.ones(2, complex)}
        )
