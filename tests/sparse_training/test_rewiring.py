"""Methods that move weights between layers, or all at once: references and laws."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune import units
from jprune.sparse_training import _rules
from tests.sparse_training import references
from tests.sparse_training.test_latent import (
    RATE,
    STEPS,
    kept,
    largest_of_all,
    run,
)
from tests.sparse_training.test_reference import kernels, shared


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def start(params, masks):
    return {
        x: {"kernel": own["kernel"] * masks[x], "bias": own["bias"].copy()}
        for x, own in params.items()
    }


def test_snfs_shares_out_by_momentum():
    params, batch = references.problem(seed=11)
    every, beta = 9, 0.8
    tx = jprune.snfs(0.6, every=every, steps=STEPS, momentum=beta)
    masks, values, history, _ = run(tx, params, batch, sparse_start=True)
    total = sum(mask.sum() for mask in masks.values())
    now, momentum = start(params, masks), {x: 0.0 for x in masks}
    moved = 0
    for t in range(STEPS):
        grads = references.gradients(now, batch)
        for x in masks:
            momentum[x] = beta * momentum[x] + (1 - beta) * grads[x]["kernel"]
        if t and t % every == 0:
            fraction = 0.5 / 2 * (1 + np.cos(np.pi * t / STEPS))
            keeps = {
                x: references.largest(
                    np.where(mask, np.abs(now[x]["kernel"]), -1.0),
                    mask.sum() - int(np.floor(fraction * mask.sum())),
                )
                for x, mask in masks.items()
            }
            gains = shared(
                sum(masks[x].sum() - keeps[x].sum() for x in masks),
                [np.abs(momentum[x])[masks[x]].mean() for x in masks],
                [(~keeps[x]).sum() for x in masks],
            )
            new = {}
            for (x, keep), gain in zip(keeps.items(), gains, strict=True):
                score = np.where(keep, -1.0, np.abs(momentum[x]))
                new[x] = keep | references.largest(score, gain)
            moved += any(new[x].sum() != masks[x].sum() for x in masks)
            masks = new
        for x, mask in masks.items():
            kernel = now[x]["kernel"] * mask
            now[x]["kernel"] = kernel - RATE * grads[x]["kernel"] * mask
            now[x]["bias"] = now[x]["bias"] - RATE * grads[x]["bias"]
            assert np.array_equal(history[t][x], mask), (t, x)
            np.testing.assert_allclose(
                values[x][t], now[x]["kernel"], rtol=1e-9, atol=1e-12
            )
        assert sum(mask.sum() for mask in masks.values()) == total
    assert moved > 0


def test_deep_r_rewires_what_has_crossed_zero():
    params, batch = references.problem(seed=12)
    tx = jprune.deep_r(0.6, learning_rate=RATE, l1=0.05)
    masks, values, history, _ = run(tx, params, batch, sparse_start=True)
    total = sum(mask.sum() for mask in masks.values())
    sign = {x: np.where(w >= 0, 1, -1) for x, w in kernels(params).items()}
    dropped = 0
    for t in range(STEPS):
        old = masks if t == 0 else history[t - 1]
        new = history[t]
        assert sum(mask.sum() for mask in new.values()) == total
        for x in masks:
            before = kernels(start(params, masks))[x] if t == 0 else values[x][t - 1]
            crossed = old[x] & (before * sign[x] < 0)
            if t:
                # All that has crossed is gone, and nothing else.
                assert np.array_equal(old[x] & ~new[x], crossed)
            dropped += crossed.sum()
            grown = new[x] & ~old[x]
            # The sign of a new weight is seen in its first step from zero.
            sign[x] = np.where(grown, 0, sign[x])
            moved = (sign[x] == 0) & new[x] & (values[x][t] != 0)
            sign[x] = np.where(moved, _life_sign(x, t, moved, values, history), sign[x])
    assert dropped > 20


def _life_sign(layer, t, moved, values, history):
    """The sign for life: that of the weight if it lives on, else the other."""
    now = np.sign(values[layer][t])
    if t + 1 == STEPS:
        return now
    return np.where(history[t + 1][layer], now, -now)


def test_deep_r_pulls_towards_zero_and_adds_noise():
    params = {"kernel": jnp.linspace(-2.0, 2.0, 20_000).reshape(200, 100)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    full = jprune.masks.dense(params)
    tx = jprune.deep_r(masks=full, learning_rate=0.5, l1=0.3)
    updates, _ = tx.update(zeros, tx.init(params), params)
    sign = np.where(np.asarray(params["kernel"]) >= 0, 1, -1)
    np.testing.assert_allclose(updates["kernel"], 0.3 * sign)
    hot = jprune.deep_r(masks=full, learning_rate=0.5, l1=0.0, temperature=0.04)
    first, state = hot.update(zeros, hot.init(params), params)
    second, _ = hot.update(zeros, state, params)
    # sqrt(2 T / eta) in gradients is sqrt(2 eta T) in steps of size eta.
    assert float(first["kernel"].std()) == pytest.approx(0.4, rel=0.03)
    assert (
        abs(np.corrcoef(first["kernel"].ravel(), second["kernel"].ravel())[0, 1]) < 0.05
    )


def test_ac_dc_alternates():
    params, batch = references.problem(seed=13)
    warm_up, period, end = 8, 6, 40
    method = jprune.ac_dc(0.75, warm_up=warm_up, period=period, end=end)
    momentum = optax.sgd(0.02, momentum=0.9)
    begin, values, history, _ = run(method, params, batch, after=momentum)
    size = sum(mask.size for mask in begin.values())
    masks, now = begin, start(params, begin)
    moments = {x: references.Momentum(0.02, mask.shape) for x, mask in masks.items()}
    biases = {x: references.Momentum(0.02, own["bias"].shape) for x, own in now.items()}
    phases = set()
    for t in range(STEPS):
        grads = references.gradients(now, batch)
        turn = warm_up <= t < end and (t - warm_up) % period == 0
        if turn or t == end:
            compressed = t >= end or (t - warm_up) // period % 2 == 0
            count = kept(0.75, size) if compressed else size
            new = largest_of_all(kernels(now), count)
            for x in masks:
                moments[x].reset(~(new[x] & masks[x]))
                now[x]["kernel"] = now[x]["kernel"] * new[x]
            masks = new
        phases.add(sum(mask.sum() for mask in masks.values()))
        for x, mask in masks.items():
            change = moments[x].step(grads[x]["kernel"] * mask)
            now[x]["kernel"] = now[x]["kernel"] + change * mask
            now[x]["bias"] = now[x]["bias"] + biases[x].step(grads[x]["bias"])
            assert np.array_equal(history[t][x], mask), (t, x)
            np.testing.assert_allclose(
                values[x][t], now[x]["kernel"], rtol=1e-9, atol=1e-12
            )
    assert phases == {size, kept(0.75, size)}


def in_fours(params):
    return units.n_m(params, 2, 4)


def groups(mask):
    return mask.reshape(-1, 4, mask.shape[1]).sum(1)


def test_rigl_over_n_m_keeps_n_of_every_m():
    params, batch = references.problem(seed=14, sizes=(12, 16, 6))
    method = jprune.rigl(units=in_fours, every=5, end=50)
    begin, values, history, _ = run(method, params, batch, sparse_start=True)
    moved = 0
    for t, now in enumerate(history):
        for x, mask in now.items():
            assert np.all(groups(mask) == 2)
            assert np.all(values[x][t][~mask] == 0)
            moved += np.sum(mask != begin[x])
    assert moved > 0


def test_rigl_over_n_m_grows_inside_its_groups():
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(8, 1)}
    first = jnp.array([1, 1, 0, 0, 1, 1, 0, 0], bool).reshape(8, 1)
    grads = jnp.array([0, 0, 1, 2, 0, 0, 9, 8.0]).reshape(8, 1)
    method = jprune.rigl(
        masks={"kernel": first}, units=in_fours, every=1, end=9, drop_fraction=0.6
    )
    state = method.init(params)._replace(step=jnp.int32(1))
    _, state = method.update({"kernel": grads}, state, params)
    # floor(0.58 * 4) = 2 are dropped, the smallest, and both are of the first group.
    assert state.masks["kernel"].ravel().astype(int).tolist() == [
        0,
        0,
        1,
        1,
        1,
        1,
        0,
        0,
    ]


def test_gradual_pruning_ends_at_n_m():
    params, batch = references.problem(seed=15, sizes=(12, 16, 6))
    method = jprune.gradual_magnitude(0.5, end=40, every=10, units=in_fours)
    _, _, history, _ = run(method, params, batch)
    counts = [sum(mask.sum() for mask in now.values()) for now in history]
    assert len(set(counts)) > 3 and counts == sorted(counts, reverse=True)
    for mask in history[-1].values():
        assert np.all(groups(mask) == 2)
    with pytest.raises(ValueError, match=r"sparsity: 0\.6 is not that of the units"):
        run(jprune.gradual_magnitude(0.6, end=40, units=in_fours), params, batch)


def test_blocks_are_dropped_and_grown_whole():
    params, batch = references.problem(seed=16, sizes=(10, 16, 6))

    def blocks(params):
        return units.blocks(params, (4, 4))

    method = jprune.rigl(0.5, every=5, end=50, units=blocks)
    _, values, history, _ = run(method, params, batch)
    for x, mask in history[-1].items():
        own = {t: mask[t[0] : t[0] + 4, t[1] : t[1] + 4] for t in _corners(mask.shape)}
        assert all(block.all() or not block.any() for block in own.values())
        assert np.all(values[x][-1][~mask] == 0)
    assert any(np.any(history[0][x] != history[-1][x]) for x in history[0])


def _corners(shape):
    return [(i, j) for i in range(0, shape[0], 4) for j in range(0, shape[1], 4)]


def test_shares_sum_to_the_total_within_room():
    rng = np.random.default_rng(0)
    for _ in range(50):
        layers = rng.integers(1, 6)
        room = rng.integers(0, 9, layers)
        total = rng.integers(0, room.sum() + 1)
        weights = rng.random(layers) * rng.integers(0, 2, layers)
        found = np.asarray(_rules.shares(*map(jnp.asarray, (total, weights, room))))
        assert found.sum() == total
        assert np.all((found >= 0) & (found <= room))


def test_the_least_sensitive_weights_go():
    params = {"kernel": jnp.array([[1.0, -2.0, 3.0, -4.0]])}
    grads = {"kernel": jnp.array([[9.0, 0.1, -1.0, 0.5]])}
    method = jprune.sparse_training.dynamic(
        masks=jprune.masks.dense(params),
        drop=lambda event: _rules.Dropped(_rules.least_sensitive(event).keeps),
        fraction=0.5,
        due=lambda step: step == 0,
    )
    _, state = method.update(grads, method.init(params), params)
    assert state.masks["kernel"].tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("name", ["rigl", "gradual_magnitude", "dpf"])
def test_networks_trained_over_coupled_channels_shrink(name):
    params, batch = references.problem(seed=17)
    params = jax.tree.map(jnp.asarray, params)

    def apply_fn(params, x):
        hidden = jnp.tanh(x @ params["fc0"]["kernel"] + params["fc0"]["bias"])
        return hidden @ params["fc1"]["kernel"] + params["fc1"]["bias"]

    def channels(params):
        return jprune.couplings(apply_fn, params, batch[0])

    method = {
        "rigl": lambda: jprune.rigl(0.5, every=5, end=50, units=channels),
        "gradual_magnitude": lambda: jprune.gradual_magnitude(
            0.5, end=40, every=10, units=channels
        ),
        "dpf": lambda: jprune.dpf(0.5, end=40, every=10, units=channels),
    }[name]()
    _, values, history, _ = run(method, params, batch)
    masks = {x: {"kernel": jnp.asarray(m)} for x, m in history[-1].items()}
    for x, own in masks.items():
        # The bias of a channel lives as long as the channel.
        alive = own["kernel"].any(0) if x == "fc0" else jnp.ones(6, bool)
        own["bias"] = alive
    trained = {
        x: {**own, "kernel": jnp.asarray(values[x][-1])} for x, own in params.items()
    }
    small, small_params = jprune.shrink(apply_fn, trained, masks, batch[0])
    assert small_params["fc0"]["kernel"].shape == (10, 8)
    expected = apply_fn(jprune.apply_masks(trained, masks), batch[0])
    np.testing.assert_allclose(small(small_params, batch[0]), expected, atol=1e-12)
