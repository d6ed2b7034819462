"""Networks for the tests of tracing: thin, plain, one of each kind.

A builder returns a :class:`Net`, whose variables are random, norm parameters and
statistics included. ``pinned`` lists what cannot be removed, as ``path[axis]``, but for
the spatial axes of kernels.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx


class Net(NamedTuple):
    """A function, its parameters, an input, and what is expected of its couplings."""

    apply: Callable[..., Any]
    variables: Any
    inputs: tuple
    groups: list[int]
    pinned: set[str]
    options: Any = types.MappingProxyType({})


def randomise(tree, seed=0):
    """Random values in the place of all; variances are positive."""
    rng = np.random.default_rng(seed)

    def leaf(path, value):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        drawn = rng.normal(size=value.shape) / 2
        if "var" in jax.tree_util.keystr(path):
            drawn = 0.5 + drawn**2
        return jnp.asarray(drawn)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def images(size=8, channels=3, batch=2):
    shape = (batch, size, size, channels)
    return jnp.asarray(np.random.default_rng(7).normal(size=shape))


def tokens(length=5, width=6, batch=2):
    return jnp.asarray(np.random.default_rng(7).normal(size=(batch, length, width)))


def linen(module, x, groups, pinned, **options):
    """The net of a Linen module that is called with one input."""
    variables = randomise(jax.eval_shape(module.init, jax.random.key(0), x))
    return Net(module.apply, variables, (x,), groups, pinned, options)


# Convolutional networks.


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.tanh(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.max_pool(nn.relu(nn.Conv(5, (3, 3))(x)), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.sigmoid(nn.Dense(7)(x))
        x = nn.relu(nn.Dense(6)(x))
        return nn.Dense(3)(x)


def lenet():
    return linen(
        LeNet(),
        images(),
        [4, 5, 6, 7],
        {"Conv_0/kernel[2]", "Dense_2/kernel[1]", "Dense_2/bias[0]"},
    )


class VGG(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        for width in (4, 5, 6):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).mean((1, 2))
        x = nn.Dropout(0.5, deterministic=not self.train)(x)
        return nn.Dense(3)(x)


VGG_PINNED = {"Conv_0/kernel[2]", "Dense_0/kernel[1]", "Dense_0/bias[0]"}


def vgg():
    return linen(VGG(), images(), [4, 5, 6], VGG_PINNED)


def vgg_in_training():
    """BatchNorm by the batch's statistics, which are outputs too; dropout."""
    module, x = VGG(train=True), images()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = randomise(jax.eval_shape(module.init, keys, x))

    def apply(variables, x):
        return module.apply(
            variables,
            x,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(5)},
        )

    options = {"mutable": "1/batch_stats"}
    return Net(apply, variables, (x,), [4, 5, 6], VGG_PINNED, options)


