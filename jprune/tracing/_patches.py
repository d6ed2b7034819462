"""The input of each output position of a product, as rows."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jprune.tracing import _jax_api
from jprune.tracing._jax_api import JaxprEqn


def dense(eqn: JaxprEqn, x: Array, kernel_first: bool) -> Array:
    """Returns the input with the axes that are summed over last, as one."""
    contracted, batch = eqn.params["dimension_numbers"]
    side = 1 if kernel_first else 0
    # In the order of the kernel's axes.
    pairs = sorted(zip(contracted[1 - side], contracted[side], strict=True))
    summed = tuple(axis for _, axis in pairs)
    free = tuple(a for a in range(x.ndim) if a not in (*summed, *batch[side]))
    moved = jnp.transpose(x, (*batch[side], *free, *summed))
    return moved.reshape(*moved.shape[: x.ndim - len(summed)], -1)


def convolution(eqn: JaxprEqn, x: Array, name: str) -> Array:
    """Returns the windows of a convolution's input, in the order of an HWIO kernel."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise ValueError(f"site {name!r}: it is a convolution by groups of the batch")
    kernel = _jax_api.aval(eqn.invars[1]).shape
    window = tuple(kernel[axis] for axis in numbers.rhs_spec[2:])
    rank = len(window)
    first = (0, 1, *range(2, rank + 2))
    found = lax.conv_general_dilated_patches(
        jnp.transpose(x, numbers.lhs_spec),
        window,
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(first, first, first),
        precision=lax.Precision.HIGHEST,
    )
    groups = params["feature_group_count"]
    inputs, area = x.shape[numbers.lhs_spec[1]] // groups, math.prod(window)
    spatial = found.shape[2:]
    split = found.reshape(found.shape[0], groups, inputs, area, *spatial)
    # Batch, positions, groups, area, inputs: area before inputs, as in HWIO.
    moved = jnp.transpose(split, (0, *range(4, 4 + rank), 1, 3, 2))
    rows = moved.reshape(*moved.shape[: rank + 2], area * inputs)
    return rows if groups > 1 else rows[..., 0, :]
