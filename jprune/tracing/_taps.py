"""Seeing and scaling values inside a function: taps, cotangents, gates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jprune.tracing import _finder, _sites
from jprune.tracing._intercept import Patterns, intercept
from jprune.tracing._sites import Site
from jprune.types import ApplyFn, LossFn, Params


def taps(
    fn: ApplyFn,
    params: Params,
    *inputs: Any,
    sites: Patterns = None,
    at: str = "input",
) -> dict[str, Array]:
    """Returns values inside a function, by the name of their site.

    Args:
        fn: ``(params, *inputs) -> outputs``.
        params: any pytree of arrays.
        *inputs: what else the function takes.
        sites: which sites, see :func:`intercept`; all unless given.
        at: ``"input"``, ``"patches"`` (the inputs of each output position as rows, see
            :meth:`Site.patches`), or a place that :func:`intercept` knows.

    Returns:
        A dict in order of evaluation. Values in a ``scan`` are stacked. Of a named
        value, the value whatever ``at``.

    Raises:
        ValueError: a pattern matches no site; the message lists them. ``at`` is no
            place.
        NotImplementedError: a chosen site cannot be intercepted.

    Example:
        >>> def fn(params, x):
        ...     return jax.nn.relu(x @ params["a"]) @ params["b"]
        >>> params = {"a": jnp.array([[1.0, -1.0]]), "b": jnp.ones((2, 1))}
        >>> taps(fn, params, jnp.array([[3.0]]))
        {'a': Array([[3.]], dtype=float32), 'b': Array([[3., 0.]], dtype=float32)}
    """

    def rule(site: Site, seen: tuple, output: Array, extra: None) -> tuple[Any, Any]:
        if site.kind == "name" or at not in ("input", "patches"):
            return output, output
        return output, seen[0] if at == "input" else site.patches(seen[0])

    place = "output" if at in ("input", "patches") else at
    return intercept(fn, rule, sites=sites, at=place)(None, params, *inputs)[1]


def cotangents(
    loss_fn: LossFn,
    params: Params,
    *inputs: Any,
    sites: Patterns = None,
    at: str = "output",
    per_example: bool = False,
) -> dict[str, Array]:
    """Returns the gradients of a loss with respect to values inside it.

    They are the gradients of zeros that are added at the sites.

    Args:
        loss_fn: ``(params, *inputs) -> scalar``.
        params: any pytree of arrays.
        *inputs: what else the loss takes. Per example, the leaves share a leading axis
            of examples.
        sites: which sites, see :func:`intercept`; all unless given.
        at: the place, see :func:`intercept`.
        per_example: whether to differentiate the loss of each example alone, as a
            batch of one. Otherwise it is the loss of the batch: where examples do not
            meet and it is a mean, the gradients of the examples' losses divided by
            their number.

    Returns:
        A dict by site name. Per example, a leading axis of examples stands before the
        shape of the value for a batch of one.

    Raises:
        ValueError: as :func:`intercept`; or the loss is not a scalar.

    Example:
        >>> loss = lambda params, x: jnp.mean((x @ params["a"]) ** 2)
        >>> cotangents(loss, {"a": jnp.ones((1, 1))}, jnp.array([[1.0], [3.0]]))
        {'a': Array([[1.], [3.]], dtype=float32)}
    """
    if per_example:

        def one(example: tuple) -> dict[str, Array]:
            batch = jax.tree.map(lambda x: x[None], example)
            return cotangents(loss_fn, params, *batch, sites=sites, at=at)

        return jax.vmap(one)(inputs)

    shape = jax.eval_shape(loss_fn, params, *inputs)
    if jax.tree.map(jnp.shape, shape) != ():
        raise ValueError(f"loss_fn: it returns {shape} where a scalar is needed")

    def add(site: Site, seen: tuple, output: Array, extra: dict) -> tuple[Any, Any]:
        own = extra[site.name]
        for step in site.steps:
            own = own[step]
        return output + own, None

    perturbed = intercept(loss_fn, add, sites=sites, at=at)
    chosen = _sites.select(_finder.find(loss_fn, params, inputs), sites, at)
    zeros = {
        name: jnp.zeros((*site.lengths, *site.shape), site.dtype)
        for name, site in chosen.items()
    }
    return jax.grad(lambda extra: perturbed(extra, params, *inputs)[0])(zeros)


def gate(
    fn: ApplyFn,
    params: Params,
    *inputs: Any,
    sites: Patterns = None,
    at: str = "after_norm",
) -> tuple[Callable[..., Any], dict[str, Array]]:
    """Returns the function with gates on its channels, and the open gates.

    A gate multiplies an output channel of a site. Gates at 1 change nothing, one at 0
    removes a channel, and the gradient in them is the derivative by the channel's
    size::

        gated_fn, gates = gate(fn, params, x)
        out = gated_fn(gates, params, x)

    Args:
        fn: ``(params, *inputs) -> outputs``.
        params: any pytree of arrays, or of their shapes; only shapes are read.
        *inputs: what else the function takes: arrays or shapes.
        sites: which sites, see :func:`intercept`; all unless given.
        at: the place of the gates, see :func:`intercept`: after bias and norm unless
            given, so that a closed gate leaves nothing of the channel.

    Returns:
        ``(gates, params, *inputs) -> outputs``, and a dict of vectors of ones by site
        name. Where a loop runs over stacked kernels, each of them has gates of its own,
        in leading axes; where it uses the same kernel in every step, so are the gates.

    Raises:
        ValueError: as :func:`intercept`.

    Example:
        >>> def fn(params, x):
        ...     return jax.nn.relu(x @ params["a"]) @ params["b"]
        >>> params = {"a": jnp.ones((1, 2)), "b": jnp.array([[1.0], [5.0]])}
        >>> gated_fn, gates = gate(fn, params, jnp.ones((1, 1)), sites="a")
        >>> gates
        {'a': Array([1., 1.], dtype=float32)}
        >>> gated_fn({"a": jnp.array([1.0, 0.0])}, params, jnp.ones((1, 1)))
        Array([[1.]], dtype=float32)
    """

    def rule(site: Site, seen: tuple, output: Array, extra: dict) -> tuple[Any, Any]:
        own = extra[site.name]
        for loop, _ in site.leaf_loops:
            own = own[site.steps[loop]]
        return output * site.along_channels(own), None

    gated = intercept(fn, rule, sites=sites, at=at)
    chosen = _sites.select(_finder.find(fn, params, inputs), sites, at)
    gates = {
        name: jnp.ones((*site.stacked, site.channels), site.dtype)
        for name, site in chosen.items()
    }
    return lambda extra, *args: gated(extra, *args)[0], gates
