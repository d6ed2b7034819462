"""The diagonal of the curvature of the loss, and Optimal Brain Damage.

A *diagonal* turns a function into ``(params, batch, *, masks, key) -> h`` with ``h`` a
pytree like ``params``:

==============================  ===========================================
:func:`exact_diagonal`          ``H_kk``; one Hessian product a weight
:func:`hutchinson_diagonal`     ``H_kk`` in the mean; one product a probe
:func:`gauss_newton_diagonal`   ``mean [J' H_out J]_kk``; one vjp an output
:func:`fisher_diagonal`         ``mean g_k^2``; one gradient an example
==============================  ===========================================

All differentiate at, and with respect to, the product of weights and masks. The model
runs in the precision of its parameters; products of derivatives, and their sums, are
formed in float32 at least, so half-precision parameters have float32 results. A leaf
that is not a floating array has a scalar 0. Put these functions under ``jax.jit``: a
bare call compiles its loop each time.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from jprune import trees
from jprune.scores import _derivatives as derivatives
from jprune.types import ApplyFn, Batch, LossFn, Masks, Params, ScoreFn, Scores

# (params, batch=None, *, masks=None, key=None) -> h, a pytree like params.
DiagonalFn = Callable[..., PyTree]


def exact_diagonal(loss_fn: LossFn, *, chunk: int = 32) -> DiagonalFn:
    """Makes the diagonal of the Hessian, one weight at a time.

    ``h_k = e_k' H e_k``: as many Hessian-vector products as weights, ``chunk`` of them
    at a time, and never the Hessian itself. For small nets, and to judge the others.

    Args:
        loss_fn: ``(params, batch[, key]) -> scalar``.
        chunk: Hessian-vector products in memory at the same time.

    Returns:
        ``(params, batch=None, *, masks=None, key=None) -> h``, a pytree like ``params``
        of float32 or wider. It raises ValueError for a batch without examples.

    Raises:
        ValueError: ``chunk`` is below 1.

    Example:
        >>> loss = lambda params, _: params["w"][0] ** 2 + 5 * jnp.prod(params["w"])
        >>> jax.jit(exact_diagonal(loss))({"w": jnp.ones(2)})
        {'w': Array([2., 0.], dtype=float32)}
    """
    _check_positive("chunk", chunk)

    def diagonal_fn(
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> PyTree:
        at, values, product = _hessian_product(loss_fn, params, batch, masks, key)
        size = sum(v.size for v in values)

        def entry(k: Array) -> Array:
            basis = _cut(jnp.arange(size) == k, values)
            column = product(
                [e.astype(v.dtype) for e, v in zip(basis, values, strict=True)]
            )
            # A selection, as 0 * NaN would spread one bad entry to all.
            picked = [
                jnp.sum(derivatives.at_least_float32(jnp.where(e, c, 0)))
                for e, c in zip(basis, column, strict=True)
            ]
            return functools.reduce(jnp.add, picked)

        flat = derivatives.map_chunks(entry, size, chunk)
        return _like(params, at, _cut(flat, values))

    return diagonal_fn


def hutchinson_diagonal(loss_fn: LossFn, *, probes: int = 100) -> DiagonalFn:
    """Makes an unbiased estimate of the diagonal of the Hessian.

    ``h = mean_v v * (H v)`` over Rademacher probes ``v`` (entries +1 or -1), one
    Hessian-vector product each. The error of ``h_k`` has the standard deviation
    ``sqrt(sum_{j != k} H_kj^2 / probes)``: none if H is diagonal.

    Args:
        loss_fn: ``(params, batch[, key]) -> scalar``.
        probes: the number of probes.

    Returns:
        ``(params, batch=None, *, masks=None, key) -> h``, a pytree like ``params`` of
        float32 or wider. It raises ValueError without the ``key`` that the probes are
        drawn with, and for a batch without examples.

    Raises:
        ValueError: ``probes`` is below 1.

    Example:
        >>> loss = lambda params, _: jnp.sum(jnp.arange(3.0) * params["w"] ** 2)
        >>> diagonal_fn = jax.jit(hutchinson_diagonal(loss, probes=1))
        >>> diagonal_fn({"w": jnp.ones(3)}, key=jax.random.key(0))
        {'w': Array([0., 2., 4.], dtype=float32)}

    Reference:
        Hutchinson, "A stochastic estimator of the trace of the influence matrix for
        Laplacian smoothing splines", 1989; for the diagonal Bekas, Kokiopoulou & Saad,
        "An estimator for the diagonal of a matrix", 2007.
    """
    _check_positive("probes", probes)

    def diagonal_fn(
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> PyTree:
        if key is None:
            raise ValueError("key: hutchinson_diagonal draws its probes with a key")
        probe_key, loss_key = jax.random.split(key)
        at, values, product = _hessian_product(loss_fn, params, batch, masks, loss_key)
        size = sum(v.size for v in values)

        def add(total: list[Array], key: PRNGKeyArray) -> tuple[list[Array], None]:
            # One draw for all leaves, as each compiles for as long as a small net.
            signs = jax.random.rademacher(key, (size,), jnp.int8)
            probe = [
                s.astype(v.dtype)
                for s, v in zip(_cut(signs, values), values, strict=True)
            ]
            # The product with +1 or -1 is exact in any precision, the sum is not.
            new = [
                t + derivatives.at_least_float32(v * hv)
                for t, v, hv in zip(total, probe, product(probe), strict=True)
            ]
            return new, None

        keys = jax.random.split(probe_key, probes)
        total, _ = jax.lax.scan(add, _zeros(values), keys)
        return _like(params, at, [t / probes for t in total])

    return diagonal_fn


def gauss_newton_diagonal(
    apply_fn: ApplyFn, loss: Callable[[Array, PyTree], Array], *, chunk: int = 8
) -> DiagonalFn:
    """Makes the diagonal of the Gauss-Newton matrix.

    ``h_k = mean_n [J_n' H_n J_n]_kk`` with ``J_n`` the Jacobian of the outputs of
    example n by the weights and ``H_n`` the Hessian of its loss by the outputs, formed
    with ``jax.hessian`` in the space of outputs alone. With ``H_n = F F'`` this is
    ``mean_n sum_c (J_n' f_c)_k^2``: one backward pass an output, exact, and never
    negative. For a softmax cross-entropy it is also the true Fisher information.

    Args:
        apply_fn: ``(params, inputs[, key]) -> outputs`` with a leading axis of
            examples, none of which depends on another (no batch statistics).
        loss: ``(outputs, target) -> scalar`` of *one* example, convex in the outputs:
            a negative eigenvalue of its Hessian counts as 0. The losses of Optax that
            keep the batch axis fit.
        chunk: examples in memory at the same time, each with a gradient an output.

    Returns:
        ``(params, (inputs, targets), *, masks=None, key=None) -> h``, a pytree like
        ``params`` of float32 or wider. It raises ValueError for another batch, for one
        without examples, and for a ``loss`` that is not a scalar.

    Raises:
        ValueError: ``chunk`` is below 1.

    Example:
        >>> apply_fn = lambda params, x: x @ params["w"]
        >>> squared_error = lambda y, target: jnp.sum((y - target) ** 2) / 2
        >>> batch = (jnp.array([[1.0, 2.0]]), jnp.zeros((1, 1)))
        >>> diagonal_fn = jax.jit(gauss_newton_diagonal(apply_fn, squared_error))
        >>> diagonal_fn({"w": jnp.ones((2, 1))}, batch)["w"].ravel()
        Array([1., 4.], dtype=float32)

    Reference:
        Schraudolph, "Fast curvature matrix-vector products for second-order gradient
        descent", Neural Computation 14, 2002.
    """
    rows = functools.partial(derivatives.gauss_newton_rows, loss=loss)
    return _mean_of_squares(apply_fn, rows, chunk)


def fisher_diagonal(loss_fn: LossFn, *, chunk: int = 32) -> DiagonalFn:
    """Makes the diagonal of the empirical Fisher information.

    ``h_k = mean_n g_nk^2`` with ``g_n`` the gradient of the loss of example n at its
    true label. The square comes before the mean: ``(mean_n g_nk)^2``, the square of
    the batch gradient, is another quantity and vanishes at a minimum.

    Args:
        loss_fn: ``(params, batch[, key]) -> scalar``, a mean over the leading axis of
            the leaves of ``batch``. It is given one example at a time, as a batch of
            one, and a key of its own.
        chunk: examples in memory at the same time, each with a gradient.

    Returns:
        ``(params, batch, *, masks=None, key=None) -> h``, a pytree like ``params`` of
        float32 or wider. It raises ValueError for a batch without examples.

    Raises:
        ValueError: ``chunk`` is below 1.

    Example:
        >>> loss = lambda params, x: jnp.mean(x * params["w"])
        >>> diagonal_fn = jax.jit(fisher_diagonal(loss))
        >>> diagonal_fn({"w": jnp.array(1.0)}, jnp.array([3.0, -1.0]))
        {'w': Array(5., dtype=float32)}
    """
    return _mean_of_squares(loss_fn, derivatives.fisher_rows, chunk)


def obd(
    fn: Callable[..., Array],
    *,
    diagonal: Callable[[Callable[..., Array]], DiagonalFn] = hutchinson_diagonal,
) -> ScoreFn:
    """Scores weights by Optimal Brain Damage.

    ``score_k = h_kk w_k^2 / 2``: the rise of the loss when weight k alone is set to 0,
    to second order at a minimum. A negative ``h_kk`` (an exact or a Hutchinson diagonal
    away from a minimum) gives a negative score, so such a weight goes first;
    Gauss-Newton and Fisher diagonals have none.

    Args:
        fn: what ``diagonal`` takes: a loss ``(params, batch[, key]) -> scalar``, or the
            model for :func:`gauss_newton_diagonal`.
        diagonal: makes the diagonal from ``fn``. Bind its other arguments with
            ``functools.partial``: ``partial(hutchinson_diagonal, probes=10)``,
            ``partial(gauss_newton_diagonal, loss=squared_error)``.

    Returns:
        A score function; scores are of float32 or wider, and a scalar 0 for leaves that
        are not floating arrays. ``h`` is taken at the product of weights and masks,
        ``w`` is the weight as given. It raises what the diagonal raises: by default
        ValueError without a ``key``.

    Example:
        >>> loss = lambda params, _: jnp.sum(jnp.array([1.0, 9.0]) * params["w"] ** 2)
        >>> params = {"w": jnp.array([2.0, 1.0])}
        >>> jax.jit(obd(loss))(params, key=jax.random.key(0))
        {'w': Array([4., 9.], dtype=float32)}

    Reference:
        LeCun, Denker & Solla, "Optimal Brain Damage", NIPS 1989.

    Differs from the paper: the paper passes second derivatives backward through the
    net, which drops the interactions of units in a layer. Here automatic
    differentiation keeps them: ``exact_diagonal`` and ``gauss_newton_diagonal`` are
    what that recursion and its Levenberg-Marquardt form approximate. They agree where
    one hidden layer meets an output Hessian that is diagonal.
    """
    diagonal_fn = diagonal(fn)

    def score_fn(
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Scores:
        h = diagonal_fn(params, batch, masks=masks, key=key)
        return jax.tree.map(
            lambda w, h: h * w.astype(h.dtype) ** 2 / 2 if trees.is_inexact(w) else h,
            params,
            h,
        )

    return score_fn


def _hessian_product(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    masks: Masks | None,
    key: PRNGKeyArray | None,
) -> tuple[list[int], list[Array], Callable[[list[Array]], list[Array]]]:
    derivatives.check_not_empty(batch)
    at = derivatives.floating(params)
    values, loss_of = derivatives.of_leaves(
        loss_fn, derivatives.at_product(params, masks), at
    )
    return at, values, derivatives.hessian_product(loss_of, values, batch, key)


def _mean_of_squares(
    fn: Callable[..., Array], rows: derivatives.RowsOf, chunk: int
) -> DiagonalFn:
    _check_positive("chunk", chunk)

    def diagonal_fn(
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> PyTree:
        size = derivatives.number_of_examples(batch)
        at = derivatives.floating(params)
        values, fn_of = derivatives.of_leaves(
            fn, derivatives.at_product(params, masks), at
        )

        def add(total: list[Array], rows: list[Array]) -> list[Array]:
            return [
                t + jnp.sum(r**2, axis=(0, 1)) for t, r in zip(total, rows, strict=True)
            ]

        total = derivatives.fold_rows(
            add,
            _zeros(values),
            functools.partial(rows, fn_of, values),
            batch,
            key,
            chunk,
        )
        return _like(params, at, [t / size for t in total])

    return diagonal_fn


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: at least 1 is needed, got {value}")


def _cut(flat: Array, like: list[Array]) -> list[Array]:
    ends = np.cumsum([v.size for v in like]).tolist()
    return [
        flat[end - v.size : end].reshape(v.shape)
        for end, v in zip(ends, like, strict=True)
    ]


def _zeros(values: list[Array]) -> list[Array]:
    return [jnp.zeros_like(derivatives.at_least_float32(v)) for v in values]


def _like(params: Params, at: list[int], values: list[Array]) -> PyTree:
    zero = jnp.zeros((), jnp.float32)
    return trees.replace_leaves(params, dict(zip(at, values, strict=True)), zero)
