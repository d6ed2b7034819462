"""Interception: sites and places by hand, and laws on the networks of tracing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jprune
from jprune.tracing import cotangents, gate, intercept, sites, taps
from tests.tracing import law, nets


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def keep(site, inputs, output, extra):
    return output, None


def convolve(x, kernel, strides=(1, 1), padding="SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, **options
    )


def normalise(x, norm):
    """BatchNorm by the batch's statistics, in two passes."""
    mean = x.mean((0, 1, 2))
    var = ((x - mean) ** 2).mean((0, 1, 2))
    return (x - mean) * lax.rsqrt(var + 1e-3) * norm["scale"] + norm["bias"]


def conv_net(params, x, see=lambda layer, **values: None):
    """A convolution with all places, one with some, and a dense layer."""
    see("conv1", input=x)
    x = convolve(x, params["conv1"]["kernel"])
    see("conv1", output=x)
    x = x + params["conv1"]["bias"]
    see("conv1", after_bias=x)
    x = normalise(x, params["norm"])
    see("conv1", after_norm=x)
    x = jax.nn.relu(x)
    see("conv1", after_activation=x)
    see("conv2", input=x)
    x = convolve(x, params["conv2"]["kernel"], (2, 2), "VALID")
    see("conv2", output=x, after_bias=x, after_norm=x)
    x = jax.nn.gelu(x)
    see("conv2", after_activation=x)
    x = x.mean((1, 2))
    see("fc", input=x)
    x = x @ params["fc"]["kernel"]
    see("fc", output=x)
    x = x + params["fc"]["bias"]
    see("fc", after_bias=x, after_norm=x, after_activation=x)
    return x


def conv_params():
    return {
        "conv1": {"kernel": drawn(3, 3, 2, 4), "bias": drawn(4, seed=1)},
        "norm": {"scale": drawn(4, seed=2), "bias": drawn(4, seed=3)},
        "conv2": {"kernel": drawn(2, 2, 4, 3, seed=4)},
        "fc": {"kernel": drawn(3, 2, seed=5), "bias": drawn(2, seed=6)},
    }


X = functools.partial(drawn, 2, 5, 5, 2, seed=9)


def test_taps_are_the_values_of_the_function():
    seen = {}

    def see(layer, **values):
        seen.update({(f"{layer}/kernel", at): value for at, value in values.items()})

    conv_net(conv_params(), X(), see)
    for at in ("input", "output", "after_bias", "after_norm", "after_activation"):
        found = taps(conv_net, conv_params(), X(), at=at)
        assert list(found) == ["conv1/kernel", "conv2/kernel", "fc/kernel"]
        for name, value in found.items():
            np.testing.assert_allclose(value, seen[name, at], rtol=1e-12)


def test_places_and_channels_of_sites():
    found = {site.name: site for site in sites(conv_net, conv_params(), X())}
    every = ("output", "after_bias", "after_norm", "after_activation")
    assert found["conv1/kernel"].places == every
    assert found["conv2/kernel"].places == ("output", "after_activation")
    assert found["fc/kernel"].places == ("output", "after_bias")
    assert found["conv1/kernel"].channel_axes == (3,)
    assert found["conv1/kernel"].leaf_axes == (3,)
    assert found["conv1/kernel"].leaf.shape == (3, 3, 2, 4)


def test_what_is_pooled_is_no_statistic():
    """A norm is told from the mean over positions that the next layer reads."""

    def fn(params, x):
        h = normalise(x @ params["a"], {"scale": params["s"], "bias": params["b"]})
        return h.mean((1, 2)) @ params["c"]

    params = {"a": drawn(2, 4), "s": drawn(4), "b": drawn(4), "c": drawn(4, 1)}
    first, _ = sites(fn, params, X())
    assert first.places == ("output", "after_norm")
    found = taps(fn, params, X(), sites="a", at="after_norm")["a"]
    np.testing.assert_allclose(found.mean((1, 2)) @ params["c"], fn(params, X()))


NETS = [
    "resnet_basic",
    "mobilenet",
    "scanned",
    "equinox_cnn",
]


@pytest.mark.parametrize("name", NETS)
def test_a_rule_that_does_nothing_changes_nothing(name):
    net = getattr(nets, name)()
    expected = jax.jit(net.apply)(net.variables, *net.inputs)
    fn = jax.jit(intercept(net.apply, keep))
    out, collected = fn(None, net.variables, *net.inputs)
    law.assert_close(out, expected, 1e-13)
    assert collected == {}