class BasicBlock(nn.Module):
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=True)  # noqa: E731
        strides = (self.stride, self.stride)
        y = nn.Conv(self.width, (3, 3), strides, use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = norm()(nn.Conv(self.width, (3, 3), use_bias=False)(y))
        if y.shape != x.shape:
            x = norm()(nn.Conv(self.width, (1, 1), strides, use_bias=False)(x))
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=True)  # noqa: E731
        strides = (self.stride, self.stride)
        y = nn.relu(norm()(nn.Conv(self.width, (1, 1), use_bias=False)(x)))
        y = nn.relu(norm()(nn.Conv(self.width, (3, 3), strides, use_bias=False)(y)))
        y = norm()(nn.Conv(self.width * 2, (1, 1), use_bias=False)(y))
        if y.shape != x.shape:
            x = norm()(nn.Conv(self.width * 2, (1, 1), strides, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    block: Any

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        for width, stride in ((4, 1), (4, 1), (6, 2)):
            x = self.block(width, stride)(x)
        return nn.Dense(3)(x.mean((1, 2)))


def resnet_basic():
    return linen(
        ResNet(BasicBlock),
        images(),
        [4, 4, 4, 6, 6],
        {"Conv_0/kernel[2]", "Dense_0/kernel[1]", "Dense_0/bias[0]"},
    )


def resnet_bottleneck():
    return linen(
        ResNet(Bottleneck),
        images(),
        [4, 4, 4, 4, 4, 6, 6, 8, 12],
        {"Conv_0/kernel[2]", "Dense_0/kernel[1]", "Dense_0/bias[0]"},
    )


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = lambda x: nn.relu(nn.BatchNorm(use_running_average=True)(x))  # noqa: E731
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        for _ in range(2):
            y = nn.Conv(5, (1, 1), use_bias=False)(norm(x))
            y = nn.Conv(3, (3, 3), use_bias=False)(norm(y))
            x = jnp.concatenate([x, y], axis=-1)
        x = nn.avg_pool(nn.Conv(6, (1, 1))(norm(x)), (2, 2), (2, 2))
        return nn.Dense(3)(norm(x).mean((1, 2)))


def densenet():
    return linen(
        DenseNet(),
        images(4),
        [3, 3, 4, 5, 5, 6],
        {"Conv_0/kernel[2]", "Dense_0/kernel[1]", "Dense_0/bias[0]"},
    )


class InvertedResidual(nn.Module):
    """MobileNetV3: expand, depthwise, squeeze and excite, project."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        y = nn.hard_swish(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (1, 1))(x)))
        y = nn.Conv(8, (3, 3), feature_group_count=8)(y)
        y = nn.hard_swish(nn.BatchNorm(use_running_average=True)(y))
        gate = nn.relu(nn.Conv(5, (1, 1))(y.mean((1, 2), keepdims=True)))
        y = y * nn.hard_sigmoid(nn.Conv(8, (1, 1))(gate))
        x = x + nn.BatchNorm(use_running_average=True)(nn.Conv(4, (1, 1))(y))
        return nn.Dense(3)(nn.relu6(x).mean((1, 2)))


def mobilenet():
    return linen(
        InvertedResidual(),
        images(4),
        [4, 5, 8],
        {
            "Conv_0/kernel[2]",
            "Dense_0/kernel[1]",
            "Dense_0/bias[0]",
        },
    )


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        conv = lambda n, x: nn.silu(nn.Conv(n, (3, 3))(x))  # noqa: E731
        first = conv(4, x)
        second = conv(6, nn.max_pool(first, (2, 2), (2, 2)))
        deep = conv(5, nn.max_pool(second, (2, 2), (2, 2)))
        up = nn.ConvTranspose(6, (2, 2), (2, 2))(deep)
        up = conv(5, jnp.concatenate([second, up], -1))
        up = nn.ConvTranspose(3, (2, 2), (2, 2))(up)
        return nn.Conv(2, (1, 1))(conv(4, jnp.concatenate([first, up], -1)))


def unet():
    return linen(
        UNet(),
        images(),
        [3, 4, 4, 5, 5, 6, 6],
        {"Conv_0/kernel[2]", "Conv_4/kernel[3]", "Conv_4/bias[0]"},
    )


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(4, (2, 2), (2, 2))(x))
        for i in range(2):
            y = nn.Conv(4, (3, 3), feature_group_count=4)(x)
            y = nn.gelu(nn.Dense(7)(nn.LayerNorm()(y)))
            scale = self.param(f"scale_{i}", nn.initializers.ones, (4,))
            x = x + nn.Dense(4)(y) * scale
        return nn.Dense(3)(nn.LayerNorm()(x.mean((1, 2))))


def convnext():
    return linen(
        ConvNeXt(),
        images(4),
        [4, 7, 7],
        {"Conv_0/kernel[2]", "Dense_4/kernel[1]", "Dense_4/bias[0]"},
    )


class GroupNormNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=4)(nn.Conv(8, (3, 3))(x)))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=2)(x))
        return nn.Dense(3)(x.mean((1, 2)))


def group_norm():
    """A group of the norm is a unit; two of them make a group of the convolution."""
    return linen(
        GroupNormNet(),
        images(4),
        [2],
        {
            "Conv_0/kernel[2]",
            "Conv_1/kernel[2]",
            "Dense_0/kernel[1]",
            "Dense_0/bias[0]",
        },
    )


class Shuffles(nn.Module):
    """Channel shuffle, pixel shuffle, and channels that were zeros."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        n, h, w, c = x.shape
        x = x.reshape(n, h, w, 2, 3).swapaxes(3, 4).reshape(n, h, w, c)
        a, b = jnp.split(x, 2, axis=-1)
        x = jnp.concatenate([nn.Conv(3, (1, 1))(a), b[..., ::-1]], axis=-1)
        x = nn.relu(nn.Conv(12, (3, 3))(x))
        x = x.reshape(n, h, w, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
        x = jnp.tanh(x.reshape(n, 2 * h, 2 * w, 3))
        x = x + jnp.pad(nn.Conv(2, (1, 1))(x), [(0, 0)] * 3 + [(0, 1)])
        return nn.Dense(3)(x.mean((1, 2)))


def shuffles():
    return linen(
        Shuffles(),
        images(4),
        [1, 2, 3, 3, 3],
        {"Conv_0/kernel[2]", "Dense_0/kernel[1]", "Dense_0/bias[0]"},
    )


# Transformers and the like.


class Mixer(nn.Module):
    bias: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        y = nn.gelu(nn.Dense(7, use_bias=self.bias)(y))
        x = x + nn.Dense(5, use_bias=self.bias)(y).swapaxes(1, 2)
        x = x + nn.Dense(6)(nn.gelu(nn.Dense(4)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


_MIXER_PINNED = {
    "Dense_0/kernel[0]",
    "Dense_1/kernel[0]",
    "Dense_2/kernel[1]",
    "Dense_5/kernel[1]",
    "Dense_5/bias[0]",
}


def mixer():
    return linen(Mixer(False), tokens(5, 3), [4, 6, 7], _MIXER_PINNED)


def mixer_with_token_biases():
    """A bias of tokens enters every channel, removed ones too, and the next norm."""
    pinned = {
        "Dense_2/bias[0]",
        "Dense_0/kernel[1]",
        "Dense_0/bias[0]",
        "Dense_3/kernel[1]",
        "Dense_3/bias[0]",
        "Dense_4/kernel[0]",
        "Dense_5/kernel[0]",
        *(f"LayerNorm_{i}/{leaf}[0]" for i in range(3) for leaf in ("scale", "bias")),
    }
    return linen(Mixer(True), tokens(5, 3), [4, 7], _MIXER_PINNED | pinned)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), (2, 2))(x)
        x = x.reshape(x.shape[0], -1, 6)
        first = self.param("first", nn.initializers.zeros, (1, 1, 6))
        x = jnp.concatenate([jnp.tile(first, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("place", nn.initializers.zeros, (1, x.shape[1], 6))
        for _ in range(2):
            attend = nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=6)
            x = x + attend(nn.LayerNorm()(x))
            x = x + nn.Dense(6)(nn.gelu(nn.Dense(7)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])


def vit():
    """Units of attention: heads, and positions within the heads of either product."""
    return linen(
        ViT(),
        images(4),
        [2, 2, 4, 4, 4, 4, 6, 7, 7],
        {"Conv_0/kernel[2]", "place[1]", "Dense_4/kernel[1]", "Dense_4/bias[0]"},
    )


class Decoder(nn.Module):
    """Rotary embedding, grouped queries, gated units, the norms of Llama."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(9, 8)(ids)
        n, length = ids.shape
        for _ in range(2):
            y = nn.RMSNorm()(x)
            q = nn.Dense(16, use_bias=False)(y).reshape(n, length, 4, 4)
            k = nn.Dense(8, use_bias=False)(y).reshape(n, length, 2, 4)
            v = nn.Dense(8, use_bias=False)(y).reshape(n, length, 2, 4)
            q, k = _rotate(q), jnp.repeat(_rotate(k), 2, axis=2)
            logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
            causal = jnp.tril(jnp.ones((length, length), bool))
            weights = nn.softmax(jnp.where(causal, logits, -1e9))
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.repeat(v, 2, axis=2))
            x = x + nn.Dense(8, use_bias=False)(y.reshape(n, length, 16))
            y = nn.RMSNorm()(x)
            y = nn.silu(nn.Dense(7, use_bias=False)(y)) * nn.Dense(7)(y)
            x = x + nn.Dense(8, use_bias=False)(y)
        return nn.Dense(9)(nn.RMSNorm()(x))


def _rotate(x):
    angles = jnp.arange(x.shape[1])[:, None] * 10.0 ** -jnp.arange(x.shape[-1] // 2)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def decoder():
    ids = jnp.asarray(np.random.default_rng(7).integers(0, 9, (2, 5)))
    return linen(
        Decoder(),
        ids,
        [2, 2, 7, 7, 8],
        {"Embed_0/embedding[0]", "Dense_14/kernel[1]", "Dense_14/bias[0]"},
    )


# Recurrence and scanned layers.


class Recurrent(nn.Module):
    cell: Any

    @nn.compact
    def __call__(self, x):
        cell = functools.partial(self.cell, param_dtype=jnp.float64)
        x = nn.RNN(cell(5))(nn.Dense(4)(x))
        return nn.Dense(3)(nn.RNN(cell(6), reverse=True)(x)[:, -1])


def lstm():
    return linen(
        Recurrent(nn.OptimizedLSTMCell),
        tokens(5, 3),
        [4, 5, 6],
        {"Dense_0/kernel[0]", "Dense_1/kernel[1]", "Dense_1/bias[0]"},
    )


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.relu(nn.Dense(7)(nn.LayerNorm()(x)))
        return x + nn.Dense(6)(y), None


class Scanned(nn.Module):
    """A stack of blocks with rematerialisation; its units span the layers."""

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = blocks()(nn.Dense(6)(x), None)
        return nn.Dense(3)(x)


def scanned():
    stacked = "ScanCheckpointBlock_0"
    leaves = ("Dense_0/kernel", "Dense_0/bias", "Dense_1/kernel", "Dense_1/bias")
    return linen(
        Scanned(),
        tokens(4, 3),
        [6, 7],
        {
            "Dense_0/kernel[0]",
            "Dense_1/kernel[1]",
            "Dense_1/bias[0]",
            *(f"{stacked}/{leaf}[0]" for leaf in leaves),
            f"{stacked}/LayerNorm_0/scale[0]",
            f"{stacked}/LayerNorm_0/bias[0]",
        },
    )


# Other libraries.


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.fc = nnx.Linear(4, 5, rngs=rngs)
        self.out = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.out(nnx.relu(self.fc(x)))


def nnx_cnn():
    graph, state = nnx.split(nnx.eval_shape(lambda: Perceptron(nnx.Rngs(0))))
    return Net(
        lambda state, x: nnx.merge(graph, state)(x),
        randomise(state),
        (images(4),),
        [4, 5],
        {"conv/kernel[2]", "out/kernel[1]", "out/bias[0]"},
    )


class EquinoxCNN(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    fc: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(3, 6, 3, key=keys[0])
        self.norm = eqx.nn.GroupNorm(3, 6)
        self.fc = eqx.nn.Linear(6, 5, key=keys[1])
        self.out = eqx.nn.Linear(5, 3, key=keys[2])

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.out(jax.nn.relu(self.fc(x)))


def equinox_cnn():
    model = eqx.filter_eval_shape(EquinoxCNN, jax.random.key(0))
    params, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    return Net(
        lambda params, x: jax.vmap(eqx.combine(params, static))(x),
        randomise(params),
        (images(5).transpose(0, 3, 1, 2),),
        [3, 5],
        {"conv/weight[1]", "out/weight[0]", "out/bias[0]"},
    )


def haiku_mlp():
    forward = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([6, 5, 3])(x)))
    x = tokens(1, 4)[:, 0]
    return Net(
        forward.apply,
        randomise(jax.eval_shape(forward.init, jax.random.key(0), x)),
        (x,),
        [5, 6],
        {"mlp/~/linear_0/w[0]", "mlp/~/linear_2/w[1]", "mlp/~/linear_2/b[0]"},
    )


ALL = (
    lenet,
    vgg,
    vgg_in_training,
    resnet_basic,
    resnet_bottleneck,
    densenet,
    mobilenet,
    unet,
    convnext,
    group_norm,
    shuffles,
    mixer,
    mixer_with_token_biases,
    vit,
    decoder,
    lstm,
    scanned,
    nnx_cnn,
    equinox_cnn,
    haiku_mlp,
)
