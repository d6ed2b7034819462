"""Sparse training in Optax: masks that live in the optimiser.

``sparse(optax.chain(rigl(0.9), optax.adam(1e-3)))`` is an optimiser like any other. It
keeps its masks in its state, and after every ``optax.apply_updates`` the weights
outside them are exactly zero.
"""

from jprune.sparse_training._dsr import dsr
from jprune.sparse_training._dynamic import dynamic
from jprune.sparse_training._gradual import gradual_magnitude, granet
from jprune.sparse_training._rigl import rigl, rigl_itop
from jprune.sparse_training._rules import (
    Dropped,
    Event,
    anywhere,
    smallest,
    smallest_of_each_sign,
    steepest,
)
from jprune.sparse_training._set import set_, set_itop
from jprune.sparse_training._sparse import sparse
from jprune.sparse_training._state import (
    MaskState,
    SparseState,
    check,
    distance_from_start,
    exploration_rate,
    forward_params,
    masks_of,
    survival_of_grown,
)
from jprune.sparse_training._static import static
from jprune.sparse_training._timing import cosine_fraction, every

__all__ = [
    "Dropped",
    "Event",
    "MaskState",
    "SparseState",
    "anywhere",
    "check",
    "cosine_fraction",
    "distance_from_start",
    "dsr",
    "dynamic",
    "every",
    "exploration_rate",
    "forward_params",
    "gradual_magnitude",
    "granet",
    "masks_of",
    "rigl",
    "rigl_itop",
    "set_",
    "set_itop",
    "smallest",
    "smallest_of_each_sign",
    "sparse",
    "static",
    "steepest",
    "survival_of_grown",
]
