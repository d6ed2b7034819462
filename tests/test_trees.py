"""Paths, patterns and what is prunable, on the trees of every framework."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jprune
from jprune import layouts, trees


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Embed(7, 4)(x))
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
        return nn.Dense(3)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(3, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs)])


class EquinoxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    layers: list

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(2, 3, 3, key=key)
        self.norm = eqx.nn.LayerNorm((4, 4))
        self.layers = [eqx.nn.Linear(3, 3, key=key)]


def linen():
    x = jnp.ones((1, 5), int)
    return jax.eval_shape(LinenNet().init, jax.random.key(0), x)["params"]


def linen_partitioned():
    init = nn.with_partitioning(nn.initializers.ones, ("a", "b"))
    dense = nn.Dense(3, kernel_init=init)
    return dense.init(jax.random.key(0), jnp.ones((1, 2)))["params"]


def nnx_state():
    return nnx.state(NnxNet(nnx.Rngs(0)))


def equinox():
    return eqx.filter(EquinoxNet(jax.random.key(0)), eqx.is_array)


def haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 3])(x)))
    return net.init(jax.random.key(0), jnp.ones((1, 2)))


def lists():
    return [[jnp.ones((2, 3)), jnp.ones(3)], [jnp.ones((3, 4)), jnp.ones(4)]]


PRUNABLE = {
    linen: [
        "Dense_0/kernel",
        "MultiHeadDotProductAttention_0/key/kernel",
        "MultiHeadDotProductAttention_0/out/kernel",
        "MultiHeadDotProductAttention_0/query/kernel",
        "MultiHeadDotProductAttention_0/value/kernel",
    ],
    linen_partitioned: ["kernel"],
    nnx_state: ["blocks/0/kernel", "conv/kernel"],
    equinox: ["conv/weight", "layers/0/weight"],
    haiku: ["mlp/~/linear_0/w", "mlp/~/linear_1/w"],
    lists: ["0/0", "1/0"],
}


@pytest.mark.parametrize("make", PRUNABLE, ids=lambda make: make.__name__)
def test_kernels_are_prunable_by_default(make):
    found = [leaf.path for leaf in trees.prunable_leaves(make())]
    assert found == PRUNABLE[make]


@pytest.mark.parametrize(
    "make", [linen_partitioned, nnx_state, equinox, haiku, lists],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_prune_and_apply_on_every_framework(make):
    params = make()
    masks = jprune.prune(jprune.scores.magnitude(params), 0.5)
    pruned = jprune.apply_masks(params, masks)
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    kept = int(jprune.masks.count(masks))
    total = sum(x.size for x in trees.prunable_leaves(params))
    assert kept == jprune.selection.keep_count(total, 0.5)
    removed = sum(
        int((x == 0).sum()) for x in map(_value, trees.prunable_leaves(pruned))
    )
    assert removed >= total - kept


def _value(leaf):
    return leaf.value


def test_equinox_layouts_begin_with_the_outputs():
    leaves = trees.prunable_leaves(equinox())
    assert layouts.layouts_of(leaves) == ["OIHW", "OI"]
    (group, *_) = jprune.units.filters(equinox()).groups
    assert group.shape == (3, 1, 1, 1)


def test_patterns_and_predicates():
    params = {"conv1": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "n": 3}
    paths = [leaf.path for leaf in trees.prunable_leaves(params, "conv1")]
    assert paths == ["conv1/bias", "conv1/kernel"]
    paths = [leaf.path for leaf in trees.prunable_leaves(params, ["*/bias"])]
    assert paths == ["conv1/bias"]
    chosen = trees.prunable_leaves(params, lambda path, leaf: leaf.ndim == 2)
    assert [leaf.path for leaf in chosen] == ["conv1/kernel"]


def test_first_matching_pattern_wins():
    leaves = trees.leaves_of({"a": 0, "b": 0})
    assert trees.lookup({"a": 1, "*": 2}, leaves, 0, "x") == [1, 2]
    assert trees.lookup({"*": 2, "a": 1}, leaves, 0, "x") == [2, 2]


def test_errors_name_the_culprit():
    params = {"fc": {"bias": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"prunable: the default rule.*'fc/bias'"):
        trees.prunable_leaves(params)
    with pytest.raises(ValueError, match=r"prunable: the pattern 'conv\*'.*'fc/bias'"):
        trees.prunable_leaves(params, "conv*")
    leaves = trees.prunable_leaves(params, "fc")
    for wrong in ("HWIO", "X", "II"):
        with pytest.raises(
            ValueError, match=f"layout: '{wrong}' does not fit 'fc/bias'"
        ):
            layouts.layouts_of(leaves, wrong)
    with pytest.raises(ValueError, match="layout: the pattern 'conv'"):
        layouts.layouts_of(leaves, {"conv": "O"})
    with pytest.raises(ValueError, match="layout: none is known for 'x/kernel'"):
        layouts.default_layout("x/kernel", (1,) * 6)