@pytest.mark.parametrize("name", ["vgg", "scanned"])
def test_a_closed_gate_removes_a_channel(name):
    """The law of masks: as with its kernel, bias, scale and shift at zero."""
    net = getattr(nets, name)()
    gated, gates = gate(net.apply, net.variables, *net.inputs)
    gated, apply = jax.jit(gated), jax.jit(net.apply)
    (path, layer) = {
        "vgg": ("params/Conv_1/kernel", ["Conv_1", "BatchNorm_1"]),
        "scanned": ("params/ScanCheckpointBlock_0/Dense_0/kernel", ["Dense_0"]),
    }[name]
    law.assert_close(
        gated(gates, net.variables, *net.inputs),
        apply(net.variables, *net.inputs),
        1e-12,
    )
    # Of stacked layers, the channel of the second.
    where = (1, 0) if name == "scanned" else (0,)
    assert gates[path].ndim == len(where)
    closed = gates | {path: gates[path].at[where].set(0.0)}

    def zeroed(keys, leaf):
        own = jprune.trees.path_of(keys)
        if not own.startswith("params") or own.split("/")[-2] not in layer:
            return leaf
        if "Scan" in path:
            return leaf.at[1, ..., 0].set(0.0) if "Scan" in own else leaf
        return leaf.at[..., 0].set(0.0)

    masked = jax.tree_util.tree_map_with_path(zeroed, net.variables)
    law.assert_close(
        gated(closed, net.variables, *net.inputs),
        apply(masked, *net.inputs),
        1e-12,
    )


# Patches.

CONVOLUTIONS = {
    "same": {},
    "valid": {"padding": "VALID"},
    "strides": {"strides": (2, 1)},
    "strides, valid": {"strides": (2, 2), "padding": "VALID"},
    "explicit padding": {"padding": ((0, 2), (1, 0))},
    "dilated kernel": {"rhs_dilation": (2, 1)},
    "dilated input": {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 2))},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_kernel_times_patches_is_the_output(options):
    kernel, x = drawn(3, 2, 4, 5), drawn(2, 6, 7, 4, seed=1)
    fn = lambda params, x: convolve(x, params["kernel"], **options)  # noqa: E731
    found = taps(fn, {"kernel": kernel}, x, at="patches")["kernel"]
    out = fn({"kernel": kernel}, x)
    assert found.shape == (*out.shape[:3], 3 * 2 * 4)
    np.testing.assert_allclose(found @ kernel.reshape(-1, 5), out, atol=1e-12)


def test_patches_of_groups():
    kernel, x = drawn(3, 2, 2, 6), drawn(2, 5, 5, 4, seed=1)
    fn = lambda params, x: convolve(  # noqa: E731
        x, params["kernel"], feature_group_count=2
    )
    found = taps(fn, {"kernel": kernel}, x, at="patches")["kernel"]
    by_group = kernel.reshape(12, 2, 3)
    out = jnp.einsum("nhwgi,igo->nhwgo", found, by_group).reshape(2, 5, 5, 6)
    np.testing.assert_allclose(out, fn({"kernel": kernel}, x), atol=1e-12)


