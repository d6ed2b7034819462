"""Units: pooling and expanding against loops, and the masks of a reference.

Mutations that these tests catch: padding that enters a mean or a maximum, a mean over
the block's nominal size, an axis named by its place and not by its letter, a stack axis
that is pooled, N:M ties to the higher index.
"""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune import units
from jprune.types import Masks

GOLDEN = Path(__file__).parent / "golden/jaxpruner"
HOW = {
    "sum": np.sum,
    "mean": np.mean,
    "max": np.max,
    "l1": lambda x: np.sum(np.abs(x)),
    "l2": lambda x: np.sqrt(np.sum(np.square(x))),
}
LAYOUTS = {
    "HWIO": (3, 2, 4, 5),
    "OIHW": (5, 4, 3, 2),
    "IO": (4, 5),
    "OI": (5, 4),
    "LIO": (3, 4, 5),
    "LHWIO": (2, 3, 2, 4, 5),
    "INO": (4, 2, 3),
    "NIO": (2, 3, 4),
    "O": (5,),
}

# The letters that tell units apart; entries that agree on them are one unit.
APART = {
    "weights": lambda own: own,
    "kernels": lambda own: own.translate(dict.fromkeys(map(ord, "HWD"))),
    "filters": lambda own: "LO" if "NI" in own else "LON",
    "input_channels": lambda own: "LIN" if "NI" in own else "LI",
    "stripes": lambda own: "LHWDO" if "NI" in own else "LHWDON",
    "shape_columns": lambda own: "LHWDIN" if "NI" in own else "LHWDI",
    "rows": lambda own: (
        own.replace("W", "")
        if "W" in own
        else own.replace("O", "")
        if "NI" in own
        else own.replace("O", "").replace("N", "")
    ),
    "layers": lambda own: "L",
}


def members(shape, own, apart):
    """The positions of each unit, in a dict by what tells the unit apart."""
    found = {}
    for position in itertools.product(*map(range, shape)):
        key = tuple(i if x in apart else 0 for i, x in zip(position, own, strict=True))
        found.setdefault(key, []).append(position)
    return found


