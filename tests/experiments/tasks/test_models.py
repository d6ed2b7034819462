"""Shapes and exact numbers of parameters, by hand or from the papers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks import _image, _models
from jprune import trees

MNIST, CIFAR, IMAGENET = (28, 28, 1), (32, 32, 3), (224, 224, 3)


def dense(*widths):
    """Parameters of fully connected layers with biases."""
    return sum(a * b + b for a, b in itertools.pairwise(widths))


def convs(*widths, size=3, per_filter=1):
    """Parameters of convolutions with ``per_filter`` more for each filter."""
    pairs = itertools.pairwise(widths)
    return sum(a * b * size**2 + b * per_filter for a, b in pairs)


def resnet(blocks):
    """Parameters of a CIFAR ResNet with shortcuts that have none."""
    stages = [(16, 16), (16, 32), (32, 64)]
    return (
        convs(3, 16, per_filter=2)
        + sum(convs(a, *[b] * (2 * blocks), per_filter=2) for a, b in stages)
        + dense(64, 10)
    )


VGG11 = (3, 64, 128, 256, 256, 512, 512, 512, 512)
VGG16 = (3, 64, 64, 128, 128, *[256] * 3, *[512] * 6)

CASES = {
    "lenet_300_100": (_models.lenet_300_100(), MNIST, 266_610),
    "lenet_300_100 on digits": (
        _models.lenet_300_100(),
        (8, 8, 1),
        dense(64, 300, 100, 10),
    ),
    "digits_cnn": (
        _models.digits_cnn(),
        (8, 8, 1),
        convs(1, 16, 32) + dense(2 * 2 * 32, 64, 10),
    ),
    "lenet5_caffe": (_models.lenet5_caffe(), MNIST, 431_080),
    "conv2": (
        _models.conv_n(2),
        CIFAR,
        convs(3, 64, 64) + dense(16 * 16 * 64, 256, 256, 10),
    ),
    "conv4": (
        _models.conv_n(4),
        CIFAR,
        convs(3, 64, 64, 128, 128) + dense(8 * 8 * 128, 256, 256, 10),
    ),
    "conv6": (
        _models.conv_n(6),
        CIFAR,
        convs(3, 64, 64, 128, 128, 256, 256) + dense(4 * 4 * 256, 256, 256, 10),
    ),
    "vgg11": (_models.vgg11(), CIFAR, convs(*VGG11, per_filter=2) + dense(512, 10)),
    "vgg16": (_models.vgg16(), CIFAR, convs(*VGG16, per_filter=2) + dense(512, 10)),
    "resnet8": (_models.resnet(8), CIFAR, resnet(1)),
    "resnet20": (_models.resnet(20), CIFAR, resnet(3)),
    "resnet32": (_models.resnet(32), CIFAR, resnet(5)),
    "resnet56": (_models.resnet(56), CIFAR, resnet(9)),
    "resnet18 of ImageNet": (_models.imagenet_resnet(18), IMAGENET, 11_689_512),
    "resnet34 of ImageNet": (_models.imagenet_resnet(34), IMAGENET, 21_797_672),
    "resnet50 of ImageNet": (_models.imagenet_resnet(50), IMAGENET, 25_557_032),
}

# Rounded as the papers give them: in millions for Conv-2, 4 and 6 (Frankle and Carbin,
# figure 2) and the ResNets (He et al., table 6).
PUBLISHED = {
    "conv2": 4.3e6,
    "conv4": 2.4e6,
    "conv6": 2.3e6,
    "resnet20": 0.27e6,
    "resnet32": 0.46e6,
    "resnet56": 0.85e6,
}


@functools.cache
def variables_of(model, shape):
    init, _ = _image.pure(model, shape)
    return jax.eval_shape(init, jax.random.key(0))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", CASES)
def test_number_of_parameters(name):
    model, shape, expected = CASES[name]
    params, _ = variables_of(model, shape)
    assert count(params) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_number_of_parameters(name):
    model, shape, _ = CASES[name]
    params, _ = variables_of(model, shape)
    unit = 1e4 if name.startswith("resnet") else 1e5
    assert round(count(params) / unit) == round(PUBLISHED[name] / unit)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_state_have_the_right_shapes(name):
    model, shape, _ = CASES[name]
    _, apply = _image.pure(model, shape)
    params, state = variables_of(model, shape)
    x = jax.ShapeDtypeStruct((6, *shape), jnp.float32)
    for train in (False, True):
        out, new = jax.eval_shape(
            lambda p, s, x, train=train: apply(p, s, x, train=train), params, state, x
        )
        assert out.shape == (6, model.classes)
        assert out.dtype == jnp.float32
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize(
    ("name", "layers"), [("vgg11", 9), ("vgg16", 14), ("resnet8", 8), ("resnet20", 20)]
)
def test_prunable_are_the_kernels_and_not_the_norms(name, layers):
    model, shape, _ = CASES[name]
    params, _ = variables_of(model, shape)
    leaves = trees.prunable_leaves(params)
    assert len(leaves) == layers
    assert all(leaf.path.endswith("kernel") for leaf in leaves)


def random_like(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), tree
    )


@pytest.fixture(scope="module")
def normed():
    """A convolution of 1 x 1 with BatchNorm, and its parameters and inputs."""
    model = _models.ConvNet(stages=((5,),), size=1, norm=True)
    _, apply = _image.pure(model, (4, 4, 3))
    params, state = random_like(variables_of(model, (4, 4, 3)))
    x = np.random.default_rng(1).normal(3, 2, (8, 4, 4, 3)).astype(np.float32)
    return params, state, x, jax.jit(apply, static_argnames="train")


def test_training_normalises_by_the_batch_and_updates_the_averages(normed):
    params, state, x, apply = normed
    out, new = apply(params, state, x, train=True)
    old, new = (s["batch_stats"]["norm1"] for s in (state, new))
    y = x @ params["conv1"]["kernel"][0, 0]
    for name, statistic in (("mean", y.mean((0, 1, 2))), ("var", y.var((0, 1, 2)))):
        expected = 0.9 * old[name] + 0.1 * statistic
        np.testing.assert_allclose(new[name], expected, rtol=1e-4)
    shifted, _ = apply(params, state, x + 1, train=True)
    np.testing.assert_allclose(shifted, out, rtol=1e-3, atol=1e-3)


def test_evaluation_uses_the_averages_and_treats_rows_alone(normed):
    params, state, x, apply = normed
    out, same = apply(params, state, x)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    alone, _ = apply(params, state, x[::-1])
    np.testing.assert_allclose(out[::-1], alone, rtol=1e-4, atol=1e-4)
    others, _ = apply(params, state, np.concatenate([x[:4], 2 * x[4:]]))
    np.testing.assert_allclose(out[:4], others[:4], rtol=1e-4, atol=1e-4)


def test_a_shortcut_drops_pixels_and_adds_channels_of_zeros():
    block = _models._Block(width=6, strides=2)
    x = np.random.default_rng(0).uniform(0.5, 1.5, (2, 4, 4, 3)).astype(np.float32)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, train=False))
    # With kernels of zero the branch adds nothing.
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    out = jax.jit(block.apply, static_argnames="train")(variables, x, train=False)
    np.testing.assert_array_equal(out[..., :3], x[:, ::2, ::2])
    np.testing.assert_array_equal(out[..., 3:], 0)
