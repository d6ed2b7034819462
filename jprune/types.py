"""The vocabulary of the library: what masks, scores and the functions on them are.

======================  ==========================================================
``Params``              any pytree of arrays
``Masks``               a pytree with the structure of the parameters. A leaf is a
                        bool array of the parameter's rank with every axis 1 or
                        full; ``True`` keeps. A leaf of shape ``()`` means *never
                        pruned* and counts nowhere
``Scores``              a pytree with the structure of the parameters; larger = keep
``Layout``              one letter an axis, see :mod:`jprune.layouts`
======================  ==========================================================
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

Params = PyTree
Masks = PyTree
Scores = PyTree
Batch = PyTree
Layout = str

# A pattern, several patterns, or a predicate on a leaf's path and value.
Prunable = str | Sequence[str] | Callable[[str, Any], bool] | None

# One layout for all leaves, one by path pattern, or a function of path and shape.
Layouts = str | Mapping[str, str] | Callable[[str, tuple[int, ...]], str] | None

LossFn = Callable[..., Float[Array, ""]]  # (params, batch[, key]) -> loss
ApplyFn = Callable[..., Any]  # (params, inputs) -> outputs


@runtime_checkable
class ScoreFn(Protocol):
    """What a criterion returns: scores of the parameters, larger = keep.

    With ``masks``, gradients are taken at, and with respect to, the product of
    weights and masks, so a removed weight has a gradient too.
    """

    def __call__(
        self,
        params: Params,
        batch: Batch = None,
        *,
        masks: Masks | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Scores:
        """Returns the scores of ``params``."""
        ...


@runtime_checkable
class Schedule(Protocol):
    """Sparsity (the removed fraction) as a function of the step."""

    def __call__(self, step: jax.typing.ArrayLike) -> Array:
        """Returns the sparsity at ``step``."""
        ...
