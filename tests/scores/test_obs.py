"""Optimal Brain Surgeon against golden data, refits and the algebra of inverses."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jprune import masks as mask_trees
from jprune.scores import _curvature, _inverse_curvature, _obs

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "second_order.npz") as data:
        return dict(data)


# The golden net in the order of torch, weights (out, in): as a list its flattening is
# the golden one, and its prunable leaves are the two weights.
def net_of(golden):
    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    params = [np.float64(golden[f"tiny/param/{name}"]) for name in names]
    return params, (np.float64(golden["tiny/x"]), golden["tiny/y"])


def apply(params, x):
    w1, b1, w2, b2 = params
    return jnp.tanh(x @ w1.T + b1) @ w2.T + b2


def loss(params, batch):
    x, y = batch
    return jnp.mean(cross_entropy(apply(params, x), y))


def everything(path, leaf):
    return True


def flat(leaves):
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def weights_of(params):
    return flat([params[0], params[2]])


def removing(inverse, q):
    """Masks that remove the weights with the slots ``q``."""
    return jax.tree.map(
        lambda s: np.isin(s, q, invert=True) if s.ndim else np.True_, inverse.slots
    )


def quadratic():
    """A loss ``(w - c)' H (w - c) / 2`` with its minimum as parameters."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(8, 16))
    hessian, centre = root @ root.T / 8 + 0.1 * np.eye(8), rng.normal(size=8)

    def loss_fn(params, _):
        step = params["w"].ravel() - centre
        return step @ hessian @ step / 2

    return loss_fn, {"w": centre.reshape(4, 2)}, hessian


def refit(hessian, centre, removed):
    """The minimum under ``w[removed] = 0``, from the normal equations."""
    live = np.setdiff1d(np.arange(len(centre)), removed)
    w = np.zeros_like(centre)
    w[live] = np.linalg.solve(hessian[np.ix_(live, live)], (hessian @ centre)[live])
    return w


exact = functools.partial(_inverse_curvature.inverse_hessian, damping=0.0)


@functools.cache
def solved(block=None):
    """A quadratic with its minimum, its Hessian, and the inverse of that."""
    loss_fn, params, hessian = quadratic()
    return loss_fn, params, hessian, jax.jit(exact(loss_fn, block=block))(params)


def test_golden_gauss_newton_surgery(golden):
    # Catches a missing 1/2, a sign of dw, damping on the inverse instead of the matrix.
    params, batch = net_of(golden)
    inverse_fn = _inverse_curvature.inverse_gauss_newton(
        apply,
        cross_entropy,
        damping=float(golden["tiny_obs/damping"]),
        prunable=everything,
        chunk=5,
    )
    inverse = jax.jit(inverse_fn)(params, batch)
    close(np.asarray(inverse.blocks)[0], golden["tiny_obs/H_inv"])
    saliency = flat(_obs.obs_saliency(params, inverse))
    close(saliency, golden["tiny_obs/saliency"])
    q = golden["tiny_obs/q"]
    assert np.argmin(saliency) == q
    updated = flat(_obs.obs_update(params, inverse, removing(inverse, q)))
    close(updated - flat(params), golden["tiny_obs/delta_w"])
    close(updated, golden["tiny_obs/w_after"])
    assert updated[q] == 0


