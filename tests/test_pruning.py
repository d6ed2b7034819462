"""The verb: exact counts, every way to spread them, rounds, and clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import allocation, scores, units
from jprune.selection import keep_count

KEY = jax.random.key(0)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "conv": {"kernel": rng.normal(size=(3, 3, 4, 8)), "bias": rng.normal(size=8)},
        "fc1": {"kernel": rng.normal(size=(32, 20))},
        "fc2": {"kernel": rng.normal(size=(20, 5))},
    }


def params_of(seed=0):
    return jax.tree.map(jnp.float32, draw(seed))


SIZES = {"conv/kernel": 288, "fc1/kernel": 640, "fc2/kernel": 100}
TOTAL = sum(SIZES.values())


def counts(masks):
    return {path: int(n) for path, n in jprune.masks.counts(masks).items()}


def threshold_by_sort(tree, k):
    """A stable sort over all kernels, as one mask per path."""
    flat = {
        path: np.abs(np.asarray(x, np.float64))
        for path, x in ((f"{n}/kernel", tree[n]["kernel"]) for n in tree)
    }
    line = np.concatenate([x.ravel() for x in flat.values()])
    order = np.argsort(-line, kind="stable")[:k]
    mask = np.zeros(line.size, bool)
    mask[order] = True
    ends = np.cumsum([x.size for x in flat.values()])[:-1]
    return {
        path: part.reshape(x.shape)
        for (path, x), part in zip(flat.items(), np.split(mask, ends), strict=True)
    }


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
def test_global_threshold_is_a_stable_sort(sparsity, by_path):
    params = params_of()
    masks = jprune.prune(scores.magnitude(params), sparsity)
    expected = threshold_by_sort(params, keep_count(TOTAL, sparsity))
    for path, mask in expected.items():
        np.testing.assert_array_equal(by_path(masks)[path], mask)
    assert masks["conv"]["bias"].shape == ()


def test_keep_may_be_traced_and_compiles_once():
    values = scores.magnitude(params_of())
    pruned = jax.jit(lambda values, keep: jprune.prune(values, keep=keep))
    for keep in (0, 17, TOTAL):
        assert sum(counts(pruned(values, jnp.int32(keep))).values()) == keep
    assert pruned._cache_size() == 1


def test_under_jit_and_vmap():
    one = scores.magnitude(params_of())
    many = jax.tree.map(lambda x: jnp.stack([x, -x, x**2]), one)
    masks = jax.jit(jax.vmap(lambda s: jprune.prune(s, 0.9)))(many)
    for i in range(3):
        own = jprune.prune(jax.tree.map(lambda x, i=i: x[i], many), 0.9)
        same = jax.tree.map(
            lambda a, b, i=i: bool((a[i] == b).all()) if b.ndim else True, masks, own
        )
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    "rule",
    [
        allocation.uniform(),
        allocation.uniform(exempt="fc2"),
        allocation.erdos_renyi(),
        allocation.erdos_renyi_kernel(),
        allocation.ideal_gas(),
        allocation.with_floor(allocation.uniform(), {"fc2": 0.5}),
    ],
)
def test_layers_keep_their_own_largest(rule, by_path):
    values = scores.magnitude(params_of())
    masks = jprune.prune(values, 0.8, allocation=rule)
    found = counts(masks)
    assert sum(found.values()) == keep_count(TOTAL, 0.8)
    for path, count in found.items():
        own = by_path(values)[path]
        order = np.argsort(-own.ravel(), kind="stable")[:count]
        assert by_path(masks)[path].ravel()[order].all()


def test_table_of_sparsities_straight_in_prune():
    masks = jprune.prune(scores.magnitude(params_of()), {"conv*": 0.5, "*": 0.9})
    assert counts(masks) == {"conv/kernel": 144, "fc1/kernel": 64, "fc2/kernel": 10}


def test_lamp_is_a_global_threshold_on_normalised_scores(by_path):
    values = scores.magnitude(params_of())
    lamp = allocation.lamp()
    masks = jprune.prune(values, 0.9, allocation=lamp)
    normalised = {}
    for path in SIZES:
        w = by_path(values)[path].astype(np.float64).ravel() ** 2
        order = np.argsort(w)
        rest = np.cumsum(w[order][::-1])[::-1]
        own = np.empty_like(w)
        own[order] = w[order] / rest
        normalised[path] = own
    line = np.concatenate(list(normalised.values()))
    cut = np.sort(line)[-keep_count(TOTAL, 0.9)]
    for path, own in normalised.items():
        np.testing.assert_array_equal(by_path(masks)[path].ravel(), own >= cut)


def test_floor_under_a_global_threshold(by_path):
    values = scores.magnitude(params_of())
    values["fc2"]["kernel"] *= 1e-6
    assert counts(jprune.prune(values, 0.9))["fc2/kernel"] == 0
    rule = allocation.with_floor(allocation.global_threshold(), {"fc2": 7})
    masks = jprune.prune(values, 0.9, allocation=rule)
    assert counts(masks)["fc2/kernel"] == 7
    assert sum(counts(masks).values()) == keep_count(TOTAL, 0.9)
    best = np.argsort(-by_path(values)["fc2/kernel"].ravel())[:7]
    assert by_path(masks)["fc2/kernel"].ravel()[best].all()


def test_units_are_pooled_and_expanded():
    values = scores.magnitude(params_of())
    filters = units.filters(values, prunable="conv/kernel")
    masks = jprune.prune(values, 0.5, units=filters)
    sums = np.asarray(values["conv"]["kernel"]).sum((0, 1, 2))
    kept = np.asarray(masks["conv"]["kernel"])
    assert kept.shape == (1, 1, 1, 8)
    assert set(np.flatnonzero(kept)) == set(np.argsort(-sums)[:4])
    assert masks["fc1"]["kernel"].shape == ()


def test_n_m_units_fix_the_budget():
    values = scores.magnitude(params_of())
    pattern = units.n_m(values, 2, 4)
    masks = jprune.prune(values, units=pattern)
    assert counts(masks) == {path: n // 2 for path, n in SIZES.items()}
    with pytest.raises(ValueError, match=r"sparsity: N:M units fix the budget"):
        jprune.prune(values, 0.5, units=pattern)


def test_layers_of_a_scanned_stack_are_layers():
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 5)), jnp.float32)
    values = {
        "blocks": {"kernel": jnp.abs(stack * jnp.array([1, 10, 100.0])[:, None, None])}
    }
    own = units.weights(values, layout={"blocks": "LIO"})
    masks = jprune.prune(values, 0.8, units=own, allocation=allocation.uniform())
    assert masks["blocks"]["kernel"].sum((1, 2)).tolist() == [6, 6, 6]
    together = jprune.prune(values, 0.8, units=own)["blocks"]["kernel"]
    assert together.sum((1, 2)).tolist() != [6, 6, 6]


def test_within_restricts_who_survives():
    values = scores.magnitude(params_of())
    outer = jprune.prune(scores.random(values, key=KEY), 0.5)
    inner = jprune.prune(values, 0.8, within=outer)
    assert sum(counts(inner).values()) == keep_count(TOTAL, 0.8)
    assert int(jprune.masks.count(jprune.masks.difference(inner, outer))) == 0
    with pytest.raises(ValueError, match=r"within: 822 units .* only 514 live"):
        jprune.prune(values, 0.2, within=outer)


def quadratic(params, batch):
    return sum(jnp.sum((w - batch) ** 2) for w in jax.tree.leaves(params))


SNIP = scores.snip(quadratic)


def test_one_round_is_prune():
    params = params_of()
    batch = jnp.float32(0.3)
    once = jprune.prune(SNIP(params, batch), 0.9)
    rounds = jprune.prune_iteratively(SNIP, params, batch, 0.9, rounds=1)
    assert int(jprune.masks.hamming(once, rounds)) == 0


@pytest.mark.parametrize("revive", [False, True])
def test_rounds_are_a_plain_loop(revive):
    params, batch = params_of(), jnp.float32(0.3)
    steps = 5
    masks, previous = jprune.masks.dense(params), None
    for step in range(1, steps + 1):
        sparsity = 1 - 0.05 ** (step / steps)
        values = SNIP(params, batch, masks=masks)
        previous, masks = (
            masks,
            jprune.prune(values, sparsity, within=None if revive else masks),
        )
    found = jprune.prune_iteratively(
        SNIP, params, batch, 0.95, rounds=steps, revive=revive
    )
    assert int(jprune.masks.hamming(found, masks)) == 0
    assert int(jprune.masks.hamming(found, previous)) > 0


def test_rounds_compile_once_for_all_sparsities_seeds_and_batches():
    traced = []

    def loss(params, batch):
        traced.append(1)
        return quadratic(params, batch)

    score_fn = scores.snip(loss)
    for seed, sparsity in ((0, 0.5), (1, 0.9), (2, 0.97)):
        masks = jprune.prune_iteratively(
            score_fn, params_of(seed), jnp.float32(seed), sparsity, rounds=4
        )
        assert sum(counts(masks).values()) == keep_count(TOTAL, sparsity)
    assert len(traced) == 1


def test_rounds_take_their_own_batches_and_keys():
    params = params_of()
    batches = jnp.arange(3.0)
    masks = jprune.masks.dense(params)
    keys = jax.random.split(KEY, 3)

    def score_fn(params, batch=None, *, masks=None, key=None):
        noise = scores.random(params, key=key)
        return jax.tree.map(lambda a, b: a * b, SNIP(params, batch, masks=masks), noise)

    for t in range(3):
        values = score_fn(params, batches[t], masks=masks, key=keys[t])
        masks = jprune.prune(values, 1 - 0.1 ** ((t + 1) / 3), within=masks)
    found = jprune.prune_iteratively(
        score_fn, params, sparsity=0.9, rounds=3, batches=batches, key=KEY
    )
    assert int(jprune.masks.hamming(found, masks)) == 0


def test_rounds_with_units_and_allocation():
    params, batch = params_of(), jnp.float32(0.3)
    found = jprune.prune_iteratively(
        SNIP,
        params,
        batch,
        0.5,
        rounds=3,
        units=units.filters(params),
        allocation=allocation.uniform(),
    )
    shapes = {k: v["kernel"].shape for k, v in found.items()}
    assert shapes == {"conv": (1, 1, 1, 8), "fc1": (1, 20), "fc2": (1, 5)}
    # 16.5 of 33 filters round to 16 removed.
    assert sum(counts(found).values()) == 17


@pytest.mark.parametrize("sparsity", [1.0, -0.5, float("nan")])
def test_sparsity_outside_its_range(sparsity):
    values = scores.magnitude(params_of())
    with pytest.raises(ValueError, match=r"sparsity: .* outside \[0, 1\)"):
        jprune.prune(values, sparsity)
    with pytest.raises(ValueError, match=r"sparsity: .* outside \[0, 1\)"):
        jprune.prune_iteratively(SNIP, values, 0.0, sparsity, rounds=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "sparsity, keep: give one of them"),
        ({"sparsity": 0.5, "keep": 3}, "sparsity, keep: give one of them"),
        ({"keep": TOTAL + 1}, f"keep: {TOTAL + 1} of {TOTAL} units cannot survive"),
        ({"keep": -1}, "keep: -1 of"),
        ({"sparsity": {"nothing": 0.5}}, "the pattern 'nothing' matches none"),
        ({"sparsity": 0.5, "prunable": "nothing"}, "prunable: the pattern 'nothing'"),
        (
            {"sparsity": {"fc1": 0.5}, "allocation": allocation.uniform()},
            "allocation: a table of sparsities is one already",
        ),
        (
            {"sparsity": 0.9, "allocation": allocation.uniform(exempt="fc1")},
            r"keep: 103 units are out of reach.*fc1/kernel.*640",
        ),
    ],
)
def test_what_cannot_be_pruned_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        jprune.prune(scores.magnitude(params_of()), **arguments)


def test_nan_scores_name_their_leaf():
    values = scores.magnitude(params_of())
    values["fc1"]["kernel"] = values["fc1"]["kernel"].at[3].set(jnp.nan)
    with pytest.raises(
        ValueError, match="scores: 20 of the 640 scores of 'fc1/kernel'"
    ):
        jprune.prune(values, 0.5)
    values["fc1"]["kernel"] = jnp.full((32, 20), jnp.nan)
    with pytest.raises(ValueError, match="scores: 640 of the 640 scores"):
        jprune.prune(values, 0.5)
    values["fc1"]["kernel"] = jnp.full((32, 20), jnp.inf).at[0].set(-jnp.inf)
    values["conv"]["bias"] = values["conv"]["bias"] * jnp.nan
    assert sum(counts(jprune.prune(values, 0.5)).values()) == TOTAL // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.5}, "sparsity, rounds: give both"),
        ({"sparsity": 0.5, "rounds": 0}, "sparsity, rounds: give both"),
        ({"keep": [5, 9]}, r"keep: \[5, 9\] rises"),
        ({"keep": [9, 5], "rounds": 3}, "keep: it has 2 rounds"),
        ({"sparsity": {"*": 0.5}, "rounds": 2}, "sparsity: in rounds it is one number"),
        (
            {"sparsity": 0.5, "rounds": 2, "batches": jnp.ones(3)},
            "batches: .* but there are 2 rounds",
        ),
    ],
)
def test_rounds_that_cannot_be_run(arguments, message):
    with pytest.raises(ValueError, match=message):
        jprune.prune_iteratively(SNIP, params_of(), **arguments)
