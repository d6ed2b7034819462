"""The training loop of all methods, and the evaluation of all methods.

An epoch is one compiled loop on the device. Everything that training changes lives in
the *carry*; the rows stay on the device and are gathered batch by batch in an order
that is drawn there from the key. A *step* is a pure function

    ``step(carry, batch, key) -> (carry, metrics)``

where ``batch`` holds rows of the stream's fields and, as ``"index"``, which rows they
are (for records by example). What a method needs besides (a second data set, a teacher,
an adversary) is part of its carry or of its step.

**Compilation.** The compiled epoch is cached on the step function, the batch size and
the shapes. :func:`default_step` and :func:`optimizer` return the same function for the
same arguments and the masks are part of the carry, so dense training and every
sparsity, seed and method that trains in this way share one compilation.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

import jprune
from experiments.task import Batch, Stream, Task

Metrics = Mapping[str, Array]
History = Mapping[str, np.ndarray]
Predict = Callable[[PyTree, PyTree, Array], Array]
# (phase, epochs done, epochs in all); called before the first epoch and after each.
OnEpoch = Callable[[str, int, int], None]


class Step(Protocol):
    """One update of everything that training changes."""

    def __call__(
        self, carry: PyTree, batch: Batch, key: PRNGKeyArray
    ) -> tuple[PyTree, Metrics]:
        """Returns the new carry, of the same shapes, and metrics of the batch."""
        ...


class Carry(NamedTuple):
    """What :func:`default_step` changes, and the masks, which it does not."""

    params: PyTree
    state: PyTree
    opt_state: PyTree
    masks: PyTree


def fit(
    step: Step,
    carry: PyTree,
    stream: Stream,
    *,
    epochs: int,
    batch_size: int,
    key: PRNGKeyArray,
    index: Int[Array, " m"] | None = None,
    n_live: int | Int[Array, ""] | None = None,
    evaluate: Callable[[PyTree], Metrics] | None = None,
    phase: str = "train",
    on_epoch: OnEpoch | None = None,
) -> tuple[PyTree, History]:
    """Trains for some epochs of shuffled batches.

    Every epoch visits each live row in a new order. All batches are full: where the
    batch size does not divide the number of rows, the last batch of an epoch is filled
    up with the first rows of that epoch's order.

    A subset of the rows costs no new compilation: its indices are padded to the length
    of the stream, and the number of live ones is traced. An epoch on half of the rows
    has half the steps.

    Args:
        step: ``(carry, batch, key) -> (carry, metrics)``; hashable, and the same object
            in every call that is to share the compiled epoch.
        carry: what training changes. It is copied; the copies are donated.
        stream: the rows by field, all fields of the same length n.
        epochs: how many.
        batch_size: rows in a batch.
        key: decides on the orders and is folded into each step's key.
        index: the rows to train on, each in [0, n); all of them by default. A row that
            is named twice is visited twice.
        n_live: how many leading entries of ``index`` count; all by default.
        evaluate: ``carry -> metrics``, called after each epoch.
        phase: the name that ``on_epoch`` is given.
        on_epoch: called as ``on_epoch(phase, epochs done, epochs)``.

    Returns:
        The carry, and a history of float arrays with one entry an epoch: the metrics of
        ``step`` averaged over the steps, and those of ``evaluate``.

    Raises:
        ValueError: fields of different lengths, an index outside the rows, or a number
            that is not positive.

    Example:
        >>> def step(carry, batch, key):
        ...     return carry + batch["x"].sum(), {"mean": batch["x"].mean()}
        >>> total, history = fit(
        ...     step, 0.0, {"x": np.arange(4.0)}, epochs=2, batch_size=2,
        ...     key=jax.random.key(0))
        >>> float(total), history["mean"].tolist()
        (12.0, [1.5, 1.5])
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: {value!r} is not a positive number")
    rows = jax.tree.map(jnp.asarray, dict(stream))
    index, n_live = _live_rows(_length(stream), index, n_live)
    carry = jax.tree.map(_own, carry)
    notify = on_epoch or (lambda *_: None)
    notify(phase, 0, epochs)
    history = []
    for epoch in range(epochs):
        epoch_key = jax.random.fold_in(key, epoch)
        carry, metrics = _epoch(
            step, carry, rows, index, n_live, epoch_key, batch_size=batch_size
        )
        measured = evaluate(carry) if evaluate else {}
        history.append(jax.device_get({**metrics, **measured}))
        notify(phase, epoch + 1, epochs)
    return carry, jax.tree.map(lambda *values: np.asarray(values), *history)


