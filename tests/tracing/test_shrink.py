"""What the shrunk function can do, and what shrink refuses.

Mutations that these tests catch: custom derivatives inlined, a batch size baked in,
masks read at one shape only, moments cut along another axis than their parameter.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.extend.core import jaxprs_in_params

import jprune
from tests.tracing import law, nets


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def mlp(params, x):
    h = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
    return h @ params["b"]["kernel"]


def mlp_params(width=6):
    rng = np.random.default_rng(0)
    return {
        "a": {
            "bias": jnp.asarray(rng.normal(size=width)),
            "kernel": jnp.asarray(rng.normal(size=(3, width))),
        },
        "b": {"kernel": jnp.asarray(rng.normal(size=(width, 2)))},
    }


def mlp_masks(keep):
    keep = jnp.asarray(keep, bool)
    return {"a": {"bias": keep, "kernel": keep[None]}, "b": {"kernel": keep[:, None]}}


KEEP = [True, False, True, True, False, True]
X = np.ones((4, 3)) * np.arange(1.0, 5.0)[:, None]


@pytest.fixture
def small():
    return jprune.shrink(mlp, mlp_params(), mlp_masks(KEEP), X)


def masked(x):
    return mlp(jprune.apply_masks(mlp_params(), mlp_masks(KEEP)), x)


# Uses.


def test_other_batch_sizes(small):
    fn, params = small
    for n in (1, 7):
        law.assert_close(fn(params, X[:1].repeat(n, 0)), masked(X[:1].repeat(n, 0)))


def test_other_dtypes(small):
    fn, params = small
    halves = jax.tree.map(lambda p: p.astype(jnp.float16), params)
    assert fn(halves, X.astype(jnp.float16)).dtype == jnp.float16


def test_transformations(small):
    fn, params = small
    rows = jax.jit(jax.vmap(fn, (None, 0)))(params, X[:, None])
    law.assert_close(rows[:, 0], masked(X))
    np.testing.assert_allclose(
        jax.jacfwd(fn)(params, X)["b"]["kernel"],
        jax.jacrev(fn)(params, X)["b"]["kernel"],
        rtol=1e-12,
    )
    assert jax.eval_shape(fn, params, X).shape == (4, 2)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert jax.eval_shape(fn, shapes, X).shape == (4, 2)


def test_export_with_a_symbolic_batch():
    """A mean over the batch divides by the symbol, and a reversal has its size."""

    def apply_fn(params, x):
        out = mlp(params, x - x.mean(0))
        return jnp.concatenate([out, out[::-1]], axis=1)

    masks = mlp_masks(KEEP)
    fn, params = jprune.shrink(apply_fn, mlp_params(), masks, X)
    (batch,) = export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 3), X.dtype)
    exported = export.export(jax.jit(fn))(params, x)
    for n in (1, 5):
        inputs = jnp.sin(jnp.arange(3.0 * n)).reshape(n, 3)
        expected = apply_fn(jprune.apply_masks(mlp_params(), masks), inputs)
        law.assert_close(exported.call(params, inputs), expected)


def test_export_of_a_network_with_a_symbolic_batch():
    """Reshapes, concatenations and pools meet the symbol."""
    net = nets.vit()
    units = jprune.couplings(net.apply, net.variables, *net.inputs)
    masks = jprune.units.expand(units, net.variables, law.removals(units))
    fn, params = jprune.shrink(net.apply, net.variables, masks, *net.inputs)
    (batch,) = export.symbolic_shape("batch")
    (x,) = net.inputs
    symbolic = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    exported = export.export(jax.jit(fn))(params, symbolic)
    law.assert_close(exported.call(params, x), fn(params, x))


@pytest.mark.parametrize(
    "build", [nets.shuffles, nets.scanned], ids=lambda b: b.__name__
)
def test_shrunk_again(build):
    """Twice by half is once by both masks."""
    net = build()
    fn, params = net.apply, net.variables
    for seed in range(2):
        units = jprune.couplings(fn, params, *net.inputs)
        keeps = law.removals(units, seed, keep=0.7)
        assert not all(keep.all() for keep in keeps)
        fn, params = law.check(fn, params, net.inputs, keeps, units)


def primitives(jaxpr):
    """How often each primitive stands in a jaxpr and those inside it."""
    counts = collections.Counter()
    for eqn in jaxpr.eqns:
        inner = list(jaxprs_in_params(eqn.params))
        for other in inner:
            counts += primitives(other)
        if not inner:
            counts[eqn.primitive.name] += 1
    return counts


@pytest.mark.parametrize(
    "build",
    [nets.resnet_basic, nets.densenet, nets.group_norm, nets.vit, nets.scanned],
    ids=lambda build: build.__name__,
)
def test_no_operation_is_added(build):
    """Heads, flattened images and concatenations need no gathers and no padding."""
    net = build()
    units = jprune.couplings(net.apply, net.variables, *net.inputs)
    masks = jprune.units.expand(units, net.variables, law.removals(units))
    fn, params = jprune.shrink(net.apply, net.variables, masks, *net.inputs)
    before = jax.make_jaxpr(net.apply)(net.variables, *net.inputs)
    after = jax.make_jaxpr(fn)(params, *net.inputs)
    assert primitives(after.jaxpr) == primitives(before.jaxpr)


def test_shapes_are_enough():
    shapes = jprune.trees.shapes_of(mlp_params())
    fn, small = jprune.shrink(
        mlp, shapes, mlp_masks(KEEP), jax.ShapeDtypeStruct((4, 3), float)
    )
    assert jax.tree.map(jnp.shape, small)["b"]["kernel"] == (4, 2)
    assert jax.eval_shape(fn, small, X).shape == (4, 2)


def test_shrinking_traced_parameters():
    masks = mlp_masks(KEEP)

    def run(params):
        fn, small = jprune.shrink(mlp, params, masks, X)
        return fn(small, X)

    law.assert_close(jax.jit(run)(mlp_params()), masked(X))


def test_an_apply_fn_that_closes_over_traced_values():
    masks = mlp_masks(KEEP)
    fn, small = jprune.shrink(mlp, mlp_params(), masks, X)

    @jax.jit
    def run(scale):
        scaled, _ = jprune.shrink(
            lambda p, x: mlp(p, x * scale), mlp_params(), masks, X
        )
        return scaled(small, X) - fn(small, X * scale)

    law.assert_close(run(2.0), jnp.zeros((4, 2)))
    law.assert_close(run(3.0), jnp.zeros((4, 2)))


def test_moments_and_whole_optimiser_states_shrink_along(small):
    fn, params = small
    tx = optax.chain(optax.clip(1.0), optax.adam(1e-2))
    state = tx.init(mlp_params())
    grads = jax.grad(lambda p: jnp.sum(mlp(p, X) ** 2))(
        jprune.apply_masks(mlp_params(), mlp_masks(KEEP))
    )
    _, state = tx.update(grads, state)
    cut = fn.take(state)
    assert jax.tree.structure(cut) == jax.tree.structure(tx.init(params))
    like = jax.tree.map(jnp.shape, tx.init(params))
    assert jax.tree.map(jnp.shape, cut) == like
    kept = np.flatnonzero(KEEP)
    np.testing.assert_array_equal(
        cut[1][0].mu["a"]["kernel"], state[1][0].mu["a"]["kernel"][:, kept]
    )


def test_the_optimiser_of_one_collection_shrinks_along():
    variables = {"params": mlp_params()}
    masks = {"params": mlp_masks(KEEP)}
    fn, params = jprune.shrink(lambda v, x: mlp(v["params"], x), variables, masks, X)
    state = optax.adam(1e-2).init(variables["params"])
    expected = optax.adam(1e-2).init(params["params"])
    found, wanted = (
        jax.tree.map(jnp.shape, tree) for tree in (fn.take(state), expected)
    )
    assert found == wanted
    assert jax.tree.map(jnp.shape, state) != wanted


# Derivatives of the user.


def hidden(function):
    def apply(params, x):
        return function(x @ params["a"] + params["c"]) @ params["b"]

    return apply


def hidden_params():
    rng = np.random.default_rng(1)
    shapes = {"a": (3, 6), "b": (6, 2), "c": (6,)}
    return {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}


def check_hidden(function, expected=6):
    params = hidden_params()
    units = jprune.couplings(hidden(function), params, X)
    assert [group.shape for group in units.groups] == [(expected,)]
    keeps = law.removals(units)
    return law.check(hidden(function), params, (X,), keeps, units, compiled=False)


def test_the_gradient_of_relu_at_its_kink():
    params = jax.tree.map(jnp.zeros_like, mlp_params())
    params["b"]["kernel"] += 1.0
    fn, small = jprune.shrink(mlp, params, mlp_masks(KEEP), X)
    own = jax.grad(lambda p: jnp.sum(mlp(p, X)))(params)
    grads = jax.grad(lambda p: jnp.sum(fn(p, X)))(small)
    # An inlined maximum would share the gradient with 0.
    assert not np.any(own["a"]["bias"]) and not np.any(grads["a"]["bias"])


def test_a_custom_jvp_keeps_its_rule():
    @jax.custom_jvp
    def odd(h, scale):
        return jnp.tanh(h) * scale

    @odd.defjvp
    def rule(primals, tangents):
        h, scale = primals
        # Not the derivative of tanh, and it contains the function itself.
        return odd(h, scale), 3.0 * tangents[0] * odd(h, scale) + tangents[1]

    fn, small = check_hidden(lambda h: odd(h, 2.0))
    grads = jax.grad(lambda p: jnp.sum(fn(p, X)))(small)
    wrong = jax.grad(lambda p: jnp.sum(hidden(lambda h: jnp.tanh(h) * 2)(p, X)))(small)
    assert np.max(np.abs(grads["c"] - wrong["c"])) > 1e-3
    # Forward mode goes by the rule too.
    tangents = jax.tree.map(jnp.ones_like, small)
    forward = jax.jvp(lambda p: fn(p, X), (small,), (tangents,))[1]
    masks = jprune.masks.from_zeros(small, prunable="*")
    assert np.isfinite(forward).all() and jprune.masks.count(masks) > 0


def test_a_custom_vjp_keeps_its_rule():
    @jax.custom_vjp
    def straight_through(h):
        return jnp.round(h)

    straight_through.defvjp(lambda h: (jnp.round(h), h), lambda h, g: (g * jnp.cos(h),))
    fn, small = check_hidden(straight_through)
    grads = jax.grad(lambda p: jnp.sum(fn(p, X)))(small)
    assert np.any(grads["c"])  # Rounding alone has none.


def test_a_custom_vjp_with_integers_and_what_is_broadcast():
    @jax.custom_vjp
    def scaled(h, scale, times):
        return h * scale * times

    def backward(residuals, g):
        h, scale, _ = residuals
        return g * scale, jnp.sum(g * h, 0), np.zeros((), jax.dtypes.float0)

    scaled.defvjp(lambda *xs: (scaled(*xs), xs), backward)
    check_hidden(lambda h: scaled(h, jnp.linspace(1.0, 2.0, 6), 2))


def test_custom_rules_inside_a_scan():
    def function(h):
        def body(carry, _):
            return jax.nn.relu(carry - 0.1) + jax.nn.silu(carry), None

        return jax.lax.scan(body, h, length=2)[0]

    check_hidden(function)


def test_a_rule_that_couples_more_than_its_function():
    @jax.custom_vjp
    def odd(h):
        return jnp.tanh(h)

    odd.defvjp(lambda h: (odd(h), None), lambda _, g: (g + g[:, ::-1],))
    params = hidden_params()
    keep = jnp.arange(6) > 0
    masks = {"a": keep[None], "b": keep[:, None], "c": keep}
    fn, small = jprune.shrink(hidden(odd), params, masks, X)
    with pytest.raises(ValueError, match="derivative of 'odd' couples channels"):
        jax.grad(lambda p: jnp.sum(fn(p, X)))(small)


# Refusals.


def test_masks_of_single_weights():
    masks = mlp_masks(KEEP)
    masks["a"]["kernel"] = jnp.ones((3, 6), bool).at[1, 2].set(False)
    with pytest.raises(ValueError, match=r"'a/kernel' \(3, 6\).*along axis [01], 1 of"):
        jprune.shrink(mlp, mlp_params(), masks, X)


def test_masks_that_leave_a_bias():
    masks = mlp_masks(KEEP)
    masks["a"]["bias"] = jprune.masks.never_pruned()
    masks["b"]["kernel"] = jprune.masks.never_pruned()
    with pytest.raises(ValueError, match=r"position 1 of 'a/kernel' \(axis 1.*not 0"):
        jprune.shrink(mlp, mlp_params(), masks, X)


def test_masks_that_leave_the_reader():
    """What is 0 may be read by rows that are not masked."""
    masks = mlp_masks(KEEP)
    masks["b"]["kernel"] = jprune.masks.never_pruned()
    fn, small = jprune.shrink(mlp, mlp_params(), masks, X)
    assert small["b"]["kernel"].shape == (4, 2)
    law.assert_close(fn(small, X), masked(X))


def test_masks_of_inputs_and_outputs():
    for leaf, axis, shape in (("a", 0, (3, 1)), ("b", 1, (1, 2))):
        masks = mlp_masks([True] * 6)
        keep = jnp.ones(shape, bool).at[0, 0].set(False)
        masks[leaf]["kernel"] = keep
        with pytest.raises(ValueError, match=rf"'{leaf}/kernel' \(axis {axis} of"):
            jprune.shrink(mlp, mlp_params(), masks, X)


def test_nothing_is_left():
    with pytest.raises(ValueError, match="nothing is left of 'a/bias'"):
        jprune.shrink(mlp, mlp_params(), mlp_masks([False] * 6), X)


def test_masks_of_another_network():
    with pytest.raises(ValueError, match="masks: the leaf 'a/bias'"):
        jprune.shrink(mlp, mlp_params(5), mlp_masks(KEEP), X)


def test_traced_masks():
    with pytest.raises(ValueError, match="masks: 'a/bias' is traced"):
        jax.jit(lambda m: jprune.shrink(mlp, mlp_params(), m, X)[1])(mlp_masks(KEEP))


def test_full_parameters_for_the_small_function(small):
    fn, params = small
    with pytest.raises(ValueError, match=r"'a/bias' has shape \(6,\).*takes \(4,\)"):
        fn(mlp_params(), X)
    with pytest.raises(ValueError, match="params: the tree"):
        fn(params["a"], X)


def test_inputs_of_another_rank(small):
    fn, params = small
    with pytest.raises(TypeError, match="dot_general"):
        fn(params, jnp.ones((4, 5)))


def test_effects():
    def apply_fn(params, x):
        jax.debug.print("{}", x)
        return mlp(params, x)

    with pytest.raises(ValueError, match="apply_fn: it has effects"):
        jprune.shrink(apply_fn, mlp_params(), mlp_masks(KEEP), X)


def test_an_unknown_primitive():
    def apply_fn(params, x):
        h = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
        h = h @ params["b"]["kernel"]
        return jnp.abs(jnp.fft.fft(h @ params["c"])) @ params["d"]

    params = mlp_params() | {"c": jnp.ones((2, 6)), "d": jnp.ones((6, 2))}
    with pytest.raises(NotImplementedError, match="the primitive 'fft'"):
        jprune.couplings(apply_fn, params, X)
    units = jprune.couplings(apply_fn, params, X, unknown="pin")
    assert sorted(group.shape[0] for group in units.groups) == [2, 6]
    (pinned,) = [p for p in units.pinned if p.members[0].leaf.path == "c"]
    assert pinned.reasons == ("the primitive 'fft' has no rule",)
    masks = jprune.units.expand(units, params, law.removals(units))
    fn, small = jprune.shrink(apply_fn, params, masks, X, unknown="pin")
    law.assert_close(fn(small, X), apply_fn(jprune.apply_masks(params, masks), X))


def test_a_weight_that_is_closed_over():
    weight = jnp.ones((3, 100))
    params = {"b": jnp.ones((100, 4)), "c": jnp.ones((4, 2))}
    with pytest.warns(UserWarning, match=r"closes over an array of shape \(3, 100\)"):
        jprune.couplings(lambda p, x: jnp.tanh(x @ weight @ p["b"]) @ p["c"], params, X)
