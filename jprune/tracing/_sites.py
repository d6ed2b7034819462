"""The sites of a function: where it uses its kernels, and what happens there next."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jprune import trees
from jprune.tracing import _jax_api, _patches, _places
from jprune.tracing._jax_api import Jaxpr, JaxprEqn


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """Where a function uses a kernel, or a value that it named.

    Attributes:
        name: the path of the kernel, with ``:1``, ``:2``, ... for the second and later
            uses; or the name that ``jax.ad_checkpoint.checkpoint_name`` gave.
        path: the path of the kernel, without the number of its use. A kernel that is
            made of several leaves is known by the one whose axes it has, or else by the
            largest.
        index: the number of the use, from 0.
        kind: ``"dot_general"``, ``"conv_general_dilated"``, or ``"name"``.
        leaf: the leaf of the kernel, its value a ``ShapeDtypeStruct``; None for a named
            value.
        places: what can be told of what follows: ``"output"``, and perhaps
            ``"after_bias"``, ``"after_norm"``, ``"after_activation"``.
        at: the place of the value that the rule sees.
        channel_axes: the axes of that value that are output channels: those that the
            kernel does not sum over. Of a named value, the last.
        leaf_axes: the axes of the leaf that these are, flattened in their order; None
            if they cannot be told.
        lengths: the lengths of the loops (``scan``) around the site, the outermost
            first.
        leaf_loops: pairs of one of these loops and the axis of the leaf that it runs
            over, where layers are stacked.
        steps: inside of a rule, the step that each of these loops is at.
        eqn: the equation.
        kernel_first: whether the kernel is the first of its operands.
        found: the variables at the places.
        refused: why the site cannot be intercepted, or nothing.
    """

    name: str
    path: str
    index: int
    kind: str
    leaf: trees.Leaf | None
    places: tuple[str, ...]
    at: str
    channel_axes: tuple[int, ...]
    leaf_axes: tuple[int, ...] | None
    lengths: tuple[int, ...]
    leaf_loops: tuple[tuple[int, int], ...]
    steps: tuple[Any, ...]
    eqn: JaxprEqn = dataclasses.field(repr=False)
    kernel_first: bool = dataclasses.field(repr=False)
    found: Mapping[str, _places.Place] = dataclasses.field(repr=False)
    refused: str = dataclasses.field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value, in one step of the loops."""
        return tuple(_jax_api.aval(self.found[self.at].var).shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the value."""
        return _jax_api.aval(self.found[self.at].var).dtype

    @property
    def channels(self) -> int:
        """The number of output channels."""
        return int(np.prod([self.shape[a] for a in self.channel_axes], dtype=np.int64))

    @property
    def stacked(self) -> tuple[int, ...]:
        """The lengths of the loops that run over stacked kernels."""
        return tuple(self.lengths[loop] for loop, _ in self.leaf_loops)

    @property
    def feature_groups(self) -> int:
        """The groups of features of a convolution, 1 for other operations."""
        return self.eqn.params.get("feature_group_count", 1)

    def along_channels(self, vector: Array) -> Array:
        """Returns one number for each channel, shaped to broadcast with the value."""
        axes = self.channel_axes
        values = jnp.reshape(vector, [self.shape[axis] for axis in axes])
        order = sorted(range(len(axes)), key=lambda i: axes[i])
        shape = [self.shape[a] if a in axes else 1 for a in range(len(self.shape))]
        return jnp.reshape(jnp.transpose(values, order), shape)

    def channels_last(self, value: Array) -> Array:
        """Returns the value with its channels as one last axis."""
        rest = [a for a in range(value.ndim) if a not in self.channel_axes]
        moved = jnp.transpose(value, (*rest, *self.channel_axes))
        return moved.reshape(*moved.shape[: len(rest)], -1)

    def call(self, x: Array, kernel: Array) -> Array:
        """Runs the operation on other operands, of other sizes if need be.

        Args:
            x: what stands for the input.
            kernel: what stands for the kernel, as the operation takes it.

        Raises:
            ValueError: the site is a named value.
        """
        if self.kind == "name":
            raise ValueError(f"site {self.name!r}: a named value has no operation")
        operands = (kernel, x) if self.kernel_first else (x, kernel)
        return _jax_api.bind(self.eqn, *operands)[0]

    def patches(self, x: Array) -> Array:
        """Returns the input of each output position, as rows (im2col).

        For a convolution of shape (batch, *spatial, h * w * in): times the kernel,
        flattened from HWIO to two axes, it is the output with its channels last. With
        groups of features there is an axis of groups before the last. Of a dense layer,
        the input with the axes that are summed over last, as one, in the order of the
        kernel's.

        Args:
            x: the input, as the operation takes it.

        Raises:
            ValueError: the site is a named value, or a convolution by groups of the
                batch.
        """
        if self.kind == "name":
            raise ValueError(f"site {self.name!r}: a named value has no patches")
        if self.kind == "dot_general":
            return _patches.dense(self.eqn, x, self.kernel_first)
        return _patches.convolution(self.eqn, x, self.name)

    def placed(self, at: str) -> "Site":
        """Returns the site seen at a place, or at the last before it that is there."""
        last = _places.ORDER.index(at)
        at = max((p for p in self.places if _places.ORDER.index(p) <= last), key=rank)
        axes = self.found[at].channel_axes
        return dataclasses.replace(self, at=at, channel_axes=axes)


def rank(place: str) -> int:
    """Returns how far a place is behind the operation."""
    return _places.ORDER.index(place)


class Body(NamedTuple):
    """A jaxpr with its sites.

    Attributes:
        jaxpr: the jaxpr; calls that hold sites are inlined.
        consts: its constants.
        sites: the sites whose operations are among its equations.
        inner: by the place of an equation, the body that it holds, with sites.
        names: the names of all sites, those of inner bodies included.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]
    sites: tuple[Site, ...]
    inner: Mapping[int, "Body"]
    names: frozenset[str]


class Sites(NamedTuple):
    """A function and its sites, in order of evaluation."""

    body: Body
    every: tuple[Site, ...]
    outputs: Any


def check_place(at: str) -> None:
    """Raises ValueError if there is no such place."""
    if at not in _places.ORDER:
        raise ValueError(f"at: {at!r} is none of {_places.ORDER}")


def select(
    found: Sites, patterns: str | Sequence[str] | None, at: str
) -> dict[str, Site]:
    """Returns the chosen sites by name, seen at a place.

    Raises:
        ValueError: a pattern matches no site, or there are none.
        NotImplementedError: a chosen site cannot be intercepted.
    """
    names = [site.name for site in found.every]
    if not names:
        raise ValueError(
            "sites: the function has none: no product of data with a parameter, and no "
            "value named by jax.ad_checkpoint.checkpoint_name"
        )
    chosen = found.every
    if patterns is not None:
        wanted = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        for pattern in wanted:
            if not any(_matches(pattern, site) for site in found.every):
                raise ValueError(f"sites: {pattern!r} matches none of {names}")
        chosen = [s for s in chosen if any(_matches(p, s) for p in wanted)]
    for site in chosen:
        if site.refused:
            raise NotImplementedError(
                f"sites: {site.name!r} cannot be intercepted: {site.refused}; choose "
                f"others of {names}"
            )
    return {site.name: site.placed(at) for site in chosen}


def _matches(pattern: str, site: Site) -> bool:
    return trees.matches(pattern, site.path) or pattern == site.name
