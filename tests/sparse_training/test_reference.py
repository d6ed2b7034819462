"""The methods against NumPy in float64, over 200 steps with many mask updates."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune import sparse_training
from tests.sparse_training import references

STEPS, EVERY, END = 200, 15, 170


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def loss_fn(params, batch):
    x, y = batch
    h = jnp.tanh(x @ params["fc0"]["kernel"] + params["fc0"]["bias"])
    return jnp.mean((h @ params["fc1"]["kernel"] + params["fc1"]["bias"] - y) ** 2)


def kernels(masks):
    return {layer: np.asarray(mask["kernel"]) for layer, mask in masks.items()}


def run(tx, params, batch, steps=STEPS):
    """Trains in one scan; returns parameters, state, and the masks of every step."""
    params = jax.tree.map(jnp.asarray, params)
    batch = jax.tree.map(jnp.asarray, batch)
    state = tx.init(params)
    start = jprune.masks_of(state)
    params = jprune.apply_masks(params, start)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), jprune.masks_of(state)

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))
    (params, state), history = scan((params, state))
    return params, state, kernels(start), history


def assert_same(params, expected, history, expected_history):
    for t, masks in enumerate(expected_history):
        for layer, mask in masks.items():
            found = np.asarray(history[layer]["kernel"][t])
            assert np.array_equal(found, mask), (t, layer)
    flat = zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True)
    for found, wanted in flat:
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def changes(history):
    return sum(
        any(np.any(a[x] != b[x]) for x in a) for a, b in itertools.pairwise(history)
    )


@pytest.mark.parametrize("hold", [True, False])
def test_rigl_with_adam(hold):
    params, batch = references.problem()
    rigl = jprune.rigl(0.7, every=EVERY, end=END, hold=hold, seed=3)
    tx = jprune.sparse(optax.chain(rigl, optax.adam(1e-2)))
    found, state, start, history = run(tx, params, batch)

    def next_mask(t, layer, weight, gradient, mask):
        fraction = 0.3 / 2 * (1 + np.cos(t * np.pi / END))
        return references.rigl_masks(weight, gradient, mask, fraction)

    expected, expected_history = references.train(
        params,
        batch,
        start,
        lambda shape: references.Adam(1e-2, shape),
        STEPS,
        lambda t: t > 0 and t % EVERY == 0 and t < END,
        next_mask,
        hold=hold,
    )
    assert changes(expected_history) > 5
    assert_same(found, expected, history, expected_history)
    jprune.check(state)


def test_set_with_momentum():
    params, batch = references.problem(seed=1)
    method = jprune.set_(0.6, every=EVERY, end=END, seed=5)
    tx = jprune.sparse(optax.chain(method, optax.sgd(0.02, momentum=0.9)))
    found, state, start, history = run(tx, params, batch)
    key = state.inner[0].key

    def next_mask(t, layer, weight, gradient, mask):
        # The one thing that cannot be independent is the draw.
        keys = jax.random.split(jax.random.fold_in(key, t), 2)
        draw = jax.random.uniform(keys[int(layer[-1])], weight.shape)
        return references.set_masks(weight, np.asarray(draw), mask, 0.3)

    expected, expected_history = references.train(
        params,
        batch,
        start,
        lambda shape: references.Momentum(0.02, shape),
        STEPS,
        lambda t: t > 0 and t % EVERY == 0 and t < END,
        next_mask,
        hold=False,
    )
    assert changes(expected_history) > 5
    assert_same(found, expected, history, expected_history)
    jprune.check(state)


def test_set_moves_living_zeros_and_no_more_than_there_is_room_for():
    """Mocanu et al.'s code: what is 0 is pruned; the number of weights is constant."""
    values = jnp.linspace(-1.0, 1.0, 20).reshape(4, 5)
    living = (jnp.arange(20).reshape(4, 5) % 3) == 0
    params = {
        # Of the seven that live, two stopped at 0.
        "sparse": {"kernel": (values * living).at[0, 0].set(0).at[1, 1].set(0)},
        "full": {"kernel": values},
        "crowded": {"kernel": values.at[2, 2].set(0)},
    }
    masks = {
        "sparse": {"kernel": living},
        "full": {"kernel": jnp.ones((4, 5), bool)},
        "crowded": {"kernel": jnp.ones((4, 5), bool).at[2, 2].set(False)},
    }
    tx = jprune.set_(masks=masks, every=1, zeta=0.3)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    moved = jax.tree.map(np.asarray, jprune.masks_of(state))
    assert living[0, 0] and living[1, 1]
    assert not moved["sparse"]["kernel"][0, 0] and not moved["sparse"]["kernel"][1, 1]
    assert moved["sparse"]["kernel"].sum() == living.sum()
    assert moved["full"]["kernel"].all()
    # One place is free, so of the six to drop only the smallest goes.
    assert moved["crowded"]["kernel"].sum() == 19 and moved["crowded"]["kernel"][2, 2]
    gone = np.argwhere(~moved["crowded"]["kernel"])
    smallest = np.argwhere(np.abs(values) == np.abs(values).min())
    assert gone.tolist()[0] in smallest.tolist()


