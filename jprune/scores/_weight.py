"""Criteria that read the weights alone."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jprune import trees
from jprune.scores import _derivatives as derivatives
from jprune.types import Batch, Masks, Params, Scores


def magnitude(
    params: Params,
    batch: Batch = None,
    *,
    masks: Masks | None = None,
    key: PRNGKeyArray | None = None,
) -> Scores:
    """Returns the absolute values of the weights.

    ``s = |w|``, zero under the masks. There is no function to differentiate, so this is
    a score function itself, not a criterion that makes one.

    Args:
        params: any pytree.
        batch: not used.
        masks: which weights live; None for all.
        key: not used.

    Returns:
        Scores in the dtype of the parameters; leaves that are not floating arrays have
        a scalar 0.

    Example:
        >>> magnitude({"w": jnp.array([-2.0, 1.0])})
        {'w': Array([2., 1.], dtype=float32)}

    Reference:
        Han et al., Learning both weights and connections for efficient neural networks,
        2015, arXiv:1506.02626.
    """
    del batch, key

    def score(w: Any) -> Array:
        return jnp.abs(w) if trees.is_inexact(w) else jnp.zeros(())

    return jax.tree.map(score, derivatives.at_product(params, masks))


def random(
    params: Params,
    batch: Batch = None,
    *,
    masks: Masks | None = None,
    key: PRNGKeyArray | None = None,
) -> Scores:
    """Returns scores drawn uniformly from (0, 1], zero under the masks.

    Args:
        params: any pytree.
        batch: not used.
        masks: which weights live; None for all.
        key: the source of the randomness. Leaves with the same path and shape get the
            same scores, whatever other leaves there are.

    Returns:
        float32 scores; leaves that are not floating arrays have a scalar 0.

    Raises:
        ValueError: no key is given.

    Example:
        >>> random({"w": jnp.ones(3)}, key=jax.random.key(0))["w"].shape
        (3,)
    """
    del batch
    if key is None:
        raise ValueError("key: random scores need one, such as jax.random.key(0)")
    drawn = {
        leaf.place: 1.0 - jax.random.uniform(_key_for(key, leaf.path), leaf.shape)
        for leaf in trees.leaves_of(params)
        if trees.is_inexact(leaf.value)
    }
    scores = trees.replace_leaves(params, drawn, jnp.zeros(()))
    return derivatives.at_product(scores, masks)


def _key_for(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    # Python's own hash of a string changes from process to process.
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