def test_golden_least_squares_sequence(golden):
    x, target = golden["lin/X"], golden["lin/t"]
    sequence = json.loads((GOLDEN / "second_order.json").read_text())
    params = {"w": golden["lin/w_opt"][:, None]}

    def mean_loss(params, _):
        return jnp.mean((x @ params["w"][:, 0] - target) ** 2) / 2

    inverse = jax.jit(exact(mean_loss))(params)
    score_fn = jax.jit(_obs.obs(mean_loss, inverse=exact))
    loss_of = jax.jit(mean_loss)
    current, masks, increase = params, {"w": np.ones((6, 1), bool)}, 0.0
    for i, expected in enumerate(sequence["lin_obs_sequence"]):
        # Scored at the masks and weights so far, each time with a new Hessian.
        scores = np.asarray(score_fn(current, masks=masks)["w"])
        live = np.asarray(masks["w"])[:, 0]
        close(scores[live, 0], golden[f"lin/step{i}/saliency"][live])
        # Removed one after the other, by downdating the first inverse.
        result = jax.tree.map(np.asarray, _obs.obs_prune(params, inverse, i + 1))
        current, masks = result.params, result.masks
        w, kept = current["w"][:, 0], masks["w"][:, 0]
        assert np.flatnonzero(live & ~kept) == [expected["q"]]
        close(w, golden[f"lin/step{i}/w"])
        close(w[kept], np.linalg.lstsq(x[:, kept], target, rcond=None)[0])
        # The predicted increase is the true one.
        increase += expected["saliency"]
        close(result.increase, increase)
        close(loss_of(current, None) - loss_of(params, None), increase)


@pytest.mark.parametrize("damping", [1e-3, 1e-1])
def test_golden_woodfisher(golden, damping):
    # Catches P missing from the recursion's denominator, or P - 1 in it; a batch
    # gradient for per-example ones; with chunk 5 a filled-up last chunk that counts.
    params, batch = net_of(golden)
    make = functools.partial(
        _inverse_curvature.inverse_fisher, damping=damping, chunk=5
    )
    inverse = jax.jit(make(loss))(params, batch)
    expected = {
        name: golden[f"woodfisher/damp{damping}/{name}"]
        for name in (
            "F_inv",
            "F_inv_diag",
            "saliency_w2_over_2Finv",
            "q",
            "delta_w",
        )
    }
    close(np.asarray(inverse.blocks)[0], expected["F_inv"])
    scores = _obs.obs_saliency(params, inverse)
    assert scores[1].shape == scores[3].shape == ()
    close(weights_of(scores), expected["saliency_w2_over_2Finv"])
    assert np.argmin(weights_of(scores)) == expected["q"]
    updated = _obs.obs_update(params, inverse, removing(inverse, expected["q"]))
    close(weights_of(updated) - weights_of(params), expected["delta_w"])
    assert updated[1] is params[1]


def test_golden_woodfisher_in_blocks(golden):
    params, batch = net_of(golden)
    inverse_fn = _inverse_curvature.inverse_fisher(loss, damping=0.1, block=10)
    inverse = jax.jit(inverse_fn)(params, batch)
    diagonal = np.diagonal(inverse.blocks, axis1=1, axis2=2).ravel()
    expected = golden["woodfisher/damp0.1/block10_F_inv_diag"]
    close(diagonal[weights_of(inverse.slots)], expected)


# 20 and 15 weights in blocks of 7: the last blocks of both leaves are ragged, and a
# block that ran on into the next leaf would differ.
@pytest.mark.parametrize(
    "make, matrix",
    [
        (functools.partial(_inverse_curvature.inverse_hessian, loss), "hessian"),
        (
            functools.partial(
                _inverse_curvature.inverse_gauss_newton, apply, cross_entropy
            ),
            "gauss_newton",
        ),
        (functools.partial(_inverse_curvature.inverse_fisher, loss), "fisher"),
    ],
    ids=["hessian", "gauss_newton", "fisher"],
)
def test_blocks_are_inverses_of_blocks(golden, make, matrix):
    params, batch = net_of(golden)
    inverse_fn = jax.jit(make(block=7, damping=0.05, chunk=5))
    blocks = [slice(a, min(a + 7, 20)) for a in (0, 7, 14)]
    blocks += [slice(a, min(a + 7, 35)) for a in (20, 27, 34)]
    for keep in (np.ones(35, bool), np.random.default_rng(1).random(35) < 0.6):
        masks = [keep[:20].reshape(5, 4), np.True_, keep[20:].reshape(3, 5), np.True_]
        product = jax.jit(mask_trees.apply)(params, masks)
        whole = np.asarray(matrix_by_brute_force(matrix, product, batch))
        inverse = np.asarray(inverse_fn(params, batch, masks=masks).blocks)
        assert inverse.shape == (6, 7, 7)
        for block, own in zip(inverse, blocks, strict=True):
            live = np.flatnonzero(keep[own])
            # With masks: the inverse over the living weights, and zeros around it.
            inner = whole[own, own][np.ix_(live, live)] + 0.05 * np.eye(len(live))
            expected = np.zeros((7, 7))
            expected[np.ix_(live, live)] = np.linalg.inv(inner)
            close(block, expected)


