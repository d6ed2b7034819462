"""Finding the sites of a function in its jaxpr."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jprune import trees
from jprune.tracing import _flow, _jax_api, _places
from jprune.tracing._flow import Flow
from jprune.tracing._jax_api import Jaxpr, JaxprEqn, Literal, Var
from jprune.tracing._sites import Body, Site, Sites, rank
from jprune.types import Params

_PRODUCTS = ("dot_general", "conv_general_dilated")
_CALLS = ("jit", "pjit", "closed_call", "core_call")
REMAT = ("remat", "remat2", "checkpoint")
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def find(fn: Callable[..., Any], params: Params, inputs: Sequence[Any]) -> Sites:
    """Traces a function and finds its sites."""
    closed, outputs = _jax_api.trace(fn, params, *inputs)
    leaves = trees.leaves_of(trees.shapes_of(params))
    arguments = closed.jaxpr.invars[len(leaves) :]
    finder = _Finder(leaves, data_closed_over=not arguments)
    flows = [_flow.of_parameter(leaf.place, len(leaf.shape)) for leaf in leaves]
    flows += [Flow(data=True) for _ in arguments]
    body, _ = finder.body(closed.jaxpr, closed.consts, flows, (), "")
    return Sites(body, tuple(finder.every), outputs)


class _Finder:
    """Goes through jaxprs in order of evaluation, and numbers the sites."""

    def __init__(self, leaves: list[trees.Leaf], data_closed_over: bool):
        self.leaves = leaves
        self.shapes = [leaf.shape for leaf in leaves]
        # A function of parameters alone holds its data.
        self.constant = Flow(data=data_closed_over)
        self.every: list[Site] = []

    def body(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        flows: Sequence[Flow],
        lengths: tuple[int, ...],
        refused: str,
    ) -> tuple[Body, list[Flow]]:
        """Returns a jaxpr with its sites, and what its results depend on."""
        jaxpr, consts = _opened(jaxpr, consts)
        env: dict[Var, Flow] = dict.fromkeys(jaxpr.constvars, self.constant)
        env.update(zip(jaxpr.invars, flows, strict=True))
        first = len(self.every)
        inner, own = {}, []
        for number, eqn in enumerate(jaxpr.eqns):
            ins = [
                Flow() if isinstance(atom, Literal) else env[atom]
                for atom in eqn.invars
            ]
            held, outs = self.held(eqn, ins, lengths, refused)
            if held is not None and held.names:
                inner[number] = held
            env.update(zip(eqn.outvars, outs, strict=True))
            kernel_first = _kernel_first(eqn, ins)
            if kernel_first is not None or eqn.primitive.name == "name":
                flow = ins[0 if kernel_first else -1]
                site = self.site(eqn, flow, bool(kernel_first), lengths, refused)
                own.append(len(self.every))
                self.every.append(site)
        followed = _places.Follower(jaxpr, env)
        for number in own:
            site = self.every[number]
            found = {"output": site.found["output"]}
            if site.kind != "name":
                found = followed.places(site.eqn, site.channel_axes)
            self.every[number] = dataclasses.replace(
                site, found=found, places=tuple(sorted(found, key=rank))
            )
        names = frozenset(site.name for site in self.every[first:])
        sites = tuple(self.every[number] for number in own)
        results = [
            Flow() if isinstance(atom, Literal) else env[atom] for atom in jaxpr.outvars
        ]
        return Body(jaxpr, consts, sites, inner, names), results

    def site(
        self,
        eqn: JaxprEqn,
        flow: Flow,
        kernel_first: bool,
        lengths: tuple[int, ...],
        refused: str,
    ) -> Site:
        """Returns the site at an equation, as yet without what follows it."""
        kind = eqn.primitive.name
        if kind == "name":
            leaf, path = None, str(eqn.params["name"])
            axes, leaf_axes = (max(len(_jax_api.result(eqn).shape) - 1, 0),), None
        else:
            place = flow.leaf
            if place is None:
                place = max(flow.leaves, key=lambda own: (self.leaves[own].size, -own))
            leaf, path = self.leaves[place], self.leaves[place].path
            pairs = _channels(eqn, kernel_first)
            axes = tuple(axis for axis, _ in pairs)
            leaf_axes = None
            if flow.axes is not None:
                leaf_axes = tuple(a for _, side in pairs for a in flow.axes[side])
        index = sum(site.path == path for site in self.every)
        return Site(
            name=f"{path}:{index}" if index else path,
            path=path,
            index=index,
            kind=kind,
            leaf=leaf,
            places=("output",),
            at="output",
            channel_axes=axes,
            leaf_axes=leaf_axes,
            lengths=lengths,
            leaf_loops=flow.loops,
            steps=(),
            eqn=eqn,
            kernel_first=kernel_first,
            found={"output": _places.Place(eqn.outvars[0], axes)},
            refused=refused,
        )

    def held(
        self,
        eqn: JaxprEqn,
        ins: Sequence[Flow],
        lengths: tuple[int, ...],
        refused: str,
    ) -> tuple[Body | None, list[Flow]]:
        """Goes into the jaxprs that an equation holds."""
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self.scan(eqn, ins, lengths, refused)
        if name in (*_CALLS, *REMAT):
            return self.go_into(params, ins, lengths, refused)
        if name.startswith("custom_") and any(key in params for key in _INNER):
            why = refused or "it stands in a function with a derivative rule of its own"
            return self.go_into(params, ins, lengths, why)
        out = _flow.through(eqn, ins, self.shapes)
        if name in ("while", "cond"):
            # To name the sites inside in the error, should one of them be chosen.
            self.refuse(eqn, ins, lengths, refused or f"it stands in a {name}")
        return None, [out] * len(eqn.outvars)

    def go_into(
        self,
        params: Mapping[str, Any],
        ins: Sequence[Flow],
        lengths: tuple[int, ...],
        refused: str,
    ) -> tuple[Body, list[Flow]]:
        """Goes into the one jaxpr that an equation with some parameters holds."""
        key = next(key for key in _INNER if key in params)
        return self.body(*_jax_api.as_closed(params[key]), ins, lengths, refused)

    def refuse(
        self,
        eqn: JaxprEqn,
        ins: Sequence[Flow],
        lengths: tuple[int, ...],
        why: str,
    ) -> None:
        """Goes into the branches of a cond, or the body of a while."""
        params = eqn.params
        if eqn.primitive.name == "cond":
            for branch in params["branches"]:
                self.body(*_jax_api.as_closed(branch), ins[1:], lengths, why)
            return
        n, m = params["cond_nconsts"], params["body_nconsts"]
        body = _jax_api.as_closed(params["body_jaxpr"])
        carry = [
            dataclasses.replace(flow, data=True, axes=None) for flow in ins[n + m :]
        ]
        self.body(*body, [*ins[n : n + m], *carry], lengths, why)

    def scan(
        self,
        eqn: JaxprEqn,
        ins: Sequence[Flow],
        lengths: tuple[int, ...],
        refused: str,
    ) -> tuple[Body, list[Flow]]:
        """Goes into the body of a scan, until what it carries depends on no more."""
        params = eqn.params
        n, m = params["num_consts"], params["num_carry"]
        rows = [flow.row(len(lengths)) for flow in ins[n + m :]]
        around = (*lengths, params["length"])
        carry = list(ins[n : n + m])
        first = len(self.every)
        while True:
            # A dependence only grows, so this ends.
            del self.every[first:]
            closed = _jax_api.as_closed(params["jaxpr"])
            flows = [*ins[:n], *carry, *rows]
            body, outs = self.body(*closed, flows, around, refused)
            grown = [
                a if a == b else _flow.joined([a, b])
                for a, b in zip(carry, outs, strict=False)
            ]
            if grown == carry:
                break
            carry = grown
        return body, [*carry, *(_flow.joined([flow]) for flow in outs[m:])]


def _kernel_first(eqn: JaxprEqn, ins: Sequence[Flow]) -> bool | None:
    """Whether the first operand is a kernel; None if the equation uses none."""
    if eqn.primitive.name not in _PRODUCTS:
        return None
    a, b = ins
    if a.data and b.is_kernel:
        return False
    dense = eqn.primitive.name == "dot_general"
    return True if dense and b.data and a.is_kernel else None


def _channels(eqn: JaxprEqn, kernel_first: bool) -> list[tuple[int, int]]:
    """Returns pairs of axes of the output and of the kernel: the output channels."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "conv_general_dilated":
        return [(numbers.out_spec[1], numbers.rhs_spec[0])]
    (contracted, batch) = numbers
    ranks = [len(_jax_api.aval(atom).shape) for atom in eqn.invars]
    free = [
        [a for a in range(rank) if a not in (*contracted[side], *batch[side])]
        for side, rank in enumerate(ranks)
    ]
    side = 0 if kernel_first else 1
    start = len(batch[0]) + (0 if kernel_first else len(free[0]))
    pairs = list(enumerate(batch[side]))
    return pairs + [(start + i, axis) for i, axis in enumerate(free[side])]


