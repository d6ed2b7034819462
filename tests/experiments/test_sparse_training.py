import collections
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from experiments import compare, fit, methods
from experiments.methods import _phases as phases
from experiments.methods import _sparse_training as sparse_training

FAMILY = [
    name
    for name in methods.__all__
    if name != "dense" and name not in compare.DEFAULT_METHODS
]
SAME_START = ["static", "set_", "rigl", "rigl_itop"]
# 30 steps: two mask updates or three.
EPOCHS = 10
SIZES = {"fc1": 48, "fc2": 24}
# With two updates, the threshold has no time to find its place.
HYPER = {"dsr": {"threshold": 0.1}}


class Run(NamedTuple):
    """An outcome, the carry that its training started from, and new traces."""

    outcome: object
    start: object
    traces: int


@pytest.fixture(scope="module")
def family(blind_task):
    """Runs of every method: ``family[name][sparsity, seed]``."""
    traces = collections.Counter()
    starts = []

    def apply(params, state, x, *, train=False, key=None):
        traces["train"] += train
        return blind_task.apply(params, state, x, train=train, key=key)

    def run(task, step, carry, **options):
        starts.append(jax.tree.map(jnp.copy, carry))
        return phases_run(task, step, carry, **options)

    phases_run = phases.run
    task = blind_task._replace(apply=apply)
    found = collections.defaultdict(dict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "run", run)
        for name in FAMILY:
            cells = [(0.5, 0), (0.5, 1)]
            if name in SAME_START:
                cells.append((0.83, 0))
            for sparsity, seed in cells:
                before = traces["train"]
                outcome = getattr(methods, name)(
                    task,
                    sparsity,
                    key=jax.random.key(seed),
                    epochs=EPOCHS,
                    **HYPER.get(name, {}),
                )
                new = traces["train"] - before
                found[name][sparsity, seed] = Run(outcome, starts[-1], new)
    return found


def kernels(tree):
    return np.concatenate([np.ravel(tree[name]["kernel"]) for name in SIZES])


def start_masks(run):
    return kernels(jprune.masks_of(run.start.opt_state))


def test_the_family_is_complete():
    expected = ["static", "set_", "rigl", "rigl_itop", "dsr", "granet"]
    assert [*expected, "gradual_magnitude"] == FAMILY


@pytest.mark.parametrize("name", FAMILY)
def test_counts_are_exact_and_removed_weights_zero(family, blind_task, name):
    for (sparsity, _), (outcome, _, _) in family[name].items():
        keep = kernels(outcome.masks)
        counts = [int(outcome.masks[layer]["kernel"].sum()) for layer in SIZES]
        assert sum(counts) == jprune.selection.keep_count(72, sparsity)
        if name == "gradual_magnitude":
            assert counts == [24, 12]
        assert (kernels(outcome.params)[~keep] == 0.0).all()
        assert outcome.masks["fc1"]["bias"].shape == ()
        assert outcome.history["train"]["valid_accuracy"].shape == (EPOCHS,)
        judged = fit.evaluate(
            blind_task,
            outcome.apply,
            outcome.params,
            outcome.state,
            blind_task.streams["valid"],
        )
        judged = {metric: float(value) for metric, value in judged.items()}
        assert outcome.metrics == pytest.approx(judged)


@pytest.mark.parametrize("name", FAMILY)
def test_a_seed_starts_from_the_weights_of_its_dense_network(family, blind_task, name):
    for (_, seed), run in family[name].items():
        key = phases.split(jax.random.key(seed)).init
        params, _ = phases.initialize(blind_task, key)
        expected = np.where(start_masks(run), kernels(params), 0.0)
        assert (kernels(run.start.params) == expected).all()


@pytest.mark.parametrize("name", SAME_START)
def test_methods_of_constant_density_start_from_the_same_masks(family, name):
    for cell, run in family[name].items():
        assert (start_masks(run) == kernels(family["static"][cell].outcome.masks)).all()
    assert (
        start_masks(family[name][0.5, 0]) != start_masks(family[name][0.5, 1])
    ).any()


def test_layers_keep_their_counts_unless_they_trade_weights(family):
    def counts(masks):
        return [int(masks[layer]["kernel"].sum()) for layer in SIZES]

    for name in SAME_START:
        for run in family[name].values():
            start = jprune.masks_of(run.start.opt_state)
            assert counts(run.outcome.masks) == counts(start)


@pytest.mark.parametrize("name", FAMILY)
def test_masks_move_but_for_the_control(family, name):
    moved = [
        (start_masks(run) != kernels(run.outcome.masks)).any()
        for run in family[name].values()
    ]
    assert all(moved) if name != "static" else not any(moved)


def test_growth_explores_and_gradual_pruning_does_not(family):
    def grown(name):
        runs = family[name].values()
        return sum((kernels(r.outcome.masks) & ~start_masks(r)).sum() for r in runs)

    assert grown("static") == 0
    assert grown("gradual_magnitude") == 0
    # The one that starts dense.
    assert start_masks(family["gradual_magnitude"][0.5, 0]).all()
    for name in ("set_", "rigl", "rigl_itop", "dsr"):
        assert grown(name) > 0


@pytest.mark.parametrize("name", FAMILY)
def test_all_seeds_share_a_compiled_step(family, name):
    """And all sparsities where no count depends on them."""
    first, *others = family[name].values()
    assert first.traces > 0
    assert [run.traces for run in others] == [0] * len(others)


def test_the_step_that_sparsities_share_is_that_of_each(family, blind_task):
    key = jax.random.key(0)
    cadence = sparse_training._cadence(blind_task, EPOCHS, 40, 0.75)
    alone = sparse_training._train(
        blind_task, 0.83, jprune.rigl, key=key, epochs=EPOCHS, on_epoch=None, **cadence
    )
    shared = family["rigl"][0.83, 0].outcome
    assert (kernels(alone.masks) == kernels(shared.masks)).all()
    np.testing.assert_array_equal(kernels(alone.params), kernels(shared.params))


def test_different_methods_give_different_networks(family):
    params = [kernels(family[name][0.5, 0].outcome.params) for name in FAMILY]
    for i, one in enumerate(params):
        assert all((one != other).any() for other in params[:i])


def test_the_cadence_is_relative_to_the_training(tiny_task):
    # 3 steps an epoch.
    cadence = sparse_training._cadence
    assert cadence(tiny_task, 400, 40, 0.75) == {"every": 30, "end": 900}
    assert cadence(tiny_task, 10, 40, 0.75) == {"every": 10, "end": 22}
    assert cadence(tiny_task, None, 1, 0.5) == {"every": 10, "end": 3}


@pytest.mark.parametrize(
    ("hyper", "message"),
    [({"updates": 0}, "updates: 0 is below 1"), ({"end": 1.0}, r"end: 1\.0 is not")],
)
def test_a_cadence_that_cannot_be_raises(tiny_task, hyper, message):
    with pytest.raises(ValueError, match=message):
        methods.rigl(tiny_task, 0.5, key=jax.random.key(0), **hyper)


def test_less_than_granets_first_sparsity_is_its_constant_sparsity(
    tiny_task, monkeypatch
):
    starts = []
    monkeypatch.setattr(
        phases, "run", lambda task, step, carry, **_: starts.append(carry)
    )
    methods.granet(tiny_task, 0.25, key=jax.random.key(0))
    masks = kernels(jprune.masks_of(starts[0].opt_state))
    assert masks.sum() == jprune.selection.keep_count(72, 0.25)
