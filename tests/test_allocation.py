"""Allocations.

Mutations that these tests catch: densities solved without clamping at 1, the budget of
dense layers not taken off, counts rounded by largest remainder of the densities (a
smaller budget then gives some layers more), ties to the higher index, LAMP's sum
without the score itself or over the smaller scores, the fan of an OIHW kernel read from
its last two axes.
"""

import itertools
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune import allocation, selection
from jprune.allocation import Layer

GOLDEN = Path(__file__).parent / "golden"
RIGL = json.loads((GOLDEN / "erk_flops.json").read_text())
REFERENCE = json.loads((GOLDEN / "jaxpruner/golden.json").read_text())["distributions"]
AFTER = json.loads((GOLDEN / "after_training.json").read_text())

LAYOUTS = {1: "O", 2: "IO", 3: "WIO", 4: "HWIO"}
PER_LAYER = {
    "uniform": allocation.uniform,
    "er": allocation.erdos_renyi,
    "erk": allocation.erdos_renyi_kernel,
    "igq": allocation.ideal_gas,
}
# Made once: the suite's type checks make every function of a factory slow to make.
RULES = {name: make() for name, make in PER_LAYER.items()}
FLOORED = {name: allocation.with_floor(rule, 2) for name, rule in RULES.items()}


def layer(path, shape, layout=None, size=None):
    layout = LAYOUTS[len(shape)] if layout is None else layout
    return Layer(path, tuple(shape), math.prod(shape) if size is None else size, layout)


def sizes_of(layers):
    return np.array([x.size for x in layers])


def densities(rule, layers, keep):
    found = rule.densities(layers, keep)
    return {x.path: d for x, d in zip(layers, found, strict=True)}


@st.composite
def layer_lists(draw, structured=True):
    shapes = draw(
        st.lists(
            st.one_of(
                st.tuples(st.integers(1, 40), st.integers(1, 40)),
                st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(1, 12)] * 2),
                st.just((0, 5)),
            ),
            min_size=1,
            max_size=7,
        )
    )
    layers = [layer(f"l{i}", shape) for i, shape in enumerate(shapes)]
    if structured and draw(st.booleans()):
        layers = [x._replace(size=x.shape[-1] if x.size else 0) for x in layers]
    return layers


# Against the references.


@pytest.mark.parametrize("sparsity", RIGL["resnet50"]["density"])
@pytest.mark.parametrize("net", RIGL)
def test_densities_of_rigl(net, sparsity):
    layers = [layer(x["name"], x["shape_jax"]) for x in RIGL[net]["layers"]]
    golden = RIGL[net]["density"][sparsity]
    # RigL rounds the number of zeros of every layer down.
    keep = sum(x.size - math.floor(float(sparsity) * x.size) for x in layers)
    for name, rule in (
        ("ER", allocation.erdos_renyi()),
        ("ERK", allocation.erdos_renyi_kernel()),
    ):
        found = densities(rule, layers, keep)
        for path, expected in golden[name].items():
            assert found[path] == pytest.approx(expected, abs=1e-9), (name, path)
    first, *others = layers
    keep = first.size + (1 - float(sparsity)) * sum(x.size for x in others)
    found = densities(allocation.uniform(exempt=first.path), layers, keep)
    for path, expected in golden["uniform"].items():
        assert found[path] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "net, index",
    [(net, i) for net in REFERENCE for i in range(len(REFERENCE[net]["results"]))],
)
def test_densities_of_jaxpruner(net, index):
    entry = REFERENCE[net]["results"][index]
    custom = entry.get("custom", {})
    layers = [
        layer(path, shape)
        for path, shape in REFERENCE[net]["shapes"].items()
        if len(shape) > 1 and path not in custom
    ]
    rules = {
        "er": allocation.erdos_renyi,
        "erk": allocation.erdos_renyi_kernel,
        "erk_custom": allocation.erdos_renyi_kernel,
        "uniform": allocation.uniform,
    }
    scale = {"power_scale": entry["power_scale"]} if "power_scale" in entry else {}
    sparsity = entry["sparsity"]
    if entry["kind"] == "uniform":
        keep = (1 - sparsity) * sum(x.size for x in layers)
    else:
        keep = sum(x.size - math.floor(sparsity * x.size) for x in layers)
    found = densities(rules[entry["kind"]](**scale), layers, keep)
    for path, density in found.items():
        assert 1 - density == pytest.approx(entry["per_layer"][path], abs=1e-9), path
    dense = {path for path, density in found.items() if density > 1 - 1e-12}
    assert dense == set(entry.get("dense_layers", dense))


