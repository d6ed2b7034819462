"""Sparse training in Optax: masks that live in the optimiser.

``sparse(optax.chain(rigl(0.9), optax.adam(1e-3)))`` is an optimiser like any other. It
keeps its masks in its state, and after every ``optax.apply_updates`` the weights
outside them are exactly zero.
"""

from jprune.sparse_training._ac_dc import ac_dc
from jprune.sparse_training._deep_r import deep_r
from jprune.sparse_training._dsr import dsr
from jprune.sparse_training._dynamic import dynamic
from jprune.sparse_training._gradual import gradual_magnitude, granet
from jprune.sparse_training._latent import (
    dpf,
    dynamic_network_surgery,
    sr_ste,
    straight_through,
    top_kast,
)
from jprune.sparse_training._rigl import rigl, rigl_itop
from jprune.sparse_training._rules import (
    Dropped,
    Event,
    anywhere,
    least_sensitive,
    smallest,
    smallest_of_each_sign,
    steepest,
)
from jprune.sparse_training._set import set_, set_itop
from jprune.sparse_training._snfs import snfs
from jprune.sparse_training._soft import gsm, soft_filter
from jprune.sparse_training._sparse import sparse
from jprune.sparse_training._state import (
    MaskState,
    SparseState,
    Storage,
    check,
    distance_from_start,
    exploration_rate,
    forward_params,
    masks_of,
    survival_of_grown,
)
from jprune.sparse_training._static import static
from jprune.sparse_training._timing import (
    cosine_fraction,
    every,
    inverse_power_fraction,
    linear_fraction,
)

__all__ = [
    "Dropped",
    "Event",
    "MaskState",
    "SparseState",
    "Storage",
    "ac_dc",
    "anywhere",
    "check",
    "cosine_fraction",
    "deep_r",
    "distance_from_start",
    "dpf",
    "dsr",
    "dynamic",
    "dynamic_network_surgery",
    "every",
    "exploration_rate",
    "forward_params",
    "gradual_magnitude",
    "granet",
    "gsm",
    "inverse_power_fraction",
    "least_sensitive",
    "linear_fraction",
    "masks_of",
    "rigl",
    "rigl_itop",
    "set_",
    "set_itop",
    "smallest",
    "smallest_of_each_sign",
    "snfs",
    "soft_filter",
    "sparse",
    "sr_ste",
    "static",
    "steepest",
    "straight_through",
    "survival_of_grown",
    "top_kast",
]