def draw_scores(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def top(pooled, keep):
    """The mask of the largest, ties to the lower index."""
    mask = np.zeros(pooled.size, bool)
    mask[np.argsort(-np.asarray(pooled).ravel(), kind="stable")[:keep]] = True
    return mask.reshape(pooled.shape)


def full(mask, shape):
    return np.broadcast_to(np.asarray(mask), shape)


# Every builder meets every layout, and every way to pool several of both.
CASES = [
    (builder, layout, list(HOW)[(i + j) % len(HOW)])
    for i, builder in enumerate(APART)
    for j, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize("builder, layout, how", CASES)
def test_builders_against_loops(builder, layout, how):
    shape = LAYOUTS[layout]
    scores = draw_scores(shape)
    options = {"how": how} if builder != "weights" else {}
    built = getattr(units, builder)([scores], prunable="0", layout=layout, **options)
    (group,) = built.groups
    pooled = np.asarray(units.pool(built, [scores])[0])
    expected = members(shape, layout, APART[builder](layout))
    assert pooled.shape == group.shape
    assert pooled.size == len(expected)
    sizes = np.broadcast_to(group.sizes, group.shape)
    keep = draw_scores(group.shape, 1) > 0
    (mask,) = units.expand(built, [scores], [jnp.asarray(keep)])
    assert mask.ndim == scores.ndim
    assert all(m in (1, n) for m, n in zip(mask.shape, shape, strict=True))
    mask = full(mask, shape)
    reduce = HOW[built.how]
    for place, positions in expected.items():
        values = np.array([scores[p] for p in positions])
        np.testing.assert_allclose(pooled[place], reduce(values), rtol=1e-5, atol=1e-6)
        assert sizes[place] == len(positions)
        assert all(mask[p] == keep[place] for p in positions)


def pool_all(built, scores):
    """The unit scores of a leaf in every way, compiled as one."""

    def pool(leaf):
        return {h: units.pool(built._replace(how=h), [leaf])[0] for h in HOW}

    return jax.tree.map(np.asarray, jax.jit(pool)(scores))


@st.composite
def tilings(draw):
    rank = draw(st.integers(2, 4))
    shape = tuple(draw(st.integers(0, 5)) for _ in range(rank))
    layout = {2: "IO", 3: "LIO", 4: "HWIO"}[rank]
    letters = draw(
        st.sets(st.sampled_from([x for x in layout if x != "L"]), min_size=1)
    )
    sizes = {x: draw(st.one_of(st.integers(1, 7), st.none())) for x in sorted(letters)}
    return shape, layout, sizes


@given(tilings(), st.sampled_from([-5, 0]))
@settings(deadline=None, max_examples=15)
def test_ragged_blocks_against_loops(tiling, shift):
    shape, layout, sizes = tiling
    # Shifted below zero, so that padding with zeros would win a maximum.
    scores = draw_scores(shape) + np.float32(shift)
    built = units.blocks([scores], sizes, layout=layout, prunable="0")
    (group,) = built.groups
    pooled = pool_all(built, scores)
    steps = [(sizes.get(x, 1) or max(n, 1)) for x, n in zip(layout, shape, strict=True)]
    expected = tuple(-(-n // step) for n, step in zip(shape, steps, strict=True))
    assert {p.shape for p in pooled.values()} == {group.shape} == {expected}
    counts = np.broadcast_to(group.sizes, group.shape)
    assert counts.sum() == scores.size
    keep = draw_scores(group.shape, 1) > 0
    (mask,) = units.expand(built, [scores], [jnp.asarray(keep)])
    assert all(m in (1, n) for m, n in zip(mask.shape, shape, strict=True))
    mask = full(mask, shape)
    for place in itertools.product(*map(range, expected)):
        here = tuple(
            slice(i * step, (i + 1) * step)
            for i, step in zip(place, steps, strict=True)
        )
        for how, reduce in HOW.items():
            np.testing.assert_allclose(
                pooled[how][place], reduce(scores[here]), rtol=1e-4, atol=1e-5
            )
        assert counts[place] == scores[here].size
        assert np.all(mask[here] == keep[place])


# Against the reference.


def reference(kind):
    with np.load(GOLDEN / "masks.npz") as data:
        inputs = {k[3:]: data[k] for k in data.files if k.startswith("in/")}
        return inputs, {k: data[k] for k in data.files if k.startswith(kind + "/")}


def kept_by_reference(size, sparsity):
    one = np.float32(1)
    return max(1, int(np.round(np.float32(size) * (one - np.float32(sparsity)))))


def test_golden_blocks():
    inputs, golden = reference("block")
    for key, mask in golden.items():
        _, tile, how, name, sparsity = key.split("/")
        rows, columns = map(int, tile.split("x"))
        scores = np.abs(inputs[name])
        built = units.blocks(
            [scores], (rows, columns), how={"avg": "mean", "max": "max"}[how]
        )
        (pooled,) = units.pool(built, [scores])
        keep = top(pooled, kept_by_reference(pooled.size, sparsity))
        (ours,) = units.expand(built, [scores], [jnp.asarray(keep)])
        np.testing.assert_array_equal(ours, mask.astype(bool), err_msg=key)


def test_golden_channels():
    inputs, golden = reference("channel")
    for key, mask in golden.items():
        _, axis, name, sparsity = key.split("/")
        scores = np.abs(inputs[name])
        last = axis == "axis-1"
        built = (units.filters if last else units.input_channels)([scores])
        (pooled,) = units.pool(built, [scores])
        keep = top(pooled, kept_by_reference(pooled.size, sparsity))
        (ours,) = units.expand(built, [scores], [jnp.asarray(keep)])
        assert ours.size == pooled.size
        np.testing.assert_array_equal(
            full(ours, scores.shape), full(mask.astype(bool), scores.shape), key
        )


def test_golden_n_m():
    inputs, golden = reference("nm")
    compared = 0
    for key, mask in golden.items():
        _, ratio, axis, name = key.split("/")
        if name == "dense_w2":
            continue
        n, m = map(int, ratio.split(":"))
        along = int(axis[4:])
        scores = np.abs(inputs[name])
        built = units.n_m([scores], n, m, axis={-1: "O", -2: "I"}[along])
        ours = np.asarray(built.choose(jnp.asarray(scores), built.groups[0]))
        rows = np.moveaxis(scores, along, -1).reshape(-1, m)
        ours, theirs = (
            np.moveaxis(x, along, -1).reshape(-1, m) for x in (ours, mask.astype(bool))
        )
        # The reference gives ties to the higher index, so ranks must be clear.
        clear = np.array([len(set(row)) == m for row in rows])
        np.testing.assert_array_equal(ours[clear], theirs[clear], key)
        assert np.all(ours.sum(1) == n)
        compared += clear.sum()
    assert compared > 3000


# N:M.


@pytest.mark.parametrize("axis, layout", [(0, "IO"), (1, "OI"), (2, "HWIO")])
@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (4, 4), (3, 8), (1, 1)])
def test_n_m_against_loops(n, m, axis, layout):
    shape = {"IO": (16, 3), "OI": (3, 16), "HWIO": (2, 3, 16, 3)}[layout]
    # Small integers have ties in almost every group.
    scores = np.random.default_rng(n + m).integers(-2, 3, shape).astype(np.float32)
    built = units.n_m([scores], n, m, layout=layout)
    ours = np.asarray(jax.jit(lambda s: built.choose(s, built.groups[0]))(scores))
    rows = np.moveaxis(scores, axis, -1).reshape(-1, m)
    for row, found in zip(
        rows, np.moveaxis(ours, axis, -1).reshape(-1, m), strict=True
    ):
        np.testing.assert_array_equal(found, top(row, n))
    (mask,) = units.expand(built, [scores], [jnp.asarray(ours)])
    np.testing.assert_array_equal(mask, ours)


def test_n_m_ranks_nan_lowest():
    scores = jnp.array([[jnp.nan, -jnp.inf, jnp.nan, -1.0]])
    built = units.n_m([scores], 2, 4, axis="O")
    found = built.choose(scores, built.groups[0])
    assert found.tolist() == [[False, True, False, True]]
    found = built.choose(jnp.full((1, 4), jnp.nan), built.groups[0])
    assert found.tolist() == [[True, True, False, False]]


def test_n_m_mistakes():
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 3, 8))},
        "fc": {"kernel": jnp.ones((8, 8))},
    }
    with pytest.raises(
        ValueError, match=r"'conv/kernel'.*shape \(3, 3, 3, 8\).*prunable="
    ):
        units.n_m(params, 2, 4)
    assert len(units.n_m(params, 2, 4, prunable="fc").groups) == 1
    assert len(units.n_m(params, 2, 4, axis="O").groups) == 2
    with pytest.raises(ValueError, match="axis: 'H' of 'fc/kernel'"):
        units.n_m(params, 1, 3, axis="H")
    with pytest.raises(ValueError, match="axis: 'L'"):
        units.n_m([jnp.ones((4, 4, 4))], 2, 4, axis="L", layout="LIO")
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"n: {n} of 4"):
            units.n_m(params, n, 4)


