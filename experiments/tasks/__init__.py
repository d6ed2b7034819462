"""Tasks: each function here makes one, and ``__all__`` lists them.

A task's data is loaded when its function is called. Data sets are stored in TFDS's
own directory (the environment variable ``TFDS_DATA_DIR`` sets it), with decoded
copies in its subdirectory ``jprune``.
"""

from experiments.tasks._image import (
    cifar10_conv2,
    cifar10_conv4,
    cifar10_conv6,
    cifar10_resnet8,
    cifar10_resnet20,
    cifar10_resnet32,
    cifar10_resnet56,
    cifar10_vgg11,
    cifar10_vgg16,
    digits_cnn,
    digits_mlp,
    fashion_mnist_lenet5,
    fashion_mnist_mlp,
    mnist_lenet5,
    mnist_mlp,
)

__all__ = [
    "cifar10_conv2",
    "cifar10_conv4",
    "cifar10_conv6",
    "cifar10_resnet8",
    "cifar10_resnet20",
    "cifar10_resnet32",
    "cifar10_resnet56",
    "cifar10_vgg11",
    "cifar10_vgg16",
    "digits_cnn",
    "digits_mlp",
    "fashion_mnist_lenet5",
    "fashion_mnist_mlp",
    "mnist_lenet5",
    "mnist_mlp",
]