@functools.partial(
    jax.jit, static_argnames=("step", "batch_size"), donate_argnames="carry"
)
def _epoch(
    step: Step,
    carry: PyTree,
    rows: Mapping[str, Array],
    index: Int[Array, " m"],
    n_live: Int[Array, ""],
    key: PRNGKeyArray,
    *,
    batch_size: int,
) -> tuple[PyTree, Metrics]:
    order_key, step_key = jax.random.split(key)
    order = index[_shuffled(order_key, index.size, n_live)]
    steps = (n_live + batch_size - 1) // batch_size

    def take(t: Array) -> Batch:
        chosen = order[(t * batch_size + jnp.arange(batch_size)) % n_live]
        batch = {name: field[chosen] for name, field in rows.items()}
        return {**batch, "index": chosen}

    def advance(t: Array, running: tuple[PyTree, Metrics]) -> tuple[PyTree, Metrics]:
        carry, sums = running
        carry, metrics = step(carry, take(t), jax.random.fold_in(step_key, t))
        return carry, jax.tree.map(lambda total, new: total + new, sums, metrics)

    _, shapes = jax.eval_shape(step, carry, jax.eval_shape(take, n_live), step_key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    # The number of steps is traced, so that a subset shares the compiled loop.
    carry, sums = lax.fori_loop(0, steps, advance, (carry, zeros))
    return carry, jax.tree.map(lambda total: total / steps, sums)


def _shuffled(key: PRNGKeyArray, size: int, n_live: Array) -> Int[Array, " size"]:
    """Returns a permutation of which the first ``n_live`` entries are below n_live."""
    bits = jax.random.bits(key, (size,))
    dead = jnp.arange(size) >= n_live
    return jnp.lexsort((bits, dead))


def _own(leaf: Any) -> Array:
    """Returns a copy to donate, of a type that is not weak and so never changes."""
    return jnp.array(leaf, dtype=jnp.result_type(leaf))


def _length(stream: Stream) -> int:
    lengths = {name: len(field) for name, field in stream.items()}
    if len(set(lengths.values())) != 1 or not min(lengths.values()):
        raise ValueError(
            f"stream: the fields must have one length, of at least 1; got {lengths}"
        )
    return next(iter(lengths.values()))


def _live_rows(
    n: int, index: Int[Array, " m"] | None, n_live: int | Array | None
) -> tuple[Int[Array, " m"], Int[Array, ""]]:
    rows = np.arange(n) if index is None else np.asarray(index)
    live = len(rows) if n_live is None else int(n_live)
    if not 1 <= live <= len(rows):
        raise ValueError(f"n_live: {live} is outside [1, {len(rows)}]")
    if rows[:live].min() < 0 or rows[:live].max() >= n:
        raise ValueError(f"index: holds rows outside [0, {n})")
    padded = np.zeros(max(n, len(rows)), np.int32)
    padded[:live] = rows[:live]
    return jnp.asarray(padded), jnp.asarray(live, jnp.int32)


def optimizer(task: Task, epochs: int) -> optax.GradientTransformation:
    """Returns the task's optimiser for so many epochs of all its training rows.

    The same task and number of epochs give the same object.
    """
    return _optimizer(task.optimizer, steps_of(task, epochs))


def steps_of(task: Task, epochs: int) -> int:
    """Returns the number of steps in so many epochs of all training rows."""
    rows = _length(task.streams["train"])
    return epochs * math.ceil(rows / task.budget.batch_size)


@functools.cache
def _optimizer(
    make: Callable[[int], optax.GradientTransformation], steps: int
) -> optax.GradientTransformation:
    return make(steps)


def default_step(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    loss: Callable[[PyTree, Array, Batch], Float[Array, ""]] | None = None,
    forward: Callable[[PyTree, PyTree], PyTree] | None = None,
    constrain: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> Step:
    """Returns the step that most methods need, for a :class:`Carry`.

    By default the parameters are zero outside the masks, as those of the first carry
    must be, so the forward pass sees them as they are; the gradient is masked, and the
    parameters again after the update, whatever the optimiser adds to it.

    The same arguments give the same function, so they should be functions of a module
    and not new closures.

    Args:
        task: provides the model, its loss and its metrics.
        tx: the optimiser; its state is the carry's.
        loss: ``(params, outputs, batch) -> scalar`` to minimise instead of the mean of
            the task's losses.
        forward: ``(params, masks) -> params`` that the model runs on, for methods that
            keep weights outside the masks; its own gradient is then what counts.
        constrain: ``(params, masks) -> params`` after the update instead of masking.

    Returns:
        The step. Its metrics are the loss and the task's metrics on the batch.
    """
    return _default_step(
        task.apply, task.per_example_loss, task.metrics, tx, loss, forward, constrain
    )


@functools.cache
def _default_step(apply, per_example_loss, metrics, tx, loss, forward, constrain):
    constrain = constrain or jprune.apply_masks

    def objective(params, carry, batch, key):
        seen = forward(params, carry.masks) if forward else params
        outputs, state = apply(seen, carry.state, batch["x"], train=True, key=key)
        if loss is None:
            value = jnp.mean(per_example_loss(outputs, batch))
        else:
            value = loss(params, outputs, batch)
        measured = {name: jnp.mean(v) for name, v in metrics(outputs, batch).items()}
        return value, (state, {"loss": value, **measured})

    def step(carry: Carry, batch: Batch, key: PRNGKeyArray) -> tuple[Carry, Metrics]:
        differentiate = jax.grad(objective, has_aux=True)
        grads, (state, measured) = differentiate(carry.params, carry, batch, key)
        if forward is None:
            grads = jprune.apply_masks(grads, carry.masks)
        updates, opt_state = tx.update(grads, carry.opt_state, carry.params)
        params = optax.apply_updates(carry.params, updates)
        params = constrain(params, carry.masks)
        return Carry(params, state, opt_state, carry.masks), measured

    return step


def predictor(task: Task) -> Predict:
    """Returns the model as ``(params, state, x) -> outputs``, as it is when deployed.

    The same task gives the same function.
    """
    return _predictor(task.apply)


@functools.cache
def _predictor(apply) -> Predict:
    return lambda params, state, x: apply(params, state, x, train=False)[0]


def evaluate(
    task: Task,
    predict: Predict,
    params: PyTree,
    state: PyTree,
    stream: Stream,
    *,
    batch_size: int = 1000,
) -> Metrics:
    """Returns the mean loss and the task's mean metrics over the rows of a stream.

    Args:
        task: provides the loss and the metrics.
        predict: ``(params, state, x) -> outputs``; compiled once per function.
        params: the parameters that ``predict`` takes.
        state: the state that it takes.
        stream: the rows by field.
        batch_size: how many rows are on their way through the model at once.

    Raises:
        ValueError: fields of different lengths.
    """
    rows = _length(stream)
    return _evaluate(
        predict,
        task.per_example_loss,
        task.metrics,
        params,
        state,
        dict(stream),
        batch_size=min(batch_size, rows),
    )


@functools.partial(
    jax.jit,
    static_argnames=("predict", "per_example_loss", "metrics", "batch_size"),
)
def _evaluate(predict, per_example_loss, metrics, params, state, stream, *, batch_size):
    rows = _length(stream)
    batches = math.ceil(rows / batch_size)

    def measure(chosen: Int[Array, " batch"]) -> Metrics:
        batch = {name: field[chosen] for name, field in stream.items()}
        outputs = predict(params, state, batch["x"])
        return {"loss": per_example_loss(outputs, batch), **metrics(outputs, batch)}

    # The last batch is filled up with rows that count only once.
    index = jnp.arange(batches * batch_size) % rows
    values = lax.map(measure, index.reshape(batches, batch_size))
    return {name: jnp.mean(v.reshape(-1)[:rows]) for name, v in values.items()}
