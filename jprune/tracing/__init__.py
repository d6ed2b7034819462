"""What a network is, read from its jaxpr: couplings, shrinking, costs, interception.

The only code that reads jaxprs. A function of JAX is traced and interpreted with one
table of rules for primitives, so no model needs hooks or annotations::

    units = jprune.couplings(apply_fn, params, x)
    print(jprune.tracing.summary(units))
    masks = jprune.prune(scores, 0.5, units=units)
    small_apply_fn, small_params = jprune.shrink(apply_fn, params, masks, x)

    inputs = jprune.taps(apply_fn, params, x)           # of each kernel, by its path
    gated_fn, gates = jprune.gate(apply_fn, params, x)  # one for each output channel
"""

# Each of the first enters its rules into the table.
from jprune.tracing import (  # noqa: F401
    _rules_contraction,
    _rules_control,
    _rules_derivatives,
    _rules_elementwise,
    _rules_index,
    _rules_layout,
    _rules_reshape,
)
from jprune.tracing._channels import summary
from jprune.tracing._costs import Cost, CostRow, cost, training_flops
from jprune.tracing._couplings import couplings
from jprune.tracing._intercept import intercept, sites
from jprune.tracing._shrink import Shrunk, shrink
from jprune.tracing._sites import Site
from jprune.tracing._taps import cotangents, gate, taps
from jprune.tracing._width_costs import WidthCost, cost_of_widths

__all__ = [
    "Cost",
    "CostRow",
    "Shrunk",
    "Site",
    "WidthCost",
    "cost",
    "cost_of_widths",
    "cotangents",
    "couplings",
    "gate",
    "intercept",
    "shrink",
    "sites",
    "summary",
    "taps",
    "training_flops",
]