def test_patches_of_a_convolution_in_another_layout():
    """NCHW and OIHW; the rows are in the order of an HWIO kernel all the same."""
    kernel, x = drawn(5, 4, 3, 2), drawn(2, 4, 6, 7, seed=1)
    fn = lambda params, x: lax.conv_general_dilated(  # noqa: E731
        x, params["kernel"], (1, 2), "SAME"
    )
    found = taps(fn, {"kernel": kernel}, x, at="patches")["kernel"]
    hwio = kernel.transpose(2, 3, 1, 0)
    out = (found @ hwio.reshape(-1, 5)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(out, fn({"kernel": kernel}, x), atol=1e-12)


def test_patches_of_a_dense_layer_over_two_axes():
    kernel, x = drawn(3, 4, 5), drawn(2, 4, 6, 3, seed=1)
    fn = lambda params, x: jnp.einsum("bhti,iho->bto", x, params["w"])  # noqa: E731
    found = taps(fn, {"w": kernel}, x, at="patches")["w"]
    out = found @ kernel.reshape(12, 5)
    np.testing.assert_allclose(out, fn({"w": kernel}, x), atol=1e-12)


# Transformations.


def test_the_result_can_be_compiled_differentiated_and_mapped():
    def rule(site, inputs, output, extra):
        scale = extra[site.name] if site.name in extra else 1.0
        return output * scale, jnp.sum(inputs[0] ** 2)

    fn = intercept(conv_net, rule)
    params, x = conv_params(), X()
    extra = {"conv2/kernel": drawn(3, seed=7)}
    scaled = {
        **params,
        "conv2": {"kernel": params["conv2"]["kernel"] * extra["conv2/kernel"]},
    }
    expected = conv_net(scaled, x)
    out, collected = jax.jit(fn)(extra, params, x)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    np.testing.assert_allclose(collected["conv1/kernel"], jnp.sum(x**2))
    # The gradient in extra is that of the kernel, by the chain rule.
    grad = jax.jit(jax.grad(lambda extra: fn(extra, params, x)[0].sum()))(extra)
    by_kernel = jax.jit(jax.grad(lambda own: conv_net(own, x).sum()))(scaled)
    expected = jnp.sum(
        by_kernel["conv2"]["kernel"] * params["conv2"]["kernel"], (0, 1, 2)
    )
    np.testing.assert_allclose(grad["conv2/kernel"], expected, atol=1e-12)
    many = jnp.stack([x, 2 * x])
    mapped = jax.jit(jax.vmap(fn, (None, None, 0)))
    out, collected = mapped(extra, params, many)
    np.testing.assert_allclose(out[1], conv_net(scaled, 2 * x), atol=1e-12)
    np.testing.assert_allclose(collected["conv1/kernel"][1], 4 * jnp.sum(x**2))


def test_derivative_rules_of_the_user_are_kept():
    """Inlined, ReLU has gradient 1/2 at its kink, and a rounding has none."""

    @jax.custom_vjp
    def straight(x):
        return jnp.round(x)

    straight.defvjp(lambda x: (straight(x), None), lambda _, g: (3 * g,))

    def fn(params, x):
        return straight(jax.nn.relu(x @ params["w"])) @ params["v"]

    params = {"w": jnp.zeros((2, 2)), "v": jnp.ones((2, 1))}
    x = jnp.ones((1, 2))
    grad = jax.grad(lambda p: intercept(fn, keep)(None, p, x)[0].sum())(params)
    np.testing.assert_array_equal(grad["w"], jnp.zeros((2, 2)))
    params = {"w": jnp.eye(2), "v": jnp.ones((2, 1))}
    grad = jax.grad(lambda p: intercept(fn, keep)(None, p, x)[0].sum())(params)
    np.testing.assert_array_equal(grad["w"], 3 * jnp.ones((2, 2)))


def test_calls_are_gone_into():
    """A compiled block, inside a checkpoint, inside a compiled function."""
    block = jax.checkpoint(jax.jit(lambda params, x: jnp.tanh(x @ params["w"])))
    fn = jax.jit(lambda params, x: block(params, block(params, x)) + 1)
    params, x = {"w": drawn(3, 3)}, drawn(2, 3, seed=1)
    found = taps(fn, params, x, at="after_activation")
    np.testing.assert_allclose(found["w"], jnp.tanh(x @ params["w"]))
    np.testing.assert_allclose(found["w:1"], fn(params, x) - 1)
    scaled, gates = gate(fn, params, x, sites="w:1", at="output")
    loss = lambda gates: scaled(gates, params, x).sum()  # noqa: E731
    expected = jnp.sum((1 - found["w:1"] ** 2) * (found["w"] @ params["w"]), axis=0)
    np.testing.assert_allclose(jax.grad(loss)(gates)["w:1"], expected)


# Sites.


def test_uses_of_a_kernel_are_numbered_and_can_be_chosen():
    fn = lambda params, x: (x @ params["w"]) @ params["w"]  # noqa: E731
    params, x = {"w": drawn(3, 3)}, drawn(2, 3, seed=1)
    assert [(s.name, s.index) for s in sites(fn, params, x)] == [("w", 0), ("w:1", 1)]
    assert list(taps(fn, params, x, sites="w")) == ["w", "w:1"]
    assert list(taps(fn, params, x, sites="w:1")) == ["w:1"]
    double = lambda site, inputs, output, extra: (2 * output, None)  # noqa: E731
    out, _ = intercept(fn, double, sites="w:1")(None, params, x)
    np.testing.assert_allclose(out, 2 * fn(params, x))


def test_named_values_are_sites():
    def fn(params, x):
        h = checkpoint_name(x @ params["w"], "branch")
        return h + checkpoint_name(jnp.tanh(h), "branch")

    params, x = {"w": drawn(3, 4)}, drawn(2, 3, seed=1)
    found = taps(fn, params, x, sites="branch")
    np.testing.assert_allclose(found["branch:1"], jnp.tanh(found["branch"]))
    drop = lambda site, inputs, output, extra: (0 * output, inputs[0])  # noqa: E731
    out, collected = intercept(fn, drop, sites="branch:1")(None, params, x)
    np.testing.assert_allclose(out, x @ params["w"])
    np.testing.assert_allclose(collected["branch:1"], jnp.tanh(x @ params["w"]))
    _, gates = gate(fn, params, x, sites="branch")
    assert gates["branch"].shape == (4,)


def test_names_stand_in_the_way_of_nothing():
    """Of a kernel, of a value before its bias, and before its activation."""

    def fn(params, x):
        h = checkpoint_name(x @ checkpoint_name(params["w"], "kernel"), "product")
        return jnp.tanh(checkpoint_name(h + params["b"], "sum"))

    params, x = {"w": drawn(3, 4), "b": drawn(4)}, drawn(2, 3, seed=1)
    (site,) = (site for site in sites(fn, params, x) if site.name == "w")
    assert site.places == ("output", "after_bias", "after_activation")
    assert site.leaf_axes == (1,)
    found = taps(fn, params, x, sites="w", at="after_activation")["w"]
    np.testing.assert_allclose(found, fn(params, x))


def test_a_missing_site_is_an_error_that_lists_them():
    fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]  # noqa: E731
    params, x = {"a": drawn(3, 3), "b": drawn(3, 1)}, drawn(2, 3)
    message = r"sites: 'block' matches none of \['a', 'b'\]"
    with pytest.raises(ValueError, match=message):
        taps(fn, params, x, sites=["a", "block"])
    with pytest.raises(ValueError, match="the function has none"):
        taps(lambda params, x: x * params["a"], {"a": 1.0}, x)
    with pytest.raises(ValueError, match="at: 'after' is none of"):
        taps(fn, params, x, at="after")


