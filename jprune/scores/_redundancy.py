"""Criteria that read the weights alone, one score a channel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jprune import selection, trees
from jprune import units as units_lib
from jprune.scores import _derivatives
from jprune.types import Batch, Layouts, Masks, Params, Prunable, ScoreFn, Scores
from jprune.units import Group

_SCALES = ("scale", "gamma")


def fpgm(
    *,
    norm_rate: float = 1.0,
    prunable: Prunable = None,
    layout: Layouts = None,
) -> ScoreFn:
    """Makes the distance of a filter to all others of its layer.

    ``s_o = sum_p |W_o - W_p|_2`` over the filters p of the layer: smallest near their
    geometric median, where a filter can be replaced by the others.

    Args:
        norm_rate: the share of filters that a first step keeps by their L2 norm. The
            others have negative scores, larger for larger norms, and are out of the
            sums. With 1 there is no such step.
        prunable: which leaves have filters, see :func:`jprune.trees.prunable_leaves`.
        layout: see :func:`jprune.layouts.layouts_of`.

    Returns:
        A score function of parameters alone. Scores are of channels: for each prunable
        leaf an array of its rank with size 1 on all axes but that of its outputs (and
        of a stack of layers), for others a scalar 0; :func:`jprune.prune` takes them
        with :func:`jprune.units.filters` or :func:`jprune.couplings`.

    Raises:
        ValueError: ``norm_rate`` is not in (0, 1].

    Example:
        >>> fpgm()({"kernel": jnp.array([[0.0, 1.0, 5.0]])})["kernel"]
        Array([[6., 5., 9.]], dtype=float32)

    Reference:
        He et al., Filter pruning via geometric median for deep convolutional neural
        networks acceleration, 2019, arXiv:1811.00250. The step by norms is that of the
        authors' code (he-y/filter-pruning-geometric-median).
    """
    if not 0 < norm_rate <= 1:
        raise ValueError(f"norm_rate: {norm_rate} is not in (0, 1]")

    def score_fn(
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Scores:
        del batch, key
        product = _derivatives.at_product(params, masks)
        units = units_lib.filters(product, prunable=prunable, layout=layout)
        leaves = jax.tree.leaves(product)
        found = {
            group.leaf.place: _of_group(leaves[group.leaf.place], group, norm_rate)
            for group in units.groups
        }
        return trees.replace_leaves(params, found, jnp.zeros(()))

    return score_fn


def _of_group(kernel: Array, group: Group, norm_rate: float) -> Array:
    """Returns the scores of a leaf, with the shape of its filters' group."""
    kernel = _derivatives.at_least_float32(jnp.asarray(kernel))
    rank, stack = kernel.ndim, group.stack
    own = [a for a in range(rank) if group.shape[a] > 1 and a != stack]
    inner = [a for a in range(rank) if a not in own and a != stack]
    front = [] if stack is None else [stack]
    depth = 1 if stack is None else kernel.shape[stack]
    filters = jnp.transpose(kernel, (*front, *own, *inner))
    size = functools.reduce(lambda n, a: n * kernel.shape[a], own, 1)
    keep = size if norm_rate == 1 else selection.keep_count(size, 1 - norm_rate)
    rows = filters.reshape(depth, size, -1)
    scores = jax.vmap(functools.partial(_distances, keep=keep))(rows)
    axes = [*front, *own]
    scores = scores.reshape([kernel.shape[a] for a in axes])
    order = sorted(range(len(axes)), key=axes.__getitem__)
    return jnp.transpose(scores, order).reshape(group.shape)


@functools.partial(jax.jit, static_argnames="keep")
def _distances(
    filters: Float[Array, "filters entries"], keep: int
) -> Float[Array, " filters"]:
    norms = jnp.linalg.norm(filters, axis=1)
    large = jnp.ones(len(filters), bool)
    if keep < len(filters):
        (large,) = selection.select([norms], jnp.array([keep]))

    def total(row: Array) -> Float[Array, ""]:
        lengths = jnp.linalg.norm(filters - row, axis=1)
        return jnp.sum(jnp.where(large, lengths, 0))

    # One filter at a time: all pairs of differences may not fit.
    return jnp.where(large, jax.lax.map(total, filters), -1 / (1 + norms))


def norm_scale(
    params: Params,
    batch: Batch = None,
    *,
    masks: Masks | None = None,
    key: PRNGKeyArray | None = None,
    scales: Prunable = None,
) -> Scores:
    """Returns the absolute scales of norms, one score a channel.

    ``s_c = |gamma_c|``. A scale stands beside the kernel that it belongs to, so the
    units are the coupled channels, which hold both: ``jprune.prune(norm_scale(params),
    0.5, units=jprune.couplings(apply_fn, params, x))``. There is no function to
    differentiate, so this is a score function itself.

    Args:
        params: any pytree.
        batch: not used.
        masks: which weights live; None for all.
        key: not used.
        scales: which leaves are scales: patterns or a predicate, see
            :func:`jprune.trees.prunable_leaves`. By default those named ``scale`` or
            ``gamma``.

    Returns:
        Scores in the dtype of the parameters; leaves that are no scales have a scalar
        0.

    Raises:
        ValueError: there are no scales.

    Example:
        >>> params = {"bn": {"scale": jnp.array([-2.0, 1.0]), "bias": jnp.ones(2)}}
        >>> norm_scale(params)["bn"]["scale"]
        Array([2., 1.], dtype=float32)

    Reference:
        Liu et al., Learning efficient convolutional networks through network slimming,
        2017, arXiv:1708.06519.
    """
    del batch, key

    def is_scale(path: str, leaf: Any) -> bool:
        del leaf
        return path.split("/")[-1] in _SCALES

    product = _derivatives.at_product(params, masks)
    leaves = trees.prunable_leaves(product, is_scale if scales is None else scales)
    found = {leaf.place: jnp.abs(leaf.value) for leaf in leaves}
    return trees.replace_leaves(params, found, jnp.zeros(()))
