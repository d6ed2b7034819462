"""Criteria: how much each weight matters. Larger = keep.

A criterion transforms a function, as ``jax.grad`` does, into a score function
``score_fn(params, batch=None, *, masks=None, key=None)``. :func:`magnitude` and
:func:`random` read no function, and are score functions themselves.
"""

from jprune.scores._curvature import (
    exact_diagonal,
    fisher_diagonal,
    gauss_newton_diagonal,
    hutchinson_diagonal,
    obd,
)
from jprune.scores._flow import (
    FlowReport,
    effective_masks,
    flow_report,
    synflow,
)
from jprune.scores._gradient import (
    accumulate,
    grasp,
    snip,
    squared_gradient,
    taylor,
)
from jprune.scores._inverse_curvature import (
    InverseCurvature,
    inverse_fisher,
    inverse_gauss_newton,
    inverse_hessian,
)
from jprune.scores._obs import ObsResult, obs, obs_prune, obs_saliency, obs_update
from jprune.scores._weight import magnitude, random

__all__ = [
    "FlowReport",
    "InverseCurvature",
    "ObsResult",
    "accumulate",
    "effective_masks",
    "exact_diagonal",
    "fisher_diagonal",
    "flow_report",
    "gauss_newton_diagonal",
    "grasp",
    "hutchinson_diagonal",
    "inverse_fisher",
    "inverse_gauss_newton",
    "inverse_hessian",
    "magnitude",
    "obd",
    "obs",
    "obs_prune",
    "obs_saliency",
    "obs_update",
    "random",
    "snip",
    "squared_gradient",
    "synflow",
    "taylor",
]
