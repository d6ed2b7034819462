import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from experiments import compare, fit, methods, tasks
from experiments.methods import _phases as phases

# Those that train sparse have a file of their own.
SPARSE = compare.DEFAULT_METHODS
AFTER_TRAINING = ["magnitude", "obd"]
WEIGHTS = 6 * 8 + 8 * 3
# The tiny task has six or seven rows of each class.
HYPER = {
    "snip": {"batch_size": 8},
    "iterative_snip": {"batch_size": 8, "rounds": 4},
    "force": {"batch_size": 8, "rounds": 4},
    "grasp": {"rows_per_class": 2},
    "synflow": {"rounds": 10},
}


def run(name, task, sparsity, *, seed=0, **options):
    method = getattr(methods, name)
    hyper = {**HYPER.get(name, {}), **options}
    return method(task, sparsity, key=jax.random.key(seed), **hyper)


@pytest.fixture(scope="module")
def dense(tiny_task):
    return methods.dense(tiny_task, key=jax.random.key(0))


def initial(task):
    params, state = phases.initialize(task, phases.split(jax.random.key(0)).init)
    return phases.variables(params, state)


def kernels(tree):
    return np.concatenate([np.ravel(tree[name]["kernel"]) for name in ("fc1", "fc2")])


def test_every_method_has_the_signature_of_the_registry():
    for name in methods.__all__:
        parameters = inspect.signature(getattr(methods, name)).parameters
        assert list(parameters)[:2] == ["task", "sparsity"]
        assert {"key", "epochs", "on_epoch"} <= set(parameters)
        for parameter in list(parameters.values())[2:]:
            assert parameter.kind == inspect.Parameter.KEYWORD_ONLY
        assert ("trained" in parameters) == (name in AFTER_TRAINING)


@pytest.mark.parametrize("name", SPARSE)
def test_counts_are_exact_and_removed_weights_zero(blind_task, dense, name):
    options = {"trained": dense} if name in AFTER_TRAINING else {}
    for sparsity in (0.5, 0.83):
        outcome = run(name, blind_task, sparsity, **options)
        keep = kernels(outcome.masks)
        assert keep.sum() == jprune.selection.keep_count(WEIGHTS, sparsity)
        assert (kernels(outcome.params)[~keep] == 0.0).all()
        assert outcome.masks["fc1"]["bias"].shape == ()
        phase = "finetune" if options else "train"
        assert set(outcome.history) == ({"dense", phase} if options else {phase})
        assert outcome.history[phase]["valid_accuracy"].shape == (2,)
        judged = fit.evaluate(
            blind_task,
            outcome.apply,
            outcome.params,
            outcome.state,
            blind_task.streams["valid"],
        )
        judged = {name: float(value) for name, value in judged.items()}
        assert outcome.metrics == pytest.approx(judged)


def test_dense_keeps_everything_and_prunes_nothing(blind_task):
    outcome = methods.dense(blind_task, key=jax.random.key(0), epochs=1)
    assert kernels(outcome.masks).all()
    assert outcome.history["dense"]["loss"].shape == (1,)
    with pytest.raises(ValueError, match=r"sparsity: 0\.5 is not 0"):
        methods.dense(blind_task, 0.5, key=jax.random.key(0))


def test_a_run_is_a_function_of_its_key(tiny_task):
    first, again, other = (run("snip", tiny_task, 0.5, seed=s) for s in (0, 0, 1))
    assert (kernels(first.params) == kernels(again.params)).all()
    assert (kernels(first.masks) != kernels(other.masks)).any()


def test_one_seed_means_one_initialisation_for_all_methods(tiny_task, monkeypatch):
    seen = []

    def no_training(task, params, *rest, **options):
        seen.append(kernels(params))

    monkeypatch.setattr(phases, "train", no_training)
    for name in ("dense", "random", "snip", "synflow"):
        run(name, tiny_task, 0.0)
    assert all((params == seen[0]).all() for params in seen)


@pytest.mark.parametrize("name", AFTER_TRAINING)
def test_a_given_dense_network_replaces_its_training(tiny_task, dense, name):
    heard = []
    given = run(
        name,
        tiny_task,
        0.5,
        trained=dense,
        on_epoch=lambda phase, *_: heard.append(phase),
    )
    assert set(heard) == {"finetune"}
    own = run(name, tiny_task, 0.5)
    assert (kernels(given.params) == kernels(own.params)).all()
    jax.tree.map(np.testing.assert_array_equal, given.history, own.history)


def test_magnitude_keeps_the_largest_trained_weights(tiny_task, dense):
    keep = kernels(run("magnitude", tiny_task, 0.5, trained=dense).masks)
    weights = np.abs(kernels(dense.params))
    assert weights[keep].min() > weights[~keep].max()


def test_snip_is_the_mask_gradient_on_a_training_batch(tiny_task):
    outcome = run("snip", tiny_task, 0.5, batch_size=20)
    variables, train = initial(tiny_task), tiny_task.streams["train"]

    def loss(masks):
        params = jax.tree.map(jnp.multiply, variables["params"], masks)
        outputs, _ = tiny_task.apply(params, {}, train["x"])
        return tiny_task.per_example_loss(outputs, train).mean()

    ones = jax.tree.map(jnp.ones_like, variables["params"])
    scores = np.abs(kernels(jax.jit(jax.grad(loss))(ones)))
    keep = kernels(outcome.masks)
    assert scores[keep].min() > scores[~keep].max()


