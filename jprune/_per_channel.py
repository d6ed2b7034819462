"""Pooling of scores that are one number a channel, not one an entry.

Such a score has the rank of its leaf and size 1 on every axis but those that are
channels: ``(1, 1, 1, out)`` for the outputs of an HWIO kernel. A leaf without scores
has a scalar.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jprune._groups import Group


def fits(shape: Sequence[int], leaf_shape: Sequence[int]) -> bool:
    """Whether scores of a shape are scores of channels of a leaf, or none.

    Example:
        >>> fits((1, 4), (3, 4)), fits((), (3, 4)), fits((2, 4), (3, 4))
        (True, True, False)
    """
    if not shape:
        return True
    pairs = zip(shape, leaf_shape, strict=False)
    return len(shape) == len(leaf_shape) and all(n in (1, full) for n, full in pairs)


def pool(group: Group, scores: Sequence[Array], how: str) -> Array:
    """Returns the scores of a group's units from those of the channels in them.

    Units of one leaf are the channels. Of coupled channels, those in a unit are pooled:
    a score counts where the unit has positions of an axis that is a channel's.

    Raises:
        ValueError: the units of one leaf are not the channels that have scores, or a
            coupled unit has no channel with a score.
    """
    if not group.members:
        (score,) = scores
        if score.shape != group.shape:
            raise ValueError(
                f"scores: those of {group.leaf.path!r} have shape {score.shape}, one a "
                f"channel, but its units have shape {group.shape}"
            )
        return score
    (size,) = group.shape
    by_leaf = {
        leaf.place: score for leaf, score in zip(group.leaves, scores, strict=True)
    }
    dtype = jnp.result_type(jnp.float32, *scores)
    total = jnp.full(size, -jnp.inf if how == "max" else 0.0, dtype)
    counts = np.zeros(size, np.int64)
    for leaf, axis, units in group.members:
        score = by_leaf[leaf.place].astype(dtype)
        if score.ndim == 0 or score.shape[axis] != leaf.shape[axis]:
            continue
        rest = tuple(a for a in range(score.ndim) if a != axis)
        if how == "l1":
            score = jnp.abs(score)
        elif how == "l2":
            score = jnp.square(score)
        # What belongs to no unit is dropped.
        places = np.where(units < 0, size, units)
        if how == "max":
            total = total.at[places].max(jnp.max(score, rest), mode="drop")
        else:
            total = total.at[places].add(jnp.sum(score, rest), mode="drop")
        each = score.size // max(score.shape[axis], 1)
        counts += each * np.bincount(places, minlength=size + 1)[:size]
    if not counts.all():
        paths = sorted({member.leaf.path for member in group.members})
        raise ValueError(
            f"scores: {int((counts == 0).sum())} of {size} coupled units of {paths} "
            "have no channel with a score; leave their group out of `units.groups`"
        )
    if how == "l2":
        return jnp.sqrt(total)
    return total / counts if how == "mean" else total
