"""Criteria that read the gradients of gates on channels.

A gate ``m_c`` at 1 multiplies channel c, so its gradient is the sum of activation times
gradient over the channel's positions::

    q_nc = dL_n / dm_c = sum_p a_npc dL_n / da_npc

for example n with the loss ``L_n``. The criteria are means, sums and squares of it:

==========================  ====================================================
:func:`taylor_activation`   ``mean_n |q_nc| / P``, perhaps divided by a layer's norm
:func:`taylor_gate`         ``(mean_n q_nc)^2``
:func:`channel_fisher`      ``sum_n q_nc^2``
:func:`group_fisher`        ``sum_n (sum_x q_nxc)^2`` over coupled inputs x
==========================  ====================================================

All but the last return scores of channels, as :mod:`jprune.scores._activation` does.
Gradients per example are those of the loss of a batch of one, so the loss is to be a
mean over examples that do not meet; BatchNorm in training makes them meet.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jprune import layouts, tracing, trees
from jprune.scores import _channel, _derivatives
from jprune.scores._channel import Sites
from jprune.tracing import Site
from jprune.types import Batch, Layouts, LossFn, Masks, Params, ScoreFn, Scores
from jprune.units import Group, Units


def taylor_activation(
    loss_fn: LossFn,
    *,
    normalize: bool = True,
    sites: Sites = None,
    at: str = "after_activation",
    chunk: int = 8,
) -> ScoreFn:
    """Makes the first-order Taylor importance of feature maps of 2017.

    ``s_c = mean_n | (1 / P) sum_p a_npc dL_n / da_npc |`` with P positions, divided by
    ``sqrt(sum_c s_c^2)`` of the layer.

    Args:
        loss_fn: ``(params, batch[, key]) -> scalar``, a mean over examples.
        normalize: whether to divide by the norm of the layer's scores, without which
            layers are not comparable.
        sites: which kernels, see :func:`jprune.intercept`; all unless given.
        at: the place of the activations, see :func:`jprune.intercept`.
        chunk: examples in memory at the same time.

    Returns:
        A score function ``(params, batch, *, masks=None, key=None)`` of scores of
        channels, float32 or wider; leaves without scores hold a scalar 0. It raises
        ValueError for a kernel of which it cannot be told what makes a channel.

    Raises:
        ValueError: ``chunk`` is below 1.

    Example:
        >>> loss = lambda params, x: jnp.mean(jax.nn.relu(x @ params["w"]) ** 2)
        >>> params = {"w": jnp.array([[1.0, 2.0]])}
        >>> taylor_activation(loss, normalize=False)(params, jnp.array([[1.0]]))["w"]
        Array([[1., 4.]], dtype=float32)

    Reference:
        Molchanov et al., Pruning convolutional neural networks for resource efficient
        inference, 2017, arXiv:1611.06440.
    """

    def finish(site: Site, total: Array, examples: int) -> Array:
        score = total / (examples * _positions(site))
        if not normalize:
            return score
        norm = jnp.linalg.norm(score, axis=-1, keepdims=True)
        # A layer without any gradient stays at 0.
        return score / jnp.where(norm > 0, norm, 1)

    return _per_example(loss_fn, jnp.abs, finish, sites, at, chunk)


def channel_fisher(
    loss_fn: LossFn,
    *,
    sites: Sites = None,
    at: str = "after_activation",
    chunk: int = 8,
) -> ScoreFn:
    """Makes the empirical Fisher information of gates on channels.

    ``s_c = sum_n q_nc^2``, with ``q_nc`` the gradient of example n in the gate of c.

    Args:
        loss_fn: as :func:`taylor_activation`.
        sites: as :func:`taylor_activation`.
        at: as :func:`taylor_activation`.
        chunk: as :func:`taylor_activation`.

    Returns:
        A score function, as :func:`taylor_activation` makes.

    Example:
        >>> loss = lambda params, x: jnp.mean(x @ params["w"])
        >>> channel_fisher(loss)({"w": jnp.ones((1, 1))}, jnp.array([[1.0], [-2.0]]))
        {'w': Array([[5.]], dtype=float32)}

    Reference:
        Theis et al., Faster gaze prediction with dense networks and Fisher pruning,
        2018, arXiv:1801.05787.

    Differs from the paper: a sum, where it has the mean divided by 2.
    """

    def finish(site: Site, total: Array, examples: int) -> Array:
        del site, examples
        return total

    return _per_example(loss_fn, jnp.square, finish, sites, at, chunk)


def taylor_gate(
    loss_fn: LossFn, *, sites: Sites = None, at: str = "after_norm"
) -> ScoreFn:
    """Makes the Taylor importance of channels of 2019, by gates.

    ``s_c = (dL / dm_c)^2`` with the gate m behind bias and norm and L the loss of the
    batch: the square of the sum of ``a dL/da`` over positions and examples. The form
    for weights is :func:`taylor`, pooled over filters by a sum.

    Args:
        loss_fn: ``(params, batch[, key]) -> scalar``.
        sites: as :func:`taylor_activation`.
        at: as :func:`taylor_activation`.

    Returns:
        A score function, as :func:`taylor_activation` makes. Of several batches, the
        scores are to be averaged.

    Example:
        >>> loss = lambda params, x: jnp.mean(x @ params["w"])
        >>> taylor_gate(loss)({"w": jnp.array([[1.0]])}, jnp.array([[1.0], [-2.0]]))
        {'w': Array([[0.25]], dtype=float32)}

    Reference:
        Molchanov et al., Importance estimation for neural network pruning, 2019,
        arXiv:1906.10771.
    """

    def score_fn(
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Scores:
        _derivatives.check_not_empty(batch)
        gates = _Gates(loss_fn, params, batch, masks, key, sites, at)
        grads = jax.grad(gates.loss)(gates.open, batch, key)
        return gates.scores([grad**2 for grad in grads])

    return score_fn


def group_fisher(
    loss_fn: LossFn, units: Units, *, layout: Layouts = None, chunk: int = 8
) -> ScoreFn:
    """Makes the Fisher information of masks that coupled channels share.

    ``s_i = sum_n (sum_x q_nxi)^2``, where ``q_nxi`` is the gradient of example n in a
    mask on input channel i of layer x, and x runs over all layers that read the unit:
    a shared mask has the *sum* of their gradients, which is squared then. A mask on an
    input is one on the slice of the kernel that reads it, so ``q_nxi`` is the sum of
    ``w dL_n/dw`` over that slice.

    Args:
        loss_fn: as :func:`taylor_activation`.
        units: coupled channels, from :func:`jprune.couplings`.
        layout: which axes of kernels are inputs, see
            :func:`jprune.layouts.layouts_of`. A convolution by groups, such as a
            depthwise one, reads a unit with the outputs that belong to it.
        chunk: examples in memory at the same time, each with a gradient.

    Returns:
        A score function ``(params, batch, *, masks=None, key=None)`` of scores in unit
        space: one vector for each group, as :func:`jprune.prune` takes them with
        ``units``.

    Raises:
        ValueError: ``units`` are not coupled channels, or ``chunk`` is below 1; or,
            from the score function, no layer reads the units of a group.

    Example:
        >>> def loss(params, x):
        ...     return jnp.mean((x @ params["a"]["kernel"]) @ params["b"]["kernel"])
        >>> kernels = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [1.0]])
        >>> params = {"a": {"kernel": kernels[0]}, "b": {"kernel": kernels[1]}}
        >>> x = jnp.array([[1.0], [2.0]])
        >>> units = tracing.couplings(loss, params, x)
        >>> group_fisher(loss, units)(params, x)
        [Array([45., 20.], dtype=float32)]

    Reference:
        Liu et al., Group Fisher pruning for practical network compression, 2021,
        arXiv:2108.00708.

    Differs from the paper: scores are not divided by the memory that a unit frees.
    """
    _check_chunk(chunk)
    if not all(group.members for group in units.groups):
        raise ValueError("units: they are not coupled channels, see jprune.couplings")

    def score_fn(
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Scores:
        product = _derivatives.at_product(params, masks)
        indices = _derivatives.floating(params)
        values, loss_of = _derivatives.of_leaves(loss_fn, product, indices)
        example = jax.tree.map(lambda x: jax.eval_shape(lambda y: y[:1], x), batch)
        found = tracing.sites(_keyed(loss_fn), product, example, key)
        readers = [_readers(group, found, layout) for group in units.groups]

        def masks_of(grads: Sequence[Array]) -> list[Array]:
            wide = _derivatives.at_least_float32
            products = [wide(w)[None] * g for w, g in zip(values, grads, strict=True)]
            by_place = dict(zip(indices, products, strict=True))
            return [
                functools.reduce(
                    jnp.add,
                    [_summed(by_place[place], axis, own) for place, axis, own in read],
                )
                for read in readers
            ]

        def rows_of(example: Batch, own: PRNGKeyArray | None) -> list[Array]:
            return masks_of(_derivatives.fisher_rows(loss_of, values, example, own))

        def step(total: list[Array], rows: list[Array]) -> list[Array]:
            return [t + jnp.sum(r**2, (0, 1)) for t, r in zip(total, rows, strict=True)]

        dtype = jnp.result_type(jnp.float32, *values)
        init = [jnp.zeros(group.shape, dtype) for group in units.groups]
        return _derivatives.fold_rows(step, init, rows_of, batch, key, chunk)

    return score_fn


# place, axis, and for each position of the axis a unit.
_Reader = tuple[int, int, Array]


def _readers(group: Group, sites: Sequence[Site], layout: Layouts) -> list[_Reader]:
    """Returns the sides of kernels that read a group's units, with their units."""
    grouped = {
        site.leaf.place
        for site in sites
        if site.leaf is not None and site.feature_groups > 1
    }
    kernels = {site.leaf.place for site in sites if site.leaf is not None}
    (size,) = group.shape
    found = []
    for leaf, axis, units in group.members:
        if leaf.place not in kernels:
            continue
        (letters,) = layouts.layouts_of([leaf], layout)
        if letters[axis] == ("O" if leaf.place in grouped else "I"):
            places = jnp.where(jnp.asarray(units) < 0, size, jnp.asarray(units))
            found.append((leaf.place, axis, jax.nn.one_hot(places, size)))
    if not found:
        paths = sorted({member.leaf.path for member in group.members})
        raise ValueError(f"units: no layer reads the units of {paths}")
    return found


