"""Methods whose pruned weights live on, against NumPy in float64 and their laws.

Each reference is the method written out for one parameter at a time; the trainer below
knows masks, a gradient at them and plain descent, and nothing of the library.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune import sparse_training
from tests.sparse_training import references
from tests.sparse_training.test_reference import kernels, loss_fn

STEPS, RATE = 60, 0.1


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def run(method, params, batch, *, after=None, sparse_start=False):
    """Trains with ``sparse``.

    Returns:
        The masks of the first forward pass, kernels and masks after every step, and the
        state in the end.
    """
    tx = jprune.sparse(optax.chain(method, after or optax.sgd(RATE)))
    params, batch = (jax.tree.map(jnp.asarray, tree) for tree in (params, batch))
    state = tx.init(params)
    begin = kernels(jprune.masks_of(state))
    if sparse_start:
        params = jprune.apply_masks(params, jprune.masks_of(state))

    def step(carry, _):
        params, state = carry

        def objective(params):
            return loss_fn(jprune.forward_params(params, state), batch)

        updates, state = tx.update(jax.grad(objective)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, jprune.masks_of(state))

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, length=STEPS))
    (params, state), (values, masks) = scan((params, state))
    history = [kernels(jax.tree.map(lambda m, t=t: m[t], masks)) for t in range(STEPS)]
    return begin, kernels(values), history, state


def descend(params, batch, masks, next_masks, rule=None, *, see=True):
    """Yields kernels and masks after every step of plain descent.

    Args:
        params: kernels and biases by layer.
        batch: the data.
        masks: of the first forward pass, by layer.
        next_masks: ``(t, weights, gradients, masks) -> masks``, before the step.
        rule: ``(layer, gradient, weight, mask) -> gradient``.
        see: whether the forward pass sees the masks.
    """
    params = {x: {k: v.copy() for k, v in own.items()} for x, own in params.items()}
    for t in range(STEPS):
        seen = {
            x: {**own, "kernel": own["kernel"] * (masks[x] if see else 1)}
            for x, own in params.items()
        }
        grads = references.gradients(seen, batch)
        masks = next_masks(t, kernels(params), kernels(grads), masks)
        for x, own in params.items():
            g = grads[x]["kernel"]
            if rule:
                g = rule(x, g, own["kernel"], masks[x])
            own["kernel"] = own["kernel"] - RATE * g
            own["bias"] = own["bias"] - RATE * grads[x]["bias"]
        yield {x: own["kernel"].copy() for x, own in params.items()}, masks


def assert_same(values, history, expected):
    flips = 0
    for t, (weights, masks) in enumerate(expected):
        for layer, mask in masks.items():
            assert np.array_equal(history[t][layer], mask), (t, layer)
            np.testing.assert_allclose(
                values[layer][t], weights[layer], rtol=1e-9, atol=1e-12
            )
            flips += t and np.sum(mask != history[t - 1][layer])
    assert flips > 10


def largest_of_all(weights, k):
    """The masks of the k largest magnitudes of all layers."""
    flat = np.concatenate([np.abs(w).ravel() for w in weights.values()])
    mask, found = references.largest(flat, k), {}
    for layer, w in weights.items():
        found[layer], mask = mask[: w.size].reshape(w.shape), mask[w.size :]
    return found


def kept(sparsity, size):
    return size - round(sparsity * size)


def test_straight_through_magnitude():
    params, batch = references.problem(seed=1)
    size = sum(w.size for w in kernels(params).values())
    begin, values, history, _ = run(jprune.straight_through(0.7), params, batch)
    first = largest_of_all(kernels(params), kept(0.7, size))
    assert all(np.array_equal(begin[x], first[x]) for x in first)

    def masks(t, weights, grads, old):
        return largest_of_all(weights, kept(0.7, size)) if t else old

    assert_same(values, history, descend(params, batch, first, masks))


def test_dpf_along_its_schedule():
    params, batch = references.problem(seed=2)
    size = sum(w.size for w in kernels(params).values())
    start, end, every = 4, 40, 8
    method = jprune.dpf(0.8, start=start, end=end, every=every)
    begin, values, history, _ = run(method, params, batch)
    assert all(mask.all() for mask in begin.values())

    def masks(t, weights, grads, old):
        if t < start or ((t - start) % every and t != end):
            return old
        left = max(1 - (t - start) / (end - start), 0)
        return largest_of_all(weights, kept(0.8 - 0.8 * left**3, size))

    assert_same(values, history, descend(params, batch, begin, masks))
    # At sparsity 0 it is descent, whatever the cadence.
    _, plain, _, _ = run(jprune.dpf(0.0, end=40), params, batch)
    expected = descend(params, batch, begin, lambda t, w, g, m: m)
    for t, (weights, _) in enumerate(expected):
        np.testing.assert_allclose(plain["fc0"][t], weights["fc0"], rtol=1e-9)


def test_dynamic_network_surgery_splices_and_keeps_its_band():
    params, batch = references.problem(seed=3)
    method = jprune.dynamic_network_surgery({"fc0*": 0.3, "fc1*": -0.2}, power=0.0)
    begin, values, history, _ = run(method, params, batch)
    rate = {"fc0": 0.3, "fc1": -0.2}
    level = {
        x: max(np.abs(w).mean() + rate[x] * np.abs(w).std(), 0)
        for x, w in kernels(params).items()
    }

    def masks(t, weights, grads, old):
        if not t:
            return old
        new = {}
        for x, w in weights.items():
            low, high = 0.9 * level[x], 1.1 * level[x]
            new[x] = np.where(np.abs(w) < low, False, old[x] | (np.abs(w) >= high))
        return new

    assert_same(values, history, descend(params, batch, begin, masks))
    spliced = inside = 0
    for t in range(1, STEPS):
        for x, at in level.items():
            before, now = history[t - 1][x], history[t][x]
            magnitude = np.abs(values[x][t - 1])
            band = (magnitude >= 0.9 * at) & (magnitude < 1.1 * at)
            assert not np.any((before != now) & band)
            inside += band.sum()
            back = now & ~before
            spliced += back.sum()
            # It comes back with what it has become, not with nothing.
            assert np.all(magnitude[back] >= 1.1 * at)
    assert spliced > 0 and inside > 0


def test_surgery_becomes_rare_and_ends():
    draws = [
        float(np.mean([due(t) for t in range(s, s + 200)]))
        for due in [_due_of(jprune.dynamic_network_surgery(0.1, gamma=0.01, end=900))]
        for s in (1, 400, 1000)
    ]
    expected = [np.mean(1 / (1 + 0.01 * np.arange(s, s + 200))) for s in (1, 400)]
    np.testing.assert_allclose(draws[:2], expected, atol=0.1)
    assert draws[2] == 0.0


def _due_of(method):
    state = method.init({"kernel": jnp.ones((2, 2))})
    zeros = {"kernel": jnp.zeros((2, 2))}
    update = jax.jit(lambda state: method.update(zeros, state, zeros)[1].due_next)
    return lambda t: bool(update(state._replace(step=jnp.int32(t - 1))))


def test_sr_ste():
    params, batch = references.problem(seed=4, sizes=(12, 16, 6))
    begin, values, history, _ = run(jprune.sr_ste(2, 4, decay=0.05), params, batch)

    def choose(w):
        groups = np.abs(w).reshape(-1, 4, w.shape[1])
        mask = np.zeros(groups.shape, bool)
        for i, j in np.ndindex(groups.shape[0], w.shape[1]):
            mask[i, :, j] = references.largest(groups[i, :, j], 2)
        return mask.reshape(w.shape)

    def masks(t, weights, grads, old):
        return {x: choose(w) for x, w in weights.items()} if t else old

    def decay(layer, g, w, mask):
        return g + 0.05 * ~mask * w

    first = {x: choose(w) for x, w in kernels(params).items()}
    assert all(np.array_equal(begin[x], first[x]) for x in first)
    assert_same(values, history, descend(params, batch, first, masks, decay))


def test_top_kast():
    params, batch = references.problem(seed=5)
    method = jprune.top_kast(0.8, backward_sparsity=0.5, penalty=0.02, every=2)
    begin, values, history, _ = run(method, params, batch)

    def top(weights, sparsity):
        return {
            x: references.largest(np.abs(w), kept(sparsity, w.size))
            for x, w in weights.items()
        }

    first, active = top(kernels(params), 0.8), top(kernels(params), 0.5)
    assert all(np.array_equal(begin[x], first[x]) for x in first)

    def masks(t, weights, grads, old):
        nonlocal active
        if not t or t % 2:
            return old
        active = top(weights, 0.5)
        return top(weights, 0.8)

    def rule(layer, g, w, mask):
        return np.where(active[layer], g + 0.02 * w / np.where(mask, 1, 0.2), 0)

    assert_same(values, history, descend(params, batch, first, masks, rule))


def test_gsm_masks_the_gradient_of_all_but_the_salient():
    params, batch = references.problem(seed=6)
    size = sum(w.size for w in kernels(params).values())
    begin, values, history, _ = run(jprune.gsm(0.9), params, batch)

    def masks(t, weights, grads, old):
        return largest_of_all(
            {x: weights[x] * grads[x] for x in weights}, kept(0.9, size)
        )

    def rule(layer, g, w, mask):
        return g * mask

    expected = descend(params, batch, begin, masks, rule, see=False)
    assert_same(values, history, expected)
    for now in history:
        assert sum(mask.sum() for mask in now.values()) == kept(0.9, size)


def test_passive_weights_of_gsm_follow_a_damped_oscillator():
    # z <- beta z + eta w; w <- w - alpha z, from which w_{t+1} = (1 + beta - alpha
    # eta) w_t - beta w_{t-1}.
    alpha, beta, eta = 0.1, 0.8, 0.5
    after = optax.chain(optax.add_decayed_weights(eta), optax.sgd(alpha, momentum=beta))
    params = {"kernel": jnp.linspace(1.0, 2.0, 6).reshape(2, 3)}
    tx = optax.chain(jprune.gsm(0.5), after)
    state = tx.init(params)
    grads = {"kernel": jnp.where(jnp.arange(6) < 3, 5.0, 0.1).reshape(2, 3)}
    seen = [np.asarray(params["kernel"])[1]]
    for _ in range(20):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["kernel"])[1])
    expected = [seen[0], seen[0] * (1 - alpha * eta)]
    for _ in range(19):
        expected.append((1 + beta - alpha * eta) * expected[-1] - beta * expected[-2])
    np.testing.assert_allclose(seen, expected, rtol=1e-12)


def test_soft_filters_are_zero_after_an_update_and_train_on():
    params, batch = references.problem(seed=7)
    every, rate = 10, 0.3
    momentum = optax.sgd(0.02, momentum=0.9)
    method = jprune.soft_filter(rate, every=every)
    _, values, history, _ = run(method, params, batch, after=momentum)
    for layer in values:
        columns = np.linalg.norm(values[layer], axis=1)
        n = columns.shape[1]
        for t in range(every, STEPS, every):
            zero = columns[t] == 0.0
            assert zero.sum() == int(rate * n)
            smallest = np.argsort(columns[t - 1], kind="stable")[: int(rate * n)]
            assert set(np.flatnonzero(zero)) == set(smallest)
            assert np.array_equal(~zero, history[t][layer][0])
            assert np.all(columns[t + 1][zero] > 0)
            # Nothing else moves in that step.
            assert np.array_equal(
                values[layer][t][:, ~zero], values[layer][t - 1][:, ~zero]
            )


def test_soft_filters_at_rate_zero_are_plain_training():
    params, batch = references.problem(seed=7)
    begin, values, _, _ = run(jprune.soft_filter(0.0, every=999), params, batch)
    expected = descend(params, batch, begin, lambda t, w, g, m: m)
    for t, (weights, _) in enumerate(expected):
        np.testing.assert_allclose(values["fc0"][t], weights["fc0"], rtol=1e-9)


def test_the_gradient_of_forward_params_is_straight_through():
    params = {"kernel": jnp.array([[1.0, jnp.inf, 3.0]]), "bias": jnp.array([1.0])}
    for method, sees in (
        (jprune.straight_through(0.5), True),
        (jprune.gsm(0.5), False),
        (
            jprune.static(
                masks={
                    "kernel": jnp.array([[True, False, True]]),
                    "bias": jnp.array(True),
                }
            ),
            True,
        ),
    ):
        state = method.init(params)
        state = state._replace(
            masks={"kernel": jnp.array([[True, False, True]]), "bias": jnp.array(True)}
        )
        seen = jprune.forward_params(params, state)["kernel"]
        assert seen.tolist() == [[1.0, 0.0 if sees else jnp.inf, 3.0]]
        weights = jnp.array([2.0, 5.0, 7.0])
        grads = jax.grad(
            lambda p, s=state, w=weights: jnp.sum(
                w * jprune.forward_params(p, s)["kernel"]
            )
        )(params)
        assert grads["kernel"].tolist() == [[2.0, 5.0, 7.0]]


def test_the_bare_chain_grows_by_the_dense_gradient():
    # Ordinary masking would hide from RigL the gradient that it grows by.
    params = {"kernel": jnp.arange(1.0, 13.0).reshape(3, 4)}
    slope = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    tx = optax.chain(
        jprune.rigl(0.5, every=1, end=99, drop_fraction=0.5), optax.sgd(0.1)
    )
    state = tx.init(params)
    for _ in range(2):
        before = np.asarray(jprune.masks_of(state)["kernel"])

        def objective(params, state=state):
            return jnp.sum(slope * jprune.forward_params(params, state)["kernel"])

        grads = jax.grad(objective)(params)
        _, state = tx.update(grads, state, params)
    after = np.asarray(jprune.masks_of(state)["kernel"])
    grown = after & ~before
    best = references.largest(np.where(before, -1.0, np.abs(slope)), grown.sum())
    assert grown.sum() > 0 and np.array_equal(grown, best)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: jprune.straight_through(1.0), "sparsity"),
        (lambda: jprune.dpf(0.5, start=9, end=9), "end"),
        (lambda: jprune.dynamic_network_surgery(1.0, gamma=-1.0), "gamma"),
        (lambda: jprune.sr_ste(2, 4, decay=-0.1), "decay"),
        (lambda: jprune.top_kast(0.5, backward_sparsity=0.6), "backward_sparsity"),
        (lambda: jprune.top_kast(0.5, backward_sparsity=0.1, penalty=-1.0), "penalty"),
        (lambda: jprune.soft_filter(-0.1, every=9), "rate"),
        (lambda: jprune.soft_filter(0.1, every=0), "every"),
        (lambda: jprune.gsm(1.0), "sparsity"),
        (lambda: jprune.snfs(0.5, every=9, steps=99, momentum=1.0), "momentum"),
        (lambda: jprune.deep_r(0.5, learning_rate=0.0), "learning_rate"),
        (lambda: jprune.deep_r(0.5, learning_rate=0.1, l1=-1.0), "l1"),
        (lambda: jprune.ac_dc(0.5, warm_up=9, period=0, end=99), "period"),
        (lambda: jprune.ac_dc(0.5, warm_up=9, period=5, end=3), "end"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        make()


def test_a_pattern_that_matches_nothing_is_named():
    method = jprune.dynamic_network_surgery({"conv*": 1.0})
    with pytest.raises(ValueError, match=r"c_rate: the pattern 'conv\*'"):
        method.init({"kernel": jnp.ones((2, 2))})


def test_storage_is_part_of_the_structure_alone():
    state = jprune.gsm(0.5).init({"kernel": jnp.ones((4, 4))})
    assert state.storage is sparse_training.Storage.DENSE
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
