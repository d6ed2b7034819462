"""Criteria that read activations: one score a channel.

They take ``apply_fn(params, inputs)``, look at what follows each kernel by
:func:`jprune.intercept`, and return scores of channels: for each kernel an array of its
rank with size 1 on all axes but that of its output channels. Units of channels take
them::

    scores = jprune.scores.apoz(apply_fn)(params, inputs)
    masks = jprune.prune(scores, 0.5, units=jprune.units.filters(params))
    masks = jprune.prune(scores, 0.5, units=jprune.couplings(apply_fn, params, inputs))

A kernel that is used several times has the mean over its uses, and so has one in a loop
over its steps. The first axis of a value that is not a channel counts as that of the
examples.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jprune import tracing, trees
from jprune.scores import _channel, _derivatives
from jprune.scores._channel import Sites
from jprune.tracing import Site
from jprune.types import ApplyFn, Batch, Masks, Params, ScoreFn, Scores

# (site, value) -> one number a channel.
_Statistic = Callable[[Site, Array], Float[Array, " channels"]]


def apoz(
    apply_fn: ApplyFn, *, sites: Sites = None, at: str = "after_activation"
) -> ScoreFn:
    """Makes the share of activations that are not zero.

    ``s_c = 1 - APoZ_c``, with APoZ the average percentage of zeros of a channel over
    examples and positions, as a fraction.

    Args:
        apply_fn: ``(params, inputs) -> outputs``.
        sites: which kernels, see :func:`jprune.intercept`; all unless given.
        at: the place of the values, see :func:`jprune.intercept`. Where there is no
            activation, the last value before it.

    Returns:
        A score function ``(params, inputs, *, masks=None)`` of scores of channels,
        float32 or wider; leaves without scores hold a scalar 0. It raises ValueError
        for a kernel of which it cannot be told what makes a channel.

    Example:
        >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w"])
        >>> params = {"w": jnp.array([[1.0, -1.0]])}
        >>> apoz(apply_fn)(params, jnp.array([[1.0], [2.0], [-3.0]]))["w"]
        Array([[0.6666667 , 0.33333334]], dtype=float32)

    Reference:
        Hu et al., Network trimming: a data-driven neuron pruning approach towards
        efficient deep architectures, 2016, arXiv:1607.03250.

    Differs from the paper: it removes the largest APoZ; this is one minus it.
    """

    def statistic(site: Site, value: Array) -> Array:
        values = _channel.by_channel(site, value)
        return jnp.mean(values != 0, (0, 1), dtype=values.dtype)

    return _criterion(apply_fn, statistic, sites, at)


def mean_activation(
    apply_fn: ApplyFn, *, sites: Sites = None, at: str = "after_activation"
) -> ScoreFn:
    """Makes the mean absolute activation.

    ``s_c = mean |a|`` over examples and positions.

    Args:
        apply_fn: as :func:`apoz`.
        sites: as :func:`apoz`.
        at: as :func:`apoz`.

    Returns:
        A score function, as :func:`apoz` makes.

    Example:
        >>> apply_fn = lambda params, x: jnp.tanh(x @ params["w"])
        >>> params = {"w": jnp.array([[0.0, -9.0]])}
        >>> mean_activation(apply_fn)(params, jnp.array([[1.0], [-2.0]]))["w"]
        Array([[0., 1.]], dtype=float32)

    Reference:
        Tan and Motani, DropNet: reducing neural network complexity via iterative
        pruning, 2020, https://proceedings.mlr.press/v119/tan20a.html.
    """

    def statistic(site: Site, value: Array) -> Array:
        return jnp.mean(jnp.abs(_channel.by_channel(site, value)), (0, 1))

    return _criterion(apply_fn, statistic, sites, at)


def activation_variance(
    apply_fn: ApplyFn, *, sites: Sites = None, at: str = "after_activation"
) -> ScoreFn:
    """Makes the variance of activations over examples and positions.

    Args:
        apply_fn: as :func:`apoz`.
        sites: as :func:`apoz`.
        at: as :func:`apoz`.

    Returns:
        A score function, as :func:`apoz` makes.

    Example:
        >>> apply_fn = lambda params, x: x @ params["w"]
        >>> params = {"w": jnp.array([[0.0, 2.0]])}
        >>> activation_variance(apply_fn)(params, jnp.array([[1.0], [3.0]]))["w"]
        Array([[0., 4.]], dtype=float32)

    Reference:
        Molchanov et al., Pruning convolutional neural networks for resource efficient
        inference, 2017, arXiv:1611.06440, which compares with the standard deviation:
        the same ranking.
    """

    def statistic(site: Site, value: Array) -> Array:
        return jnp.var(_channel.by_channel(site, value), (0, 1))

    return _criterion(apply_fn, statistic, sites, at)


def activation_entropy(
    apply_fn: ApplyFn,
    *,
    bins: int = 20,
    sites: Sites = None,
    at: str = "after_activation",
) -> ScoreFn:
    """Makes the entropy of a channel's mean activation over examples.

    ``s_c = -sum_b p_b log p_b``, where ``p_b`` is the share of examples whose mean over
    positions falls into bin b, of ``bins`` equal ones from the smallest mean of the
    channel to the largest. A channel that says the same of all examples has 0.

    Args:
        apply_fn: as :func:`apoz`.
        bins: the number of bins.
        sites: as :func:`apoz`.
        at: as :func:`apoz`.

    Returns:
        A score function, as :func:`apoz` makes.

    Raises:
        ValueError: ``bins`` is below 1.

    Example:
        >>> apply_fn = lambda params, x: x @ params["w"]
        >>> params = {"w": jnp.array([[0.0, 1.0]])}
        >>> x = jnp.array([[1.0], [2.0]])
        >>> activation_entropy(apply_fn, bins=2)(params, x)["w"]
        Array([[0.       , 0.6931472]], dtype=float32)

    Reference:
        Luo and Wu, An entropy-based pruning method for CNN compression, 2017,
        arXiv:1706.05791.
    """
    if bins < 1:
        raise ValueError(f"bins: {bins} is below 1")

    def entropy(means: Float[Array, " examples"]) -> Float[Array, ""]:
        low, high = jnp.min(means), jnp.max(means)
        width = jnp.where(high > low, high - low, 1)
        places = jnp.floor((means - low) / width * bins).astype(int)
        # The largest belongs to the last bin.
        counts = jnp.zeros(bins, means.dtype).at[jnp.minimum(places, bins - 1)].add(1)
        return jnp.sum(jax.scipy.special.entr(counts / means.size))

    def statistic(site: Site, value: Array) -> Array:
        means = jnp.mean(_channel.by_channel(site, value), axis=1)
        return jax.vmap(entropy, 1)(means)

    return _criterion(apply_fn, statistic, sites, at)


def hrank(
    apply_fn: ApplyFn,
    *,
    tolerance: float | None = None,
    sites: Sites = None,
    at: str = "after_activation",
) -> ScoreFn:
    """Makes the mean rank of a channel's feature maps.

    ``s_c = mean_n rank(a_nc)`` of the maps as matrices, over the examples.

    Args:
        apply_fn: as :func:`apoz`.
        tolerance: singular values up to it, relative to the largest of the map, count
            as zero; the larger side of the map times the machine precision unless
            given.
        sites: as :func:`apoz`.
        at: as :func:`apoz`.

    Returns:
        A score function, as :func:`apoz` makes. A map with a side of 1 has a rank of 0
        or 1, and a dense layer has no map: where the values are not two-dimensional
        maps of at least 2 by 2, the score is the mean absolute activation. So compare
        scores within a layer, as the paper does: by an allocation that spreads the
        budget over layers.

    Example:
        >>> numbers = ("NHWC", "HWIO", "NHWC")
        >>> conv = lambda params, x: jax.lax.conv_general_dilated(
        ...     x, params["w"], (1, 1), "SAME", dimension_numbers=numbers)
        >>> x = jnp.eye(3).reshape(1, 3, 3, 1)
        >>> hrank(conv)({"w": jnp.ones((1, 1, 1, 1))}, x)["w"]
        Array([[[[3.]]]], dtype=float32)

    Reference:
        Lin et al., HRank: filter pruning using high-rank feature map, 2020,
        arXiv:2002.10179.
    """

    def statistic(site: Site, value: Array) -> Array:
        maps = _derivatives.at_least_float32(site.channels_last(value))
        if maps.ndim != 4 or min(maps.shape[1:3]) < 2:
            return jnp.mean(jnp.abs(_channel.by_channel(site, value)), (0, 1))
        ranks = jnp.linalg.matrix_rank(jnp.moveaxis(maps, -1, 1), tolerance)
        return jnp.mean(ranks.astype(maps.dtype), axis=0)

    return _criterion(apply_fn, statistic, sites, at)


def _criterion(
    apply_fn: ApplyFn, statistic: _Statistic, sites: Sites, at: str
) -> ScoreFn:
    """Lifts a statistic of the values at a site to a score function."""

    def score_fn(
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Scores:
        del key
        _derivatives.check_not_empty(batch)
        seen: dict[str, Site] = {}

        def rule(site: Site, inputs: Any, value: Array, extra: None) -> tuple[Any, Any]:
            if site.leaf is None:
                return value, None
            seen[site.name] = site
            return value, statistic(site, value)

        fn = tracing.intercept(apply_fn, rule, sites=sites, at=at)
        _, values = fn(None, _derivatives.at_product(params, masks), batch)
        _channel.check_same_axes(list(seen.values()))
        found: dict[int, list[Array]] = {}
        for name, value in values.items():
            site = seen[name]
            running = dict(site.leaf_loops)
            shared = tuple(i for i in range(len(site.lengths)) if i not in running)
            value = _channel.of_leaf(site, jnp.mean(value, shared))
            found.setdefault(_channel.leaf_of(site).place, []).append(value)
        merged = {place: sum(own) / len(own) for place, own in found.items()}
        return trees.replace_leaves(params, merged, jnp.zeros(()))

    return score_fn