def _jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, (_jax_api.ClosedJaxpr, Jaxpr)):
                yield _jax_api.as_closed(one)[0]


def _holds(jaxpr: Jaxpr) -> bool:
    """Whether a jaxpr may have sites."""
    return any(
        eqn.primitive.name in (*_PRODUCTS, "name") or any(map(_holds, _jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def _is_opened(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in _CALLS and any(map(_holds, _jaxprs(eqn)))


def _opened(jaxpr: Jaxpr, consts: Sequence[Any]) -> tuple[Jaxpr, Sequence[Any]]:
    """Inlines the calls that may have sites, so that what follows one is in view."""
    if not any(map(_is_opened, jaxpr.eqns)):
        return jaxpr, consts
    structs = [
        jax.ShapeDtypeStruct(_jax_api.aval(var).shape, _jax_api.aval(var).dtype)
        for var in jaxpr.invars
    ]
    closed, _ = _jax_api.trace(lambda *args: _inline(jaxpr, consts, args), *structs)
    return _jax_api.as_closed(closed)


def _inline(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else env[atom]  # noqa: E731
    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if _is_opened(eqn):
            key = next(key for key in _INNER if key in eqn.params)
            outs = _inline(*_jax_api.as_closed(eqn.params[key]), operands)
        else:
            outs = _jax_api.bind(eqn, *operands)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
