"""Criteria: how much each weight matters. Larger = keep.

A criterion transforms a function, as ``jax.grad`` does, into a score function
``score_fn(params, batch=None, *, masks=None, key=None)``. :func:`magnitude` and
:func:`random` read no function, and are score functions themselves.

The criteria of channels, in ``_activation.py``, ``_gate.py`` and ``_redundancy.py``,
have one score an output channel of a kernel: an array of the kernel's rank with size 1
on all other axes, and a scalar where there is none.
:func:`jprune.prune` takes it with units that are channels::

    scores = jprune.scores.taylor_gate(loss_fn)(params, batch)
    masks = jprune.prune(scores, 0.5, units=jprune.couplings(apply_fn, params, x))
"""

from jprune.scores._activation import (
    activation_entropy,
    activation_variance,
    apoz,
    hrank,
    mean_activation,
)
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
from jprune.scores._gate import (
    channel_fisher,
    group_fisher,
    taylor_activation,
    taylor_gate,
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
from jprune.scores._redundancy import fpgm, norm_scale
from jprune.scores._weight import magnitude, random

__all__ = [
    "FlowReport",
    "InverseCurvature",
    "ObsResult",
    "accumulate",
    "activation_entropy",
    "activation_variance",
    "apoz",
    "channel_fisher",
    "effective_masks",
    "exact_diagonal",
    "fisher_diagonal",
    "flow_report",
    "fpgm",
    "gauss_newton_diagonal",
    "grasp",
    "group_fisher",
    "hrank",
    "hutchinson_diagonal",
    "inverse_fisher",
    "inverse_gauss_newton",
    "inverse_hessian",
    "magnitude",
    "mean_activation",
    "norm_scale",
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
    "taylor_activation",
    "taylor_gate",
]
