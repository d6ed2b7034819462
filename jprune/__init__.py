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
    storage,
    tracing,
    trees,
    types,
    units,
)
from jprune._version import __version__
from jprune.masks import apply as apply_masks
from jprune.pruning import prune, prune_iteratively
from jprune.sparse_training import (
    ac_dc,
    check,
    deep_r,
    dpf,
    dsr,
    dynamic_network_surgery,
    forward_params,
    gradual_magnitude,
    granet,
    gsm,
    masks_of,
    rigl,
    rigl_itop,
    set_,
    set_itop,
    snfs,
    soft_filter,
    sparse,
    sr_ste,
    static,
    straight_through,
    top_kast,
)
from jprune.storage import load, load_shrunk, save
from jprune.tracing import cost, couplings, gate, intercept, shrink, taps

__all__ = [
    "__version__",
    "ac_dc",
    "allocation",
    "apply_masks",
    "check",
    "cost",
    "couplings",
    "deep_r",
    "dpf",
    "dsr",
    "dynamic_network_surgery",
    "forward_params",
    "gate",
    "gradual_magnitude",
    "granet",
    "gsm",
    "intercept",
    "layouts",
    "load",
    "load_shrunk",
    "masks",
    "masks_of",
    "prune",
    "prune_iteratively",
    "rigl",
    "rigl_itop",
    "save",
    "schedules",
    "scores",
    "selection",
    "set_",
    "set_itop",
    "shrink",
    "snfs",
    "soft_filter",
    "sparse",
    "sparse_training",
    "sr_ste",
    "static",
    "storage",
    "straight_through",
    "taps",
    "top_kast",
    "tracing",
    "trees",
    "types",
    "units",
]
