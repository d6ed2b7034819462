"""Criteria that read how a signal can flow through the network.

They run the model on inputs of ones with every parameter made positive, so that nothing
cancels, and ask what passes through each weight. No data is needed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jprune import masks as masks_lib
from jprune import trees
from jprune.scores import _derivatives as derivatives
from jprune.types import ApplyFn, Batch, Masks, Params, ScoreFn, Scores

# What is added to a signal, rather than multiplied with it.
_ADDITIVE = frozenset(("bias", "b", "beta", "offset", "shift", "mean"))

# Signals are kept below 2^_LARGEST; a dry run at 2^-_PROBE of the input measures them.
_LARGEST = 100
_PROBE = 120


def synflow(apply_fn: ApplyFn) -> ScoreFn:
    """Makes the synaptic flow: what passes through a weight, from inputs to outputs.

    ``R = sum of the outputs`` for inputs of ones with every parameter replaced by its
    absolute value, and ``s = |w| dR/d|w|``. In a network of continuous, homogeneous
    units without biases the scores of a neuron's incoming weights and of its outgoing
    ones have the same sum, and those of every layer sum to R. Scores of removed weights
    are 0.

    *Overflow.* R grows with every layer, to 2^229 for a ResNet-56 of width 16. Where it
    exceeds 2^100, the inputs and all that is added to the signal (leaves named
    ``bias``, ``b``, ``beta``, ``offset``, ``shift`` or ``mean``; without a name, those
    of rank 1) are scaled down by a power of two, and so is the derivative. In a
    positive network R is linear in these together, so the scores are scaled by a power
    of two and nothing else, and no ranking changes. This serves up to about 2^240 in
    float32, where scores 2^120 below the largest vanish. Beyond, the scores are NaN,
    not silently wrong.

    *BatchNorm.* ``apply_fn`` must use stored statistics: those of a batch of ones would
    destroy the flow. Statistics among ``params`` are made absolute with all else, as in
    the authors' code; closed over, they are used as they are, and nothing is changed if
    the means are 0, as at initialisation.

    Args:
        apply_fn: ``(params, inputs) -> outputs``, an array.

    Returns:
        A score function whose ``batch`` is an array, or a pytree, with the shape of
        inputs; its values do not matter and one example is enough. Scores have the
        parameters' dtype, float32 at least.

    Example:
        >>> apply_fn = lambda params, x: x @ params["w"]
        >>> synflow(apply_fn)({"w": jnp.array([[1.0], [-2.0]])}, jnp.zeros((1, 2)))
        {'w': Array([[1.],
               [2.]], dtype=float32)}

    Reference:
        Tanaka et al., Pruning neural networks without any data by iteratively
        conserving synaptic flow, 2020, arXiv:2006.05467.

    Differs from the paper: the paper's networks have no biases; here, as in the
    authors' code (ganguli-lab/Synaptic-Flow), absolute biases take part in the flow.
    """

    def score_fn(
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Scores:
        del key
        indices = derivatives.floating(params)
        positive = jax.tree.map(_absolute, derivatives.at_product(params, masks))
        values, apply_of = derivatives.of_leaves(apply_fn, positive, indices)
        additive = _additive(params)
        ones = jax.tree.map(jnp.ones_like, batch)

        def flow(values: list[Array], scale: Array) -> Array:
            scaled = [
                v * scale.astype(v.dtype) if i in additive else v
                for i, v in zip(indices, values, strict=True)
            ]
            inputs = jax.tree.map(
                lambda x: x * scale.astype(x.dtype) if trees.is_inexact(x) else x, ones
            )
            return _total(apply_of(scaled, inputs, None))

        def derive(scale: Array) -> tuple[Array, Callable[[], list[Array]]]:
            total, pull_back = jax.vjp(lambda values: flow(values, scale), values)
            return total, lambda: pull_back(scale.astype(total.dtype))[0]

        def rescaled() -> tuple[Array, list[Array]]:
            total, derived = derive(_scale_of(lambda scale: flow(values, scale)))
            return total, derived()

        # Nearly all networks are in range as they are, and spare the dry run.
        total, derived = derive(jnp.ones(()))
        total, derived = jax.lax.cond(
            total < 2.0**_LARGEST, lambda: (total, derived()), rescaled
        )
        valid = jnp.isfinite(total)
        scores = {
            i: jnp.where(valid, derivatives.at_least_float32(v * d), jnp.nan)
            for i, v, d in zip(indices, values, derived, strict=True)
        }
        return trees.replace_leaves(params, scores, jnp.zeros(()))

    return score_fn


class FlowReport(NamedTuple):
    """What is left of each layer, counted as weights and as paths.

    Attributes:
        kept: the number of weights that a mask keeps, by path.
        active: the number of those that lie on a path from an input to an output.
        sizes: the number of weights, by path.
        collapsed: the paths of layers with no weight left.
        disconnected: the paths of layers with weights but none on a path.
    """

    kept: dict[str, int]
    active: dict[str, int]
    sizes: dict[str, int]
    collapsed: tuple[str, ...]
    disconnected: tuple[str, ...]

    @property
    def density(self) -> float:
        """The kept fraction of all prunable weights."""
        return sum(self.kept.values()) / max(sum(self.sizes.values()), 1)

    @property
    def effective_density(self) -> float:
        """The active fraction of all prunable weights."""
        return sum(self.active.values()) / max(sum(self.sizes.values()), 1)


def effective_masks(
    apply_fn: ApplyFn, params: Params, masks: Masks, inputs: PyTree
) -> Masks:
    """Returns the masks without the weights that lie on no path.

    A weight is *active* if a path of kept weights leads from an input through it to an
    output; its derivative in a network of positive weights is then positive. Biases
    carry nothing, as they are on no path from an input. Norms pass their inputs on.

    Kept weights of the test network have one value a layer, about the inverse of their
    fan-in, so that signals neither overflow nor fade with depth.

    Args:
        apply_fn: ``(params, inputs) -> outputs``, in inference mode, whose activations
            pass positive signals on (ReLU and its kin; no softmax).
        params: the parameters, whose values do not matter.
        masks: the masks.
        inputs: an array, or a pytree, with the shape of inputs.

    Returns:
        Masks of the parameters' full shapes.

    Raises:
        ValueError: the masks do not fit.

    Example:
        >>> apply_fn = lambda params, x: x @ params[0] @ params[1]
        >>> params = [jnp.ones((1, 2)), jnp.ones((2, 1))]
        >>> masks = [jnp.array([[True, False]]), jnp.array([[False], [True]])]
        >>> effective = effective_masks(apply_fn, params, masks, jnp.ones((1, 1)))
        >>> [mask.tolist() for mask in effective]
        [[[False, False]], [[False], [False]]]

    Reference:
        Vysogorets and Kempe, Connectivity matters: neural network pruning through the
        lens of effective sparsity, 2023, arXiv:2107.02306.

    Differs from the paper: the authors' code uses ``|w|`` and drops norms by hand; ones
    find the paths of weights that happen to be 0 as well.
    """
    masks_lib.check(masks, params)
    additive = _additive(params)
    flat_masks = jax.tree.leaves(masks)

    def test_value(leaf: trees.Leaf) -> Any:
        if not trees.is_inexact(leaf.value):
            return leaf.value
        value = jnp.asarray(leaf.value)
        if leaf.place in additive:
            return jnp.zeros_like(value)
        mask = flat_masks[leaf.place]
        if np.ndim(mask) == 0:
            return jnp.ones_like(value)
        kept = jnp.broadcast_to(mask, leaf.shape).astype(value.dtype)
        # Any positive value finds the same paths; this one stays in range.
        return kept / jnp.maximum(jnp.sum(kept) / max(leaf.shape), 1)

    test = {leaf.place: test_value(leaf) for leaf in trees.leaves_of(params)}
    scores = synflow(apply_fn)(trees.replace_leaves(params, test, None), inputs)
    active = {
        leaf.place: leaf.value > 0
        for leaf in trees.leaves_of(scores)
        if np.ndim(flat_masks[leaf.place])
    }
    return trees.replace_leaves(params, active, masks_lib.never_pruned())


def flow_report(
    apply_fn: ApplyFn, params: Params, masks: Masks, inputs: PyTree
) -> FlowReport:
    """Reports layer collapse: the layers, and the weights, that masks cut off.

    To keep at least n weights in every layer, prune with
    :func:`jprune.allocation.with_floor`.

    Args:
        apply_fn: see :func:`effective_masks`.
        params: the parameters.
        masks: the masks.
        inputs: an array, or a pytree, with the shape of inputs.

    Example:
        >>> apply_fn = lambda params, x: x @ params[0] @ params[1]
        >>> params = [jnp.ones((1, 2)), jnp.ones((2, 1))]
        >>> masks = [jnp.array([[True, False]]), jnp.array([[False], [True]])]
        >>> flow_report(apply_fn, params, masks, jnp.ones((1, 1))).disconnected
        ('0', '1')
    """
    active_masks = effective_masks(apply_fn, params, masks, inputs)
    kept, active = (
        {path: int(n) for path, n in masks_lib.counts(m, params).items()}
        for m in (masks, active_masks)
    )
    return FlowReport(
        kept=kept,
        active=active,
        sizes=masks_lib.sizes(masks, params),
        collapsed=tuple(path for path, n in kept.items() if n == 0),
        disconnected=tuple(path for path, n in kept.items() if n and not active[path]),
    )


def _scale_of(flow: Any) -> Float[Array, ""]:
    """Returns the power of two by which inputs are scaled to keep signals in range."""
    probe = flow(jnp.asarray(2.0**-_PROBE))
    exponent = jnp.log2(probe.astype(jnp.float32)) + _PROBE
    # An overflow even there stays one, and is reported by the scores.
    excess = jnp.clip(jnp.ceil(exponent - _LARGEST), 0, _PROBE)
    return jnp.ldexp(jnp.ones(()), -excess.astype(jnp.int32))


def _total(outputs: Any) -> Array:
    if not hasattr(outputs, "dtype"):
        raise TypeError(
            f"apply_fn: it returned a {type(outputs).__name__}; let it return the "
            "array of outputs alone"
        )
    return jnp.sum(outputs)


def _absolute(value: Any) -> Any:
    return jnp.abs(value) if trees.is_inexact(value) else value


def _additive(params: Params) -> set[int]:
    """Returns the indices of the leaves that are added to a signal."""

    def adds(leaf: trees.Leaf) -> bool:
        name = leaf.path.split("/")[-1]
        return name in _ADDITIVE or (name.isdigit() and len(leaf.shape) == 1)

    return {leaf.place for leaf in trees.leaves_of(params) if adds(leaf)}
