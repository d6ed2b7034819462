"""The network without its removed channels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jprune import masks as masks_lib
from jprune import trees
from jprune.tracing import _jax_api, _kept, _trace, _values
from jprune.tracing._interpreter import evaluate
from jprune.tracing._kept import Kept
from jprune.tracing._trace import Traced
from jprune.types import ApplyFn, Masks, Params, Prunable

# For each leaf, by place, what its mask removes along each axis.
_Removed = Mapping[int, Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Shrunk:
    """A function of smaller parameters; call it as the function that was shrunk.

    It analyses the function anew for other shapes of its inputs, so it takes any that
    the function takes, and can be transformed, compiled, exported and shrunk again.

    Attributes:
        apply_fn: the function that was shrunk.
        tree: the full parameters, as ``ShapeDtypeStruct``.
        kept: for each leaf by path, and each axis, the positions that are kept, or
            None for all.
        removed: what the masks remove.
        mutable: which results shrink.
        unknown: what to do about unknown primitives.
    """

    apply_fn: ApplyFn
    tree: PyTree
    kept: dict[str, tuple[np.ndarray | None, ...]]
    removed: _Removed
    mutable: Prunable
    unknown: str
    _analysed: dict[Any, tuple[Traced, Kept]] = dataclasses.field(default_factory=dict)

    def __call__(self, params: Params, *inputs: Any) -> Any:
        """Evaluates the function on smaller parameters."""
        self._check(params)
        traced, kept = self._analyse(params, inputs)
        args = jax.tree.leaves((params, inputs))
        outs = evaluate(kept, traced.frame, args)
        return jax.tree.unflatten(jax.tree.structure(traced.outputs), outs)

    def take(self, tree: PyTree) -> PyTree:
        """Cuts what belongs to the parameters as the parameters are cut.

        Args:
            tree: parameters, gradients, or a whole optimiser state: a leaf whose path
                ends in a parameter's path and that has its shape is cut; others pass.
                Of Flax's variables, optimisers hold one collection: ``params/`` may
                be missing there.

        Example:
            >>> def apply_fn(params, x):
            ...     return jnp.tanh(x @ params["a"]) @ params["b"]
            >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
            >>> keep = jnp.arange(4) > 0
            >>> masks = {"a": keep[None, :], "b": keep[:, None]}
            >>> small, _ = shrink(apply_fn, params, masks, jnp.ones((1, 3)))
            >>> moments = (params, {"count": jnp.zeros(())})
            >>> jax.tree.map(jnp.shape, small.take(moments))
            ({'a': (3, 3), 'b': (3, 2)}, {'count': ()})
        """
        owner_of = trees.Owners(self.tree, optional="params/")

        def leaf(keys: Sequence[Any], value: Any) -> Any:
            owner = owner_of(keys, np.shape(value))
            return value if owner is None else _cut(value, self.kept[owner.path])

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def _check(self, params: Params) -> None:
        if jax.tree.structure(params) != jax.tree.structure(self.tree):
            raise ValueError("params: the tree is not that of the parameters")
        leaves = zip(trees.leaves_of(params), trees.leaves_of(self.tree), strict=True)
        for leaf, full in leaves:
            pairs = zip(self.kept[full.path], full.shape, strict=True)
            expected = tuple(n if kept is None else len(kept) for kept, n in pairs)
            if leaf.shape != expected:
                raise ValueError(
                    f"params: the leaf {leaf.path!r} has shape {leaf.shape}; the "
                    f"shrunk function takes {expected}"
                )

    def _analyse(self, params: Params, inputs: Sequence[Any]) -> tuple[Traced, Kept]:
        avals = tuple(map(jax.typeof, jax.tree.leaves((params, inputs))))
        key = (avals, jax.tree.structure(inputs), _jax_api.wide())
        if key in self._analysed:
            return self._analysed[key]
        full = jax.tree.map(
            lambda own, x: (
                jax.ShapeDtypeStruct(own.shape, x.dtype) if hasattr(own, "dtype") else x
            ),
            self.tree,
            params,
        )
        found = _analyse(
            self.apply_fn, full, inputs, self.removed, self.mutable, self.unknown
        )
        kept = _kept_positions(*found)
        for path, own in kept.items():
            for axis, (a, b) in enumerate(zip(own, self.kept[path], strict=True)):
                if not _equal(a, b):
                    raise ValueError(
                        f"inputs: at these shapes other channels of {path!r} (axis "
                        f"{axis}) are coupled than at those it was shrunk for"
                    )
        # A function that closes over traced values must be traced anew in every trace.
        if not any(map(_jax_api.is_tracer, found[0].frame.consts)):
            self._analysed[key] = found
        return found


def shrink(
    apply_fn: ApplyFn,
    params: Params,
    masks: Masks,
    *inputs: Any,
    mutable: Prunable = None,
    unknown: str = "error",
) -> tuple[Shrunk, Params]:
    """Returns the network without its removed channels.

    The small function computes on small parameters what ``apply_fn`` computes on masked
    ones, in exact arithmetic: outputs are equal, and so are gradients on what is kept.
    It evaluates the same operations on fewer channels. A norm that divides by a number
    of channels goes on dividing by the original number, as the masked network does; a
    smaller module built anew would not.

    The two agree on finite values: where the masked network multiplies an infinity by
    a weight at zero it has NaN, and the small one has nothing. Gradients are equal at
    the masked parameters; apply the masks again after each training step, for a
    removed scale or shift can have a gradient of its own.

    Args:
        apply_fn: ``(params, *inputs) -> outputs``.
        params: the parameters, and other collections if the function takes them. A leaf
            with a mask of shape ``()``, as statistics have, is not masked, but cut with
            the channels that it describes.
        masks: masks of whole channels, as :func:`jprune.prune` makes them from
            :func:`couplings`.
        *inputs: what else the function takes: arrays or their shapes. The small
            function takes other shapes too.
        mutable: which results shrink, see :func:`couplings`.
        unknown: see :func:`couplings`.

    Returns:
        The small function, a :class:`Shrunk`, and its parameters, under the same paths.
        ``small_apply_fn.take(tree)`` cuts other trees alike: optimiser states,
        gradients.

    Raises:
        ValueError: the masks do not fit, do not remove whole channels, or remove
            channels that cannot be removed or all of an axis; the message names the
            leaf and the axis.
        NotImplementedError: a primitive has no rule.

    Example:
        >>> def apply_fn(params, x):
        ...     return jnp.tanh(x @ params["a"]) @ params["b"]
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> keep = jnp.arange(4) > 0
        >>> masks = {"a": keep[None, :], "b": keep[:, None]}
        >>> x = jnp.ones((1, 3))
        >>> small_apply_fn, small_params = shrink(apply_fn, params, masks, x)
        >>> jax.tree.map(jnp.shape, small_params)
        {'a': (3, 3), 'b': (3, 2)}
    """
    masks_lib.check(masks, params)
    removed = _removed(params, masks)
    tree = trees.shapes_of(params)
    found = _analyse(apply_fn, params, inputs, removed, mutable, unknown)
    kept = _kept_positions(*found)
    small = Shrunk(apply_fn, tree, kept, removed, mutable, unknown)
    return small, jax.tree_util.tree_map_with_path(
        lambda keys, leaf: _cut(leaf, kept[trees.path_of(keys)]), params
    )


def _removed(params: Params, masks: Masks) -> _Removed:
    """Returns which positions of which axes are masked out as a whole."""
    found = {}
    leaves = zip(trees.leaves_of(params), trees.leaves_of(masks), strict=True)
    for leaf, mask in leaves:
        if _jax_api.is_tracer(mask.value):
            raise ValueError(
                f"masks: {mask.path!r} is traced; shapes depend on masks, so shrink "
                "outside of jit"
            )
        keep = np.asarray(mask.value)
        if not mask.shape or keep.all():
            continue
        if not keep.any():
            raise ValueError(
                f"masks: nothing is left of {leaf.path!r} {leaf.shape}; at least one "
                "channel of each group must survive"
            )
        rest = [tuple(b for b in range(keep.ndim) if b != a) for a in range(keep.ndim)]
        sides: list[Any] = [keep.any(axis=other) for other in rest]
        stray = _kept.outer(sides) & ~keep
        if stray.any():
            counts = [int(stray.any(axis=other).sum()) for other in rest]
            axis = int(np.argmin([n if n else keep.size for n in counts]))
            raise ValueError(
                f"masks: {leaf.path!r} {leaf.shape} is not masked by whole channels: "
                f"along axis {axis}, {counts[axis]} of {keep.shape[axis]} positions "
                "are masked in part. Without single weights a network is no smaller"
            )
        found[leaf.place] = [
            np.broadcast_to(~side, (n,))
            for side, n in zip(sides, leaf.shape, strict=True)
        ]
    return found


def _analyse(
    apply_fn: ApplyFn,
    params: Params,
    inputs: Sequence[Any],
    removed: _Removed,
    mutable: Prunable,
    unknown: str,
) -> tuple[Traced, Kept]:
    def background(leaf: trees.Leaf, axis: int) -> np.ndarray:
        if leaf.place not in removed:
            return _values.UNKNOWN
        return np.where(removed[leaf.place][axis], 0.0, np.nan)

    traced = _trace.trace(
        apply_fn, params, inputs, background, mutable=mutable, unknown=unknown
    )
    gone = np.zeros(traced.graph.size, bool)
    for place, sides in removed.items():
        for ids, side in zip(traced.labels[place], sides, strict=True):
            if ids is not None:
                gone[traced.component[ids[side]]] = True
    for place, sides in removed.items():
        leaf = traced.leaves[place]
        for axis, (ids, side) in enumerate(
            zip(traced.labels[place], sides, strict=True)
        ):
            for position in np.flatnonzero(side):
                own = -1 if ids is None else int(traced.component[ids[position]])
                if own in traced.reasons:
                    raise ValueError(
                        f"masks: position {position} of {leaf.path!r} (axis {axis} of "
                        f"{leaf.shape}) cannot be removed: "
                        f"{'; '.join(traced.reasons[own])}. A channel goes with all "
                        "that is coupled to it, see jprune.couplings"
                    )
    return traced, Kept(traced.component, gone)


def _kept_positions(
    traced: Traced, kept: Kept
) -> dict[str, tuple[np.ndarray | None, ...]]:
    found = {}
    for leaf, value in zip(traced.leaves, traced.frame.ins, strict=False):
        found[leaf.path] = kept.positions(value)
        for axis, own in enumerate(found[leaf.path]):
            if own is not None and len(own) == 0:
                raise ValueError(
                    f"masks: nothing is left of {leaf.path!r} along axis {axis}; at "
                    "least one channel of each group must survive"
                )
    return found


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def _cut(leaf: Any, kept: Sequence[np.ndarray | None]) -> Any:
    """Returns what is kept of an array, or of its shape."""
    if all(own is None for own in kept):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        pairs = zip(kept, leaf.shape, strict=True)
        shape = tuple(n if own is None else len(own) for own, n in pairs)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    on_host = not _jax_api.is_tracer(leaf) and not _is_spread(leaf)
    for axis, own in enumerate(kept):
        if own is not None:
            # On the host, nothing is compiled.
            take = np.asarray(leaf).take if on_host else None
            leaf = take(own, axis) if take else _kept.take(leaf, axis, own)
    return jnp.asarray(leaf)


def _is_spread(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return sharding is not None and len(sharding.device_set) > 1