KERNELS = {
    "cast": lambda p: p["w"].astype(jnp.float32).astype(jnp.float64),
    "masked by a constant": lambda p: p["w"] * (np.arange(4) > 0),
    "weight norm": lambda p: p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0),
    "low rank": lambda p: p["w"] + p["a"] @ p["b"],
    "rounded": lambda p: jax.jit(jnp.round)(p["w"]),
    "transposed twice": lambda p: p["w"].T[:, :].T,
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_kernel_that_is_made_is_known_by_its_main_leaf(kernel):
    params = {"w": drawn(3, 4), "g": drawn(4), "a": drawn(3, 1), "b": drawn(1, 4)}
    (site,) = sites(lambda p, x: x @ kernel(p), params, drawn(2, 3))
    assert (site.name, site.leaf_axes) == ("w", (1,))


def test_a_kernel_with_noise_is_a_kernel():
    """DropConnect: what is drawn from a key is no data."""

    def fn(params, x, key):
        return x @ (params["w"] * jax.random.bernoulli(key, 0.5, (3, 4)))

    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        (site,) = sites(fn, {"w": drawn(3, 4)}, drawn(2, 3), key)
        assert (site.name, site.leaf_axes) == ("w", (1,))


def test_axes_of_kernels_of_other_layouts():
    def fn(params, x):
        h = jnp.einsum("oi,bi->ob", params["first"], x)
        h = jnp.einsum("ob,ohd->bhd", h, params["heads"])
        return h.reshape(2, -1) @ params["out"].reshape(8, -1)

    params = {
        "first": drawn(5, 3),
        "heads": drawn(5, 2, 4),
        "out": drawn(2, 4, 3, 2),
    }
    found = {site.name: site for site in sites(fn, params, drawn(2, 3))}
    assert {name: site.leaf_axes for name, site in found.items()} == {
        "first": (0,),
        "heads": (1, 2),
        "out": (2, 3),
    }
    np.testing.assert_array_equal(taps(fn, params, drawn(2, 3))["first"], drawn(2, 3))
    values = taps(fn, params, drawn(2, 3), at="output")
    for name, site in found.items():
        sizes = [values[name].shape[axis] for axis in site.channel_axes]
        assert np.prod(sizes) == site.channels
        # A scale of the channels is one of the leaf's.
        scale = drawn(site.channels, seed=3)
        leaf_shape = [
            n if axis in site.leaf_axes else 1 for axis, n in enumerate(site.leaf.shape)
        ]
        scaled = {**params, name: params[name] * scale.reshape(leaf_shape)}
        rule = lambda site, inputs, output, extra: (  # noqa: E731
            output * site.along_channels(extra),
            None,
        )
        out, _ = intercept(fn, rule, sites=name)(scale, params, drawn(2, 3))
        np.testing.assert_allclose(out, fn(scaled, drawn(2, 3)), atol=1e-12)


