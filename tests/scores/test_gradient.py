"""Gradient criteria against closed forms, finite differences and their laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jprune
from jprune import scores

X = np.random.default_rng(0).normal(size=(12, 4))
Y = np.random.default_rng(1).normal(size=(12, 2))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": rng.normal(size=(4, 5))},
        "b": {"kernel": rng.normal(size=(5, 2))},
        "n": 3,
        "rng": jax.random.key(0),
    }


def apply(params, x):
    return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


def objective(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def loss(params, batch):
    return objective(apply(params, batch[0]), batch[1])


def halves(seed=3):
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": jnp.asarray(rng.random((4, 5)) < 0.6)},
        "b": {"kernel": jnp.asarray(rng.random((5, 2)) < 0.6)},
        "n": jprune.masks.never_pruned(),
        "rng": jprune.masks.never_pruned(),
    }


def gradient_by_differences(params, at):
    """The gradient at the product, by central differences in NumPy."""

    def value(a, b):
        return np.mean((np.tanh(X @ a) @ b - Y) ** 2)

    kernels = [np.array(at[k]["kernel"]) for k in ("a", "b")]
    grads = []
    for i, kernel in enumerate(kernels):
        grad = np.zeros_like(kernel)
        for place in np.ndindex(kernel.shape):
            shifted = [k.copy() for k in kernels]
            shifted[i][place] += 1e-5
            high = value(*shifted)
            shifted[i][place] -= 2e-5
            grad[place] = (high - value(*shifted)) / 2e-5
        grads.append(grad)
    return grads


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("criterion", "rule"),
    [
        ("snip", lambda w, g: np.abs(w * g)),
        ("taylor", lambda w, g: (w * g) ** 2),
        ("squared_gradient", lambda w, g: g**2),
    ],
)
def test_first_order_criteria_at_the_product(criterion, rule, masked):
    """Fails if the gradient is masked, or if the masked weight multiplies it."""
    params = draw()
    masks = halves() if masked else None
    found = getattr(scores, criterion)(loss)(params, (X, Y), masks=masks)
    at = params if masks is None else jprune.apply_masks(params, masks)
    grads = gradient_by_differences(params, at)
    for name, g in zip(("a", "b"), grads, strict=True):
        expected = rule(params[name]["kernel"], g)
        np.testing.assert_allclose(
            found[name]["kernel"], expected, rtol=1e-6, atol=1e-9
        )
    assert found["n"].shape == () and found["rng"].shape == ()


def test_snip_is_the_derivative_by_the_mask():
    params = draw()
    kernels = {k: params[k] for k in ("a", "b")}
    ones = jax.tree.map(jnp.ones_like, kernels)
    by_mask = jax.grad(lambda c: loss(jax.tree.map(jnp.multiply, c, kernels), (X, Y)))(
        ones
    )
    found = scores.snip(loss)(kernels, (X, Y))
    jax.tree.map(
        lambda s, d: np.testing.assert_allclose(s, abs(d), rtol=1e-12), found, by_mask
    )


def test_signed_saliency_is_conserved_at_every_hidden_neuron():
    """In a ReLU net without biases, sum of w g over incoming = over outgoing."""
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=s) for s in ((4, 6), (6, 5), (5, 3))]

    def relu_loss(params, batch):
        x = batch[0]
        for kernel in params[:-1]:
            x = jax.nn.relu(x @ kernel)
        return jnp.mean(jax.nn.logsumexp(x @ params[-1], axis=1))

    grads = jax.grad(relu_loss)(kernels, (X, Y))
    found = scores.snip(relu_loss)(kernels, (X, Y))
    for w, g, s in zip(kernels, grads, found, strict=True):
        np.testing.assert_allclose(s, abs(w * g), rtol=1e-12)
    flows = [np.asarray(w * g) for w, g in zip(kernels, grads, strict=True)]
    for before, after in itertools.pairwise(flows):
        np.testing.assert_allclose(before.sum(0), after.sum(1), rtol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_grasp_is_weight_times_hessian_times_gradient(masked):
    """Against the dense Hessian; fails with the other sign or a masked weight."""
    params = draw()
    kernels = {k: params[k] for k in ("a", "b")}
    masks = {k: halves()[k] for k in kernels} if masked else None
    at = kernels if masks is None else jprune.apply_masks(kernels, masks)
    flat, unravel = ravel_pytree(at)
    function = lambda v: loss(unravel(v), (X, Y))  # noqa: E731
    product = jax.hessian(function)(flat) @ jax.grad(function)(flat)
    weights, _ = ravel_pytree(kernels)
    found, _ = ravel_pytree(scores.grasp(loss)(kernels, (X, Y), masks=masks))
    np.testing.assert_allclose(found, weights * product, rtol=1e-9, atol=1e-12)


def test_grasp_counts_the_gradient_of_prunable_leaves_alone():
    params = {k: draw()[k] for k in ("a", "b")}
    only = scores.grasp(loss, prunable="a")(params, (X, Y))
    half = lambda a: loss({"a": {"kernel": a}, "b": params["b"]}, (X, Y))  # noqa: E731
    a = jnp.asarray(params["a"]["kernel"])
    expected = a * jax.jvp(jax.grad(half), (a,), (jax.grad(half)(a),))[1]
    np.testing.assert_allclose(only["a"]["kernel"], expected, rtol=1e-9)


def test_grasp_divides_outputs_by_the_temperature():
    params = {k: draw()[k] for k in ("a", "b")}
    found = scores.grasp(apply, loss=objective, temperature=7.0)(params, (X, Y))
    scaled = lambda p, b: objective(apply(p, b[0]) / 7.0, b[1])  # noqa: E731
    expected = scores.grasp(scaled)(params, (X, Y))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected
    )
    default = scores.grasp(apply, loss=objective)(params, (X, Y))
    at_200 = scores.grasp(apply, loss=objective, temperature=200)(params, (X, Y))
    jax.tree.map(np.testing.assert_array_equal, default, at_200)


@pytest.mark.parametrize("criterion", ["snip", "grasp", "taylor"])
def test_microbatches_change_nothing_but_the_memory(criterion):
    params = {k: draw()[k] for k in ("a", "b")}
    make = getattr(scores, criterion)
    whole = make(loss)(params, (X, Y))
    parts = make(scores.accumulate(loss, microbatches=4))(params, (X, Y))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), parts, whole
    )


def test_microbatches_pass_a_key_on():
    def noisy(params, batch, key):
        return loss(params, batch) * jax.random.uniform(key)

    params = {k: draw()[k] for k in ("a", "b")}
    key = jax.random.key(1)
    found = scores.snip(scores.accumulate(noisy, microbatches=3))(
        params, (X, Y), key=key
    )
    keys = jax.random.split(key, 3)
    parts = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
    grads = [jax.grad(noisy)(params, b, k) for b, k in zip(parts, keys, strict=True)]
    mean = sum(np.asarray(g["a"]["kernel"]) for g in grads) / 3
    expected = abs(params["a"]["kernel"] * mean)
    np.testing.assert_allclose(found["a"]["kernel"], expected, rtol=1e-10)


def test_half_precision_scores_are_float32():
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), {"w": X})
    for make in (scores.snip, scores.grasp, scores.taylor):
        found = make(lambda p, _: jnp.sum(p["w"] ** 2))(params)
        assert found["w"].dtype == jnp.float32


def test_random_scores_depend_on_key_and_path_alone():
    key = jax.random.key(0)
    params = draw()
    found = scores.random(params, key=key)
    alone = scores.random({"a": params["a"]}, key=key)
    np.testing.assert_array_equal(found["a"]["kernel"], alone["a"]["kernel"])
    other = scores.random(params, key=jax.random.key(1))
    assert (found["a"]["kernel"] != other["a"]["kernel"]).all()
    assert float(found["a"]["kernel"].min()) > 0
    masked = scores.random(params, key=key, masks=halves())
    np.testing.assert_array_equal(masked["a"]["kernel"] > 0, halves()["a"]["kernel"])
    with pytest.raises(ValueError, match="key: random scores need one"):
        scores.random(params)


def test_magnitude():
    found = scores.magnitude(draw(), masks=halves())
    expected = abs(draw()["a"]["kernel"]) * np.asarray(halves()["a"]["kernel"])
    np.testing.assert_array_equal(found["a"]["kernel"], expected)
    assert found["rng"].shape == ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: scores.grasp(loss, temperature=2.0),
            "temperature: 2.0 divides logits",
        ),
        (
            lambda: scores.grasp(apply, loss=objective, temperature=0.0),
            "temperature: 0.0 is not positive",
        ),
        (lambda: scores.accumulate(loss, microbatches=0), "microbatches: 0 is below 1"),
        (
            lambda: scores.accumulate(loss, microbatches=5)(draw(), (X, Y)),
            "microbatches: 5 does not divide the batch of 12",
        ),
        (lambda: scores.snip(loss)(draw(), (X[:0], Y[:0])), "batch: .* no examples"),
        (lambda: scores.snip(loss)({"n": 3}, (X, Y)), "params: none of the leaves"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