def test_counts_of_layers_are_constant_and_dead_weights_are_zero():
    params, batch = references.problem(seed=2)
    for method in (
        jprune.rigl(0.8, every=7, end=END),
        jprune.set_(0.8, every=7),
        jprune.rigl_itop(0.8, steps=STEPS, every=7),
        jprune.set_itop(0.8, steps=STEPS, every=7),
        jprune.static(0.8),
    ):
        tx = jprune.sparse(optax.chain(method, optax.adamw(1e-2, weight_decay=0.1)))
        found, state, start, history = run(tx, params, batch)
        for layer, mask in start.items():
            counts = np.asarray(history[layer]["kernel"]).sum((1, 2))
            assert np.all(counts == mask.sum())
            dead = ~np.asarray(jprune.masks_of(state)[layer]["kernel"])
            assert np.all(np.asarray(found[layer]["kernel"])[dead] == 0.0)
            for moment in (state.inner[1][0].mu, state.inner[1][0].nu):
                assert np.all(np.asarray(moment[layer]["kernel"])[dead] == 0.0)
        assert float(loss_fn(found, batch)) < float(loss_fn(params, batch))


def test_all_masks_true_is_the_inner_optimizer_to_the_bit():
    # Step by step: a compiled whole may contract multiplications otherwise.
    params, batch = jax.tree.map(jnp.asarray, references.problem())
    full = jprune.masks.dense(params)
    rigl = jprune.rigl(masks=full, every=2, hold=False)
    found = {}
    for name, tx in {
        "sparse": jprune.sparse(optax.chain(rigl, optax.adam(1e-2))),
        "plain": optax.adam(1e-2),
    }.items():
        state, now = tx.init(params), params
        for _ in range(5):
            updates, state = tx.update(jax.grad(loss_fn)(now, batch), state, now)
            now = optax.apply_updates(now, updates)
        found[name] = now
    flat = map(jax.tree.leaves, found.values())
    for a, b in zip(*flat, strict=True):
        assert np.array_equal(a, b)


def test_diagnostics_follow_the_masks():
    params, batch = references.problem(seed=4)
    tx = jprune.sparse(
        optax.chain(jprune.set_itop(0.7, steps=STEPS, every=9), optax.sgd(0.02))
    )
    _, state, start, history = run(tx, params, batch)
    masks = {k: np.asarray(v["kernel"]) for k, v in history.items()}
    ever = {k: start[k] | masks[k].any(0) for k in start}
    size = sum(m.size for m in start.values())
    rate = sum(m.sum() for m in ever.values()) / size
    assert float(sparse_training.exploration_rate(state)) == pytest.approx(rate)
    moved = sum((masks[k][-1] != start[k]).sum() for k in start)
    assert int(sparse_training.distance_from_start(state)) == moved
    grown = {k: ever[k] & ~start[k] for k in start}
    alive = sum((grown[k] & masks[k][-1]).sum() for k in start)
    share = alive / sum(m.sum() for m in grown.values())
    assert float(sparse_training.survival_of_grown(state)) == pytest.approx(share)
    assert rate > 0.4


def test_gradual_magnitude_with_momentum():
    params, batch = references.problem(seed=6)
    start, end, every = 3, 120, 25
    tx = jprune.sparse(
        optax.chain(
            jprune.gradual_magnitude(0.85, start=start, end=end, every=every),
            optax.sgd(0.02, momentum=0.9),
        )
    )
    found, _, first, history = run(tx, params, batch)
    assert all(mask.all() for mask in first.values())
    events = [*range(start, end, every), end]

    def next_mask(t, layer, weight, gradient, mask):
        sparsity = 0.85 - 0.85 * (1 - (t - start) / (end - start)) ** 3
        keep = mask.size - round(sparsity * mask.size)
        return references.largest(np.where(mask, np.abs(weight), -1.0), keep)

    expected, expected_history = references.train(
        params,
        batch,
        first,
        lambda shape: references.Momentum(0.02, shape),
        STEPS,
        lambda t: t in events,
        next_mask,
        hold=False,
    )
    assert changes(expected_history) > 3
    assert_same(found, expected, history, expected_history)
    for layer, mask in expected_history[-1].items():
        assert mask.sum() == first[layer].size - round(0.85 * first[layer].size)


