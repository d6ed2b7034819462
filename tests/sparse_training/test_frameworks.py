"""The same optimiser in the training loops of four frameworks, and on disk."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state

import jprune

STEPS = 8


@pytest.fixture(scope="module")
def batch():
    x, y = jax.random.split(jax.random.key(0))
    return jax.random.normal(x, (16, 6)), jax.random.normal(y, (16, 4))


def optimizer():
    rigl = jprune.rigl(0.75, every=3, end=STEPS)
    return jprune.sparse(optax.chain(rigl, optax.adam(1e-2)))


def assert_sparse(params, opt_state, weights):
    masks = jprune.masks_of(opt_state)
    assert int(jprune.masks.count(masks)) == weights
    again = jprune.apply_masks(params, masks)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert np.array_equal(a, b)
    jprune.check(opt_state)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.tanh(nn.Dense(10)(x)))


def test_linen_train_state(batch):
    x, y = batch
    model = Mlp()
    params = model.init(jax.random.key(1), x)["params"]
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=optimizer()
    )
    masks = jprune.masks_of(state.opt_state)
    state = state.replace(params=jprune.apply_masks(state.params, masks))

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(STEPS):
        state = step(state)
    assert_sparse(state.params, state.opt_state, 25)


def test_nnx_optimizer(batch):
    x, y = batch
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(6, 10, rngs=rngs), nnx.tanh, nnx.Linear(10, 4, rngs=rngs)
    )
    held = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    @nnx.jit
    def step(model, held):
        def loss(model):
            return jnp.mean((model(x) - y) ** 2)

        held.update(model, nnx.grad(loss)(model))

    for _ in range(STEPS):
        step(model, held)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    kernels = [params["layers"][i]["kernel"] for i in (0, 2)]
    assert sum(int(jnp.sum(kernel != 0)) for kernel in kernels) == 25


def test_equinox(batch):
    x, y = batch
    model = eqx.nn.MLP(6, 4, 10, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    tx = optimizer()
    opt_state = tx.init(params)
    params = jprune.apply_masks(params, jprune.masks_of(opt_state))

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(STEPS):
        params, opt_state = step(params, opt_state)
    assert_sparse(params, opt_state, 25)


def plain():
    keys = jax.random.split(jax.random.key(3))
    params = {
        "fc1": {"kernel": jax.random.normal(keys[0], (6, 10))},
        "fc2": {"kernel": jax.random.normal(keys[1], (10, 4))},
    }
    tx = optimizer()

    @jax.jit
    def step(params, opt_state, batch):
        def loss(params):
            hidden = jnp.tanh(batch[0] @ params["fc1"]["kernel"])
            return jnp.mean((hidden @ params["fc2"]["kernel"] - batch[1]) ** 2)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return params, tx, step


def bits(tree):
    def plain_array(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return [plain_array(x) for x in jax.tree.leaves(tree)]


def test_a_run_restored_from_disk_goes_on_bit_for_bit(batch, tmp_path):
    params, tx, step = plain()
    opt_state = tx.init(params)
    for _ in range(4):
        params, opt_state = step(params, opt_state, batch)
    saved = {"params": params, "opt_state": opt_state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", saved)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
        restored = checkpointer.restore(tmp_path / "run", like)
    for a, b in zip(bits(saved), bits(restored), strict=True):
        assert np.array_equal(a, b)
    ends = []
    for run in (saved, restored):
        params, opt_state = run["params"], run["opt_state"]
        for _ in range(4):
            params, opt_state = step(params, opt_state, batch)
        ends.append(bits((params, opt_state)))
    assert all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))


def test_half_precision_parameters(batch):
    params, tx, _ = plain()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    opt_state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    for _ in range(STEPS):
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert jax.tree.leaves(params)[0].dtype == jnp.bfloat16
    assert_sparse(params, opt_state, 25)


def test_a_scanned_stack_selects_in_each_of_its_layers():
    params = {"blocks": {"kernel": jax.random.normal(jax.random.key(0), (3, 8, 8))}}
    layouts = {"blocks": "LIO"}
    tx = jprune.sparse(
        jprune.rigl(
            0.5,
            every=1,
            end=9,
            units=lambda tree: jprune.units.weights(tree, layout=layouts),
        )
    )
    state = tx.init(params)
    first = np.asarray(jprune.masks_of(state)["blocks"]["kernel"])
    params = jprune.apply_masks(params, jprune.masks_of(state))
    # All the gradient is in one layer; the others must not lose weights to it.
    grads = {
        "blocks": {
            "kernel": jnp.ones((3, 8, 8)) * jnp.array([0, 0, 9.0])[:, None, None]
        }
    }
    for _ in range(3):
        _, state = tx.update(grads, state, params)
    mask = np.asarray(jprune.masks_of(state)["blocks"]["kernel"])
    assert np.array_equal(mask.sum((1, 2)), first.sum((1, 2)))
    assert not np.array_equal(mask, first)
