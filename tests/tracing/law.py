"""The law of shrinking, as a check: shrunk == masked, in outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np

import jprune


def compile_quickly(fn):
    """Compiles without optimisations: a function runs once here."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    return jax.jit(fn, compiler_options=options)


def removals(units, seed=0, keep=0.5):
    """Random decisions that remove something of every group, and leave something."""
    rng = np.random.default_rng(seed)
    kept = [max(1, round(keep * group.shape[0])) for group in units.groups]
    return [
        jnp.asarray(rng.permutation(group.shape[0]) < n)
        for group, n in zip(units.groups, kept, strict=True)
    ]


def objective(fn):
    """A scalar in which every output counts, with its gradient and the outputs."""

    def loss(params, *inputs):
        outs = fn(params, *inputs)
        first = jax.tree.leaves(outs)[0]
        weights = jnp.cos(jnp.arange(first.size)).reshape(first.shape)
        return jnp.sum(weights * (first + first**2)), outs

    return jax.value_and_grad(loss, has_aux=True, allow_int=True)


def assert_close(a, b, tolerance=1e-10):
    """Floating leaves are equal, up to a small part of the largest entry."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape
        if jnp.issubdtype(x.dtype, jnp.inexact):
            assert np.isfinite(x).all()
            scale = 1 + np.max(np.abs(x), initial=0)
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)


def check(apply_fn, params, inputs, keeps, units, *, mutable=None, compiled=True):
    """Asserts the law where ``keeps`` says which units of ``units`` survive.

    Returns:
        The small function and its parameters.
    """
    masks = jprune.units.expand(units, params, keeps)
    small, small_params = jprune.shrink(
        apply_fn, params, masks, *inputs, mutable=mutable
    )
    masked = jprune.apply_masks(params, masks)
    jit = compile_quickly if compiled else lambda fn: fn
    (_, expected), grads = jit(objective(apply_fn))(masked, *inputs)
    (_, found), small_grads = jit(objective(small))(small_params, *inputs)
    assert_close(small.take(expected) if mutable else expected, found)
    assert_close(small.take(grads), small_grads)
    return small, small_params
