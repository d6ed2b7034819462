"""Criteria: how much each weight matters. Larger = keep.

A criterion transforms a function, as ``jax.grad`` does, into a score function
``score_fn(params, batch=None, *, masks=None, key=None)``. :func:`magnitude` and
:func:`random` read no function, and are score functions themselves.
"""

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
from jprune.scores._weight import magnitude, random

__all__ = [
    "FlowReport",
    "accumulate",
    "effective_masks",
    "flow_report",
    "grasp",
    "magnitude",
    "random",
    "snip",
    "squared_gradient",
    "synflow",
    "taylor",
]
