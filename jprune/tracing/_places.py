"""What follows a product: its bias, its norm and its activation, where they show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jprune.tracing import _jax_api
from jprune.tracing._flow import Flow
from jprune.tracing._jax_api import Jaxpr, JaxprEqn, Literal, Var

ORDER = ("output", "after_bias", "after_norm", "after_activation")

_AFFINE = frozenset(["add", "add_any", "sub", "mul", "div"])
_NONLINEAR = frozenset(
    "abs ceil cos custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr erf exp exp2 "
    "expm1 floor ge gt integer_pow jit le log log1p logistic lt max min pjit pow round "
    "rsqrt select_n sign sin sqrt square tanh".split()
)
_SAME = frozenset("convert_element_type copy name sharding_constraint".split())
_NO_STATISTIC = frozenset(["dot_general", "conv_general_dilated", "scan", "while"])


class Place(NamedTuple):
    """A value that follows a product, and which of its axes are channels."""

    var: Var
    channel_axes: tuple[int, ...]


class Follower:
    """Follows values through one jaxpr."""

    def __init__(self, jaxpr: Jaxpr, flows: Mapping[Var, Flow]):
        self.jaxpr = jaxpr
        self.flows = flows
        self.results = {v for v in jaxpr.outvars if isinstance(v, Var)}
        self.readers: dict[Var, list[JaxprEqn]] = {}
        for eqn in jaxpr.eqns:
            for var in dict.fromkeys(a for a in eqn.invars if isinstance(a, Var)):
                self.readers.setdefault(var, []).append(eqn)

    def places(
        self, product: JaxprEqn, channel_axes: tuple[int, ...]
    ) -> dict[str, Place]:
        """Returns the places that can be told, by name."""
        last = Place(product.outvars[0], channel_axes)
        found = {"output": last}
        last = self.without_moves(last)
        last = self.bias(last, found)
        last = self.norm(last, found)
        self.activation(last, found)
        return found

    def without_moves(self, at: Place) -> Place:
        """Goes on while the only thing that happens is a transposition or a cast."""
        while True:
            eqn = self.only_reader(at.var)
            axes = eqn and _moved(eqn, at)
            if eqn is None or axes is None:
                return at
            at = Place(eqn.outvars[0], axes)

    def bias(self, at: Place, found: dict[str, Place]) -> Place:
        eqn = self.only_reader(at.var)
        if eqn is None or eqn.primitive.name not in ("add", "add_any"):
            return at
        other = self.other(eqn, at.var)
        if other is None or not self.is_parameter(other) or not _fits(eqn, at.var):
            return at
        at = found["after_bias"] = Place(eqn.outvars[0], at.channel_axes)
        return self.without_moves(at)

    def norm(self, at: Place, found: dict[str, Place]) -> Place:
        """Goes on through products and sums with parameters and own statistics.

        A norm has a product among them.
        """
        statistics, aside = self.statistics(at.var)
        last, own, scaled = at, at, False
        while own.var not in self.results:
            live = [
                eqn
                for eqn in self.readers.get(own.var, ())
                if not _is_reduction(eqn) and not aside.issuperset(eqn.outvars)
            ]
            if len(live) != 1:
                break
            (eqn,) = live
            name = eqn.primitive.name
            if name in _SAME:
                own = Place(eqn.outvars[0], own.channel_axes)
                continue
            if name not in _AFFINE or not _fits(eqn, own.var):
                break
            other = self.other(eqn, own.var)
            is_own = isinstance(other, Var) and other in statistics
            if other is None or not (is_own or self.is_still(other)):
                break
            own = Place(eqn.outvars[0], own.channel_axes)
            if is_own or self.is_parameter(other):
                last = own
                scaled = scaled or name in ("mul", "div")
        if not scaled:
            return at
        found["after_norm"] = last
        return self.without_moves(last)

    def activation(self, at: Place, found: dict[str, Place]) -> None:
        """Goes on to the first value that is a function of this one alone.

        It is where all that is made of the value, entry by entry, comes together.
        """
        region, made, bent = {at.var}, set(), False
        for eqn in self.jaxpr.eqns:
            name = eqn.primitive.name
            read = [a for a in eqn.invars if isinstance(a, Var) and a in region]
            if not read or name not in _NONLINEAR | _AFFINE | _SAME | {"neg"}:
                continue
            others = [a for a in eqn.invars if isinstance(a, Literal) or a not in read]
            alone = all(self.is_still(a) and not self.is_parameter(a) for a in others)
            if not alone or len(eqn.outvars) != 1 or not _fits(eqn, at.var):
                continue
            made.add(id(eqn))
            bent = bent or name in _NONLINEAR or len(set(read)) > 1
            (last,) = eqn.outvars
            if bent and all(self.stays(var, made) for var in region):
                found["after_activation"] = Place(last, at.channel_axes)
                return
            region.add(last)

    def stays(self, var: Var, made: set[int]) -> bool:
        """Whether only some equations read a variable."""
        readers = self.readers.get(var, ())
        return var not in self.results and all(id(eqn) in made for eqn in readers)

    def only_reader(self, var: Var) -> JaxprEqn | None:
        readers = self.readers.get(var, ())
        return readers[0] if len(readers) == 1 and var not in self.results else None

    def other(self, eqn: JaxprEqn, var: Var) -> Any:
        """Returns the other of two operands."""
        others = [atom for atom in eqn.invars if atom is not var]
        return others[0] if len(others) == 1 else None

    def is_still(self, atom: Var | Literal) -> bool:
        return isinstance(atom, Literal) or not self.flows[atom].data

    def is_parameter(self, atom: Var | Literal) -> bool:
        return isinstance(atom, Var) and self.flows[atom].is_kernel

    def statistics(self, start: Var) -> tuple[set[Var], set[Var]]:
        """Returns the statistics of a value, and what only they are made of."""
        values, statistics = {start}, set()
        for eqn in self.jaxpr.eqns:
            read = {atom for atom in eqn.invars if isinstance(atom, Var)}
            of_value = bool(read & values)
            if not (of_value or read & statistics):
                continue
            if eqn.primitive.name in _NO_STATISTIC:
                continue
            others = read - values - statistics
            if not all(self.is_still(atom) for atom in others):
                continue
            reduced = not of_value or _is_reduction(eqn)
            (statistics if reduced else values).update(eqn.outvars)
        used = self.used(values, statistics)
        aside: set[Var] = set()
        for eqn in reversed(self.jaxpr.eqns):
            for var in values.intersection(eqn.outvars) - self.results:
                if all(
                    used.issuperset(own.outvars)
                    if _is_reduction(own)
                    else aside.issuperset(own.outvars)
                    for own in self.readers.get(var, ())
                ):
                    aside.add(var)
        return statistics, aside

    def used(self, values: set[Var], statistics: set[Var]) -> set[Var]:
        """Returns the statistics that meet a value again, as a pooled one does not."""
        used: set[Var] = set()
        for eqn in reversed(self.jaxpr.eqns):
            read = {atom for atom in eqn.invars if isinstance(atom, Var)}
            meet = eqn.primitive.name in _AFFINE and bool(read & values)
            if meet or used.intersection(eqn.outvars):
                used |= read & statistics
        return used


def _is_reduction(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name.startswith("reduce_") and (
        eqn.primitive.name != "reduce_precision"
    )


def _fits(eqn: JaxprEqn, var: Var) -> bool:
    return _jax_api.result(eqn).shape == _jax_api.aval(var).shape


def _moved(eqn: JaxprEqn, at: Place) -> tuple[int, ...] | None:
    """Returns where an equation that only moves a value moves its channels."""
    name, axes = eqn.primitive.name, at.channel_axes
    if name in _SAME:
        return axes
    if name == "transpose":
        order = list(eqn.params["permutation"])
        return tuple(order.index(axis) for axis in axes)
    old, new = _jax_api.aval(at.var).shape, _jax_api.result(eqn).shape
    same_size = math.prod(old) == math.prod(new)
    if name not in ("reshape", "squeeze", "broadcast_in_dim") or not same_size:
        return None
    found = [_same_axis(old, axis, new) for axis in axes]
    return None if None in found else tuple(a for a in found if a is not None)


def _same_axis(old: Sequence[int], axis: int, new: Sequence[int]) -> int | None:
    """Returns the axis with as many entries before it and of the same size."""
    before = math.prod(old[:axis])
    for other, size in enumerate(new):
        if size == old[axis] and math.prod(new[:other]) == before:
            return other
    return None