NETS = {
    "mlp": {"fc1": (784, 300), "fc2": (300, 100), "fc3": (100, 10)},
    "conv": {"conv1": (3, 3, 3, 8), "conv2": (3, 3, 8, 16), "fc": (1024, 10)},
}
UNIFORM_PLUS = {
    # The reference holds the first layer dense only if it is a convolution.
    "mlp": allocation.with_floor(allocation.uniform(), {"fc3": 0.2}),
    "conv": allocation.with_floor(allocation.uniform(exempt="conv1"), {"fc": 0.2}),
}


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.98])
@pytest.mark.parametrize("name", ["erk", "unif", "unifplus"])
@pytest.mark.parametrize("net", NETS)
def test_counts_after_training(net, name, sparsity):
    layers = [layer(path, shape) for path, shape in NETS[net].items()]
    rule = {
        "erk": allocation.erdos_renyi_kernel(),
        "unif": allocation.uniform(),
        "unifplus": UNIFORM_PLUS[net],
    }[name]
    entry = AFTER[net][f"{name}@{sparsity}"]
    keep = selection.keep_count(sum(x.size for x in layers), sparsity)
    if "error" in entry:
        with pytest.raises(ValueError, match=r"\['conv1', 'fc'\] alone keep 2264"):
            rule.counts(layers, keep)
        return
    found = rule.counts(layers, keep)
    assert found.sum() == keep
    expected = np.array([entry["per_layer"][f"{x.path}.weight"] for x in layers])
    # The reference rounds every layer on its own, so its total may be one off.
    assert np.abs(found - expected).sum() <= abs(keep - entry["kept"])


def weights_of(net):
    with np.load(GOLDEN / "nets.npz") as data:
        return {path: data[f"{net}/{path}/kernel"] for path in NETS[net]}


def test_lamp_scores():
    normalize = allocation.lamp().normalize
    with np.load(GOLDEN / "after_training.npz") as data:
        for path, w in weights_of("conv").items():
            np.testing.assert_allclose(
                normalize(jnp.abs(w)), data[f"conv/lamp/score/{path}/kernel"], rtol=1e-5
            )


@pytest.mark.parametrize("net", NETS)
def test_lamp_counts(net):
    weights = weights_of(net)
    normalize = allocation.lamp().normalize
    scores = [np.asarray(normalize(jnp.abs(w))) for w in weights.values()]
    layers = [layer(path, shape) for path, shape in NETS[net].items()]
    for sparsity in (0.5, 0.8, 0.9, 0.95, 0.98):
        keep = selection.keep_count(sum(x.size for x in layers), sparsity)
        assert allocation.lamp().counts(layers, keep).tolist() == [keep]
        level = np.sort(np.concatenate([s.ravel() for s in scores]))[-keep]
        found = [int((s >= level).sum()) for s in scores]
        entry = AFTER[net][f"lamp@{sparsity}"]["per_layer"]
        assert found == [entry[f"{path}.weight"] for path in weights]


# Laws.


@pytest.mark.parametrize("name", PER_LAYER)
@settings(deadline=None, max_examples=30)
@given(layers=layer_lists(), part=st.floats(0, 1))
def test_counts_are_exact_and_within_the_layers(name, layers, part):
    sizes = sizes_of(layers)
    keep = round(part * sizes.sum())
    counts = RULES[name].counts(layers, keep)
    assert counts.dtype == np.int64 and counts.shape == sizes.shape
    assert counts.sum() == keep
    assert np.all((counts >= 0) & (counts <= sizes))
    real = RULES[name].densities(layers, keep) * sizes
    assert real.sum() == pytest.approx(keep)
    # Every other layer's rounding may weigh on one, by half a unit each.
    assert np.all(np.abs(counts - real) <= (len(layers) + 1) / 2)


