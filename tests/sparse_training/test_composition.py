"""Methods inside and outside other transformations: each cell trains a small network.

Every cell asserts exact counts, zeros where the method stores them, one compilation and
descent of the loss at the parameters that the forward pass sees; or a named error.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune

STEPS = 24


@pytest.fixture(scope="module")
def setting():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "fc1": {
            "kernel": jax.random.normal(keys[0], (6, 12)) / 3,
            "bias": jnp.zeros(12),
        },
        "fc2": {"kernel": jax.random.normal(keys[1], (12, 4)) / 3},
    }
    batch = jax.random.normal(keys[2], (32, 6)), jax.random.normal(keys[3], (32, 4))
    return params, batch


def loss_fn(params, batch):
    hidden = jnp.tanh(batch[0] @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    return jnp.mean((hidden @ params["fc2"]["kernel"] - batch[1]) ** 2)


class Method(NamedTuple):
    """A method, and what is true of its masks after training."""

    make: Callable
    counts: Callable  # (sizes, counts at first) -> counts of the layers, or their sum
    stores_zeros: bool = True


def same(sizes, first):
    return first


def same_total(sizes, first):
    return sum(first)


def each(sparsity, sizes, first):
    return [n - round(sparsity * n) for n in sizes]


def total(sparsity, sizes, first):
    return sum(sizes) - round(sparsity * sum(sizes))


def anything(sizes, first):
    return None


def kernels_in_pairs(params, n=2, m=4):
    return jprune.units.n_m(params, n, m, prunable="fc2")


METHODS = {
    "rigl": Method(lambda: jprune.rigl(0.7, every=5, end=21), same),
    "set": Method(lambda: jprune.set_(0.7, every=5), same),
    "static": Method(lambda: jprune.static(0.7), same),
    "rigl_itop": Method(lambda: jprune.rigl_itop(0.7, steps=24, every=5), same),
    "set_itop": Method(lambda: jprune.set_itop(0.7, steps=24, every=5), same),
    "dsr": Method(
        lambda: jprune.dsr(0.7, target=6, every=5, threshold=0.05), same_total
    ),
    "snfs": Method(lambda: jprune.snfs(0.7, every=5, steps=24), same_total),
    "deep_r": Method(
        lambda: jprune.deep_r(0.7, learning_rate=0.05, l1=0.3), same_total
    ),
    "gradual_magnitude": Method(
        lambda: jprune.gradual_magnitude(0.7, end=20, every=5),
        functools.partial(each, 0.7),
    ),
    "granet": Method(
        lambda: jprune.granet(0.7, end=15, steps=24, every=5),
        functools.partial(total, 0.7),
    ),
    "ac_dc": Method(
        lambda: jprune.ac_dc(0.7, warm_up=4, period=4, end=20),
        functools.partial(total, 0.7),
    ),
    "straight_through": Method(
        lambda: jprune.straight_through(0.7), functools.partial(total, 0.7), False
    ),
    "dpf": Method(
        lambda: jprune.dpf(0.7, end=15, every=4), functools.partial(total, 0.7), False
    ),
    "dynamic_network_surgery": Method(
        lambda: jprune.dynamic_network_surgery(0.1), anything, False
    ),
    "top_kast": Method(
        lambda: jprune.top_kast(0.7, backward_sparsity=0.4),
        functools.partial(each, 0.7),
        False,
    ),
    "sr_ste": Method(
        lambda: jprune.sr_ste(2, 4, prunable="fc2"), functools.partial(each, 0.5), False
    ),
    "soft_filter": Method(
        lambda: jprune.soft_filter(0.25, every=8), lambda sizes, first: [9, 3], False
    ),
    "gsm": Method(lambda: jprune.gsm(0.7), functools.partial(total, 0.7), False),
    "rigl_n_m": Method(
        lambda: jprune.rigl(every=5, end=21, units=kernels_in_pairs), same
    ),
}


def chain(*rest):
    """The method first, the rest behind, `sparse` around."""
    return lambda method: jprune.sparse(optax.chain(method, *rest))


def reduce_on_plateau(method):
    plateau = optax.contrib.reduce_on_plateau(patience=3)
    return jprune.sparse(optax.chain(method, optax.adam(1e-2), plateau))


def partition(method):
    labels = {"fc1": {"kernel": "a", "bias": "a"}, "fc2": {"kernel": "b"}}
    parts = {
        "a": optax.chain(method, optax.adam(1e-2)),
        "b": optax.chain(method, optax.sgd(1e-2)),
    }
    return jprune.sparse(optax.partition(parts, labels))


def masked(method):
    only = {"fc1": {"kernel": True, "bias": False}, "fc2": {"kernel": True}}
    return jprune.sparse(optax.chain(optax.masked(method, only), optax.adam(1e-2)))


def injected(method):
    inner = optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(1e-2, 1e-3, STEPS)
    )
    return jprune.sparse(optax.chain(method, inner))


def schedule_free(method):
    inner = optax.contrib.schedule_free(optax.adam(1e-2), 1e-2)
    return jprune.sparse(optax.chain(method, inner))


def multi_steps(method):
    tx = jprune.sparse(optax.chain(method, optax.adam(2e-2)))
    return optax.MultiSteps(tx, 2).gradient_transformation()


def sam(method):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.01))
    inner = optax.contrib.sam(optax.adam(2e-2), adversary, sync_period=2)
    # It says that it takes extra arguments, and takes none.
    inner = optax.GradientTransformation(inner.init, inner.update)
    return jprune.sparse(optax.chain(method, inner))


OPTIMIZERS = {
    "sgd": chain(optax.sgd(0.05)),
    "momentum": chain(optax.sgd(0.05, momentum=0.9)),
    "nesterov": chain(optax.sgd(0.05, momentum=0.9, nesterov=True)),
    "adam": chain(optax.adam(1e-2)),
    "adamw": chain(optax.adamw(1e-2, weight_decay=0.1)),
    "lion": chain(optax.lion(3e-3)),
    "rmsprop": chain(optax.rmsprop(1e-2)),
    "muon": chain(optax.contrib.muon(1e-2)),
    "clip": chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "ema": chain(optax.adam(1e-2), optax.ema(0.5)),
    "schedule_free": schedule_free,
    "inject_hyperparams": injected,
    "reduce_on_plateau": reduce_on_plateau,
    "partition": partition,
    "masked": masked,
    "MultiSteps": multi_steps,
    "sam": sam,
    "apply_if_finite": lambda m: optax.apply_if_finite(
        jprune.sparse(optax.chain(m, optax.adam(1e-2))), 3
    ),
}


# What is refused, and the error that says so. The first layer cannot be cut in fours.
REFUSED = {
    (method, "partition"): "prunable: the pattern 'fc2' matches none of the leaves"
    for method in ("sr_ste", "rigl_n_m")
}
# The whole table is long; by default, each method and each optimiser come up.
ALWAYS = {(method, "adam") for method in METHODS} | {
    (method, optimizer)
    for method in ("rigl", "set", "straight_through")
    for optimizer in OPTIMIZERS
}
CELLS = [
    pytest.param(
        method,
        optimizer,
        marks=() if (method, optimizer) in ALWAYS else pytest.mark.slow,
    )
    for method in METHODS
    for optimizer in OPTIMIZERS
]


@pytest.mark.parametrize(("method", "optimizer"), CELLS)
def test_counts_zeros_one_compilation_and_descent(method, optimizer, setting):
    params, batch = setting
    start = float(loss_fn(params, batch))
    rule = METHODS[method]
    tx = OPTIMIZERS[optimizer](rule.make())
    if (method, optimizer) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[method, optimizer]):
            tx.init(params)
        return
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(None)

        def objective(params):
            return loss_fn(jprune.forward_params(params, state), batch)

        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    first = kernels(jprune.masks_of(state), params)
    if rule.stores_zeros:
        params = jprune.apply_masks(params, jprune.masks_of(state))
    visited = []
    # Of two steps of MultiSteps, one is a step.
    for _ in range(2 * STEPS if optimizer == "MultiSteps" else STEPS):
        params, state = step(params, state)
        visited.append(kernels(jprune.masks_of(state), params))
    assert len(traces) == 1
    last = visited[-1]
    counts = [int(mask.sum()) for mask in last.values()]
    sizes = [mask.size for mask in last.values()]
    if method == "soft_filter":
        counts = [int(mask.any(0).sum()) for mask in last.values()]
    expected = rule.counts(sizes, [int(mask.sum()) for mask in first.values()])
    if expected is not None:
        assert (counts if isinstance(expected, list) else sum(counts)) == expected
    if rule.stores_zeros:
        for path, mask in last.items():
            assert np.all(np.asarray(leaf_of(params, path))[~mask] == 0.0)
        jprune.check(state)
    moved = any(np.any(mask != first[x]) for now in visited for x, mask in now.items())
    assert moved == (method != "static")
    assert float(loss_fn(jprune.forward_params(params, state), batch)) < start


def kernels(masks, params):
    """The masks that prune, at full shape, by path."""
    pairs = zip(
        jprune.trees.leaves_of(masks), jprune.trees.leaves_of(params), strict=True
    )
    return {
        mask.path: np.broadcast_to(mask.value, leaf.shape)
        for mask, leaf in pairs
        if mask.shape
    }


def leaf_of(params, path):
    return {leaf.path: leaf.value for leaf in jprune.trees.leaves_of(params)}[path]


@pytest.mark.parametrize("method", METHODS)
def test_lookahead_is_refused(method, setting):
    # Its parameters are a fast and a slow set, and the slow one would bring back what
    # the masks have removed from the other.
    params, _ = setting
    fast = optax.chain(METHODS[method].make(), optax.adam(1e-2))
    tx = jprune.sparse(optax.lookahead(fast, 5, 0.5))
    with pytest.raises(ValueError, match=r"masks: the tree differs.*fast/fc1"):
        tx.init(optax.LookaheadParams.init_synced(params))


def test_factored_moments_are_refused_unless_accepted(setting):
    params = {"kernel": jnp.ones((128, 128))}
    tx = optax.chain(jprune.static(0.5), optax.adafactor(1e-2))
    with pytest.raises(ValueError, match=r"v_row.*'kernel'.*approximate=True"):
        jprune.sparse(tx).init(params)
    jprune.sparse(tx, approximate=True).init(params)


def test_no_holder_and_two_holders_are_errors(setting):
    params, _ = setting
    with pytest.raises(ValueError, match="no part of it holds masks"):
        jprune.sparse(optax.adam(1e-3)).init(params)
    twice = optax.chain(jprune.static(0.5), jprune.rigl(0.5), optax.adam(1e-3))
    with pytest.raises(ValueError, match="two transformations hold masks of 'fc1/"):
        jprune.sparse(twice).init(params)


def test_params_are_needed(setting):
    params, _ = setting
    for tx in (jprune.static(0.5), jprune.sparse(jprune.static(0.5))):
        with pytest.raises(ValueError, match="params"):
            tx.update(params, tx.init(params))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        jprune.rigl(sparsity)


def test_other_arguments_outside_their_ranges():
    with pytest.raises(ValueError, match="fraction"):
        jprune.set_(0.5, every=10, zeta=1.5)
    with pytest.raises(ValueError, match="fraction"):
        jprune.rigl(0.5, drop_fraction=-0.1)
    with pytest.raises(ValueError, match="every"):
        jprune.rigl(0.5, every=0)
    with pytest.raises(ValueError, match="target"):
        jprune.dsr(0.5, target=0)
    with pytest.raises(ValueError, match="end"):
        jprune.gradual_magnitude(0.5, start=5, end=5)


def test_units_are_made_from_the_parameters(setting):
    params, _ = setting
    # The checks of the tests' own would come first.
    unchecked = inspect.unwrap(jprune.sparse_training.dynamic)
    with pytest.raises(TypeError, match=r"units: a function .* got Units"):
        unchecked(0.5, drop=None, due=None, units=jprune.units.filters(params))


def test_a_state_of_another_tree_is_refused(setting):
    params, _ = setting
    tx = jprune.sparse(optax.chain(jprune.static(0.5), optax.sgd(0.1)))
    other = {"fc1": {"kernel": jnp.ones((3, 3))}}
    with pytest.raises(ValueError, match="masks"):
        tx.update(params, tx.init(other), params)


def test_one_of_sparsity_and_masks(setting):
    params, _ = setting
    with pytest.raises(ValueError, match="sparsity, masks"):
        jprune.rigl()
    with pytest.raises(ValueError, match="sparsity, masks"):
        jprune.rigl(0.5, masks=jprune.masks.dense(params))


def test_a_wrapper_in_the_wrong_order_is_found(setting):
    params, batch = setting
    inside = jprune.sparse(optax.chain(jprune.static(0.5), optax.adam(1e-2)))
    tx = optax.chain(inside, optax.add_noise(0.1, 0.5, key=0))
    state = tx.init(params)
    for _ in range(2):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    with pytest.raises(ValueError, match="arrived outside the masks"):
        jprune.check(state)


def test_gradients_that_are_not_finite_leave_the_masks(setting):
    params, batch = setting
    tx = jprune.sparse(optax.chain(jprune.rigl(0.5, every=1, end=9), optax.adam(1e-2)))
    state = tx.init(params)
    params = jprune.apply_masks(params, jprune.masks_of(state))
    before = jprune.masks_of(state)
    grads = jax.grad(loss_fn)(params, batch)
    _, state = tx.update(grads, state, params)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads)
    updates, state = tx.update(bad, state, params)
    assert int(state.inner[0].refused) == 1
    same = jax.tree.map(np.array_equal, before, jprune.masks_of(state))
    assert all(jax.tree.leaves(same))
    after = optax.apply_updates(params, updates)
    same = jax.tree.map(np.array_equal, params, after)
    assert all(jax.tree.leaves(same))


def test_seeds_under_vmap_are_the_runs_one_by_one(setting):
    params, batch = setting

    def run(seed):
        tx = jprune.sparse(
            optax.chain(
                jprune.set_(0.7, every=4, seed=jax.random.key(seed)), optax.adam(1e-2)
            )
        )
        state = tx.init(params)

        def step(carry, _):
            params, state = carry
            grads = jax.grad(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = jprune.apply_masks(params, jprune.masks_of(state)), state
        (last, state), _ = jax.lax.scan(step, start, length=10)
        return last, jprune.masks_of(state)

    seeds = jnp.arange(2)
    found, found_masks = jax.jit(jax.vmap(run))(seeds)
    alone = jax.jit(run)
    for i in range(2):
        expected, masks = alone(seeds[i])
        for a, b in zip(
            jax.tree.leaves(found_masks), jax.tree.leaves(masks), strict=True
        ):
            assert np.array_equal(a[i], b)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-6)
    assert not np.array_equal(*found_masks["fc1"]["kernel"])


def test_a_step_may_donate_its_state(setting):
    params, batch = setting
    tx = OPTIMIZERS["adam"](METHODS["rigl"].make())
    state = tx.init(params)
    params = jprune.apply_masks(params, jprune.masks_of(state))

    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    donating, keeping = jax.jit(step, donate_argnums=(0, 1)), jax.jit(step)
    expected = params, state
    for _ in range(6):
        expected = keeping(*expected)
    found = jax.tree.map(jnp.copy, params), state
    for _ in range(6):
        found = donating(*found)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert np.array_equal(a, b)


def test_the_bare_chain_works_with_forward_params(setting):
    params, batch = setting
    tx = optax.chain(jprune.rigl(0.7, every=5, end=21), optax.adam(1e-2))
    state = tx.init(params)
    begin = float(loss_fn(jprune.forward_params(params, state), batch))

    @jax.jit
    def step(params, state):
        def objective(params):
            return loss_fn(jprune.forward_params(params, state), batch)

        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    assert float(loss_fn(jprune.forward_params(params, state), batch)) < begin
    assert int(jprune.masks.count(jprune.masks_of(state))) == 36


def test_filters_are_dropped_and_grown_whole():
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 10))}
    method = jprune.rigl(0.5, every=1, end=9, units=jprune.units.filters, hold=False)
    tx = jprune.sparse(optax.chain(method, optax.sgd(0.1)))
    state = tx.init(params)
    first = jprune.masks_of(state)["kernel"]
    params = jprune.apply_masks(params, {"kernel": first})
    # The gradient is largest in the last filters, dead or not.
    grads = {"kernel": jnp.ones((3, 3, 4, 10)) * jnp.arange(10.0)}
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    mask = jprune.masks_of(state)["kernel"]
    assert mask.shape == (1, 1, 1, 10) and int(mask.sum()) == 5
    assert not np.array_equal(mask, first)
    dead = np.asarray(params["kernel"])[..., ~np.asarray(mask).ravel()]
    assert np.all(dead == 0.0)
