"""All that the package needs of JAX beyond its public functions, in one place.

A new version of JAX that moves or renames something is met here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Var",
    "as_closed",
    "aval",
    "bind",
    "is_key",
    "is_size",
    "is_tracer",
    "module_of",
    "result",
    "trace",
    "variables_read",
    "wide",
]


def bind(eqn: JaxprEqn, *operands: Any, **changed: Any) -> list[Any]:
    """Evaluates an equation on other operands, with some parameters changed."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changed})
    if isinstance(params, tuple):  # Before JAX 0.9.
        operands, params = (*params[0], *operands), params[1]
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def aval(atom: Var | Literal) -> Any:
    """Returns the shape and dtype of a variable."""
    return atom.aval


def result(eqn: JaxprEqn) -> Any:
    """Returns the shape and dtype of the first result of an equation."""
    return eqn.outvars[0].aval


def wide() -> bool:
    """Whether 64-bit types are enabled."""
    return bool(jax.config.read("jax_enable_x64"))


def trace(fn: Callable[..., Any], *args: Any) -> tuple[ClosedJaxpr, Any]:
    """Returns the jaxpr of a function and the pytree of its outputs' shapes."""
    return jax.make_jaxpr(fn, return_shape=True)(*args)


def as_closed(jaxpr: ClosedJaxpr | Jaxpr) -> tuple[Jaxpr, list[Any]]:
    """Returns a jaxpr, closed or not, and its constants."""
    if isinstance(jaxpr, ClosedJaxpr):
        return jaxpr.jaxpr, list(jaxpr.consts)
    return jaxpr, []


def variables_read(jaxpr: Jaxpr) -> set[Var]:
    """Returns the variables that an equation or the result of a jaxpr reads."""
    atoms = [*jaxpr.outvars, *(atom for eqn in jaxpr.eqns for atom in eqn.invars)]
    return {atom for atom in atoms if isinstance(atom, Var)}


def module_of(eqn: JaxprEqn) -> str:
    """Returns the named scopes around an equation, such as the model's modules."""
    return str(eqn.source_info.name_stack)


def is_tracer(value: Any) -> bool:
    """Whether a value is known to a surrounding transformation only."""
    return isinstance(value, Tracer)


def is_key(aval: Any) -> bool:
    """Whether a value is an array of PRNG keys."""
    dtype = getattr(aval, "dtype", None)
    return dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended)


def is_size(size: Any) -> bool:
    """Whether a dimension is a number, not a symbol."""
    return isinstance(size, (int, np.integer))
