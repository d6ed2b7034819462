"""What a task is: data, a model, a loss and a training budget.

Everything that training changes lives in a carry, so one compiled loop
(:func:`experiments.fit.fit`) serves every method.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

# The rows of a stream by field: at least "x" (inputs) and "y" (labels).
Stream = Mapping[str, np.ndarray]
Batch = Mapping[str, Any]


class Apply(Protocol):
    """The model, as a pure function of its parameters and its state."""

    def __call__(
        self,
        params: PyTree,
        state: PyTree,
        x: Array,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Array, PyTree]:
        """Returns the outputs and the new state (BatchNorm statistics)."""
        ...


class Budget(NamedTuple):
    """How long a task trains by default."""

    epochs: int
    batch_size: int


class Task(NamedTuple):
    """Data, model, loss and training budget.

    Attributes:
        name: the name of the task, such as ``"digits_mlp"``.
        source: where the data comes from, as every figure made with it must say.
        init: ``key -> (params, state)``.
        apply: the model.
        per_example_loss: ``(outputs, batch) -> (n,)`` losses.
        metrics: ``(outputs, batch) -> {name: (n,) values}``, to be averaged.
        streams: the rows of ``"train"``, ``"valid"`` and ``"test"``.
        optimizer: ``steps -> optax.GradientTransformation``.
        budget: epochs and batch size.
    """

    name: str
    source: str
    init: Callable[[PRNGKeyArray], tuple[PyTree, PyTree]]
    apply: Apply
    per_example_loss: Callable[[Array, Batch], Float[Array, " n"]]
    metrics: Callable[[Array, Batch], Mapping[str, Float[Array, " n"]]]
    streams: Mapping[str, Stream]
    optimizer: Callable[[int], optax.GradientTransformation]
    budget: Budget


class Outcome(NamedTuple):
    """What a method returns, and all that it is judged by.

    Attributes:
        apply: ``(params, state, x) -> outputs``, run on raw test inputs.
        params: the parameters that ``apply`` takes, zero where masks are.
        state: the model's state.
        masks: which weights live.
        bytes: the size of the stored network, or None for its dense size.
        metrics: what the method measured on the validation stream.
        history: metrics by epoch, of every phase.
    """

    apply: Callable[[PyTree, PyTree, Array], Array]
    params: PyTree
    state: PyTree
    masks: PyTree
    bytes: int | None
    metrics: Mapping[str, float]
    history: Mapping[str, Any]
