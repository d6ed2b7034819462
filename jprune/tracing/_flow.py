"""Where values come from: parameters, data or neither, and which axis is which.

One pass over an equation says, for each result, which parameters it depends on and
whether it depends on data. A product of data and what depends on parameters alone is
where a kernel is used. As long as a value has the axes of one leaf, moved and merged,
they are followed.
"""

import dataclasses
import math
from collections.abc import Sequence

from jprune.tracing import _jax_api
from jprune.tracing._jax_api import JaxprEqn

# For each axis of a value the axes of a leaf that were merged into it.
Axes = tuple[tuple[int, ...], ...]

_ELEMENTWISE = frozenset(
    "abs add add_any clamp convert_element_type copy copy_p div erf exp integer_pow "
    "log logistic max min mul name neg optimization_barrier pow reduce_precision round "
    "rsqrt select_n sharding_constraint sign sqrt square stop_gradient sub tanh".split()
)


@dataclasses.dataclass(frozen=True)
class Flow:
    """What a value depends on.

    Attributes:
        leaves: the parameters, by place.
        data: whether it depends on data too.
        leaf: the parameter whose entries it has, changed or moved; or None.
        axes: which axes of that leaf its axes are, or None.
        loops: pairs of a loop, by its depth, and the axis of the leaf that it runs
            over.
    """

    leaves: frozenset[int] = frozenset()
    data: bool = False
    leaf: int | None = None
    axes: Axes | None = None
    loops: tuple[tuple[int, int], ...] = ()

    @property
    def is_kernel(self) -> bool:
        """Whether it depends on parameters alone."""
        return bool(self.leaves) and not self.data

    def row(self, depth: int) -> "Flow":
        """What a row of the value depends on, in a loop over its first axis."""
        if self.axes is None or len(self.axes[0]) != 1:
            return dataclasses.replace(self, axes=None)
        loops = (*self.loops, (depth, self.axes[0][0]))
        return dataclasses.replace(self, axes=self.axes[1:], loops=loops)


def of_parameter(place: int, rank: int) -> Flow:
    """Returns what a parameter depends on: itself."""
    axes = tuple((axis,) for axis in range(rank))
    return Flow(frozenset([place]), False, place, axes)


def joined(flows: Sequence[Flow]) -> Flow:
    """Returns what depends on all of some values."""
    leaves = frozenset().union(*(flow.leaves for flow in flows))
    return Flow(leaves, any(flow.data for flow in flows))


def through(
    eqn: JaxprEqn, flows: Sequence[Flow], shapes: Sequence[tuple[int, ...]]
) -> Flow:
    """Returns what the results of an equation depend on.

    Args:
        eqn: the equation; what it holds has been looked at elsewhere.
        flows: what its operands depend on.
        shapes: those of the parameters.
    """
    name = eqn.primitive.name
    if name.startswith(("random_", "threefry")):
        return Flow()
    out = joined(flows)
    if name in _ELEMENTWISE:
        shape = _jax_api.result(eqn).shape
        owners = [
            (math.prod(shapes[flow.leaf]), flow)
            for atom, flow in zip(eqn.invars, flows, strict=True)
            if flow.leaf is not None and _jax_api.aval(atom).shape == shape
        ]
        if not owners:
            return out
        # Of a kernel and its scale, the kernel.
        _, owner = max(owners, key=lambda own: own[0])
        axes = owner.axes
    elif flows and flows[0].leaf is not None:
        owner = flows[0]
        axes = owner.axes and _moved(eqn, owner.axes, shapes[flows[0].leaf])
    else:
        return out
    return dataclasses.replace(out, leaf=owner.leaf, axes=axes, loops=owner.loops)


def _moved(eqn: JaxprEqn, axes: Axes, leaf_shape: Sequence[int]) -> Axes | None:
    name, params = eqn.primitive.name, eqn.params
    shape = _jax_api.result(eqn).shape
    if name == "transpose":
        return tuple(axes[axis] for axis in params["permutation"])
    if name == "squeeze":
        gone = params["dimensions"]
        return tuple(own for axis, own in enumerate(axes) if axis not in gone)
    if name == "broadcast_in_dim":
        found: list[tuple[int, ...]] = [()] * len(shape)
        for own, axis in zip(axes, params["broadcast_dimensions"], strict=True):
            if math.prod(leaf_shape[a] for a in own) == shape[axis]:
                found[axis] = own
        return tuple(found)
    if name == "reshape":
        return _reshaped(axes, leaf_shape, shape)
    return None


def _reshaped(
    axes: Axes, leaf_shape: Sequence[int], shape: Sequence[int]
) -> Axes | None:
    """Merges axes, or splits what was merged; an axis of the leaf is never split."""
    rest = [axis for own in axes for axis in own if leaf_shape[axis] != 1]
    found = []
    for size in shape:
        own: list[int] = []
        while rest and math.prod(leaf_shape[a] for a in own) < size:
            own.append(rest.pop(0))
        if math.prod(leaf_shape[a] for a in own) != size:
            return None
        found.append(tuple(own))
    return tuple(found)
