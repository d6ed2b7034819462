"""Costs of training, and costs as polynomials in the widths of coupled groups.

Mutations that these tests catch: channels of a group counted as fixed, a group counted
for an axis that it does not have, a scan counted once, the cheaper branch taken, the
dense pass of a mask update forgotten.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jprune
from jprune import tracing
from tests.tracing import law, nets


@pytest.fixture(scope="module")
def golden_flops():
    path = pathlib.Path(__file__).parents[1] / "golden" / "erk_flops.json"
    return json.loads(path.read_text())


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def mlp(params, x):
    h = jax.nn.relu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    return h @ params["fc2"]["kernel"]


MLP = {
    "fc1": {"bias": struct(6), "kernel": struct(3, 6)},
    "fc2": {"kernel": struct(6, 2, dtype=jnp.bfloat16)},
}


# Training.


def test_training_flops_of_rigl(golden_flops):
    rule = golden_flops["resnet50"]["training_flops_rule"]["relative_to_dense"]
    names = {"dense": "dense", "static": "static/SET/SNIP", "set": "static/SET/SNIP"}
    names |= {"snfs": "SNFS", "rigl": "RigL"}
    for table in rule.values():
        sparse = table["static/SET/SNIP"]
        for method, name in names.items():
            found = tracing.training_flops(method, 1.0, sparse, every=100) / 3
            assert found == pytest.approx(table[name], rel=1e-12)


def test_training_flops_of_gradual_pruning():
    schedule = jax.vmap(jprune.schedules.cubic(0.8, steps=6, start=2))
    sparsities = np.asarray(schedule(jnp.arange(10)), np.float64)
    assert sparsities[-1] == pytest.approx(0.8)
    found = tracing.training_flops("gradual", 7.0, 7.0 * (1 - sparsities))
    assert found == pytest.approx(3 * 7 * (1 - sparsities).mean())


def test_training_flops_refuses():
    for options, message in (
        ({"method": "snip", "sparse": 1.0}, "method: 'snip'"),
        ({"method": "rigl", "sparse": 1.0}, "every: None"),
        ({"method": "rigl", "sparse": 1.0, "every": 0}, "every: 0"),
        ({"method": "set", "sparse": np.ones(3)}, "sparse: shape"),
    ):
        with pytest.raises(ValueError, match=message):
            tracing.training_flops(dense=2.0, **options)


# Widths.


@pytest.fixture(scope="module", params=nets.ALL, ids=lambda build: build.__name__)
def coupled(request):
    with jax.enable_x64(True):
        net = request.param()
        units = jprune.couplings(net.apply, net.variables, *net.inputs, **net.options)
        yield net, units


def test_the_polynomial_is_the_cost_of_the_shrunk_network(coupled):
    net, units = coupled
    with jax.enable_x64(True):
        of_widths = tracing.cost_of_widths(units, net.apply, net.variables, *net.inputs)
        dense = jprune.cost(net.apply, net.variables, *net.inputs)
        full = of_widths([group.shape[0] for group in units.groups])
        assert full == (dense.macs, dense.parameters)
        keeps = law.removals(units)
        masks = jprune.units.expand(units, net.variables, keeps)
        small = jprune.shrink(
            net.apply, net.variables, masks, *net.inputs, **net.options
        )
        shrunk = jprune.cost(*small, *net.inputs)
        assert shrunk.macs < dense.macs
        found = of_widths([int(keep.sum()) for keep in keeps])
        assert found == (shrunk.macs, shrunk.parameters)
        at_masks = jprune.cost(net.apply, net.variables, *net.inputs, masks=masks)
        assert at_masks.parameters == shrunk.parameters
        assert at_masks.macs >= shrunk.macs


def test_the_gradient_by_widths():
    """Against the polynomial by hand and central differences; it jits and vmaps."""
    inputs = (struct(5, 3),)
    units = jprune.couplings(mlp, MLP, *inputs)
    of_widths = tracing.cost_of_widths(units, mlp, MLP, *inputs)
    assert of_widths([2]) == (5 * (3 + 2) * 2, (3 + 2 + 1) * 2)
    slopes = jax.jacobian(of_widths)(jnp.asarray([2.5]))
    np.testing.assert_allclose(slopes.macs, [25.0])
    np.testing.assert_allclose(slopes.parameters, [6.0])
    many = jax.jit(jax.vmap(of_widths))(jnp.arange(4.0)[:, None])
    np.testing.assert_allclose(many.macs, [0.0, 25.0, 50.0, 75.0])


def test_the_gradient_by_widths_of_a_residual_network():
    with jax.enable_x64(True):
        net = nets.resnet_basic()
        units = jprune.couplings(net.apply, net.variables, *net.inputs)
        of_widths = tracing.cost_of_widths(units, net.apply, net.variables, *net.inputs)
        rng = np.random.default_rng(0)
        widths = rng.uniform(1, 4, len(units.groups))
        found = jax.grad(lambda w: of_widths(w).macs)(jnp.asarray(widths))
        for place in range(len(widths)):
            step = np.eye(len(widths))[place] * 1e-4
            up, down = (of_widths(widths + sign * step).macs for sign in (1, -1))
            np.testing.assert_allclose(found[place], (up - down) / 2e-4, rtol=1e-6)


def test_widths_inside_loops_and_branches():
    """Turns multiply, a while counts once, the dearest branch counts: as in cost."""

    def fn(p, x):
        h = jnp.tanh(x @ p["in"])
        h = lax.scan(lambda h, _: (jnp.tanh(h @ p["loop"]), None), h, None, length=3)[0]
        h = lax.while_loop(
            lambda h: h.sum() < 9, lambda h: jax.jit(jnp.matmul)(h, p["loop"]), h
        )
        once = lambda h: h @ p["out"]  # noqa: E731
        twice = lambda h: (h @ p["loop"]) @ p["out"]  # noqa: E731
        return lax.cond(x.sum() > 0, once, twice, h)

    params = {"in": struct(3, 6), "loop": struct(6, 6), "out": struct(6, 2)}
    x = struct(5, 3)
    units = jprune.couplings(fn, params, x)
    of_widths = tracing.cost_of_widths(units, fn, params, x)
    dense = jprune.cost(fn, params, x)
    assert of_widths([6]) == (dense.macs, dense.parameters)
    by_hand = lambda w: 5 * (3 * w + (3 + 1 + 1) * w * w + 2 * w)  # noqa: E731
    assert of_widths([6]).macs == by_hand(6) and of_widths([4]).macs == by_hand(4)


def test_widths_can_be_learnt_to_a_budget():
    """Gradient descent on expected widths meets a budget of MACs."""
    inputs = (struct(5, 3),)
    units = jprune.couplings(mlp, MLP, *inputs)
    of_widths = tracing.cost_of_widths(units, mlp, MLP, *inputs)
    loss = lambda w: (of_widths([6 * jax.nn.sigmoid(w)]).macs / 50 - 1) ** 2  # noqa: E731
    tx = optax.sgd(1.0)
    logit = jnp.zeros(())
    for _ in range(30):
        updates, _ = tx.update(jax.grad(loss)(logit), tx.init(logit))
        logit = optax.apply_updates(logit, updates)
    np.testing.assert_allclose(6 * jax.nn.sigmoid(logit), 2.0, rtol=1e-3)


def test_widths_that_do_not_fit():
    x = struct(5, 3)
    units = jprune.couplings(mlp, MLP, x)
    of_widths = tracing.cost_of_widths(units, mlp, MLP, x)
    for wrong in ([1, 2], 3.0, jnp.ones(2)):
        with pytest.raises(ValueError, match="there is one for each of the 1 groups"):
            of_widths(wrong)
    with pytest.raises(ValueError, match="not of coupled channels"):
        tracing.cost_of_widths(jprune.units.filters(MLP), mlp, MLP, x)
    with pytest.raises(ValueError, match="of other parameters"):
        tracing.cost_of_widths(units, mlp, MLP | {"fc3": struct(2)}, x)
