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
    sparse_training,
    trees,
    types,
    units,
)
from jprune.masks import apply as apply_masks
from jprune.pruning import prune, prune_iteratively
from jprune.sparse_training import (
    check,
    dsr,
    forward_params,
    gradual_magnitude,
    granet,
    masks_of,
    rigl,
    rigl_itop,
    set_,
    set_itop,
    sparse,
    static,
)

__version__ = "0.1.0"

__all__ = [
    "allocation",
    "apply_masks",
    "check",
    "dsr",
    "forward_params",
    "gradual_magnitude",
    "granet",
    "layouts",
    "masks",
    "masks_of",
    "prune",
    "prune_iteratively",
    "rigl",
    "rigl_itop",
    "schedules",
    "scores",
    "selection",
    "set_",
    "set_itop",
    "sparse",
    "sparse_training",
    "static",
    "trees",
    "types",
    "units",
]