def _summed(product: Array, axis: int, belongs: Array) -> Float[Array, "rows units"]:
    """Returns the sums over the slices of an axis, by unit."""
    rest = tuple(a for a in range(1, product.ndim) if a != axis + 1)
    return jnp.sum(product, rest) @ belongs.astype(product.dtype)


class _Gates:
    """A loss with gates on the channels of kernels, all of them open.

    All uses of a leaf have the same gates.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        params: Params,
        batch: Batch,
        masks: Masks | None,
        key: PRNGKeyArray | None,
        sites: Sites,
        at: str,
    ):
        self.params = params
        product = _derivatives.at_product(params, masks)
        keyed = _keyed(loss_fn)
        _, gates = tracing.gate(keyed, product, batch, key, sites=sites, at=at)
        chosen = [
            site.placed(at)
            for site in tracing.sites(keyed, product, batch, key)
            if site.name in gates and site.leaf is not None
        ]
        if not chosen:
            raise ValueError(f"sites: {sites!r} are no kernels, but named values")
        _channel.check_same_axes(chosen)
        self.sites = {site.path: site for site in reversed(chosen)}
        names = {site.name: site.path for site in chosen}
        gated, gates = tracing.gate(
            keyed, product, batch, key, sites=list(names), at=at
        )
        self.open = [
            _derivatives.at_least_float32(gates[site.name])
            for site in self.sites.values()
        ]

        def loss(
            values: Sequence[Array], batch: Batch, key: PRNGKeyArray | None
        ) -> Array:
            by_path = dict(zip(self.sites, values, strict=True))
            own = {
                name: by_path[path].astype(gates[name].dtype)
                for name, path in names.items()
            }
            return gated(own, product, batch, key)

        self.loss = loss

    def scores(self, values: Sequence[Array]) -> Scores:
        """Returns the scores of leaves from one number for each gate."""
        found = {
            _channel.leaf_of(site).place: _channel.of_leaf(site, value)
            for site, value in zip(self.sites.values(), values, strict=True)
        }
        return trees.replace_leaves(self.params, found, jnp.zeros(()))


def _per_example(
    loss_fn: LossFn,
    entry: Callable[[Array], Array],
    finish: Callable[[Site, Array, int], Array],
    sites: Sites,
    at: str,
    chunk: int,
) -> ScoreFn:
    """Makes a criterion of the sum over examples of a function of their gradients."""
    _check_chunk(chunk)

    def score_fn(
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Scores:
        examples = _derivatives.number_of_examples(batch)
        gates = _Gates(loss_fn, params, batch, masks, key, sites, at)

        def step(total: list[Array], rows: list[Array]) -> list[Array]:
            # A function with entry(0) = 0: what fills up the last chunk is 0.
            return [
                t + jnp.sum(entry(row), (0, 1))
                for t, row in zip(total, rows, strict=True)
            ]

        rows_of = functools.partial(_derivatives.fisher_rows, gates.loss, gates.open)
        init = [jnp.zeros_like(own) for own in gates.open]
        total = _derivatives.fold_rows(step, init, rows_of, batch, key, chunk)
        pairs = zip(gates.sites.values(), total, strict=True)
        return gates.scores([finish(site, own, examples) for site, own in pairs])

    return score_fn


def _keyed(loss_fn: LossFn) -> LossFn:
    """Returns the loss as a function of parameters, batch and key, used or not."""

    def keyed(params: Params, batch: Batch, key: PRNGKeyArray | None) -> Array:
        _, fn_of = _derivatives.of_leaves(loss_fn, params, [])
        return fn_of([], batch, key)

    return keyed


def _positions(site: Site) -> int:
    """Returns at how many positions of an example a channel has a value."""
    rest = [n for a, n in enumerate(site.shape) if a not in site.channel_axes]
    running = dict(site.leaf_loops)
    shared = [n for loop, n in enumerate(site.lengths) if loop not in running]
    return math.prod(rest[1:]) * math.prod(shared)


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk: {chunk} is below 1")
