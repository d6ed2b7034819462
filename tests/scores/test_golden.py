"""Criteria at initialisation, and rounds of them, against public implementations.

Data and commits are described in ``tests/golden/README.md``. Where a reference rounds
otherwise than the library, its own count is asked for by ``keep=``.
"""

import numpy as np
import pytest

import jprune

RTOL = {"mlp": 2e-6, "conv": 1e-11}  # the MLP's reference scores are stored in float32


def assert_scores(net, found, quantity, scale):
    for path, expected in net.golden(quantity).items():
        np.testing.assert_allclose(
            found[path] / scale, expected, rtol=RTOL[net.name], atol=1e-12
        )


def normaliser(net, found, quantity):
    return abs(sum(found[path].sum() for path in net.golden(quantity)))


def assert_masks(net, masks, quantity, by_path):
    found = by_path(masks)
    for path, expected in net.golden(quantity).items():
        np.testing.assert_array_equal(found[path], expected, err_msg=path)


def assert_layer_counts(net, masks, quantity, by_path):
    found = by_path(masks)
    for name, count in net.numbers[quantity]["per_layer"].items():
        assert found[f"{name.split('.')[0]}/kernel"].sum() == count, (quantity, name)


def golden_keep(net, density):
    """The peer removes int((1 - d) N) weights."""
    return net.weights - int((1 - density) * net.weights)


def test_snip_scores_and_masks(golden_net, by_path):
    scores = jprune.scores.snip(golden_net.loss)(golden_net.params, golden_net.batch)
    found = by_path(scores)
    total = normaliser(golden_net, found, "snip/score")
    assert_scores(golden_net, found, "snip/score", total)
    masks = jprune.prune(scores, keep=golden_keep(golden_net, 0.01))
    assert_masks(golden_net, masks, "snip/mask_global_d0.01", by_path)


@pytest.mark.parametrize("temperature", [200, 1])
def test_grasp_scores(golden_net, by_path, temperature):
    score_fn = jprune.scores.grasp(
        golden_net.apply, loss=golden_net.objective, temperature=temperature
    )
    found = by_path(score_fn(golden_net.params, golden_net.batch))
    quantity = f"grasp_T{temperature}/score"
    sums = golden_net.numbers[quantity]["per_layer_sum"]
    # The peer divides by the absolute sum plus 1e-10, which is not negligible here.
    kernels = {f"{name.split('.')[0]}/kernel": total for name, total in sums.items()}
    scale = abs(sum(found[path].sum() for path in kernels)) + 1e-10
    for path, total in kernels.items():
        np.testing.assert_allclose(found[path].sum() / scale, total, rtol=1e-6)
    if (golden_net.name, temperature) != ("mlp", 1):
        assert_scores(golden_net, found, quantity, scale)


def test_grasp_of_the_authors(golden_net, by_path):
    """Two half-batches, whose gradients and products are summed: four times the mean.

    The sign is the other one: the authors remove the largest.
    """
    indices = np.array(golden_net.numbers["grasp_peer_batch_indices"])
    x, y = golden_net.batch
    score_fn = jprune.scores.grasp(golden_net.apply, loss=golden_net.objective)
    scores = score_fn(golden_net.params, (x[indices], y[indices]))
    found = by_path(scores)
    quantity = "grasp_peer_T200/mask_ratio0.9"
    masks = jprune.prune(scores, keep=golden_net.numbers[quantity]["kept"])
    assert_layer_counts(golden_net, masks, quantity, by_path)
    if golden_net.name == "conv":
        expected = golden_net.golden("grasp_peer_T200/score")
        total = abs(sum(found[path].sum() for path in expected))
        for path, own in expected.items():
            scaled = -4 * found[path] / (4 * total + 1e-10)
            np.testing.assert_allclose(scaled, own, rtol=1e-9, atol=1e-12)
        assert_masks(golden_net, masks, quantity, by_path)


