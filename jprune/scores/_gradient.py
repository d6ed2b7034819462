"""Criteria that read gradients of the loss.

All of them differentiate at, and with respect to, the *product* of weights and masks.
So a removed weight has a gradient: that of putting it back, from zero. The weights that
multiply gradients are the dense ones; without masks the two are the same.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jprune import trees
from jprune.scores import _derivatives as derivatives
from jprune.types import (
    ApplyFn,
    Batch,
    LossFn,
    Masks,
    Params,
    Prunable,
    ScoreFn,
    Scores,
)


class _Point(NamedTuple):
    """Where a rule reads derivatives: lists of the floating leaves of ``params``."""

    params: Params
    indices: list[int]
    weights: list[Array]
    product: list[Array]
    loss: Callable[[list[Array]], Array]


def snip(loss_fn: LossFn) -> ScoreFn:
    """Makes the connection sensitivity of SNIP.

    ``s = |w g|`` with ``g`` the gradient of the loss: the absolute derivative of the
    loss with respect to a multiplicative mask at 1.

    Args:
        loss_fn: ``(params, batch[, key]) -> scalar``.

    Returns:
        A score function; scores are float32 or wider, and a scalar 0 for leaves that
        are not floating arrays. It raises ValueError for a batch without examples.

    Example:
        >>> loss = lambda params, x: jnp.sum(params["w"] * x)
        >>> snip(loss)({"w": jnp.array([1.0, -2.0])}, jnp.array([3.0, 1.0]))
        {'w': Array([3., 2.], dtype=float32)}

    Reference:
        Lee et al., SNIP: single-shot network pruning based on connection sensitivity,
        2019, arXiv:1810.02340.

    Differs from the paper: scores are not divided by their sum, which changes no
    ranking; biases are scored, but not pruned by default.
    """

    def rule(at: _Point) -> list[Array]:
        return [jnp.abs(w * g) for w, g in _pairs(at, jax.grad(at.loss)(at.product))]

    return _criterion(loss_fn, rule)


def taylor(loss_fn: LossFn) -> ScoreFn:
    """Makes the first-order Taylor importance of single weights.

    ``s = (w g)^2``, the square of the change of the loss, to first order, when the
    weight is removed. For single weights the ranking is that of :func:`snip`; pooled
    over units by a sum it is another.

    Args:
        loss_fn: ``(params, batch[, key]) -> scalar``.

    Returns:
        A score function, as :func:`snip` makes.

    Example:
        >>> loss = lambda params, x: jnp.sum(params["w"] * x)
        >>> taylor(loss)({"w": jnp.array([1.0, -2.0])}, jnp.array([3.0, 1.0]))
        {'w': Array([9., 4.], dtype=float32)}

    Reference:
        Molchanov et al., Importance estimation for neural network pruning, 2019,
        arXiv:1906.10771.
    """

    def rule(at: _Point) -> list[Array]:
        return [(w * g) ** 2 for w, g in _pairs(at, jax.grad(at.loss)(at.product))]

    return _criterion(loss_fn, rule)


def squared_gradient(loss_fn: LossFn) -> ScoreFn:
    """Makes the saliency of GRASP-It: what a weight adds to the gradient norm.

    ``s = g^2``. Differentiated with respect to the product, it tells which removed
    weights to put back.

    Args:
        loss_fn: ``(params, batch[, key]) -> scalar``.

    Returns:
        A score function, as :func:`snip` makes.

    Example:
        >>> loss = lambda params, x: jnp.sum(params["w"] * x)
        >>> squared_gradient(loss)({"w": jnp.zeros(2)}, jnp.array([3.0, 1.0]))
        {'w': Array([9., 1.], dtype=float32)}

    Reference:
        de Jorge et al., Progressive skeletonization: trimming more fat from a network
        at initialization, 2021, arXiv:2006.09081.
    """

    def rule(at: _Point) -> list[Array]:
        return [g**2 for _, g in _pairs(at, jax.grad(at.loss)(at.product))]

    return _criterion(loss_fn, rule)


def grasp(
    fn: LossFn | ApplyFn,
    *,
    loss: Callable[[Array, PyTree], Array] | None = None,
    temperature: float | None = None,
    prunable: Prunable = None,
) -> ScoreFn:
    """Makes the gradient signal preservation of GraSP.

    ``s = w (H g)``: removing a weight changes ``|g|^2 / 2``, and so how fast training
    starts, by ``-s`` to first order. The Hessian-gradient product is one ``jvp`` of the
    gradient along the gradient, and never a Hessian. The norm is that of the gradient
    of the prunable leaves.

    Args:
        fn: ``loss_fn(params, batch[, key]) -> scalar``; or, with ``loss``,
            ``apply_fn(params, inputs) -> logits``.
        loss: ``(logits, targets) -> scalar``, for batches ``(inputs, targets)``.
        temperature: divides the logits before the loss; 200 unless given. It takes
            ``loss``: without it the logits are out of reach, and not scaled.
        prunable: the leaves whose gradient counts, see
            :func:`jprune.trees.prunable_leaves`.

    Returns:
        A score function, as :func:`snip` makes, of signed scores.

    Raises:
        ValueError: a temperature without ``loss``, or one that is not positive.

    Example:
        >>> half_square = lambda params, _: jnp.sum(params["w"] ** 2) / 2
        >>> grasp(half_square)({"w": jnp.array([[1.0, -2.0]])})
        {'w': Array([[1., 4.]], dtype=float32)}

    Reference:
        Wang, Zhang and Grosse, Picking winning tickets before training by preserving
        gradient flow, 2020, arXiv:2002.07376. The temperature is that of the authors'
        code (alecwangcq/GraSP).

    Differs from the paper: its score has the other sign and removes the highest;
    gradient and product use the same batch.
    """
    if temperature is not None and loss is None:
        raise ValueError(
            f"temperature: {temperature} divides logits, so give `loss` too and let "
            "`fn` be apply_fn(params, inputs)"
        )
    divisor = 200.0 if temperature is None else temperature
    if not divisor > 0:
        raise ValueError(f"temperature: {temperature} is not positive")

    if loss is None:
        return _criterion(fn, _grasp_rule(prunable))

    @functools.wraps(fn)
    def tempered(params: Params, batch: Batch, *rest: Any, **named: Any) -> Array:
        inputs, targets = batch
        return loss(fn(params, inputs, *rest, **named) / divisor, targets)

    return _criterion(tempered, _grasp_rule(prunable))


def _grasp_rule(prunable: Prunable) -> Callable[[_Point], list[Array]]:
    def rule(at: _Point) -> list[Array]:
        counted = {x.place for x in trees.prunable_leaves(at.params, prunable)}
        gradient, push = jax.linearize(jax.grad(at.loss), at.product)
        direction = [
            g if place in counted else jnp.zeros_like(g)
            for place, g in zip(at.indices, gradient, strict=True)
        ]
        return [w * h for w, h in _pairs(at, push(direction))]

    return rule


def accumulate(loss_fn: LossFn, *, microbatches: int) -> LossFn:
    """Returns the loss with its batch processed in equal parts, one after the other.

    The value is the mean of the parts' losses, so that for a loss that is a mean over
    examples nothing changes but the memory: every derivative, of any order, is
    accumulated over the parts. A criterion made of it computes its score once, from the
    accumulated gradient; averaging scores is another quantity.

    Args:
        loss_fn: ``(params, batch[, key]) -> scalar``; a key is split between the parts.
        microbatches: the number of parts; divides the batch.

    Raises:
        ValueError: ``microbatches`` is below 1; or, from the loss, it does not divide
            the batch, or the batch has no examples.

    Example:
        >>> loss = lambda w, x: jnp.mean((w * x) ** 2)
        >>> in_parts = accumulate(loss, microbatches=2)
        >>> float(jax.grad(in_parts)(1.0, jnp.arange(4.0)))
        7.0
    """
    if microbatches < 1:
        raise ValueError(f"microbatches: {microbatches} is below 1")

    # Wrapped, it shows the signature of the loss, which says whether it takes a key.
    @functools.wraps(loss_fn)
    def accumulated(params: Params, batch: Batch, *rest: Any, **named: Any) -> Array:
        size = derivatives.number_of_examples(batch)
        if size % microbatches:
            raise ValueError(
                f"microbatches: {microbatches} does not divide the batch of {size}"
            )
        parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
        keys = jax.tree.map(lambda k: jax.random.split(k, microbatches), (rest, named))

        # The checkpoint frees the activations of a part when the next begins.
        @jax.checkpoint
        def part_loss(part: Batch, own: tuple) -> Array:
            return loss_fn(params, part, *own[0], **own[1])

        def add(total: Array, part: tuple) -> tuple[Array, None]:
            return total + part_loss(*part), None

        first = jax.tree.map(lambda x: x[0], (parts, keys))
        zero = jnp.zeros((), jax.eval_shape(part_loss, *first).dtype)
        return jax.lax.scan(add, zero, (parts, keys))[0] / microbatches

    return accumulated


def _criterion(loss_fn: LossFn, rule: Callable[[_Point], list[Array]]) -> ScoreFn:
    """Lifts a rule on lists of floating leaves to a score function on pytrees."""

    def score_fn(
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Scores:
        derivatives.check_not_empty(batch)
        indices = derivatives.floating(params)
        flat = jax.tree.leaves(params)
        weights = [jnp.asarray(flat[i]) for i in indices]
        product, loss_of = derivatives.of_leaves(
            loss_fn, derivatives.at_product(params, masks), indices
        )

        def loss(values: list[Array]) -> Array:
            return loss_of(values, batch, key)

        scores = rule(_Point(params, indices, weights, product, loss))
        return trees.replace_leaves(
            params, dict(zip(indices, scores, strict=True)), jnp.zeros(())
        )

    return score_fn


def _pairs(at: _Point, derived: Sequence[Array]) -> list[tuple[Array, Array]]:
    """Pairs weights with what was derived for them, in float32 at least."""
    wide = derivatives.at_least_float32
    return [(wide(w), wide(d)) for w, d in zip(at.weights, derived, strict=True)]
