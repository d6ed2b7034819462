"""The networks of the tasks, as Flax Linen modules.

Layers are named by kind and place (``conv1``, ``norm1``, ``fc1``). The models return
logits, call BatchNorm's statistics ``batch_stats`` and draw no random numbers.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from experiments.tasks import _layers


class MLP(nn.Module):
    """Fully connected layers with ReLU between them.

    Attributes:
        hidden: widths of the hidden layers.
        classes: number of outputs.
    """

    hidden: Sequence[int]
    classes: int = 10

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Float[Array, "n classes"]:
        """Returns the logits of a batch ``(n, ...)``."""
        x = x.reshape(len(x), -1)
        for i, width in enumerate(self.hidden, 1):
            x = nn.relu(nn.Dense(width, name=f"fc{i}")(x))
        return nn.Dense(self.classes, name=f"fc{len(self.hidden) + 1}")(x)


class ConvNet(nn.Module):
    """Stages of convolutions, each ended by 2 x 2 max pooling, then an MLP.

    Attributes:
        stages: widths of the convolutions, by stage.
        hidden: widths of the hidden fully connected layers.
        size: height and width of the kernels.
        padding: ``"SAME"`` or ``"VALID"``.
        norm: whether BatchNorm follows each convolution, whose bias it replaces.
        classes: number of outputs.
    """

    stages: Sequence[Sequence[int]]
    hidden: Sequence[int] = ()
    size: int = 3
    padding: str = "SAME"
    norm: bool = False
    classes: int = 10

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool = False
    ) -> Float[Array, "n classes"]:
        """Returns the logits; ``train`` makes BatchNorm use the batch's statistics."""
        i = 0
        for stage in self.stages:
            for width in stage:
                i += 1
                x = _layers.conv(
                    width,
                    self.size,
                    padding=self.padding,
                    use_bias=not self.norm,
                    name=f"conv{i}",
                )(x)
                if self.norm:
                    x = _batch_norm(f"norm{i}", train)(x)
                x = nn.relu(x)
            x = _layers.max_pool(x)
        x = x.reshape(len(x), -1)
        for j, width in enumerate(self.hidden, 1):
            x = nn.relu(nn.Dense(width, name=f"fc{j}")(x))
        return nn.Dense(self.classes, name=f"fc{len(self.hidden) + 1}")(x)


class ResNet(nn.Module):
    """A ResNet for CIFAR of ``6 * blocks + 2`` layers (He et al., 2016, section 4.2).

    Three stages of basic blocks (version 1) of widths 16, 32 and 64. The shortcuts
    are the paper's option A, without parameters: a stride of 2 and zeros for the new
    channels.

    Attributes:
        blocks: number of residual blocks in each stage.
        classes: number of outputs.
    """

    blocks: int
    classes: int = 10

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool = False
    ) -> Float[Array, "n classes"]:
        """Returns the logits; ``train`` makes BatchNorm use the batch's statistics."""
        x = _layers.conv(16, 3, use_bias=False, name="conv1")(x)
        x = nn.relu(_batch_norm("norm1", train)(x))
        for stage, width in enumerate((16, 32, 64), 1):
            for block in range(1, self.blocks + 1):
                strides = 2 if stage > 1 and block == 1 else 1
                name = f"stage{stage}_block{block}"
                x = _Block(width, strides, name=name)(x, train)
        return nn.Dense(self.classes, name="fc1")(x.mean(axis=(1, 2)))


class _Block(nn.Module):
    width: int
    strides: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        y = _layers.conv(
            self.width, 3, strides=self.strides, use_bias=False, name="conv1"
        )(x)
        y = nn.relu(_batch_norm("norm1", train)(y))
        y = _layers.conv(self.width, 3, use_bias=False, name="conv2")(y)
        y = _batch_norm("norm2", train)(y)
        x = x[:, :: self.strides, :: self.strides]
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, self.width - x.shape[-1])])
        return nn.relu(x + y)