@functools.partial(jax.jit, static_argnums=0)
def matrix_by_brute_force(matrix, params, batch):
    """The 35 x 35 matrix over the two weights, formed as it is defined."""
    x, y = batch

    def of_weights(fn):
        def fn_of(w, *args):
            w1, w2 = w[:20].reshape(5, 4), w[20:].reshape(3, 5)
            return fn([w1, params[1], w2, params[3]], *args)

        return fn_of

    w = jnp.concatenate([params[0].ravel(), params[2].ravel()])
    if matrix == "hessian":
        return jax.hessian(of_weights(loss))(w, batch)
    if matrix == "fisher":
        one = jax.grad(lambda w, x, y: of_weights(loss)(w, (x[None], y[None])))
        g = jax.vmap(one, (None, 0, 0))(w, x, y)
        return g.T @ g / len(y)
    jacobian = jax.jacobian(of_weights(apply))(w, x)
    p = jax.nn.softmax(apply(params, x))
    output = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    return jnp.einsum("nci,ncd,ndj->ij", jacobian, output, jacobian) / len(y)


def test_one_removal_on_a_quadratic():
    loss_fn, params, hessian, inverse = solved()
    saliency = np.ravel(_obs.obs_saliency(params, inverse)["w"])
    update = jax.jit(_obs.obs_update)
    for q in range(8):
        updated = update(params, inverse, removing(inverse, q))
        close(np.ravel(updated["w"]), refit(hessian, params["w"].ravel(), [q]))
        close(loss_fn(updated, None), saliency[q])
    # Never above the saliency that lets nothing else move.
    obd = _curvature.obd(loss_fn, diagonal=_curvature.exact_diagonal)
    assert np.all(saliency < np.ravel(jax.jit(obd)(params)["w"]))


def test_a_set_is_removed_at_once():
    # Catches the sum of single updates, which is no minimum.
    _, params, hessian, inverse = solved()
    update = jax.jit(_obs.obs_update)
    for removed in ([0, 3, 4], [1, 2], [6], list(range(8))):
        updated = update(params, inverse, removing(inverse, removed))
        close(np.ravel(updated["w"]), refit(hessian, params["w"].ravel(), removed))
        assert np.all(np.ravel(updated["w"])[removed] == 0)
    assert update._cache_size() == 1


def test_a_set_is_removed_in_each_block():
    _, params, hessian, inverse = solved(block=3)
    blocked = np.where(np.kron(np.eye(3), np.ones((3, 3)))[:8, :8], hessian, 0)
    updated = _obs.obs_update(params, inverse, removing(inverse, [0, 2, 7]))
    expected = refit(blocked, params["w"].ravel(), [0, 2, 7])
    close(np.ravel(updated["w"]), expected)


def test_one_by_one_is_the_joint_removal_of_the_same_set():
    loss_fn, params, hessian, inverse = solved()
    result = _obs.obs_prune(params, inverse, 4)
    joint = _obs.obs_update(params, inverse, result.masks)
    close(result.params["w"], joint["w"])
    close(result.increase, loss_fn(joint, None))
    # What is left of the inverse: zeros, and the inverse of the reduced Hessian, as
    # it would be computed at the masks.
    kept = np.flatnonzero(result.masks["w"])
    left = np.zeros((8, 8))
    left[np.ix_(kept, kept)] = np.linalg.inv(hessian[np.ix_(kept, kept)])
    assert len(kept) == 4
    close(np.asarray(result.inverse.blocks)[0], left)
    again = jax.jit(exact(loss_fn))(params, masks=result.masks)
    close(again.blocks, result.inverse.blocks)
    # So pruning goes on from there.
    further = _obs.obs_prune(result.params, result.inverse, 2)
    close(further.params["w"], _obs.obs_prune(params, inverse, 6).params["w"])