# Trees.

PARAMS = {
    "conv": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)},
    "norm": {"scale": jnp.ones(8)},
    "fc": {"kernel": jnp.ones((8, 5))},
    "key": jax.random.key(0),
}


def test_trees_keep_their_structure():
    built = units.filters(PARAMS)
    assert [g.leaf.path for g in built.groups] == ["conv/kernel", "fc/kernel"]
    assert [g.layout for g in built.groups] == ["HWIO", "IO"]
    keeps = [jnp.arange(g.shape[-1]).reshape(g.shape) % 2 == 0 for g in built.groups]
    masks: Masks = units.expand(built, PARAMS, keeps)
    assert jax.tree.structure(masks) == jax.tree.structure(PARAMS)
    shapes = [jnp.shape(x) for x in jax.tree.leaves(masks)]
    assert shapes == [(), (1, 1, 1, 8), (1, 5), (), ()]
    assert all(x.dtype == bool for x in jax.tree.leaves(masks))


@pytest.mark.parametrize("builder", APART)
def test_units_are_bound_to_shapes_alone(builder):
    shapes = jax.eval_shape(lambda: {k: v for k, v in PARAMS.items() if k != "key"})
    (a, b) = getattr(units, builder)(shapes).groups
    assert isinstance(a.leaf.value, jax.ShapeDtypeStruct)
    (c, d) = getattr(units, builder)(PARAMS).groups
    assert isinstance(c.leaf.value, jax.ShapeDtypeStruct)
    assert (a.shape, b.shape) == (c.shape, d.shape)


def test_stack_axis():
    (group,) = units.filters([jnp.ones((5, 3, 4))], layout="LIO").groups
    assert group.stack == 0 and group.shape == (5, 1, 4)
    (group,) = units.filters([jnp.ones((3, 4))]).groups
    assert group.stack is None


def test_weights_cost_nothing():
    scores = jnp.ones((4, 3), jnp.bfloat16)
    built = units.weights([scores])
    assert units.pool(built, [scores])[0] is scores
    keep = jnp.ones((4, 3), bool)
    assert units.expand(built, [scores], [keep])[0] is keep


def test_pooling_traced_and_batched():
    built = units.blocks([jnp.ones((5, 7))], (2, 3), how="max")
    scores = jnp.asarray(draw_scores((6, 5, 7)))
    one = jax.jit(lambda s: units.pool(built, [s])[0])
    many = jax.jit(jax.vmap(one))(scores)
    for s, pooled in zip(scores, many, strict=True):
        np.testing.assert_array_equal(one(s), pooled)


