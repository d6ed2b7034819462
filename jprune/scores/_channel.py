"""What the criteria of channels share: from values at sites to scores of leaves.

A score of channels has one number for each output channel of a kernel: an array of the
kernel's rank with size 1 on all other axes, ``(1, 1, 1, out)`` for HWIO. Leaves that
have none hold a scalar 0. :func:`jprune.prune` takes such scores with units that are
channels, :func:`jprune.units.filters` or :func:`jprune.couplings`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from jprune import trees
from jprune.scores import _derivatives as derivatives
from jprune.tracing import Site

Sites = str | Sequence[str] | None


def leaf_of(site: Site) -> trees.Leaf:
    """Returns the leaf whose entries make the channels of a site.

    Raises:
        ValueError: it cannot be told which entries make which channel.
    """
    if site.leaf is None or site.leaf_axes is None:
        raise ValueError(
            f"sites: it cannot be told which entries of {site.path!r} make a channel "
            f"at {site.name!r}; choose other sites by `sites=`"
        )
    return site.leaf


def of_leaf(site: Site, value: Array) -> Array:
    """Returns values of the channels of a site as scores of its leaf.

    Args:
        site: the site.
        value: one number a channel, behind an axis for each loop that runs over the
            leaf.
    """
    leaf = leaf_of(site)
    running = dict(site.leaf_loops)
    axes = [*(running[loop] for loop in sorted(running)), *(site.leaf_axes or ())]
    value = value.reshape([leaf.shape[axis] for axis in axes])
    value = jnp.transpose(value, sorted(range(len(axes)), key=axes.__getitem__))
    return value.reshape([n if a in axes else 1 for a, n in enumerate(leaf.shape)])


def check_same_axes(sites: Sequence[Site]) -> None:
    """Raises ValueError if uses of a leaf have different axes as their channels."""
    known: dict[str, Site] = {}
    for site in sites:
        first = known.setdefault(site.path, site)
        if first.leaf_axes != site.leaf_axes:
            raise ValueError(
                f"sites: the channels of {first.name!r} and {site.name!r} are "
                "different axes of one leaf; choose one of them by `sites=`"
            )


def by_channel(site: Site, value: Array) -> Float[Array, "examples positions channels"]:
    """Returns a value at a site with three axes.

    The first axis of the value that is not a channel is that of the examples.
    """
    last = derivatives.at_least_float32(site.channels_last(value))
    examples = last.shape[0] if last.ndim > 1 else 1
    return last.reshape(examples, -1, last.shape[-1])
