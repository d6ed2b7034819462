"""Convolution and pooling that run fast inside ``jax.lax.scan`` on a CPU.

XLA's CPU backend leaves a convolution inside a loop to a slow generic kernel. As one
matrix product over patches (im2col) the same step runs some twenty times as fast. On
other backends the convolution is XLA's own.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float


def im2col(
    x: Float[Array, "n h w c"],
    window: tuple[int, int],
    strides: Sequence[int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "VALID",
) -> Float[Array, "n oh ow p"]:
    """Returns the patches of ``x`` under a sliding window, as rows.

    Args:
        x: images.
        window: height and width of the window.
        strides: its steps.
        padding: ``"SAME"``, ``"VALID"`` or the rows and columns to add on each side.

    Returns:
        For each position of the window, its ``p = height * width * c`` values in the
        order of a kernel of layout HWI.

    Example:
        >>> im2col(jnp.ones((1, 8, 8, 3)), (5, 5)).shape
        (1, 4, 4, 75)
    """
    pads = padding
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    height, width = [
        (size - span) // stride + 1
        for size, span, stride in zip(x.shape[1:3], window, strides, strict=True)
    ]
    down, right = strides
    return jnp.concatenate(
        [
            x[:, i : i + (height - 1) * down + 1 : down][
                :, :, j : j + (width - 1) * right + 1 : right
            ]
            for i, j in itertools.product(range(window[0]), range(window[1]))
        ],
        axis=-1,
    )


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | None = None,
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
) -> Array:
    """Computes :func:`jax.lax.conv_general_dilated`, on a CPU as a product of matrices.

    That holds for plain two-dimensional convolutions of NHWC inputs with HWIO kernels;
    grouped and dilated ones, and other layouts, go to the original.

    Args:
        lhs: images ``(n, h, w, in)``.
        rhs: a kernel ``(height, width, in, out)``.
        window_strides: the steps of the window.
        padding: ``"SAME"``, ``"VALID"`` or pairs.
        lhs_dilation: dilation of the images.
        rhs_dilation: dilation of the kernel.
        dimension_numbers: the layouts, as for the original.
        feature_group_count: the number of groups.
        precision: that of the product.

    Returns:
        Images ``(n, oh, ow, out)``.
    """
    plain = (
        jax.default_backend() == "cpu"
        and lhs.ndim == 4
        and feature_group_count == 1
        and set(lhs_dilation or (1,)) == set(rhs_dilation or (1,)) == {1}
        and dimension_numbers is not None
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
    )
    if not plain:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
        )
    patches = im2col(lhs, rhs.shape[:2], window_strides, padding)
    return jnp.dot(patches, rhs.reshape(-1, rhs.shape[-1]), precision=precision)


def conv(
    features: int,
    size: int,
    *,
    name: str,
    strides: int = 1,
    padding: str = "SAME",
    use_bias: bool = True,
) -> nn.Conv:
    """Returns a square Flax convolution computed by :func:`conv_general_dilated`."""
    return nn.Conv(
        features,
        (size, size),
        strides=strides,
        padding=padding,
        use_bias=use_bias,
        conv_general_dilated_cls=lambda: conv_general_dilated,
        name=name,
    )


def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n oh ow c"]:
    """Returns the maxima over 2 x 2 windows with stride 2.

    A last row or column of odd size is dropped.

    Example:
        >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1)).ravel()
        Array([ 5.,  7., 13., 15.], dtype=float32)
    """
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