def test_granet_keeps_its_schedule_to_the_unit():
    params, batch = references.problem(seed=7)
    end, every = 100, 20
    method = jprune.granet(0.8, end=end, steps=STEPS, every=every, initial=0.5)
    tx = jprune.sparse(optax.chain(method, optax.adam(1e-2)))
    _, state, first, history = run(tx, params, batch)
    size = sum(mask.size for mask in first.values())
    found_counts = sum(np.asarray(history[x]["kernel"]).sum((1, 2)) for x in first)
    for t, count in enumerate(found_counts):
        event = min(t // every * every, end)
        sparsity = 0.8 - 0.3 * (1 - event / end) ** 3
        assert count == size - round(sparsity * size), t
    # Regeneration goes on after the last pruning.
    late = history["fc0"]["kernel"]
    assert np.any(np.asarray(late[end]) != np.asarray(late[-1]))
    jprune.check(state)


def shared(total, weights, room):
    """Largest remainders, in plain Python; no layer of this test is full."""
    exact = [total * w / sum(weights) for w in weights]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    assert all(c <= r for c, r in zip(counts, room, strict=True))
    return counts


def test_dsr_with_sgd():
    params, batch = references.problem(seed=8)
    target = 12
    method = jprune.dsr(0.7, target=target, every=EVERY, threshold=0.01, seed=2)
    tx = jprune.sparse(optax.chain(method, optax.sgd(0.05)))
    found, state, start, history = run(tx, params, batch)
    key = state.inner[0].key
    layers = list(start)
    threshold = 0.01

    # The threshold is global, so an event is decided for all layers at once.
    def decide(t, weights, masks):
        nonlocal threshold
        keeps = {}
        for layer in layers:
            magnitude = np.where(masks[layer], np.abs(weights[layer]), -1.0)
            keeps[layer] = (magnitude >= threshold) | references.largest(magnitude, 1)
        lost = sum(masks[x].sum() - keeps[x].sum() for x in layers)
        gains = shared(
            lost,
            [keeps[x].sum() for x in layers],
            [(~masks[x]).sum() for x in layers],
        )
        draws = jax.random.split(jax.random.fold_in(key, t), 2)
        new = {}
        for layer, draw, gain in zip(layers, draws, gains, strict=True):
            noise = np.asarray(jax.random.uniform(draw, masks[layer].shape))
            grown = references.largest(np.where(masks[layer], -1.0, noise), gain)
            new[layer] = keeps[layer] | grown
        if lost > 1.1 * target:
            threshold /= 2
        elif lost < 0.9 * target:
            threshold *= 2
        return new

    masks, now = dict(start), jax.tree.map(np.array, params)
    for layer in layers:
        now[layer]["kernel"] = now[layer]["kernel"] * masks[layer]
    thresholds = set()
    for t in range(STEPS):
        grads = references.gradients(now, batch)
        if t and t % EVERY == 0:
            masks = decide(t, {x: now[x]["kernel"] for x in layers}, masks)
            thresholds.add(threshold)
        for layer in layers:
            kernel = now[layer]["kernel"] - 0.05 * grads[layer]["kernel"]
            now[layer]["kernel"] = kernel * masks[layer]
            now[layer]["bias"] = now[layer]["bias"] - 0.05 * grads[layer]["bias"]
        for layer in layers:
            got = np.asarray(history[layer]["kernel"][t])
            assert np.array_equal(got, masks[layer]), (t, layer)
    assert len(thresholds) > 2
    total = sum(mask.sum() for mask in start.values())
    assert sum(mask.sum() for mask in masks.values()) == total
    assert any(masks[x].sum() != start[x].sum() for x in layers)
    flat = zip(jax.tree.leaves(found), jax.tree.leaves(now), strict=True)
    for a, b in flat:
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert float(state.inner[0].memory) == pytest.approx(threshold, rel=1e-6)
