"""One mask update against the outputs of public implementations."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune import sparse_training

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDEN / "dynamic_sparse.npz") as data:
        return dict(data)


@pytest.fixture(scope="module")
def peer():
    with np.load(GOLDEN / "jaxpruner" / "masks.npz") as data:
        return dict(data)


def read(arrays, name, layers=("l0", "l1", "l2")):
    return {
        layer: {"kernel": jnp.asarray(arrays[name.format(layer)])} for layer in layers
    }


def update_once(masks, weights, grads, grow, fraction, *, prunable="*"):
    """Returns the masks and weights after one mask update that takes no step."""
    method = sparse_training.dynamic(
        masks=masks,
        drop=sparse_training.smallest,
        grow=grow,
        fraction=fraction,
        due=lambda step: step == 0,
        hold=True,
        prunable=prunable,
    )
    tx = jprune.sparse(optax.chain(method, optax.sgd(0.1, momentum=0.9)))
    state = tx.init(weights)
    weights = jprune.apply_masks(weights, masks)
    updates, state = tx.update(grads, state, weights)
    return jprune.masks_of(state), optax.apply_updates(weights, updates)


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_rigl_of_its_authors(arrays, fraction):
    inputs = [read(arrays, f"in/{{}}/{name}") for name in ("mask", "weight", "grad")]
    masks, weights = update_once(*inputs, sparse_training.steepest, fraction)
    for layer in masks:
        found = masks[layer]["kernel"], weights[layer]["kernel"]
        name = f"rigl_google/f{fraction}/{layer}"
        assert np.array_equal(found[0], arrays[f"{name}/mask"])
        np.testing.assert_array_equal(
            found[1], np.asarray(arrays[f"{name}/weight"], np.float32)
        )


def test_set_of_the_authors_of_rigl(arrays):
    inputs = [read(arrays, f"in/{{}}/{name}") for name in ("mask", "weight", "grad")]
    draws = [jnp.asarray(arrays[f"in/{x}/grow_uniform"]) for x in ("l0", "l1", "l2")]
    masks, _ = update_once(*inputs, lambda event: draws, 0.3)
    for layer in masks:
        expected = arrays[f"set_google/f0.3/{layer}/mask"]
        assert np.array_equal(masks[layer]["kernel"], expected)


def test_drop_of_set(arrays):
    masks, weights = (read(arrays, f"in/{{}}/{name}") for name in ("mask", "weight"))
    own = jprune.units.weights(weights)
    event = sparse_training.Event(
        step=jnp.asarray(0),
        key=jax.random.key(0),
        fraction=jnp.asarray(0.3),
        units=own,
        weights=jax.tree.leaves(weights),
        grads=jax.tree.leaves(weights),
        living=jprune.units.living(own, weights, masks),
    )
    kept = sparse_training.smallest_of_each_sign(event).keeps
    for layer, keep in zip(masks, kept, strict=True):
        expected = arrays[f"set_mocanu/z0.3/{layer}/mask_after_prune"]
        assert np.array_equal(keep, expected)


# The cases in which the peer's rounding of the kept count and ours agree.
@pytest.mark.parametrize(("case", "fraction"), [(0, 0.3), (1, 0.1), (2, 0.5), (7, 0.3)])
def test_rigl_of_jaxpruner(peer, case, fraction):
    names = ("mask_before", "weights", "grads")
    masks, weights, grads = (
        {"kernel": jnp.asarray(peer[f"rigl/{case}/{name}"])} for name in names
    )
    masks = {"kernel": masks["kernel"].astype(bool)}
    found, _ = update_once(masks, weights, grads, sparse_training.steepest, fraction)
    expected = peer[f"rigl/{case}/mask_after"].astype(bool)
    assert np.array_equal(found["kernel"], expected)