def test_grasp_is_the_mask_gradient_of_half_the_squared_gradient(tiny_task):
    # Seven rows of two classes and six of the third: six of each are nearly all.
    key = phases.split(jax.random.key(0)).score
    batch = phases.draw_balanced(tiny_task, key, 6)
    variables = initial(tiny_task)

    def loss(params):
        outputs, _ = tiny_task.apply(params, {}, batch["x"])
        return tiny_task.per_example_loss(outputs / 3.0, batch).mean()

    def half_square(masks):
        params = jax.tree.map(jnp.multiply, variables["params"], masks)
        grads = jax.grad(loss)(params)
        return sum(jnp.sum(layer["kernel"] ** 2) for layer in grads.values()) / 2

    ones = jax.tree.map(jnp.ones_like, variables["params"])
    scores = kernels(jax.jit(jax.grad(half_square))(ones))
    outcome = run("grasp", tiny_task, 0.5, rows_per_class=6, temperature=3.0)
    keep = kernels(outcome.masks)
    assert scores[keep].min() > scores[~keep].max()


def test_one_round_of_force_and_of_iterative_snip_is_snip(tiny_task):
    masks = [
        kernels(run(name, tiny_task, 0.5, batch_size=20, **hyper).masks)
        for name, hyper in (
            ("snip", {}),
            ("iterative_snip", {"rounds": 1}),
            ("force", {"rounds": 1}),
        )
    ]
    assert (masks[0] == masks[1]).all()
    assert (masks[0] == masks[2]).all()


def test_force_revives_what_iterative_snip_cannot(tiny_task):
    assert any(
        (
            kernels(run("force", tiny_task, 0.83, seed=seed).masks)
            != kernels(run("iterative_snip", tiny_task, 0.83, seed=seed).masks)
        ).any()
        for seed in range(5)
    )


def test_synflow_reads_no_data(tiny_task):
    masks = []
    for factor in (1, -5):
        train = dict(tiny_task.streams["train"])
        train["x"] = factor * train["x"]
        task = tiny_task._replace(streams={**tiny_task.streams, "train": train})
        masks.append(kernels(run("synflow", task, 0.9).masks))
    assert (masks[0] == masks[1]).all()


def test_obd_is_the_gauss_newton_saliency(tiny_task, dense):
    outcome = run("obd", tiny_task, 0.5, trained=dense)
    x = tiny_task.streams["train"]["x"]

    def logits(flat, row):
        return tiny_task.apply(unflatten(flat), {}, row[None])[0][0]

    flat, unflatten = jax.flatten_util.ravel_pytree(dense.params)
    jacobian = jax.vmap(jax.jacobian(logits), (None, 0))(flat, x)
    chances = jax.nn.softmax(jax.vmap(logits, (None, 0))(flat, x))
    inner = jax.vmap(jnp.diag)(chances) - chances[:, :, None] * chances[:, None]
    diagonal = jnp.einsum("nck,ncd,ndk->k", jacobian, inner, jacobian) / len(x)
    scores = kernels(unflatten(diagonal * flat**2))
    keep = kernels(outcome.masks)
    assert scores[keep].min() > scores[~keep].max()


def test_scoring_batches_are_balanced_distinct_and_follow_the_key(tiny_task):
    draw = functools.partial(phases.draw, tiny_task)
    key = jax.random.key(0)
    train = tiny_task.streams["train"]
    (rows,) = (np.flatnonzero((train["x"] == x).all(-1)) for x in draw(key, 1)["x"])
    assert len(rows) == 1
    assert len(np.unique(draw(key, 15)["x"], axis=0)) == 15
    assert len(draw(key, 50)["x"]) == 20
    batches = draw(key, 5, batches=3)
    assert batches["x"].shape == (3, 5, 6)
    assert batches["y"].shape == (3, 5)
    assert (batches["x"][0] != batches["x"][1]).any()
    assert (draw(key, 5)["x"] == draw(key, 5)["x"]).all()
    balanced = phases.draw_balanced(tiny_task, key, 4)
    assert np.bincount(balanced["y"]).tolist() == [4, 4, 4]
    assert len(np.unique(balanced["x"], axis=0)) == 12
    with pytest.raises(ValueError, match=r"rows_per_class: 7 .* class 2 .* only 6"):
        phases.draw_balanced(tiny_task, key, 7)


def test_sparsities_and_seeds_share_the_compiled_score(tiny_task):
    traces = []

    def criterion(fn):
        def score_fn(variables, batch):
            traces.append(None)
            return jprune.scores.snip(fn)(variables, batch)

        return score_fn

    for seed in range(3):
        params, state = phases.initialize(tiny_task, jax.random.key(seed))
        score_fn = phases.score_fn(criterion, phases.loss_fn(tiny_task))
        batch = phases.draw(tiny_task, jax.random.key(seed), 8)
        score_fn(phases.variables(params, state), batch)
    assert len(traces) == 1


def test_the_dense_network_learns_the_digits():
    task = tasks.digits_mlp()
    outcome = methods.dense(task, key=jax.random.key(0))
    judged = fit.evaluate(
        task, outcome.apply, outcome.params, outcome.state, task.streams["test"]
    )
    assert judged["accuracy"] >= 0.95