def test_hessian_gradient_product(golden_net, by_path):
    if golden_net.name == "mlp":
        numbers = golden_net.numbers["grasp_plain"]
        score_fn = jprune.scores.grasp(golden_net.loss)
        found = by_path(score_fn(golden_net.params, golden_net.batch))
        total = sum(v.sum() for k, v in found.items() if k.endswith("kernel"))
        np.testing.assert_allclose(-total, numbers["sum_-w*Hg"], rtol=1e-6)
        return
    score_fn = jprune.scores.grasp(golden_net.loss)
    found = by_path(score_fn(golden_net.params, golden_net.batch))
    weights = by_path(golden_net.params)
    for path, product in golden_net.golden("grasp_plain/Hg").items():
        np.testing.assert_allclose(found[path], weights[path] * product, rtol=1e-9)


def test_magnitude_masks(golden_net, by_path):
    scores = jprune.scores.magnitude(golden_net.params)
    masks = jprune.prune(scores, keep=golden_keep(golden_net, 0.1))
    assert_masks(golden_net, masks, "mag/mask_global_d0.1", by_path)


def test_synflow_scores(golden_net, by_path):
    score_fn = jprune.scores.synflow(golden_net.apply)
    one = golden_net.batch[0][:1]
    found = by_path(score_fn(golden_net.unbiased, one))
    assert_scores(golden_net, found, "synflow_nobias/score", 1.0)
    if golden_net.name == "conv":
        found = by_path(score_fn(golden_net.params, one))
        assert_scores(golden_net, found, "synflow/score", 1.0)


SYNFLOW_ROUNDS = [
    ("synflow_iter100_nobias/mask_rho1", 100),
    ("synflow_iter100_nobias/mask_rho2", 100),
    ("synflow_iter100_nobias/mask_rho3", 100),
    ("synflow_iter100/mask_rho1", 100),
    ("synflow_iter100/mask_rho2", 100),
    ("synflow_iter100/mask_rho3", 100),
    ("synflow_iter100_linear/mask_rho2", 100),
    ("synflow_iter1/mask_rho2", 1),
    ("synflow_iter5/mask_rho2", 5),
    ("synflow_iter20/mask_rho2", 20),
]


def test_synflow_rounds(golden_net, by_path):
    score_fn = jprune.scores.synflow(golden_net.apply)
    one = golden_net.batch[0][:1]
    for quantity, rounds in SYNFLOW_ROUNDS:
        if golden_net.name == "mlp" and rounds < 100:
            continue  # another program to compile, and covered by the other net
        density = 10.0 ** -int(quantity[-1])
        steps = np.arange(1, rounds + 1) / rounds
        linear = "linear" in quantity
        masks = jprune.prune_iteratively(
            score_fn,
            golden_net.unbiased if "nobias" in quantity else golden_net.params,
            one,
            keep=[
                golden_keep(golden_net, d)
                for d in (1 - (1 - density) * steps if linear else density**steps)
            ],
        )
        assert_layer_counts(golden_net, masks, quantity, by_path)
        if golden_net.name == "conv" or quantity == "synflow_iter100_nobias/mask_rho2":
            assert_masks(golden_net, masks, quantity, by_path)


# At density 0.01 GRASP-It's threshold falls on exact zeros; the peer keeps them all.
ROUNDS = [
    ("force", "snip", True, 0.1),
    ("force", "snip", True, 0.01),
    ("iter_snip", "snip", False, 0.1),
    ("iter_snip", "snip", False, 0.01),
    ("grasp_it", "squared_gradient", False, 0.1),
]


@pytest.mark.parametrize(("method", "criterion", "revive", "density"), ROUNDS)
def test_rounds_of_sensitivity(golden_net, by_path, method, criterion, revive, density):
    score_fn = getattr(jprune.scores, criterion)(golden_net.loss)
    for rounds in (10, 60) if golden_net.name == "conv" else (10,):
        densities = np.exp(np.log(density) * np.arange(1, rounds + 1) / rounds)
        masks = jprune.prune_iteratively(
            score_fn,
            golden_net.params,
            golden_net.batch,
            keep=[int(golden_net.weights * d) for d in densities],
            revive=revive,
        )
        quantity = f"{method}/mask_keep{density}_steps{rounds}"
        assert_layer_counts(golden_net, masks, quantity, by_path)
        if golden_net.name == "conv":
            assert_masks(golden_net, masks, quantity, by_path)
