"""Groups as units: pooling, expanding, pruning; and couplings against brute force.

Mutations that these tests catch: entries that belong to a unit by both axes counted
twice, statistics that are masked, floors left out, masks that replace one another where
two groups meet.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import allocation
from tests.tracing import law, nets

HOW = {
    "sum": np.sum,
    "mean": np.mean,
    "max": np.max,
    "l1": lambda x: np.sum(np.abs(x)),
    "l2": lambda x: np.sqrt(np.sum(np.square(x))),
}


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def coupled(build, **options):
    net = build()
    return net, jprune.couplings(
        net.apply, net.variables, *net.inputs, **net.options, **options
    )


def entries(group, unit):
    """For each leaf of a group, which entries belong to a unit: by loops."""
    found = {leaf.path: np.zeros(leaf.shape, bool) for leaf in group.leaves}
    for member in group.members:
        for position, own in enumerate(member.units):
            if own == unit:
                index = [slice(None)] * len(member.leaf.shape)
                index[member.axis] = position
                found[member.leaf.path][tuple(index)] = True
    return found


@pytest.mark.parametrize(
    "build, how",
    [
        (nets.resnet_basic, "sum"),
        (nets.resnet_basic, "max"),
        (nets.resnet_basic, "l2"),
        (nets.haiku_mlp, "l1"),
        (nets.decoder, "mean"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_pooling_against_loops(build, how):
    net, units = coupled(build, how=how)
    values = {leaf.path: leaf.value for leaf in jprune.trees.leaves_of(net.variables)}
    pooled = jprune.units.pool(units, net.variables)
    check_pooled(units, pooled, values, how)


def check_pooled(units, pooled, values, how):
    for group, scores in zip(units.groups, pooled, strict=True):
        assert scores.shape == group.shape == group.sizes.shape
        for unit in range(group.shape[0]):
            own = entries(group, unit)
            every = np.concatenate([values[p][mask] for p, mask in own.items()])
            assert every.size == group.sizes[unit]
            np.testing.assert_allclose(scores[unit], HOW[how](every), rtol=1e-10)


def test_expanding_against_loops():
    net, units = coupled(nets.resnet_basic)
    keeps = law.removals(units)
    masks = jprune.units.expand(units, net.variables, keeps)
    jprune.masks.check(masks, net.variables)
    expected = {
        leaf.path: np.ones(leaf.shape, bool)
        for leaf in jprune.trees.leaves_of(net.variables)
    }
    for group, keep in zip(units.groups, keeps, strict=True):
        for unit in np.flatnonzero(~np.asarray(keep)):
            for path, own in entries(group, unit).items():
                expected[path] &= ~own
    for leaf in jprune.trees.leaves_of(masks):
        shape = expected[leaf.path].shape
        np.testing.assert_array_equal(
            np.broadcast_to(leaf.value, shape), expected[leaf.path]
        )
        if "batch_stats" in leaf.path:
            assert leaf.shape == ()
    for alive, keep in zip(
        jprune.units.living(units, net.variables, masks), keeps, strict=True
    ):
        np.testing.assert_array_equal(alive, keep)


# Pruning.


def test_pruning_by_leaf_scores_and_in_unit_space():
    net, units = coupled(nets.vgg)
    total = sum(group.shape[0] for group in units.groups)
    masks = jprune.prune(net.variables, 0.4, units=units)
    pooled = jprune.units.pool(units, net.variables)
    same = jprune.prune(pooled, 0.4, units=units)
    assert jax.tree.structure(same) == jax.tree.structure(net.variables)
    law.assert_close(masks, same)
    kept = jprune.units.living(units, net.variables, masks)
    assert sum(int(keep.sum()) for keep in kept) == total - round(0.4 * total)
    threshold = np.sort(np.concatenate(pooled))[round(0.4 * total)]
    for keep, scores in zip(kept, pooled, strict=True):
        np.testing.assert_array_equal(keep, scores >= threshold)
    fewer = jprune.prune(pooled, keep=5, units=units, within=masks)
    assert int(jprune.masks.count(jprune.masks.difference(fewer, masks))) == 0


@pytest.mark.parametrize(
    "spread",
    [None, allocation.uniform(), allocation.erdos_renyi_kernel()],
    ids=["global", "uniform", "erk"],
)
def test_allocations_and_the_floor(spread):
    """The best unit of each group survives, however small its scores."""
    _, units = coupled(nets.vgg)
    scores = [
        jnp.full(group.shape, 10.0**-i) + jnp.arange(group.shape[0]) * 1e-9
        for i, group in enumerate(units.groups)
    ]
    masks = jprune.prune(scores, keep=4, units=units, allocation=spread)
    alive = jprune.units.living(units, units.tree, masks)
    assert sum(int(keep.sum()) for keep in alive) == 4
    assert all(bool(keep[-1]) for keep in alive)
    with pytest.raises(ValueError, match="keep"):
        jprune.prune(scores, keep=2, units=units, allocation=spread)
    wider = units._replace(least=2)
    masks = jprune.prune(scores, keep=6, units=wider, allocation=spread)
    alive = jprune.units.living(units, units.tree, masks)
    assert [int(keep.sum()) for keep in alive] == [2, 2, 2]


def test_a_table_by_path():
    _, units = coupled(nets.vgg)
    scores = [jnp.arange(group.shape[0]) * 1.0 for group in units.groups]
    table = {"params/Conv_0": 0.5, "*": 0.0}
    alive = jprune.units.living(
        units, units.tree, jprune.prune(scores, table, units=units)
    )
    kept = {
        group.leaf.path: int(keep.sum())
        for group, keep in zip(units.groups, alive, strict=True)
    }
    assert kept == {
        "params/Conv_0/kernel": 2,
        "params/Conv_1/kernel": 5,
        "params/Conv_2/kernel": 6,
    }
    with pytest.raises(ValueError, match="'params/Conv_0/kernel', but 1 must survive"):
        jprune.prune(scores, table | {"params/Conv_0": 0.95}, units=units)


def test_pruning_in_rounds():
    net, units = coupled(nets.vgg)
    score = jprune.scores.magnitude
    masks = jprune.prune_iteratively(
        score, net.variables, sparsity=0.5, rounds=3, units=units
    )
    alive = jprune.units.living(units, net.variables, masks)
    assert sum(int(keep.sum()) for keep in alive) == 7
    small, params = jprune.shrink(net.apply, net.variables, masks, *net.inputs)
    masked = jprune.apply_masks(net.variables, masks)
    law.assert_close(small(params, *net.inputs), net.apply(masked, *net.inputs))


def test_sparse_training_of_channels():
    """A drop rule sees the weights of all leaves of a group."""
    net, units = coupled(nets.haiku_mlp)
    tx = jprune.rigl(0.5, units=lambda _: units, every=1, end=10, drop_fraction=0.4)
    state = tx.init(net.variables)
    grads = jax.tree.map(jnp.ones_like, net.variables)
    update = law.compile_quickly(tx.update)
    for _ in range(3):
        _, state = update(grads, state, net.variables)
    alive = jprune.units.living(units, net.variables, jprune.masks_of(state))
    assert sum(int(keep.sum()) for keep in alive) == 5


# Mistakes.


def test_mistakes():
    net, units = coupled(nets.vgg)
    for wrong, message in (
        ({"how": "median"}, "how: 'median'"),
        ({"unknown": "ignore"}, "unknown: 'ignore'"),
        ({"mutable": "nothing"}, "mutable: the pattern 'nothing'"),
        ({"statistics": "nothing"}, "statistics: the pattern 'nothing'"),
    ):
        with pytest.raises(ValueError, match=message):
            jprune.couplings(net.apply, net.variables, *net.inputs, **wrong)
    with pytest.raises(ValueError, match="keeps: 1 decisions"):
        jprune.units.expand(units, net.variables, [jnp.ones(4, bool)])
    with pytest.raises(ValueError, match="NaN"):
        scores = [jnp.full(group.shape, jnp.nan) for group in units.groups]
        jprune.prune(scores, 0.5, units=units)


def test_statistics_by_pattern():
    net, _ = coupled(nets.vgg)
    units = jprune.couplings(
        net.apply, net.variables, *net.inputs, statistics=["batch_stats", "*/bias"]
    )
    assert not any("bias" in leaf.path for leaf in units.leaves)


def test_a_matrix_of_one_leaf_on_both_sides():
    """A square kernel that feeds itself: one group, on both axes."""

    def apply_fn(params, x):
        h = jnp.tanh(x @ params["in"])
        for _ in range(2):
            h = h + jnp.tanh(h @ params["square"])
        return h @ params["out"]

    shapes = {"in": (3, 5), "square": (5, 5), "out": (5, 2)}
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(4, 3)))
    units = jprune.couplings(apply_fn, params, x)
    assert [group.shape for group in units.groups] == [(5,)]
    assert units.groups[0].sizes.tolist() == [3 + 9 + 2] * 5
    for how in HOW:
        pooled = jprune.units.pool(units._replace(how=how), params)
        check_pooled(units, pooled, params, how)
    law.check(apply_fn, params, (x,), law.removals(units), units)


# Brute force.


BRUTE = [
    nets.densenet,
    nets.resnet_basic,
    nets.mobilenet,
    nets.unet,
    nets.equinox_cnn,
    nets.haiku_mlp,
    nets.lstm,
]


@pytest.mark.parametrize("build", BRUTE, ids=lambda build: build.__name__)
def test_zeroed_groups_have_no_gradient(build, monkeypatch):
    """Of a removed unit all entries die, and in a living network no other does.

    One unit of each group is masked, and the gradient of the whole taken.
    """
    # A ReLU can be dead for other reasons.
    for module in (nets.nn, jax.nn):
        monkeypatch.setattr(module, "relu", jax.nn.silu)
    net, units = coupled(build)
    grad = law.compile_quickly(jax.grad(lambda v, x: jnp.sum(jnp.sin(net.apply(v, x)))))
    (x,) = net.inputs
    before = slices_alive(grad(net.variables, x))
    for number, group in enumerate(units.groups):
        keeps = [jnp.ones(g.shape, bool) for g in units.groups]
        keeps[number] = keeps[number].at[0].set(False)
        masks = jprune.units.expand(units, net.variables, keeps)
        masked = jprune.apply_masks(net.variables, masks)
        after = slices_alive(grad(masked, x))
        died = {key for key in before if before[key] and not after[key]}
        own = {
            (member.leaf.path, member.axis, int(position))
            for member in group.members
            for position in np.flatnonzero(member.units == 0)
        }
        alive_before = {key for key in own if before[key]}
        assert died <= own | statistics(units, died)
        assert alive_before <= died


def slices_alive(grads):
    """Whether the gradient of each slice of each kernel is not all 0."""
    found = {}
    for leaf in jprune.trees.leaves_of(grads):
        for axis in range(len(leaf.shape)):
            rest = tuple(a for a in range(len(leaf.shape)) if a != axis)
            alive = np.any(np.asarray(leaf.value) != 0, axis=rest)
            for position in range(leaf.shape[axis]):
                found[leaf.path, axis, position] = bool(alive[position])
    return found


def statistics(units, died):
    """What is cut with a channel, but not masked."""
    own = {leaf.path for leaf in units.leaves}
    return {key for key in died if key[0] not in own}
