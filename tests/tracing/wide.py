"""Networks at full width, for counting: of these, nothing is computed.

Modules are named as in torchvision, whose names the golden data uses.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn


def _conv(width, size, stride, name, bias=False):
    return nn.Conv(
        width, (size, size), (stride, stride), size // 2, use_bias=bias, name=name
    )


def _norm(name):
    return nn.BatchNorm(use_running_average=True, name=name)


class ResNet(nn.Module):
    """ResNet-18 and ResNet-50 for ImageNet, with the stride in the 3x3 convolution."""

    depths: tuple[int, ...]
    bottleneck: bool
    width: int = 64

    @nn.compact
    def __call__(self, x):
        x = nn.relu(_norm("bn1")(_conv(self.width, 7, 2, "conv1")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths):
            for number in range(depth):
                stride = 2 if stage and not number else 1
                name = f"layer{stage + 1}.{number}."
                x = self.block(x, self.width * 2**stage, stride, name)
        return nn.Dense(1000, name="fc")(x.mean((1, 2)))

    def block(self, x, width, stride, name):
        # The width, the size and the stride of each convolution.
        convs = [(width, 3, stride), (width, 3, 1)]
        if self.bottleneck:
            convs = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
        y = x
        for i, (out, size, step) in enumerate(convs):
            y = _conv(out, size, step, f"{name}conv{i + 1}")(nn.relu(y) if i else y)
            y = _norm(f"{name}bn{i + 1}")(y)
        if y.shape != x.shape:
            x = _conv(y.shape[-1], 1, stride, f"{name}downsample.0")(x)
            x = _norm(f"{name}downsample.1")(x)
        return nn.relu(x + y)


class VGG16(nn.Module):
    """VGG-16 with BatchNorm; the CIFAR one has a single dense layer and no biases."""

    cifar: bool = False
    width: int = 64

    @nn.compact
    def __call__(self, x):
        number = 0
        for times, depth in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(depth):
                name, bias = f"features.{number}", not self.cifar
                x = _conv(self.width * times, 3, 1, name, bias)(x)
                x = nn.relu(_norm(f"features.{number + 1}")(x))
                number += 3
            x = nn.max_pool(x, (2, 2), (2, 2))
            number += 1
        x = x.reshape(x.shape[0], -1)
        if not self.cifar:
            x = nn.relu(nn.Dense(64 * self.width, name="classifier.0")(x))
            x = nn.relu(nn.Dense(64 * self.width, name="classifier.3")(x))
        return nn.Dense(10 if self.cifar else 1000, name="classifier.6")(x)


def vgg_layers(variables):
    """The names of the layers with kernels, in the order of evaluation."""
    found = [key for key, own in variables["params"].items() if "kernel" in own]
    return sorted(
        found, key=lambda key: (key.startswith("classifier"), int(key.split(".")[1]))
    )


class CifarResNet(nn.Module):
    """ResNet-56 and ResNet-110 for CIFAR-10: shortcuts without parameters."""

    depth: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(_norm("norm1")(_conv(16, 3, 1, "conv1")(x)))
        number = 2
        for stage in range(3):
            width = 16 * 2**stage
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage and not block else 1
                y = _conv(width, 3, stride, f"conv{number}")(x)
                y = nn.relu(_norm(f"norm{number}")(y))
                y = _norm(f"norm{number + 1}")(
                    _conv(width, 3, 1, f"conv{number + 1}")(y)
                )
                if stride == 2:
                    extra = width - x.shape[-1]
                    x = jnp.pad(x[:, ::2, ::2], [(0, 0)] * 3 + [(0, extra)])
                x = nn.relu(x + y)
                number += 2
        return nn.Dense(10, name="fc")(x.mean((1, 2)))


@functools.cache
def shapes(module, size):
    """The variables of a module and an image, as shapes."""
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), x), x


resnet18 = ResNet((2, 2, 2, 2), bottleneck=False)
resnet50 = ResNet((3, 4, 6, 3), bottleneck=True)
vgg16_bn = VGG16()
vgg16_cifar = VGG16(cifar=True)