@pytest.mark.parametrize("how", HOW)
def test_nan_reaches_its_unit_alone(how):
    scores = draw_scores((5, 7))
    scores[4, 6] = np.nan
    built = units.blocks([scores], (2, 3), how=how)
    (pooled,) = units.pool(built, [scores])
    expected = np.zeros((3, 3), bool)
    expected[2, 2] = True
    np.testing.assert_array_equal(np.isnan(pooled), expected)
    (whole,) = units.pool(units.filters([scores], how=how), [scores])
    assert np.isnan(whole).tolist() == [[False] * 6 + [True]]


@pytest.mark.parametrize("how", ["sum", "mean", "l1", "l2"])
def test_half_precision_is_pooled_in_float32(how):
    # In bfloat16 a running sum of ones stops at 256.
    scores = jnp.ones((1000, 2), jnp.bfloat16)
    (pooled,) = units.pool(units.filters([scores], how=how), [scores])
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, HOW[how](np.ones(1000)), rtol=1e-6)


def test_signs_matter_to_the_sum_only():
    scores = [jnp.array([[-3.0], [2.0]])]
    pooled = {h: units.pool(units.filters(scores, how=h), scores)[0] for h in HOW}
    assert {h: round(float(p[0, 0]), 4) for h, p in pooled.items()} == {
        "sum": -1.0,
        "mean": -0.5,
        "max": 2.0,
        "l1": 5.0,
        "l2": 3.6056,
    }
    # A single weight is a unit too.
    assert units.pool(units.kernels(scores, how="l2"), scores)[0].tolist() == [[3], [2]]


def test_defaults_of_how():
    defaults = {name: getattr(units, name)(PARAMS).how for name in APART}
    assert {name for name, how in defaults.items() if how == "mean"} == {"layers"}
    assert units.blocks(PARAMS, (2, 2)).how == "mean"


@pytest.mark.parametrize("builder", APART)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 4), (4, 1), (1, 1), (0, 0)])
def test_empty_and_single_axes(builder, shape):
    scores = jnp.ones(shape)
    built = getattr(units, builder)([scores])
    (pooled,) = units.pool(built, [scores])
    assert pooled.shape == built.groups[0].shape
    assert bool(pooled.size) == bool(scores.size)
    (mask,) = units.expand(built, [scores], [jnp.ones(pooled.shape, bool)])
    assert np.broadcast_to(mask, shape).all()
    assert np.broadcast_to(built.groups[0].sizes, pooled.shape).sum() == scores.size


def test_blocks_of_channels_and_positions():
    built = units.blocks(PARAMS, {"H": None, "W": None, "I": 4, "O": 3})
    assert [g.shape for g in built.groups] == [(1, 1, 1, 3), (2, 2)]
    assert built.groups[0].sizes.tolist() == [[[[108, 108, 72]]]]
    same = units.blocks(PARAMS, (4, 3))
    assert [g.shape for g in same.groups] == [(3, 3, 1, 3), (2, 2)]


def test_block_mistakes():
    with pytest.raises(ValueError, match=r"shape: 'D' is no axis .*\['HWIO', 'IO'\]"):
        units.blocks(PARAMS, {"D": 2})
    with pytest.raises(ValueError, match="shape: the block size 0 of 'I' is below 1"):
        units.blocks(PARAMS, (0, 4))
    with pytest.raises(ValueError, match="shape: 'L' is no axis"):
        units.blocks([jnp.ones((4, 4, 4))], {"L": 2}, layout="LIO")


@pytest.mark.parametrize("builder", [x for x in APART if x != "weights"])
def test_unknown_how(builder):
    with pytest.raises(ValueError, match="how: 'l3' is none of"):
        getattr(units, builder)(PARAMS, how="l3")


def test_scores_that_do_not_fit():
    built = units.filters(PARAMS)
    with pytest.raises(ValueError, match=r"scores: .*'fc/kernel' of shape \(8, 5\)"):
        units.pool(built, PARAMS | {"fc": {"kernel": jnp.ones((8, 6))}})
    with pytest.raises(ValueError, match=r"scores: .*'conv/kernel'"):
        units.pool(built, {})


def test_decisions_that_do_not_fit():
    built = units.filters(PARAMS)
    with pytest.raises(ValueError, match="keeps: 1 decisions for 2 groups"):
        units.expand(built, PARAMS, [jnp.ones((1, 5), bool)])
    with pytest.raises(ValueError, match=r"'conv/kernel' have shape \(1, 1, 1, 8\)"):
        units.expand(built, PARAMS, [jnp.ones(8, bool), jnp.ones((1, 5), bool)])