class ImageNetResNet(nn.Module):
    """A ResNet for ImageNet (He et al., 2016, table 1), with projection shortcuts.

    A 7 x 7 stem with max pooling, then four stages of which all but the first halve
    the size. Bottlenecks take their stride at the 3 x 3 convolution.

    Attributes:
        blocks: number of residual blocks in each stage.
        bottleneck: whether blocks are bottlenecks (1 x 1, 3 x 3, 1 x 1, expanding by
            4) and not two 3 x 3 convolutions.
        width: channels of the stem and of the first stage, twice as many in each next.
        classes: number of outputs.
    """

    blocks: Sequence[int]
    bottleneck: bool = False
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool = False
    ) -> Float[Array, "n classes"]:
        """Returns the logits; ``train`` makes BatchNorm use the batch's statistics."""
        x = nn.relu(_conv_norm(x, self.width, 7, 2, "1", train))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.blocks, 1):
            for block in range(1, blocks + 1):
                x = _ImageNetBlock(
                    self.width * 2 ** (stage - 1),
                    strides=2 if stage > 1 and block == 1 else 1,
                    bottleneck=self.bottleneck,
                    name=f"stage{stage}_block{block}",
                )(x, train)
        return nn.Dense(self.classes, name="fc1")(x.mean(axis=(1, 2)))


class _ImageNetBlock(nn.Module):
    width: int
    strides: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        w, s = self.width, self.strides
        layers = [(w, 3, s), (w, 3, 1)]
        if self.bottleneck:
            layers = [(w, 1, 1), (w, 3, s), (4 * w, 1, 1)]
        y = x
        for i, layer in enumerate(layers, 1):
            y = _conv_norm(y, *layer, str(i), train)
            y = nn.relu(y) if i < len(layers) else y
        if y.shape != x.shape:
            x = _conv_norm(x, y.shape[-1], 1, s, "_shortcut", train)
        return nn.relu(x + y)


def _conv_norm(
    x: Array, width: int, size: int, strides: int, name: str, train: bool
) -> Array:
    # XLA's own convolution: these networks are timed outside of loops.
    x = nn.Conv(
        width,
        (size, size),
        strides,
        padding=size // 2,
        use_bias=False,
        name=f"conv{name}",
    )(x)
    return _batch_norm(f"norm{name}", train)(x)


def _batch_norm(name: str, train: bool) -> nn.BatchNorm:
    # Runs are short: averages over 100 batches would lag behind the weights.
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)


def lenet_300_100() -> MLP:
    """LeNet-300-100 (LeCun et al., 1998): 266,610 parameters on 28 x 28 inputs."""
    return MLP(hidden=(300, 100))


def digits_cnn() -> ConvNet:
    """A small convolutional network for 8 x 8 images: 13,706 parameters."""
    return ConvNet(stages=((16,), (32,)), hidden=(64,))


def lenet5_caffe() -> ConvNet:
    """LeNet-5 as Caffe ships it: 431,080 parameters on 28 x 28 inputs.

    With a ReLU after each convolution, as the pruning literature has it.
    """
    return ConvNet(stages=((20,), (50,)), hidden=(500,), size=5, padding="VALID")


def conv_n(layers: int) -> ConvNet:
    """Conv-2, Conv-4 or Conv-6 (Frankle and Carbin, 2019), by number of layers."""
    stages = ((64, 64), (128, 128), (256, 256))[: layers // 2]
    return ConvNet(stages=stages, hidden=(256, 256))


def vgg11() -> ConvNet:
    """VGG-11 for CIFAR with BatchNorm.

    The fifth pooling leaves 1 x 1 x 512 values for one linear layer.
    """
    return ConvNet(
        stages=((64,), (128,), (256, 256), (512, 512), (512, 512)), norm=True
    )


def vgg16() -> ConvNet:
    """VGG-16 for CIFAR with BatchNorm and one linear layer, as :func:`vgg11`."""
    return ConvNet(
        stages=((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3), norm=True
    )


def resnet(layers: int) -> ResNet:
    """ResNet-8, 20, 32 or 56 for CIFAR, by number of layers."""
    return ResNet(blocks=(layers - 2) // 6)


def imagenet_resnet(layers: int, width: int = 64) -> ImageNetResNet:
    """ResNet-18, 34 or 50 for ImageNet, by number of layers.

    At width 64 they have 11,689,512, 21,797,672 and 25,557,032 parameters.
    """
    blocks = (2, 2, 2, 2) if layers == 18 else (3, 4, 6, 3)
    return ImageNetResNet(blocks, bottleneck=layers == 50, width=width)
