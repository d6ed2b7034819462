"""Evaluating a function with a hand on its sites."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jprune.tracing import _finder, _jax_api, _sites
from jprune.tracing._jax_api import JaxprEqn, Literal, Var
from jprune.tracing._sites import Body, Site
from jprune.types import ApplyFn, Params

# (site, inputs, value, extra) -> (value to go on with, what to collect or None).
Rule = Callable[[Site, tuple[Any, ...], Any, Any], tuple[Any, PyTree]]
Patterns = str | Sequence[str] | None


def sites(fn: ApplyFn, params: Params, *inputs: Any) -> list[Site]:
    """Returns the sites of a function, in order of evaluation.

    A site is the product (``dot_general`` or ``conv_general_dilated``) of data with a
    value that depends on parameters alone, the kernel; or a value that the function
    named by ``jax.ad_checkpoint.checkpoint_name``. Where a function of parameters alone
    is traced, the arrays it closes over are the data.

    Args:
        fn: ``(params, *inputs) -> outputs``; traced, not run.
        params: any pytree of arrays, or of their shapes.
        *inputs: what else the function takes: arrays or shapes.

    Example:
        >>> def fn(params, x):
        ...     h = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
        ...     return h @ params["b"]["kernel"]
        >>> params = {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
        ...           "b": {"kernel": jnp.ones((4, 2))}}
        >>> for site in sites(fn, params, jnp.ones((1, 3))):
        ...     print(site.name, site.places)
        a/kernel ('output', 'after_bias', 'after_activation')
        b/kernel ('output',)
    """
    return list(_finder.find(fn, params, inputs).every)


def intercept(
    fn: ApplyFn, rule: Rule, *, sites: Patterns = None, at: str = "output"
) -> Callable[..., tuple[Any, dict[str, PyTree]]]:
    """Returns the function with a rule applied at its sites.

    The new function evaluates ``fn`` equation by equation. When a site's value is
    there, the rule sees it, says with which value to go on, and what to collect::

        def rule(site, inputs, output, extra):
            return output * extra[site.name], jnp.mean(output)

        out, collected = intercept(fn, rule)(extra, params, x)

    The result can be compiled, differentiated (also in ``extra``) and mapped. The rule
    is called while the function is traced, once for each site, in order of evaluation.

    Calls, ``remat`` and ``scan`` are gone into. In a ``scan`` the rule runs in the
    loop's body, with ``site.steps`` the step that the loop is at, and what is collected
    is stacked along leading axes of ``site.lengths``. A function with a derivative rule
    of its own (``custom_jvp``, ``custom_vjp``) keeps it; sites inside, and in a
    ``while`` or ``cond``, cannot be intercepted.

    Args:
        fn: ``(params, *inputs) -> outputs``.
        rule: ``(site, inputs, output, extra) -> (value, collect)``. ``inputs`` are the
            input and the kernel, as the operation takes them; of a named value, the
            value alone. ``output`` is the value at ``at``, and the value returned takes
            its place. ``collect`` is any pytree of arrays, or None.
        sites: the sites that the rule is for: names, or path patterns of kernels (see
            :mod:`jprune.trees`); all unless given.
        at: the place of the value that the rule sees. ``"output"`` is that of the
            operation, ``"after_bias"`` with its bias added, ``"after_norm"`` with
            whatever scales and shifts it by parameters and its own statistics,
            ``"after_activation"`` with the function applied that is elementwise and
            takes nothing else. Where there is none, or it cannot be told, it is the
            last place before that is there; ``site.at`` says which. A named value is in
            the same place always.

    Returns:
        ``(extra, params, *inputs) -> (outputs, collected)``, with ``collected`` a dict
        by site name. It raises ValueError if a pattern matches no site (the message
        lists them) or a value returned by the rule has another shape or dtype, and
        NotImplementedError if a chosen site cannot be intercepted.

    Raises:
        ValueError: ``at`` is no place.

    Example:
        >>> def fn(params, x):
        ...     return jnp.tanh(x @ params["a"]) @ params["b"]
        >>> def double(site, inputs, output, extra):
        ...     return extra * output, jnp.max(output)
        >>> params = {"a": jnp.eye(2), "b": jnp.ones((2, 1))}
        >>> x = jnp.array([[0.0, 1.0]])
        >>> out, collected = intercept(fn, double, sites="b")(2.0, params, x)
        >>> float(out[0, 0]) == 2 * float(collected["b"])
        True
    """
    _sites.check_place(at)

    def intercepted(extra: PyTree, params: Params, *inputs: Any) -> tuple[Any, dict]:
        found = _finder.find(fn, params, inputs)
        chosen = _sites.select(found, sites, at)
        args = jax.tree.leaves((params, inputs))
        outs, collected = _Run(rule, extra, chosen).evaluate(found.body, args, ())
        # In order of evaluation.
        ordered = {name: collected[name] for name in chosen if name in collected}
        return jax.tree.unflatten(jax.tree.structure(found.outputs), outs), ordered

    return intercepted


@dataclasses.dataclass(frozen=True)
class _Run:
    """One evaluation: the rule, its parameters, and the chosen sites."""

    rule: Rule
    extra: PyTree
    chosen: Mapping[str, Site]

    def evaluate(
        self, body: Body, args: Sequence[Any], steps: tuple[Any, ...]
    ) -> tuple[list[Any], dict[str, PyTree]]:
        jaxpr = body.jaxpr
        env: dict[Var, Any] = dict(zip(jaxpr.constvars, body.consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        collected: dict[str, PyTree] = {}
        waiting: dict[Var, list[Site]] = {}
        for own in body.sites:
            site = self.chosen.get(own.name)
            if site is not None:
                waiting.setdefault(site.found[site.at].var, []).append(site)

        def read(atom: Var | Literal) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for number, eqn in enumerate(jaxpr.eqns):
            operands = [read(atom) for atom in eqn.invars]
            inner = body.inner.get(number)
            if inner is None or self.chosen.keys().isdisjoint(inner.names):
                outs = _jax_api.bind(eqn, *operands)
            else:
                outs, found = self.go_into(eqn, inner, operands, steps)
                collected |= found
            env.update(zip(eqn.outvars, outs, strict=True))
            for var in eqn.outvars:
                for site in waiting.get(var, ()):
                    inputs = tuple(map(read, site.eqn.invars))
                    inputs = inputs[::-1] if site.kernel_first else inputs
                    env[var], own = self.apply(site, inputs, env[var], steps)
                    if own is not None:
                        collected[site.name] = own
        return [read(atom) for atom in jaxpr.outvars], collected

    def apply(
        self, site: Site, inputs: tuple[Any, ...], value: Any, steps: tuple[Any, ...]
    ) -> tuple[Any, PyTree]:
        site = dataclasses.replace(site, steps=steps)
        new, collect = self.rule(site, inputs, value, self.extra)
        if (jnp.shape(new), jnp.result_type(new)) != (value.shape, value.dtype):
            raise ValueError(
                f"rule: at {site.name!r} it returns shape {jnp.shape(new)} and "
                f"{jnp.result_type(new)} in the place of {value.shape} and "
                f"{value.dtype}"
            )
        return new, collect

    def go_into(
        self,
        eqn: JaxprEqn,
        inner: Body,
        operands: Sequence[Any],
        steps: tuple[Any, ...],
    ) -> tuple[Sequence[Any], dict[str, PyTree]]:
        if eqn.primitive.name == "scan":
            return self.scan(eqn, inner, operands, steps)
        run = lambda *values: self.evaluate(inner, values, steps)  # noqa: E731
        if eqn.primitive.name in _finder.REMAT:
            run = jax.checkpoint(
                run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
            )
        return run(*operands)

    def scan(
        self,
        eqn: JaxprEqn,
        inner: Body,
        operands: Sequence[Any],
        steps: tuple[Any, ...],
    ) -> tuple[Sequence[Any], dict[str, PyTree]]:
        params = eqn.params
        n, m = params["num_consts"], params["num_carry"]
        consts, init, xs = operands[:n], operands[n : n + m], operands[n + m :]

        def body(carry: Sequence[Any], x: tuple) -> tuple[Any, Any]:
            step, rows = x
            args = [*consts, *carry, *rows]
            outs, collected = self.evaluate(inner, args, (*steps, step))
            return outs[:m], (outs[m:], collected)

        length = params["length"]
        options = {key: params[key] for key in ("reverse", "unroll")}
        carry, (ys, collected) = lax.scan(
            body, list(init), (jnp.arange(length), list(xs)), length=length, **options
        )
        return [*carry, *ys], collected
