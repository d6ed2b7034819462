"""What each axis of a kernel means.

A layout is a string with one letter an axis:

======  ==================================================================
``I``   input channels
``O``   output channels
``H``   ``W``, ``D``: spatial axes
``N``   attention heads
``L``   a stack of layers, as ``flax.linen.scan`` or ``jax.lax.scan`` make it
======  ==================================================================

so a Flax convolution is ``"HWIO"``, an Equinox one ``"OIHW"`` and a scanned dense layer
``"LIO"``. The default follows the name of the leaf: ``kernel`` and ``w`` (Flax, Haiku)
end in ``IO``; ``weight`` (Equinox) begins with ``OI``.
"""

from collections.abc import Mapping, Sequence

from jprune.trees import Leaf, lookup
from jprune.types import Layouts

_LETTERS = frozenset("IOHWDNL")
_SPATIAL = {0: "", 1: "W", 2: "HW", 3: "HWD"}


def default_layout(path: str, shape: tuple[int, ...]) -> str:
    """Returns the layout that the name and the rank of a leaf suggest.

    The projections of Flax attention (``query``, ``key``, ``value``, ``out``) have a
    head axis. A stack of layers cannot be told from a spatial axis, so scanned layers
    need an explicit layout.

    Args:
        path: the leaf's path.
        shape: its shape.

    Raises:
        ValueError: no layout is known for this rank.

    Example:
        >>> default_layout("conv/kernel", (3, 3, 8, 16))
        'HWIO'
        >>> default_layout("layers/0/weight", (16, 8))
        'OI'
    """
    rank = len(shape)
    names = path.split("/")
    owner = names[-2] if len(names) > 1 else ""
    if rank == 1:
        return "O"
    if rank == 3 and owner in ("query", "key", "value"):
        return "INO"
    if rank == 3 and owner == "out":
        return "NIO"
    if rank - 2 not in _SPATIAL:
        raise ValueError(
            f"layout: none is known for {path!r} of shape {shape}; give one, such as "
            "{'" + path + "': 'LHWIO'}"
        )
    spatial = _SPATIAL[rank - 2]
    return "OI" + spatial if names[-1] == "weight" else spatial + "IO"


def layouts_of(leaves: Sequence[Leaf], layout: Layouts = None) -> list[str]:
    """Returns the layout of each leaf.

    Args:
        leaves: leaves with their paths.
        layout: one layout for all, a mapping from path patterns to layouts (leaves that
            match none have the default one), a function ``(path, shape) -> layout``, or
            None for the default.

    Raises:
        ValueError: a layout does not fit its leaf, or a pattern matches nothing.

    Example:
        >>> import numpy as np
        >>> leaf = Leaf(0, "blocks/kernel", np.ones((4, 8, 8)))
        >>> layouts_of([leaf], {"blocks": "LIO"})
        ['LIO']
    """
    if isinstance(layout, str):
        chosen = [layout for _ in leaves]
    elif callable(layout):
        chosen = [layout(leaf.path, leaf.shape) for leaf in leaves]
    else:
        table: Mapping[str, str | None] = layout or {}
        given = lookup(table, leaves, None, "layout")
        chosen = [
            own or default_layout(leaf.path, leaf.shape)
            for own, leaf in zip(given, leaves, strict=True)
        ]
    for own, leaf in zip(chosen, leaves, strict=True):
        unknown = set(own) - _LETTERS
        if len(own) != len(leaf.shape) or len(set(own)) != len(own) or unknown:
            raise ValueError(
                f"layout: {own!r} does not fit {leaf.path!r} of shape {leaf.shape}; it "
                f"needs one distinct letter of {''.join(sorted(_LETTERS))} an axis"
            )
    return chosen


def axes_of(layout: str, letters: str) -> tuple[int, ...]:
    """Returns the axes whose letter is in ``letters``.

    Example:
        >>> axes_of("HWIO", "HW")
        (0, 1)
    """
    return tuple(i for i, letter in enumerate(layout) if letter in letters)