def test_the_operation_of_a_site_runs_on_other_operands():
    def rule(site, inputs, output, extra):
        x, kernel = inputs
        return site.call(x, jnp.abs(kernel)), site.call(x[:1], kernel[..., :2])

    params, x = conv_params(), X()
    fn = intercept(conv_net, rule, sites="conv1")
    out, collected = fn(None, params, x)
    positive = {**params, "conv1": jax.tree.map(jnp.abs, params["conv1"])}
    positive["conv1"]["bias"] = params["conv1"]["bias"]
    np.testing.assert_allclose(out, conv_net(positive, x), atol=1e-12)
    expected = convolve(x, params["conv1"]["kernel"])[:1, ..., :2]
    np.testing.assert_allclose(collected["conv1/kernel"], expected, atol=1e-12)


def test_a_value_of_another_shape_is_an_error():
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    rule = lambda site, inputs, output, extra: (output[0], None)  # noqa: E731
    with pytest.raises(ValueError, match=r"rule: at 'w' it returns shape \(4,\)"):
        intercept(fn, rule)(None, {"w": drawn(3, 4)}, drawn(2, 3))


def test_a_function_of_parameters_alone_holds_its_data():
    x = drawn(2, 3)
    fn = lambda params: jnp.tanh(x @ params["a"]) @ params["b"]  # noqa: E731
    found = taps(fn, {"a": drawn(3, 4), "b": drawn(4, 1)})
    np.testing.assert_array_equal(found["a"], x)
    assert list(found) == ["a", "b"]


# Loops.


def test_sites_in_a_loop_know_their_step_and_are_stacked():
    """A recurrent kernel is the same in every step, stacked ones are not."""

    def fn(params, x):
        def step(h, row):
            return jnp.tanh(h @ params["again"] + row @ params["in"]), h

        h, _ = lax.scan(step, jnp.zeros((2, 4)), x)
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["deep"])[0]

    params = {"again": drawn(4, 4), "in": drawn(3, 4), "deep": drawn(5, 4, 4)}
    x = drawn(6, 2, 3, seed=1)
    found = {site.name: site for site in sites(fn, params, x)}
    assert {name: (s.lengths, s.stacked) for name, s in found.items()} == {
        "again": ((6,), ()),
        "in": ((6,), ()),
        "deep": ((5,), (5,)),
    }
    seen = taps(fn, params, x)
    np.testing.assert_array_equal(seen["in"], x)
    h = jnp.zeros((2, 4))
    for t in range(6):
        np.testing.assert_allclose(seen["again"][t], h, atol=1e-12)
        h = jnp.tanh(h @ params["again"] + x[t] @ params["in"])
    gated, gates = gate(fn, params, x, at="output")
    assert {k: v.shape for k, v in gates.items()} == {
        "again": (4,),
        "in": (4,),
        "deep": (5, 4),
    }
    scale = drawn(5, 4, seed=2)
    scaled = {**params, "deep": params["deep"] * scale[:, None, :]}
    out = gated({**gates, "deep": scale}, params, x)
    np.testing.assert_allclose(out, fn(scaled, x), atol=1e-12)
    count = lambda site, inputs, output, extra: (output, site.steps[0])  # noqa: E731
    collected = intercept(fn, count, sites="in")(None, params, x)[1]
    np.testing.assert_array_equal(collected["in"], range(6))


