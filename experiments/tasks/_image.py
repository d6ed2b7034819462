"""The tasks of image classification.

Their budgets are short, and no task augments its images: methods are compared under
equal conditions, not brought to the last percent.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from experiments import task
from experiments.tasks import _data, _models


def image_task(
    name: str,
    data: _data.Data,
    model: nn.Module,
    *,
    optimizer: Callable[[int], optax.GradientTransformation],
    epochs: int,
    batch_size: int,
) -> task.Task:
    """Returns the task of classifying images with cross-entropy.

    Args:
        name: the name of the task.
        data: streams of images ``(n, h, w, c)`` and integer labels.
        model: a Linen module called as ``model(x, train)``.
        optimizer: ``steps -> optax.GradientTransformation``.
        epochs: how long to train by default.
        batch_size: rows per step.
    """
    init, apply = pure(model, data.streams["train"]["x"].shape[1:])
    return task.Task(
        name=name,
        source=data.source,
        init=init,
        apply=apply,
        per_example_loss=cross_entropy,
        metrics=accuracy,
        streams=data.streams,
        optimizer=optimizer,
        budget=task.Budget(epochs, batch_size),
    )


# Compiled code is kept by function: a task made twice must not be compiled twice.
@functools.cache
def pure(
    model: nn.Module, shape: tuple[int, ...]
) -> tuple[Callable[[PRNGKeyArray], tuple[PyTree, PyTree]], task.Apply]:
    """Returns the functions ``init`` and ``apply`` of a task from a Linen module.

    Args:
        model: called as ``model(x, train)``; draws no random numbers.
        shape: that of one input.

    Example:
        >>> init, apply = pure(_models.MLP(hidden=(), classes=2), (3,))
        >>> params, state = init(jax.random.key(0))
        >>> apply(params, state, jnp.ones((5, 3)))[0].shape
        (5, 2)
    """

    def init(key):
        x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        variables = dict(model.lazy_init(key, x))
        return variables.pop("params"), variables

    def apply(params, state, x, *, train=False, key=None):
        variables = {"params": params, **state}
        if not train:
            return model.apply(variables, x, False), state
        out, updated = model.apply(variables, x, True, mutable=list(state))
        return out, dict(updated)

    return init, apply


def cross_entropy(out: Float[Array, "n k"], batch: task.Batch) -> Float[Array, " n"]:
    """Returns the cross-entropy of logits with the integer labels ``batch["y"]``."""
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["y"])


def accuracy(
    out: Float[Array, "n k"], batch: task.Batch
) -> dict[str, Float[Array, " n"]]:
    """Returns, as ``accuracy``, 1 where the largest logit is the label's, else 0.

    Example:
        >>> accuracy(jnp.eye(2), {"y": jnp.array([0, 0])})
        {'accuracy': Array([1., 0.], dtype=float32)}
    """
    correct = jnp.argmax(out, axis=-1) == batch["y"]
    return {"accuracy": correct.astype(jnp.float32)}


@functools.cache
def adam(learning_rate: float) -> Callable[[int], optax.GradientTransformation]:
    """Returns ``steps -> Adam`` with a cosine decay to 0 over the steps."""
    return lambda steps: optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


@functools.cache
def momentum(
    learning_rate: float, weight_decay: float
) -> Callable[[int], optax.GradientTransformation]:
    """Returns ``steps -> SGD`` with momentum 0.9, L2 decay and a cosine decay to 0."""
    return lambda steps: optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(optax.cosine_decay_schedule(learning_rate, steps), momentum=0.9),
    )


def digits_mlp() -> task.Task:
    """LeNet-300-100 on scikit-learn's digits: a third of a second on two cores."""
    return _digits("digits_mlp", _models.lenet_300_100())


def digits_cnn() -> task.Task:
    """A network of two convolutions on scikit-learn's digits."""
    return _digits("digits_cnn", _models.digits_cnn())


def mnist_mlp() -> task.Task:
    """LeNet-300-100 on MNIST."""
    return _mnist("mnist_mlp", _data.mnist(), _models.lenet_300_100())


def mnist_lenet5() -> task.Task:
    """LeNet-5-Caffe on MNIST."""
    return _mnist("mnist_lenet5", _data.mnist(), _models.lenet5_caffe())


def fashion_mnist_mlp() -> task.Task:
    """LeNet-300-100 on Fashion-MNIST."""
    return _mnist("fashion_mnist_mlp", _data.fashion_mnist(), _models.lenet_300_100())


def fashion_mnist_lenet5() -> task.Task:
    """LeNet-5-Caffe on Fashion-MNIST."""
    return _mnist("fashion_mnist_lenet5", _data.fashion_mnist(), _models.lenet5_caffe())


def cifar10_conv2() -> task.Task:
    """Conv-2 on CIFAR-10."""
    return _cifar10("cifar10_conv2", _models.conv_n(2), adam(3e-4))


def cifar10_conv4() -> task.Task:
    """Conv-4 on CIFAR-10."""
    return _cifar10("cifar10_conv4", _models.conv_n(4), adam(3e-4))


def cifar10_conv6() -> task.Task:
    """Conv-6 on CIFAR-10."""
    return _cifar10("cifar10_conv6", _models.conv_n(6), adam(3e-4))


def cifar10_vgg11() -> task.Task:
    """VGG-11 with BatchNorm on CIFAR-10."""
    return _cifar10("cifar10_vgg11", _models.vgg11(), momentum(0.05, 5e-4))


def cifar10_vgg16() -> task.Task:
    """VGG-16 with BatchNorm on CIFAR-10."""
    return _cifar10("cifar10_vgg16", _models.vgg16(), momentum(0.05, 5e-4))


def cifar10_resnet8() -> task.Task:
    """ResNet-8 on CIFAR-10."""
    return _cifar10("cifar10_resnet8", _models.resnet(8), momentum(0.1, 1e-4))


def cifar10_resnet20() -> task.Task:
    """ResNet-20 on CIFAR-10."""
    return _cifar10("cifar10_resnet20", _models.resnet(20), momentum(0.1, 1e-4))


def cifar10_resnet32() -> task.Task:
    """ResNet-32 on CIFAR-10."""
    return _cifar10("cifar10_resnet32", _models.resnet(32), momentum(0.1, 1e-4))


def cifar10_resnet56() -> task.Task:
    """ResNet-56 on CIFAR-10."""
    return _cifar10("cifar10_resnet56", _models.resnet(56), momentum(0.1, 1e-4))


def _digits(name: str, model: nn.Module) -> task.Task:
    return image_task(
        name, _data.digits(), model, optimizer=adam(4e-3), epochs=30, batch_size=64
    )


def _mnist(name: str, data: _data.Data, model: nn.Module) -> task.Task:
    return image_task(
        name, data, model, optimizer=adam(1e-3), epochs=10, batch_size=128
    )


def _cifar10(
    name: str,
    model: nn.Module,
    optimizer: Callable[[int], optax.GradientTransformation],
) -> task.Task:
    data = _data.cifar10()
    return image_task(name, data, model, optimizer=optimizer, epochs=30, batch_size=128)
