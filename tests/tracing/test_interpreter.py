"""The interpreter itself: its hook, and the page on how to add a primitive."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad

import jprune
from jprune.tracing import (
    _interpreter,
    _jax_api,
    _rules_contraction,
    _trace,
    _values,
)
from jprune.tracing._kept import Kept
from tests.tracing import law

PAGE = pathlib.Path(__file__).parents[2] / "docs/add_a_primitive.md"


def test_a_hook_sees_and_replaces_every_equation():
    """Inner jaxprs included, and the rest is evaluated as it was."""

    def apply_fn(params, x):
        block = jax.jit(lambda h: jnp.tanh(h @ params["square"]))
        return jax.lax.scan(lambda h, _: (block(h), h), x, length=2)[0]

    params = {"square": jnp.eye(3) * 0.5}
    x = jnp.ones((2, 3))
    traced = _trace.trace(apply_fn, params, (x,), lambda leaf, axis: np.zeros(1))
    removed = np.zeros(traced.graph.size, bool)
    seen = []

    def hook(step, operands, run):
        name = step.eqn.primitive.name
        seen.append(name)
        outs = run(*operands)
        return [2 * outs[0]] if name == "tanh" else outs

    args = [params["square"], x]
    plain = _interpreter.evaluate(Kept(traced.component, removed), traced.frame, args)
    np.testing.assert_array_equal(plain[0], apply_fn(params, x))
    kept = Kept(traced.component, removed, hook)
    (found,) = _interpreter.evaluate(kept, traced.frame, args)
    assert set(seen) == {"scan", "jit", "dot_general", "tanh"}
    once = 2 * jnp.tanh(x @ params["square"])
    expected = 2 * jnp.tanh(once @ params["square"])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def flip(x):
    return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)


def test_the_page_on_primitives():
    """Its skeleton is a rule that obeys the law."""
    primitive = Primitive("flip_pairs")
    primitive.def_impl(lambda x, size: flip(x))
    primitive.def_abstract_eval(lambda x, size: x)
    ad.deflinear2(primitive, lambda g, x, size: [primitive.bind(g, size=size)])

    def flip_pairs(x):
        return primitive.bind(x, size=x.shape[-1])

    code, case = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {**vars(_interpreter), **vars(_rules_contraction), **vars(_values)}
    names |= {"_jax_api": _jax_api, "flip_pairs": flip_pairs}
    exec(code, names)
    names |= {"flip_pairs": flip_pairs, "case": lambda *n: lambda f: (n, f)}
    try:
        exec(case, names)
        expected, apply_fn = names["flipped"]
        with jax.enable_x64(True):
            rng = np.random.default_rng(0)
            shapes = {"a": (3, 6), "b": (6, 2)}
            params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
            x = jnp.asarray(rng.normal(size=(4, 3)))
            units = jprune.couplings(apply_fn, params, x)
            assert [group.shape for group in units.groups] == [expected]
            keeps = law.removals(units)
            law.check(apply_fn, params, (x,), keeps, units, compiled=False)
    finally:
        del _interpreter.RULES["flip_pairs"]