def _in_custom_vjp(params, x):
    @jax.custom_vjp
    def layer(w, x):
        return x @ w

    layer.defvjp(lambda w, x: (layer(w, x), None), lambda _, g: (g, g))
    return layer(params["w"], x)


REFUSED = {
    "a derivative rule of its own": _in_custom_vjp,
    "a cond": lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x),
    "a while": lambda p, x: lax.while_loop(
        lambda h: h[0, 0] < 0, lambda h: h @ p["w"], x
    ),
}


@pytest.mark.parametrize("where", REFUSED)
def test_sites_that_cannot_be_intercepted_are_named(where):
    """Left out, the others can be."""
    fn = lambda params, x: REFUSED[where](params, x) @ params["v"]  # noqa: E731
    params, x = {"w": drawn(3, 3), "v": drawn(3, 2)}, drawn(3, 3)
    with pytest.raises(NotImplementedError, match=f"'w' cannot .* {where}"):
        taps(fn, params, x)
    found = taps(fn, params, x, sites="v", at="output")
    np.testing.assert_allclose(found["v"], fn(params, x), atol=1e-12)


# Cotangents and gates.


def loss(params, x, y):
    return jnp.mean((conv_net(params, x) - y) ** 2)


def test_gradients_of_kernels_are_inputs_times_cotangents():
    """The identity that K-FAC stands on."""
    params, x, y = conv_params(), X(), drawn(2, 2, seed=8)
    rows = jax.jit(lambda *own: taps(loss, *own, at="patches"))(params, x, y)
    found = jax.jit(lambda *own: cotangents(loss, *own))(params, x, y)
    grads = jax.jit(jax.grad(loss))(params, x, y)
    for name, own in found.items():
        layer = name.split("/")[0]
        flat = rows[name].reshape(-1, rows[name].shape[-1])
        product = flat.T @ own.reshape(-1, own.shape[-1])
        expected = grads[layer]["kernel"].reshape(product.shape)
        np.testing.assert_allclose(product, expected, atol=1e-12)


def test_cotangents_per_example_are_those_of_single_examples():
    """Where examples do not meet, they add up to those of the batch."""

    def fn(params, x, y):
        h = jax.nn.relu(x @ params["w"] + params["b"])
        return jnp.mean((h @ params["v"] - y) ** 4)

    params = {"w": drawn(3, 2), "b": drawn(2), "v": drawn(2, 2)}
    x, y = drawn(4, 3, seed=1), drawn(4, 2, seed=8)
    each = cotangents(fn, params, x, y, per_example=True, at="after_bias")
    whole = cotangents(fn, params, x, y, at="after_bias")
    for n in range(4):
        alone = cotangents(fn, params, x[n : n + 1], y[n : n + 1], at="after_bias")
        for name, expected in alone.items():
            assert each[name].shape == (4, 1, 2)
            np.testing.assert_allclose(each[name][n], expected, atol=1e-12)
            np.testing.assert_allclose(whole[name][n], each[name][n, 0] / 4)


def test_cotangents_in_loops_and_of_losses_that_are_no_scalar():
    fn = lambda params, x: lax.scan(  # noqa: E731
        lambda h, w: (jnp.tanh(h @ w), None), x, params["w"]
    )[0]
    params, x = {"w": drawn(3, 4, 4)}, drawn(2, 4, seed=1)
    total = lambda params, x: fn(params, x).sum()  # noqa: E731
    found = cotangents(total, params, x)["w"]
    seen = taps(total, params, x)["w"]
    grad = jax.grad(total)(params, x)["w"]
    product = jnp.einsum("lbi,lbo->lio", seen, found)
    np.testing.assert_allclose(product, grad, atol=1e-12)
    with pytest.raises(ValueError, match="loss_fn: it returns"):
        cotangents(fn, params, x)


def test_gradients_of_gates_are_values_times_cotangents():
    params, x, y = conv_params(), X(), drawn(2, 2, seed=8)
    gated, gates = gate(loss, params, x, y)
    found = jax.jit(jax.grad(gated))(gates, params, x, y)

    @jax.jit
    def both(*own):
        return tuple(f(loss, *own, at="after_norm") for f in (taps, cotangents))

    seen, pulled = both(params, x, y)
    for name, own in found.items():
        product = seen[name] * pulled[name]
        expected = product.reshape(-1, own.size).sum(0)
        np.testing.assert_allclose(own, expected, atol=1e-12)
