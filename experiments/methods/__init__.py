"""One function a paper: ``method(task, sparsity, *, key, ...) -> Outcome``.

All methods also take ``epochs`` (of each phase of training) and ``on_epoch`` (for
progress), and never read the test stream. Those that prune the trained network take it
as ``trained``, or train it.

====================  =================================================  ==============
method                masks from                                         training
====================  =================================================  ==============
``dense``             (none)                                             one phase
``random``            chance                                             one phase
``magnitude``         trained weights                                    dense + one
``snip``              gradient of one batch at initialisation            one phase
``iterative_snip``    the same, in rounds                                one phase
``grasp``             Hessian-gradient product at initialisation         one phase
``synflow``           synaptic flow in rounds, no data                   one phase
``force``             gradient in rounds, with revival                   one phase
``obd``               curvature and weights after training               dense + one
``static``            chance, with ERK densities                         one phase
``set_``              chance, then smallest out, random in               one phase
``rigl``              chance, then smallest out, steepest in             one phase
``rigl_itop``         the same, rarely, much and to the end              one phase
``dsr``               chance, then under one threshold out, random in    one phase
``granet``            gradual global pruning with regeneration           one phase
``gradual_magnitude`` magnitude in every layer, along a cubic schedule   one phase
====================  =================================================  ==============
"""

from experiments.methods._after_training import magnitude, obd
from experiments.methods._initialization import (
    force,
    grasp,
    iterative_snip,
    random,
    snip,
    synflow,
)
from experiments.methods._phases import dense
from experiments.methods._sparse_training import (
    dsr,
    gradual_magnitude,
    granet,
    rigl,
    rigl_itop,
    set_,
    static,
)

# The order of rows in tables, of lines in legends and of their colours.
__all__ = [  # noqa: RUF022
    "dense",
    "random",
    "magnitude",
    "snip",
    "iterative_snip",
    "grasp",
    "synflow",
    "force",
    "obd",
    "static",
    "set_",
    "rigl",
    "rigl_itop",
    "dsr",
    "granet",
    "gradual_magnitude",
]
