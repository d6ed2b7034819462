"""What papers found, at a scale that takes minutes: run by ``pytest -m slow``."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from experiments import compare, methods, tasks
from experiments.tasks import _image, _models

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.slow
def test_synflow_reaches_maximal_compression_where_one_shot_criteria_collapse():
    """Tanaka et al. 2020, Theorem 3, on a VGG-11 with BatchNorm.

    Down to two weights a layer, SynFlow leaves every layer alive; SNIP and GraSP in one
    shot have emptied some at the same compressions.
    """
    init, apply = _image.pure(_models.vgg11(), (32, 32, 3))
    params, state = init(jax.random.key(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 32, 32, 3)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, 64))

    def apply_fn(params, x):
        return apply(params, state, x, train=False)[0]

    def objective(logits, y):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(losses)

    def loss_fn(params, batch):
        return objective(apply_fn(params, batch[0]), batch[1])

    def alive(masks):
        return [int(n) > 0 for n in jprune.masks.counts(masks).values()]

    synflow = jprune.scores.synflow(apply_fn)
    total = sum(leaf.size for leaf in jprune.trees.prunable_leaves(params))
    layers = len(jprune.trees.prunable_leaves(params))
    budgets = (2 * layers, total // 100_000)
    for keep in budgets:
        density = keep / total
        rounds = [max(round(total * density ** (t / 100)), keep) for t in range(1, 101)]
        masks = jprune.prune_iteratively(synflow, params, x[:1], keep=rounds)
        assert all(alive(masks)) and int(jprune.masks.count(masks)) == keep
    for criterion in (
        jprune.scores.snip(loss_fn),
        jprune.scores.grasp(apply_fn, loss=objective),
    ):
        scores = jax.jit(criterion)(params, (x, y))
        for keep in budgets:
            assert not all(alive(jprune.prune(scores, keep=keep)))


@pytest.mark.slow
@pytest.mark.skipif(
    not DEBIAN.exists(), reason="the Debian package dataset-fashion-mnist is missing"
)
def test_fashion_mnist_from_end_to_end(tmp_path):
    """Zalando's images: a pruned LeNet-300-100 stays near the dense one."""
    task = tasks.fashion_mnist_mlp()
    plan = compare.configs(task, ["synflow", "magnitude"], [0.9], seeds=1, epochs=2)
    records = compare.compare(task, plan, tmp_path)
    accuracy = {r["config"]["method"]: r["test"]["accuracy"] for r in records}
    assert accuracy["dense"] > 0.84
    assert min(accuracy.values()) > accuracy["dense"] - 0.04
    assert all(abs(r["sparsity"] - 0.9) < 1e-5 for r in records[1:])


@pytest.mark.slow
def test_the_dense_digits_network_is_good_on_every_seed():
    task = tasks.digits_mlp()
    for seed in range(3):
        outcome = methods.dense(task, key=jax.random.key(seed))
        x, y = task.streams["test"]["x"], task.streams["test"]["y"]
        found = jnp.argmax(outcome.apply(outcome.params, outcome.state, x), -1)
        assert float(jnp.mean(found == y)) >= 0.95
