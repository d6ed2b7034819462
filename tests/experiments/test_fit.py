import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from experiments import fit

STREAM = {
    "x": np.arange(10, dtype=np.float32),
    "y": np.arange(10, dtype=np.int32) % 2,
}


def logging_step():
    """A step that logs the rows it is given, and how often it is traced."""
    traces = []

    def step(carry, batch, key):
        traces.append(None)
        log, t = carry
        return (log.at[t].set(batch["index"]), t + 1), {"x": batch["x"].mean()}

    return step, traces


def logged(step, *, epochs=1, batch_size=4, room=12, seed=0, **options):
    log = np.full((room, batch_size), -1, np.int32)
    (log, t), history = fit.fit(
        step,
        (log, 0),
        STREAM,
        epochs=epochs,
        batch_size=batch_size,
        key=jax.random.key(seed),
        **options,
    )
    return np.asarray(log)[: int(t)], history


def half_masks(params):
    masks = jprune.masks.dense(params)
    keep = np.random.default_rng(0).random(params["fc1"]["kernel"].shape) < 0.5
    masks["fc1"]["kernel"] = jnp.asarray(keep)
    return masks


def carry_of(task, tx, masks=None, seed=0):
    params, state = task.init(jax.random.key(seed))
    masks = jprune.masks.dense(params) if masks is None else masks
    params = jprune.masks.apply(params, masks)
    return fit.Carry(params, state, tx.init(params), masks)


def test_an_epoch_visits_every_row_and_fills_the_last_batch_with_its_first_rows():
    step, _ = logging_step()
    log, history = logged(step, epochs=3)
    assert log.shape == (9, 4)
    for epoch in log.reshape(3, 12):
        assert sorted(epoch[:10]) == list(range(10))
        assert epoch[10:].tolist() == epoch[:2].tolist()
    assert len({tuple(epoch) for epoch in log.reshape(3, 12).tolist()}) == 3
    # The field's value is its index, so the metric can be had from the log.
    np.testing.assert_allclose(history["x"], log.reshape(3, 12).mean(axis=1), rtol=1e-6)


def test_orders_follow_the_key():
    step, _ = logging_step()
    first, again, other = (logged(step, seed=seed)[0] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_equals_a_plain_loop_of_jitted_steps(tiny_task):
    tx = optax.adam(0.01)
    inner = fit.default_step(tiny_task, tx)

    def step(carry, batch, key):
        carry, log, t = carry
        carry, metrics = inner(carry, batch, key)
        return (carry, log.at[t].set(batch["index"]), t + 1), metrics

    begin = carry_of(tiny_task, tx, half_masks(tiny_task.init(jax.random.key(0))[0]))
    train = tiny_task.streams["train"]
    (done, log, _), history = fit.fit(
        step,
        (begin, np.zeros((6, 8), np.int32), 0),
        train,
        epochs=2,
        batch_size=8,
        key=jax.random.key(1),
    )

    @jax.jit
    def update(params, opt_state, x, y):
        def loss(params):
            outputs, _ = tiny_task.apply(params, {}, x, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        keep = begin.masks["fc1"]["kernel"]
        grads["fc1"]["kernel"] = jnp.where(keep, grads["fc1"]["kernel"], 0.0)
        updates, opt_state = tx.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    params, opt_state, losses = begin.params, begin.opt_state, []
    for rows in np.asarray(log):
        value, params, opt_state = update(
            params, opt_state, train["x"][rows], train["y"][rows]
        )
        losses.append(float(value))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (done.params, done.opt_state),
        (params, opt_state),
    )
    np.testing.assert_allclose(
        history["loss"], np.reshape(losses, (2, 3)).mean(axis=1), rtol=1e-5
    )


def test_sparsities_seeds_phases_and_subsets_share_one_compilation(tiny_task):
    traces = []

    def counting_loss(params, outputs, batch):
        traces.append(None)
        return tiny_task.per_example_loss(outputs, batch).mean()

    tx = fit.optimizer(tiny_task, 2)
    params = tiny_task.init(jax.random.key(0))[0]
    options = [
        {"masks": None, "phase": "dense", "index": None, "epochs": 2},
        {"masks": half_masks(params), "phase": "train", "index": None, "epochs": 2},
        {"masks": None, "phase": "train", "index": np.arange(10), "epochs": 1},
    ]
    counts = []
    for seed, option in enumerate(options):
        step = fit.default_step(tiny_task, tx, loss=counting_loss)
        fit.fit(
            step,
            carry_of(tiny_task, tx, option.pop("masks"), seed),
            tiny_task.streams["train"],
            batch_size=8,
            key=jax.random.key(seed),
            **option,
        )
        counts.append(len(traces))
    assert counts[0] > 0
    assert counts == [counts[0]] * 3


def test_the_same_task_gives_the_same_optimizer(tiny_task):
    assert fit.optimizer(tiny_task, 2) is fit.optimizer(tiny_task, 2)
    assert fit.optimizer(tiny_task, 2) is not fit.optimizer(tiny_task, 3)


@pytest.mark.parametrize("as_traced", [False, True])
def test_a_subset_is_trained_on_alone(as_traced):
    step, traces = logging_step()
    logged(step)
    before = len(traces)
    index, n_live = np.array([7, 3, 5, 1, 9]), None
    if as_traced:
        index, n_live = np.append(index, [0, 0, 2, 2, 2]), jnp.asarray(5)
    log, _ = logged(step, index=index, n_live=n_live)
    assert log.shape == (2, 4)
    assert sorted(log.ravel()[:5]) == [1, 3, 5, 7, 9]
    assert log.ravel()[5:].tolist() == log.ravel()[:3].tolist()
    assert len(traces) == before


def test_fewer_live_rows_than_a_batch_are_repeated():
    log, _ = logged(logging_step()[0], index=np.array([4, 6]))
    assert log.shape == (1, 4)
    assert sorted(log.ravel()) == [4, 4, 6, 6]


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(0.05, weight_decay=0.1),
        optax.chain(
            optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.05, momentum=0.9)
        ),
    ],
    ids=["adam with weight decay", "momentum with noise"],
)
def test_parameters_are_zero_outside_the_masks(tiny_task, tx):
    params = tiny_task.init(jax.random.key(0))[0]
    masks = half_masks(params)
    carry, _ = fit.fit(
        fit.default_step(tiny_task, tx),
        carry_of(tiny_task, tx, masks),
        tiny_task.streams["train"],
        epochs=2,
        batch_size=8,
        key=jax.random.key(0),
    )
    kernel, keep = carry.params["fc1"]["kernel"], masks["fc1"]["kernel"]
    assert (kernel[~keep] == 0.0).all()
    assert (kernel[keep] != 0.0).all()
    assert (carry.masks["fc1"]["kernel"] == keep).all()
    assert (carry.params["fc2"]["kernel"] != params["fc2"]["kernel"]).all()


