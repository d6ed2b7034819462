"""The contractions of a jaxpr, and which parameters each of them is charged to.

Every value is *data* (it depends on an input of the function), is made of parameters
alone, or is a constant. A matrix product or a convolution is charged to what its side
of parameters is made of; that side may be several leaves, as when the kernels of an
LSTM are concatenated before they are multiplied.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jprune.tracing import _jax_api
from jprune.tracing._interpreter import RULES
from jprune.tracing._jax_api import Jaxpr, JaxprEqn, Literal, Var

# What a value of parameters consists of: sets of leaves (by place) that cannot be told
# apart in it, with the number of entries that each set contributes.
Pieces = Mapping[frozenset[int], int]


class Origin(NamedTuple):
    """What a value is made of.

    Attributes:
        data: whether it depends on an input; then the pieces say nothing.
        pieces: of which parameters it is made; none for a constant.
    """

    data: bool
    pieces: Pieces


DATA = Origin(True, {})
CONSTANT = Origin(False, {})


class Contraction(NamedTuple):
    """A matrix product or a convolution.

    Attributes:
        macs: its multiply-accumulate operations, in all iterations of loops.
        outputs: the entries of its results, likewise.
        itemsize: the bytes of an entry of its result.
        pieces: what it is charged to; empty if neither side is made of parameters.
        of_data: whether both operands depend on an input.
    """

    macs: int
    outputs: int
    itemsize: int
    pieces: Pieces
    of_data: bool


def is_contraction(eqn: JaxprEqn) -> bool:
    """Whether the operations of an equation are counted."""
    return eqn.primitive.name in ("dot_general", "conv_general_dilated")


def factors(eqn: JaxprEqn, lhs: Sequence[Any], rhs: Sequence[Any]) -> list[Any]:
    """Returns lengths whose product is the number of MACs of a contraction.

    A convolution meets the padding as if it were data, but not the holes that a
    dilation of its input makes: a transposed convolution costs what each of its inputs
    costs. An axis within a group of a grouped convolution has its own, shorter length.

    Args:
        eqn: the equation.
        lhs: the lengths of the axes of its first operand: numbers, or anything else.
        rhs: those of the second.
    """
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        (_, summed), (_, batched) = jax.tree.map(int, numbers)
        rest = [n for j, n in enumerate(rhs) if j not in (*summed, *batched)]
        return [*lhs, *rest]
    outputs, inner, *kernel = numbers.rhs_spec
    batch = lhs[numbers.lhs_spec[0]]
    if eqn.params["batch_group_count"] > 1:
        batch = _jax_api.result(eqn).shape[numbers.out_spec[0]]
    window = [
        _meetings(
            size=_jax_api.result(eqn).shape[numbers.out_spec[2 + i]],
            taps=_jax_api.aval(eqn.invars[1]).shape[axis],
            stride=eqn.params["window_strides"][i],
            low=eqn.params["padding"][i][0],
            hole=eqn.params["lhs_dilation"][i],
            reach=eqn.params["rhs_dilation"][i],
        )
        for i, axis in enumerate(kernel)
    ]
    return [batch, rhs[outputs], rhs[inner], *window]


def _meetings(
    *, size: int, taps: int, stride: int, low: int, hole: int, reach: int
) -> int:
    """Returns how often a tap meets an entry that is no hole, along an axis."""
    if hole == 1:
        return size * taps
    places = np.arange(size)[:, None] * stride + np.arange(taps) * reach - low
    return int(np.count_nonzero(places % hole == 0))


# Walking.

_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
)


class Walk:
    """Goes through a jaxpr and its inner ones, and collects contractions.

    Attributes:
        unknown: ``"error"`` or ``"free"``, what to do about an unknown primitive.
    """

    def __init__(self, unknown: str):
        self.unknown = unknown

    def run(
        self, jaxpr: Any, args: Sequence[Origin], times: int = 1
    ) -> tuple[list[Origin], list[Contraction]]:
        """Returns what the results are made of, and the contractions.

        Args:
            jaxpr: a jaxpr, closed or not.
            args: what its arguments are made of.
            times: how often it is evaluated.
        """
        inner: Jaxpr = _jax_api.as_closed(jaxpr)[0]
        env: dict[Var, Origin] = dict.fromkeys(inner.constvars, CONSTANT)
        env.update(zip(inner.invars, args, strict=True))

        def read(atom: Var | Literal) -> Origin:
            return CONSTANT if isinstance(atom, Literal) else env[atom]

        found: list[Contraction] = []
        for eqn in inner.eqns:
            outs, own = self._equation(eqn, [read(x) for x in eqn.invars], times)
            found += own
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in inner.outvars], found

    def _equation(
        self, eqn: JaxprEqn, ins: Sequence[Origin], times: int
    ) -> tuple[Sequence[Origin], list[Contraction]]:
        name = eqn.primitive.name
        if is_contraction(eqn):
            lhs, rhs = ins
            return [_jointly(ins)], [_contraction(eqn, lhs, rhs, times)]
        if name in _CALLS:
            keys = ("jaxpr", "call_jaxpr", "fun_jaxpr")
            key = next(key for key in keys if key in eqn.params)
            return self.run(eqn.params[key], ins, times)
        if name == "scan":
            return self._scan(eqn, ins, times)
        if name == "while":
            return self._while(eqn, ins, times)
        if name == "cond":
            runs = [self.run(b, ins[1:], times) for b in eqn.params["branches"]]
            outs = [
                _join(options) for options in zip(*(r[0] for r in runs), strict=True)
            ]
            return outs, max((r[1] for r in runs), key=_total_macs)
        if name not in RULES and self.unknown != "free":
            module = _jax_api.module_of(eqn)
            raise NotImplementedError(
                f"cost: nothing is known of the primitive {name!r}"
                f"{f' (in {module})' if module else ''}; unknown='free' counts nothing "
                "for it"
            )
        return [_mixed(eqn, ins)] * len(eqn.outvars), []

    def _settle(
        self, jaxpr: Any, before: Sequence[Origin], carry: Sequence[Origin], after: Any
    ) -> list[Origin]:
        """Returns what a loop carries is made of, in any of its iterations."""
        while True:
            outs, _ = self.run(jaxpr, [*before, *carry, *after])
            pairs = zip(carry, outs, strict=False)
            joined = [_join(pair) for pair in pairs]
            if all(map(_alike, carry, joined)):
                return joined
            carry = joined

    def _scan(
        self, eqn: JaxprEqn, ins: Sequence[Origin], times: int
    ) -> tuple[list[Origin], list[Contraction]]:
        n, m = eqn.params["num_consts"], eqn.params["num_carry"]
        jaxpr, length = eqn.params["jaxpr"], eqn.params["length"]
        rows = [
            Origin(
                x.data, {k: -(-size // max(length, 1)) for k, size in x.pieces.items()}
            )
            for x in ins[n + m :]
        ]
        carry = self._settle(jaxpr, ins[:n], ins[n : n + m], rows)
        return self.run(jaxpr, [*ins[:n], *carry, *rows], times * length)

    def _while(
        self, eqn: JaxprEqn, ins: Sequence[Origin], times: int
    ) -> tuple[list[Origin], list[Contraction]]:
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        tested, consts, init = ins[:n], ins[n : n + m], ins[n + m :]
        carry = self._settle(eqn.params["body_jaxpr"], consts, init, ())
        _, test = self.run(eqn.params["cond_jaxpr"], [*tested, *carry], times)
        _, body = self.run(eqn.params["body_jaxpr"], [*consts, *carry], times)
        return carry, [*test, *body]


def _total_macs(found: Iterable[Contraction]) -> int:
    """Returns the MACs of some contractions."""
    return sum(own.macs for own in found)


def _contraction(eqn: JaxprEqn, lhs: Origin, rhs: Origin, times: int) -> Contraction:
    shapes = [_jax_api.aval(atom).shape for atom in eqn.invars]
    out = _jax_api.result(eqn)
    charged = _jointly([side._replace(data=False) for side in (lhs, rhs)])
    return Contraction(
        macs=math.prod(factors(eqn, *shapes)) * times,
        outputs=math.prod(out.shape) * times,
        itemsize=out.dtype.itemsize,
        pieces=charged.pieces,
        of_data=lhs.data and rhs.data,
    )


def _mixed(eqn: JaxprEqn, ins: Sequence[Origin]) -> Origin:
    """What the results of any other primitive are made of."""
    if any(value.data for value in ins):
        return DATA
    made = [value for value in ins if value.pieces]
    if eqn.primitive.name in ("concatenate", "stack"):
        sizes: dict[frozenset[int], int] = {}
        for value in made:
            for leaves, size in value.pieces.items():
                sizes[leaves] = sizes.get(leaves, 0) + size
        return Origin(False, sizes)
    if eqn.primitive.name in ("mul", "div") and made:
        # A scale, as of weight normalisation, has no operations of its own, and what
        # it scales stays zero where it was.
        most = max(map(_size, made))
        made = [value for value in made if _size(value) == most]
    return _jointly(made)


def _join(values: Iterable[Origin]) -> Origin:
    """Returns what may be any of some values."""
    values = list(values)
    same = all(_alike(values[0], value) for value in values)
    return values[0] if same else _jointly(values)


def _jointly(values: Sequence[Origin]) -> Origin:
    if any(value.data for value in values):
        return DATA
    made = [value for value in values if value.pieces]
    if len(made) < 2:
        return made[0] if made else CONSTANT
    leaves = frozenset().union(*(own for value in made for own in value.pieces))
    return Origin(False, {leaves: max(map(_size, made))})


def _alike(a: Origin, b: Origin) -> bool:
    return a.data == b.data and a.pieces.keys() == b.pieces.keys()


def _size(value: Origin) -> int:
    return sum(value.pieces.values())
