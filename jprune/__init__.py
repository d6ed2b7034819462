"""Neural-network pruning and sparse training in JAX: one algebra for all methods.

Masks are pytrees beside the parameters, criteria transform a loss into a function that
scores weights, and pruning is a pure function from scores to masks::

    scores = jprune.scores.snip(loss_fn)(params, batch)
    masks = jprune.prune(scores, sparsity=0.9)
    params = jprune.apply_masks(params, masks)
"""

from jprune import (
    allocation,
    layouts,
    masks,
    schedules,
    scores,
    selection,
    trees,
    types,
    units,
)
from jprune.masks import apply as apply_masks
from jprune.pruning import prune, prune_iteratively

__version__ = "0.1.0"

__all__ = [
    "allocation",
    "apply_masks",
    "layouts",
    "masks",
    "prune",
    "prune_iteratively",
    "schedules",
    "scores",
    "selection",
    "trees",
    "types",
    "units",
]
