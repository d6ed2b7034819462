"""Which channels of a network are coupled: read from its jaxpr."""

from typing import Any

import numpy as np

from jprune import trees
from jprune._groups import Units
from jprune.tracing import _channels, _trace, _values
from jprune.types import ApplyFn, Layouts, Params, Prunable

_HOW = ("sum", "mean", "max", "l1", "l2")
_STATISTICS = ("mean", "var", "average", "hidden", "counter", "count")


def couplings(
    apply_fn: ApplyFn,
    params: Params,
    *inputs: Any,
    mutable: Prunable = None,
    statistics: Prunable = None,
    how: str = "sum",
    layout: Layouts = None,
    unknown: str = "error",
) -> Units:
    """Returns the groups of channels that must be removed together.

    ``apply_fn(params, *inputs)`` is traced, not run; shapes are enough. A unit is a set
    of positions of axes of parameters: what makes a channel, shifts and scales it, and
    reads it, wherever residual connections, concatenations, reshapes and heads carry
    it. When all of a unit's entries are zero, the network computes what it would
    compute without them. Units with entries in the same axes of the same leaves form a
    group::

        units = jprune.couplings(apply_fn, params, x)
        masks = jprune.prune(scores, 0.5, units=units)
        small_apply_fn, small_params = jprune.shrink(apply_fn, params, masks, x)

    At least one unit of each group survives any pruning; ``units._replace(least=8)``
    asks for more.

    What the network would notice is pinned: a channel that is an output, that computed
    indices point into, or that is not zero when its parameters are and is summed over,
    as in a softmax over channels or a variance in two passes.

    Args:
        apply_fn: any function of JAX.
        params: any pytree of arrays or their shapes, such as all variables of a model.
        *inputs: what else the function takes: arrays or shapes.
        mutable: which results are state, such as new BatchNorm statistics, and shrink
            with the network: path patterns, or a predicate ``(path, shape) -> bool``.
            All others keep their shape.
        statistics: which leaves of ``params`` are never masked, but cut with the
            channels that they describe. By default what is not floating, stands under
            ``batch_stats``, or is named as the statistics of Flax's and Haiku's norms.
        how: how the scores of a unit's entries are pooled: ``"sum"``, ``"mean"``,
            ``"max"``, ``"l1"`` or ``"l2"``.
        layout: the axes of the first leaf of each group, see
            :func:`jprune.layouts.layouts_of`.
        unknown: ``"error"``, or ``"pin"`` to keep all that a primitive without a rule
            touches.

    Returns:
        Units. ``units.pinned`` are the channels that cannot be removed, with reasons;
        :func:`jprune.tracing.summary` prints both.

    Raises:
        NotImplementedError: a primitive has no rule.
        ValueError: the function has effects, nothing can be removed, a pattern matches
            nothing, or ``how`` or ``unknown`` is not among the choices.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply_fn(params, x):
        ...     h = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"])
        ...     return h @ params["out"]["kernel"]
        >>> kernels = jnp.ones((3, 4)), jnp.ones((4, 2))
        >>> params = {"in": {"kernel": kernels[0], "bias": jnp.ones(4)},
        ...           "out": {"kernel": kernels[1]}}
        >>> (group,) = couplings(apply_fn, params, jnp.ones((1, 3))).groups
        >>> [(member.leaf.path, member.axis) for member in group.members]
        [('in/bias', 0), ('in/kernel', 1), ('out/kernel', 0)]
    """
    if how not in _HOW:
        raise ValueError(f"how: {how!r} is none of {_HOW}")
    still = trees.selector(
        statistics, trees.leaves_of(params), "statistics", is_statistic
    )

    def background(leaf: trees.Leaf, axis: int) -> np.ndarray:
        return _values.UNKNOWN if still(leaf) else np.zeros(1)

    traced = _trace.trace(
        apply_fn, params, inputs, background, mutable=mutable, unknown=unknown
    )
    own = [leaf for leaf in traced.leaves if not still(leaf)]
    free, pinned = _channels.clusters(traced, {leaf.place for leaf in own})
    if not free:
        raise ValueError(
            "apply_fn: no channel of it can be removed:\n"
            + _channels.reasons_of(pinned)
        )
    groups = tuple(_channels.group_of(members, layout) for members in free)
    return Units(groups, how, least=1, tree=trees.shapes_of(params), pinned=pinned)


def is_statistic(leaf: trees.Leaf) -> bool:
    """Whether a leaf is, by its name or dtype, no trained parameter."""
    names = leaf.path.split("/")
    named = "batch_stats" in names or names[-1] in _STATISTICS
    return named or not trees.is_inexact(leaf.value)