def test_a_method_can_replace_loss_forward_and_constraint(tiny_task):
    params = tiny_task.init(jax.random.key(0))[0]
    masks = half_masks(params)
    tx = optax.sgd(0.1)
    step = fit.default_step(
        tiny_task,
        tx,
        loss=lambda params, outputs, batch: jnp.sum(params["fc1"]["kernel"] ** 2) / 2,
        forward=lambda params, masks: params,
        constrain=lambda params, masks: jax.tree.map(lambda p: 2 * p, params),
    )
    batch = jax.tree.map(jnp.asarray, tiny_task.streams["train"])
    carry = fit.Carry(params, {}, tx.init(params), masks)
    carry, metrics = jax.jit(step)(carry, batch, jax.random.key(0))
    kernel = params["fc1"]["kernel"]
    np.testing.assert_allclose(carry.params["fc1"]["kernel"], 1.8 * kernel, rtol=1e-6)
    assert metrics["loss"] == pytest.approx(float(jnp.sum(kernel**2) / 2))


def test_the_callers_carry_survives():
    carry = (jnp.zeros((3, 4), jnp.int32), jnp.zeros((), jnp.int32))
    step, _ = logging_step()
    fit.fit(step, carry, STREAM, epochs=1, batch_size=4, key=jax.random.key(0))
    assert not any(leaf.is_deleted() for leaf in carry)
    assert (carry[0] == 0).all()


def test_progress_and_evaluation_by_epoch():
    step, _ = logging_step()
    heard = []
    _, history = logged(
        step,
        epochs=2,
        phase="finetune",
        on_epoch=lambda *args: heard.append(args),
        evaluate=lambda carry: {"steps": carry[1]},
    )
    assert heard == [("finetune", 0, 2), ("finetune", 1, 2), ("finetune", 2, 2)]
    assert history["steps"].tolist() == [3, 6]
    assert set(history) == {"x", "steps"}


@pytest.mark.parametrize("batch_size", [4, 15])
def test_evaluation_counts_every_row_once(tiny_task, batch_size):
    stream = tiny_task.streams["test"]
    params, state = tiny_task.init(jax.random.key(0))
    measured = fit.evaluate(
        tiny_task,
        fit.predictor(tiny_task),
        params,
        state,
        stream,
        batch_size=batch_size,
    )
    outputs, _ = tiny_task.apply(params, state, stream["x"])
    right = np.argmax(outputs, -1) == stream["y"]
    chance = jax.nn.softmax(outputs)[np.arange(15), stream["y"]]
    np.testing.assert_allclose(measured["accuracy"], right.mean(), rtol=1e-6)
    np.testing.assert_allclose(measured["loss"], -np.log(chance).mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: 0"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"n_live": 11}, r"n_live: 11 is outside \[1, 10\]"),
        ({"index": np.array([], int)}, "n_live: 0 is outside"),
        ({"index": np.array([0, 10])}, r"index: holds rows outside \[0, 10\)"),
        ({"index": np.array([-1])}, "index: holds rows outside"),
    ],
)
def test_mistakes_are_named(options, message):
    step, _ = logging_step()
    with pytest.raises(ValueError, match=message):
        logged(step, **options)


def test_fields_of_different_lengths_are_an_error():
    stream = {"x": np.zeros(3), "y": np.zeros(2)}
    with pytest.raises(ValueError, match=r"stream: .*'x': 3, 'y': 2"):
        fit.fit(
            lambda carry, batch, key: (carry, {}),
            0.0,
            stream,
            epochs=1,
            batch_size=1,
            key=jax.random.key(0),
        )