@pytest.mark.parametrize("block", [None, 3])
def test_one_by_one_against_a_plain_loop(block):
    # Catches a saliency that is not renewed, and the block of another weight updated.
    _, params, hessian, inverse = solved(block=block)
    blocks = np.ones((8, 8)) if block is None else np.kron(np.eye(3), np.ones((3, 3)))
    matrix = np.where(blocks[:8, :8], hessian, 0)
    w, live = np.array(params["w"]).ravel(), list(range(8))
    for count in range(1, 8):
        inner = np.linalg.inv(matrix[np.ix_(live, live)])
        worst = live[np.argmin(w[live] ** 2 / np.diag(inner))]
        w[live] -= (
            w[worst]
            / inner[live.index(worst), live.index(worst)]
            * (inner[:, live.index(worst)])
        )
        live.remove(worst)
        w[worst] = 0
        result = _obs.obs_prune(params, inverse, count)
        close(np.ravel(result.params["w"]), w)
        assert np.flatnonzero(result.masks["w"]).tolist() == live


def test_the_count_may_be_traced():
    _, params, _, inverse = solved()
    prune = jax.jit(_obs.obs_prune)
    for count in (0, 3, 8, 50):
        result = prune(params, inverse, jnp.asarray(count))
        assert int(mask_trees.count(result.masks)) == max(8 - count, 0)
        assert np.all((result.params["w"] != 0) == result.masks["w"])
    assert prune._cache_size() == 1
    np.testing.assert_array_equal(prune(params, inverse, 0).params["w"], params["w"])


def test_scores_at_masks():
    # Catches removed weights that still take part in the compensation.
    loss_fn, params, hessian = quadratic()
    masks = {"w": np.array([[True, False]])}
    score_fn = jax.jit(_obs.obs(loss_fn, inverse=exact))
    scores = np.asarray(score_fn(params, masks=masks)["w"])
    kept = np.arange(0, 8, 2)
    inner = np.linalg.inv(hessian[np.ix_(kept, kept)])
    close(scores[:, 0], params["w"][:, 0] ** 2 / (2 * np.diag(inner)))
    np.testing.assert_array_equal(scores[:, 1], 0)


def test_leaves_that_are_not_prunable_stay():
    loss_fn, params, _ = quadratic()
    tree = {
        **params,
        "bias": jnp.ones(3),
        "scale": jnp.asarray(2.0),
        "steps": jnp.arange(3),
        "key": jax.random.key(0),
    }
    inverse = jax.jit(exact(loss_fn))(tree)
    scores = _obs.obs_saliency(tree, inverse)
    result = _obs.obs_prune(tree, inverse, 2)
    updated = _obs.obs_update(tree, inverse, result.masks)
    for name in ("bias", "scale", "steps", "key"):
        assert scores[name].shape == () and scores[name] == 0
        assert result.masks[name].shape == () and result.masks[name]
        assert result.params[name] is updated[name] is tree[name]
    close(updated["w"], result.params["w"])


def test_half_precision():
    params = {"w": jnp.array([[1.0, 2.0]], jnp.bfloat16)}
    ones = jnp.ones((300, 2), jnp.bfloat16)
    make = functools.partial(_inverse_curvature.inverse_fisher, damping=1.0, chunk=1)

    def linear(params, x):
        return jnp.mean(x @ params["w"].T)

    inverse = jax.jit(make(linear))(params, ones)
    assert inverse.blocks.dtype == jnp.float32
    expected = np.linalg.inv(np.eye(2) + 1)
    np.testing.assert_allclose(np.asarray(inverse.blocks)[0], expected, rtol=1e-4)
    assert _obs.obs_saliency(params, inverse)["w"].dtype == jnp.float32
    result = _obs.obs_prune(params, inverse, 1)
    assert result.params["w"].dtype == jnp.bfloat16
    assert result.params["w"].tolist() == [[0.0, 2.5]]