@pytest.mark.parametrize("name", PER_LAYER)
@settings(deadline=None, max_examples=30)
@given(layers=layer_lists(), floor=st.sampled_from([0, 2]), data=st.data())
def test_a_smaller_budget_gives_no_layer_more(name, layers, floor, data):
    rule = FLOORED[name] if floor else RULES[name]
    low = int(np.minimum(floor, sizes_of(layers)).sum())
    keep = data.draw(st.integers(low, int(sizes_of(layers).sum())))
    counts = rule.counts(layers, keep)
    for smaller in (keep - 1, keep - 2, keep // 2):
        if smaller >= low:
            assert np.all(rule.counts(layers, smaller) <= counts)


@pytest.mark.parametrize("name", PER_LAYER)
def test_budgets_of_a_schedule_are_nested(name):
    layers = [layer(x["name"], x["shape_jax"]) for x in RIGL["resnet50"]["layers"]]
    filters = [x._replace(size=x.shape[-1]) for x in layers]
    rule = RULES[name]
    total = sum(x.size for x in filters)
    counts = [rule.counts(filters, keep) for keep in range(total // 10, total, 397)]
    assert np.all(np.diff(counts, axis=0) >= 0)


@pytest.mark.parametrize("name", PER_LAYER)
@settings(deadline=None, max_examples=30)
@given(layers=layer_lists(), parts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_densities_rise_with_the_budget(name, layers, parts):
    low, high = sorted(round(p * sizes_of(layers).sum()) for p in parts)
    rule = RULES[name]
    difference = rule.densities(layers, high) - rule.densities(layers, low)
    assert np.all(difference >= -1e-12)


@pytest.mark.parametrize("name", PER_LAYER)
@settings(deadline=None, max_examples=15)
@given(layers=layer_lists(), data=st.data())
def test_floors_and_exemptions(name, layers, data):
    sizes = sizes_of(layers)
    exempt = data.draw(st.sets(st.sampled_from([x.path for x in layers])))
    floor = data.draw(st.one_of(st.integers(0, 50), st.floats(0, 1)))
    rule = allocation.with_floor(PER_LAYER[name](exempt=sorted(exempt)), floor)
    least = [
        math.ceil(floor * n - 1e-9) if isinstance(floor, float) else min(floor, n)
        for n in sizes
    ]
    least = np.where([x.path in exempt for x in layers], sizes, least)
    keep = data.draw(st.integers(0, int(sizes.sum())))
    if keep < least.sum():
        with pytest.raises(ValueError, match=f"it can be {least.sum()} to"):
            rule.counts(layers, keep)
        return
    counts = rule.counts(layers, keep)
    assert counts.sum() == keep
    assert np.all((least <= counts) & (counts <= sizes))


@settings(deadline=None, max_examples=30)
@given(layers=layer_lists(), part=st.floats(0.01, 0.99))
def test_proportional_rules_share_one_multiplier(layers, part):
    layers = [x for x in layers if x.size] or [layer("l", (3, 3))]
    keep = part * sizes_of(layers).sum()
    for rule, ratio in (
        (RULES["uniform"], lambda x: 1.0),
        (RULES["erk"], lambda x: sum(x.shape) / math.prod(x.shape)),
    ):
        found = rule.densities(layers, keep)
        multiplier = found / np.array([ratio(x) for x in layers])
        free = found < 1 - 1e-12
        # Dense layers are those that would exceed 1.
        if free.any():
            np.testing.assert_allclose(multiplier[free], multiplier[free][0], rtol=1e-9)
            assert np.all(multiplier[~free] <= multiplier[free][0] * (1 + 1e-9))


@settings(deadline=None, max_examples=30)
@given(layers=layer_lists(structured=False), part=st.floats(0.01, 0.99))
def test_ideal_gas_law(layers, part):
    layers = [x for x in layers if x.size] or [layer("l", (3, 3))]
    keep = part * sizes_of(layers).sum()
    found = RULES["igq"].densities(layers, keep)
    sizes = sizes_of(layers)
    force = (1 / found - 1) / sizes
    np.testing.assert_allclose(force, force[0], rtol=1e-6)
    order = np.argsort(sizes)
    assert np.all(np.diff(found[order]) <= 1e-12)
    assert np.all((found > 0) & (found < 1))


@pytest.mark.parametrize("name", PER_LAYER)
def test_a_stack_is_separate_layers(name):
    conv = layer("conv/kernel", (3, 3, 4, 8))
    stack = [layer(f"blocks/kernel[{i}]", (16, 16)) for i in range(3)]
    apart = [layer(f"block{i}/kernel", (16, 16)) for i in range(3)]
    for keep in (100, 333, 1000):
        a = RULES[name].counts([conv, *stack], keep)
        b = RULES[name].counts([conv, *apart], keep)
        assert a.tolist() == b.tolist()
        assert max(a[1:]) - min(a[1:]) <= 1


@pytest.mark.parametrize("name", PER_LAYER)
def test_order_of_layers_does_not_matter(name):
    layers = [layer(f"l{i}", (8, 5 * i + 3)) for i in range(4)]
    rule = RULES[name]
    expected = densities(rule, layers, 100)
    for shuffled in itertools.permutations(layers):
        assert densities(rule, shuffled, 100) == pytest.approx(expected, abs=1e-12)


def test_the_layout_says_which_axes_are_the_fans():
    fc = layer("fc", (30, 20))
    for rule in (allocation.erdos_renyi(), allocation.erdos_renyi_kernel()):
        for shape, layout, other, same in [
            ((5, 5, 4, 8), "HWIO", (8, 4, 5, 5), "OIHW"),
            ((4, 8), "IO", (8, 4), "OI"),
        ]:
            a = rule.counts([layer("x", shape, layout), fc], 90)
            b = rule.counts([layer("x", other, same), fc], 90)
            assert a.tolist() == b.tolist()
    rule = allocation.erdos_renyi()
    # Heads belong to the side that they split.
    flat = rule.counts([layer("q", (16, 16)), fc], 90)
    query = rule.counts([layer("q", (16, 2, 8), "INO"), fc], 90)
    out = rule.counts([layer("q", (2, 8, 16), "NIO"), fc], 90)
    assert flat.tolist() == query.tolist() == out.tolist()
    # Spatial axes do not enter, so a kernel is as dense as its matrix.
    found = rule.densities([layer("x", (3, 3, 8, 8)), layer("y", (8, 8))], 90)
    assert found[0] == pytest.approx(found[1])


def test_ratios_read_the_parameter_and_the_budget_counts_units():
    kernels = [layer("a", (3, 3, 16, 32)), layer("b", (1, 1, 32, 64))]
    filters = [x._replace(size=x.shape[-1]) for x in kernels]
    rule = allocation.erdos_renyi_kernel()
    found = rule.densities(filters, 40)
    ratio = [sum(x.shape) / math.prod(x.shape) for x in kernels]
    assert found[0] / found[1] == pytest.approx(ratio[0] / ratio[1])
    assert rule.counts(filters, 40).sum() == 40


def test_power_scale_zero_is_uniform():
    layers = [layer("a", (30, 20)), layer("b", (5, 9))]
    for rule in (allocation.erdos_renyi, allocation.erdos_renyi_kernel):
        assert (
            rule(power_scale=0.0).counts(layers, 300).tolist()
            == allocation.uniform().counts(layers, 300).tolist()
        )


# Rounding.


@st.composite
def problems(draw):
    n = draw(st.integers(1, 8))
    floors = np.array(draw(st.lists(st.integers(0, 20), min_size=n, max_size=n)))
    room = np.array(draw(st.lists(st.integers(0, 20), min_size=n, max_size=n)))
    caps = floors + room
    total = draw(st.integers(int(floors.sum()), int(caps.sum())))
    real = st.floats(-5, 50, allow_nan=False)
    targets = np.array(draw(st.lists(real, min_size=n, max_size=n)))
    return targets, caps, floors, total


@settings(deadline=None, max_examples=30)
@given(problems())
def test_apportion_is_exact_and_bounded(problem):
    _, caps, floors, total = problem
    counts = allocation.apportion(*problem)
    assert counts.dtype == np.int64 and counts.sum() == total
    assert np.all((floors <= counts) & (counts <= caps))


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    part=st.floats(0, 1),
)
def test_apportion_is_nearest(sizes, part):
    sizes = np.array(sizes)
    total = round(part * sizes.sum())
    targets = sizes * total / sizes.sum()
    counts = allocation.apportion(targets, sizes, 0 * sizes, total)
    distance = np.abs(counts - targets).sum()
    for other in itertools.product(*[range(n + 1) for n in sizes]):
        if sum(other) == total:
            assert np.abs(np.array(other) - targets).sum() >= distance - 1e-6


def test_apportion_ties_go_to_the_lower_index():
    caps, floors = np.full(4, 9), np.zeros(4, int)
    half = np.array([1.5, 2.5, 0.5, 3.5])
    assert allocation.apportion(half, caps, floors, 9).tolist() == [2, 3, 1, 3][:4]
    assert allocation.apportion(half, caps, floors, 7).tolist() == [2, 2, 0, 3]
    # Too much to give back: the higher index loses first.
    assert allocation.apportion(np.ones(4), caps, floors, 3).tolist() == [1, 1, 1, 0]
    # A solver's last bits decide nothing.
    noisy = np.array([1.5 - 1e-12, 1.5 + 1e-12])
    assert allocation.apportion(noisy, caps[:2], floors[:2], 3).tolist() == [2, 1]


def test_apportion_far_from_the_targets():
    counts = allocation.apportion(
        np.zeros(3), np.array([10**9, 5, 10**9]), np.zeros(3, int), 10**9 + 6
    )
    assert counts.sum() == 10**9 + 6 and counts[1] == 5
    assert abs(counts[0] - counts[2]) <= 1


def test_apportion_mistakes():
    with pytest.raises(ValueError, match="total: 5 is out of reach; it can be 1 to 4"):
        allocation.apportion(np.ones(2), np.array([2, 2]), np.array([1, 0]), 5)
    with pytest.raises(ValueError, match="floors"):
        allocation.apportion(np.ones(1), np.array([2]), np.array([3]), 3)


def test_large_layers_are_counted_exactly():
    layers = [layer("a", (2**20, 2**12)), layer("b", (2**20 + 1, 2**11 + 1))]
    total = sum(x.size for x in layers)
    for rule in PER_LAYER.values():
        for keep in (1, total // 3, total - 1, total):
            assert rule().counts(layers, keep).sum() == keep


# LAMP.


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(0, 2.0**60, width=32), min_size=20, max_size=20),
    st.floats(2.0**-60, 2.0**60, width=32),
)
def test_lamp_law(values, scale):
    scores = np.array(values, np.float32) * np.float32(scale)
    found = np.asarray(allocation.lamp().normalize(jnp.asarray(scores)))
    assert np.all((found >= 0) & (found <= 1))
    tiny = np.finfo(np.float32).tiny
    if scores.max() > tiny:
        assert found.max() == 1 and (found == 1).sum() == 1
    # Within a layer the order of magnitudes stays, ties to the lower index.
    order = np.argsort(-scores, kind="stable")
    living = order[scores[order] > tiny]
    assert np.all(np.diff(found[living]) <= 0)
    exact = scores[order].astype(np.float64)
    squares = (exact / max(exact.max(), tiny)) ** 2
    expected = squares / np.maximum(np.cumsum(squares), tiny)
    np.testing.assert_allclose(found[order], expected, rtol=1e-5, atol=1e-30)


def test_lamp_survives_special_values():
    normalize = allocation.lamp().normalize
    scores = jnp.array([jnp.nan, 2.0, -jnp.inf, jnp.inf, 0.0, -3.0, 2.0, 1e-30])
    expected = [np.nan, 1.0, -np.inf, np.inf, 0.0, -3.0, 0.5, 0.0]
    np.testing.assert_allclose(normalize(scores), expected, atol=1e-30)
    assert normalize(jnp.zeros((0, 3))).shape == (0, 3)
    np.testing.assert_array_equal(normalize(jnp.zeros((2, 3))), np.zeros((2, 3)))
    half = normalize(jnp.array([[1.0, 2.0]], jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, [[0.2, 1.0]], rtol=1e-6)


# Tables.


def test_tables_by_pattern():
    layers = [
        layer("conv1/kernel", (3, 3, 1, 7)),
        layer("conv2/kernel", (3, 3, 7, 7)),
        layer("fc/kernel", (49, 10)),
    ]
    table = {"conv1": 0.5, "conv*": 0.9}
    kept = allocation.keep_of(table, layers)
    assert kept.tolist() == [63 - 32, 441 - 397, 490]
    rule = allocation.by_pattern(table)
    assert rule.budget(layers) == kept.sum()
    assert rule.counts(layers, int(kept.sum())).tolist() == kept.tolist()
    with pytest.raises(ValueError, match=f"keeps {kept.sum()} units, not 3"):
        rule.counts(layers, 3)
    with pytest.raises(ValueError, match=r"table: the pattern 'conv3'.*'conv1/kernel'"):
        allocation.keep_of({"conv3": 0.5}, layers)
    with pytest.raises(ValueError, match=r"table\['fc'\]: 1.5 is outside"):
        allocation.by_pattern({"fc": 1.5})
    with pytest.raises(ValueError, match="allocation: its table fixes"):
        allocation.with_floor(rule, 1)


def test_patterns_reach_the_layers_of_a_stack():
    layers = [layer(f"blocks/kernel[{i}]", (4, 4)) for i in range(3)]
    layers += [layer("fc/kernel", (4, 4))]
    for pattern, dense in [
        ("blocks/kernel", {0, 1, 2}),
        ("blocks", {0, 1, 2}),
        ("blocks/kernel[1]", {1}),
        ("*", {0, 1, 2, 3}),
    ]:
        kept = allocation.keep_of({pattern: 0.5}, layers)
        assert set(np.flatnonzero(kept == 8)) == dense


# Floors.


def test_floors_beside_a_global_threshold():
    layers = [layer("a", (4, 4)), layer("b", (5, 5)), layer("c", (0, 5))]
    rule = allocation.with_floor(allocation.lamp(), {"a": 0.25, "*": 7})
    assert rule.normalize is not None
    assert rule.floors(layers).tolist() == [4, 7, 0]
    assert rule.counts(layers, 20).tolist() == [20]
    higher = allocation.with_floor(rule, {"b": 0.5})
    assert higher.floors(layers).tolist() == [4, 13, 0]
    with pytest.raises(ValueError, match=r"\['a', 'b'\] alone keep 17"):
        higher.counts(layers, 16)


def test_floors_add_up_on_per_layer_rules():
    layers = [layer("a", (4, 4)), layer("b", (10, 10))]
    rule = allocation.with_floor(allocation.uniform(), {"a": 8})
    rule = allocation.with_floor(rule, {"a": 6, "b": 0.3})
    assert rule.floors is None
    assert rule.counts(layers, 40).tolist() == [8, 32]
    assert rule.counts(layers, 38).tolist() == [8, 30]


def test_a_density_is_a_fraction_rounded_up():
    layers = [layer("a", (10, 10)), layer("b", (3, 1))]
    rule = allocation.with_floor(allocation.global_threshold(), 0.07)
    assert rule.floors(layers).tolist() == [7, 1]


@pytest.mark.parametrize("floor", [-1, 1.5, -0.1, math.nan, {"*": 2.0}])
def test_floor_out_of_range(floor):
    with pytest.raises(ValueError, match=r"floor: .* is neither a density"):
        allocation.with_floor(allocation.uniform(), floor)


@pytest.mark.parametrize("floor", [True, "1", {"*": None}])
def test_floor_of_a_wrong_type(floor):
    with pytest.raises(TypeError, match="floor"):
        allocation.with_floor(allocation.uniform(), floor)


# Budgets and patterns.


@pytest.mark.parametrize(
    "make", [allocation.global_threshold, allocation.lamp, *PER_LAYER.values()]
)
def test_budgets_out_of_reach(make):
    layers = [layer("a", (4, 4)), layer("b", (5, 5))]
    for keep in (-1, 42):
        with pytest.raises(ValueError, match=f"keep: {keep} .* it can be 0 to 41$"):
            make().counts(layers, keep)


@pytest.mark.parametrize("make", PER_LAYER.values())
def test_exempt_layers(make):
    layers = [layer("first/w", (4, 4)), layer("b/w", (5, 5)), layer("last/w", (3, 3))]
    counts = make(exempt=("first", "last")).counts(layers, 30)
    assert counts.tolist() == [16, 5, 9]
    with pytest.raises(ValueError, match=r"\['first/w', 'last/w'\] alone keep 25"):
        make(exempt=("first", "last")).counts(layers, 24)
    with pytest.raises(ValueError, match=r"exempt: the pattern 'frist' matches none"):
        make(exempt="frist").counts(layers, 30)