def test_under_vmap():
    loss_fn, params, _, inverse = solved()
    stacked = {"w": np.stack([params["w"], 2 * params["w"], params["w"][::-1]])}

    def prune(params):
        inverse = exact(loss_fn)(params)
        return _obs.obs_saliency(params, inverse), _obs.obs_prune(params, inverse, 3)

    together = jax.jit(jax.vmap(prune))(stacked)
    for i, w in enumerate(stacked["w"]):
        # The Hessian of a quadratic is the same everywhere.
        one = (
            _obs.obs_saliency({"w": w}, inverse),
            _obs.obs_prune({"w": w}, inverse, 3),
        )
        jax.tree.map(
            lambda all_, one, i=i: close(np.asarray(all_)[i], one), together, one
        )


PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
INVERSE = _inverse_curvature.InverseCurvature(
    jnp.eye(6)[None], {"w": jnp.arange(6).reshape(3, 2), "b": jnp.full((), -1)}
)


def linear(params, x):
    return jnp.mean(x @ params["w"] + params["b"])


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: _obs.obs(
                linear,
                inverse=functools.partial(
                    _inverse_curvature.inverse_fisher, max_entries=35
                ),
            )(PARAMS, jnp.ones((2, 3))),
            r"6 prunable weights in 1 block\(s\) of 6 .* 36 entries.*block=",
        ),
        (
            lambda: _obs.obs(linear)({"w": jnp.ones(3)}, jnp.ones((2, 3))),
            "prunable: the default rule accepts none",
        ),
        (
            lambda: _obs.obs(linear)(PARAMS, jnp.ones((0, 3))),
            r"batch: .* \(0, 3\) has no examples",
        ),
        (
            lambda: exact(linear)(PARAMS, jnp.ones((0, 3))),
            r"batch: .* \(0, 3\) has no examples",
        ),
        (lambda: _obs.obs(linear)(PARAMS), "batch: .* leading axis"),
        (
            lambda: _inverse_curvature.inverse_fisher(linear, damping=0.0),
            "damping: .* got 0.0",
        ),
        (
            lambda: _inverse_curvature.inverse_hessian(linear, damping=-1.0),
            "damping: .* got -1.0",
        ),
        (
            lambda: _inverse_curvature.inverse_fisher(linear, block=0),
            "block: .* got 0",
        ),
        (
            lambda: _inverse_curvature.inverse_hessian(linear, chunk=0),
            "chunk: .* got 0",
        ),
        (lambda: _obs.obs_prune(PARAMS, INVERSE, 7), "count: .* 6.* got 7"),
        (lambda: _obs.obs_prune(PARAMS, INVERSE, -1), "count: .* got -1"),
        (
            lambda: _obs.obs_saliency({"w": PARAMS["w"]}, INVERSE),
            "inverse: .* structure",
        ),
        (
            lambda: _obs.obs_saliency({**PARAMS, "w": jnp.ones((2, 3))}, INVERSE),
            r"inverse: .* 'w' has the shape \(3, 2\), the parameter \(2, 3\)",
        ),
        (
            lambda: _obs.obs_update(
                PARAMS, INVERSE, {"w": jnp.ones((3, 2), bool), "b": jnp.ones(2, bool)}
            ),
            "masks: the leaf 'b' .* no inverse",
        ),
        (
            lambda: _obs.obs_update(PARAMS, INVERSE, {"w": jnp.ones((3, 2), bool)}),
            "masks: the tree differs",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_complex_weights():
    with pytest.raises(TypeError, match="'w' is complex"):
        exact(linear)({"w": jnp.ones((3, 2), complex), "b": jnp.ones(2)}, None)
