"""Saved networks come back bit for bit, or not at all.

Mutations that these tests catch: values cast on the way, bits in another order, masks
broadcast before they are packed, a file written in place, positions of the small
network read as those of the full one, a manifest that is not compared.
"""

import json
import math
import os
import pathlib
import stat
import subprocess
import sys
import tempfile

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from hypothesis import strategies as st

import jprune
from tests.programs import reload_shrunk

ROOT = pathlib.Path(__file__).parents[1]

DTYPES = [
    *("bool", "int8", "int32", "uint16", "uint32", "int64", "uint64", "int4", "uint4"),
    *("bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"),
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


@pytest.fixture
def net():
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)},
        "b": [jnp.ones(3), jnp.zeros((), jnp.int32)],
    }
    masks = {
        "a": {"kernel": jnp.asarray(rng.random((5, 4)) < 0.4)},
        "b": [jprune.masks.never_pruned()] * 2,
    }
    return params, masks


def bits_of(leaf):
    """What must be equal: kind, dtype, shape and bytes."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key", str(jax.random.key_impl(leaf)), bits_of(jax.random.key_data(leaf))
    kind = "numpy" if isinstance(leaf, np.ndarray | np.generic) else "jax"
    return kind, leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes()


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.map(bits_of, found) == jax.tree.map(bits_of, expected)


def random_bits(rng, dtype, shape):
    """Values of random bits: NaNs with payloads, infinities, subnormals."""
    dtype = np.dtype(getattr(jnp, dtype).dtype)
    if dtype.name in ("bool", "int4", "uint4"):
        return rng.integers(0, 2, shape).astype(dtype)
    data = rng.bytes(math.prod(shape) * dtype.itemsize)
    return np.array(np.frombuffer(bytearray(data), dtype)).reshape(shape)


# Masks.


@hypothesis.given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    broadcast=st.lists(st.booleans(), min_size=3, max_size=3),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_what_lives_comes_back_bit_for_bit(dtype, shape, broadcast, density, seed):
    rng = np.random.default_rng(seed)
    shape_of_mask = tuple(1 if b else n for b, n in zip(broadcast, shape, strict=False))
    value = random_bits(rng, dtype, shape)
    mask = np.asarray(rng.random(shape_of_mask) < density)
    mask = np.ones((), bool) if mask.ndim == 0 else mask
    params, masks = (value, [value]), (mask, [np.ones((), bool)])
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "x")
        jprune.save(path, params, masks=masks)
        found, found_masks = jprune.load(path, params)
    zeroed = np.where(mask, value, np.zeros((), value.dtype))
    assert_identical(found, (zeroed, [value]))
    assert_identical(found_masks, jax.tree.map(jnp.asarray, masks))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_jax_keep_every_dtype(path, dtype):
    with jax.enable_x64(True):
        value = jnp.asarray(random_bits(np.random.default_rng(1), dtype, (3, 4)))
        jprune.save(path, {"w": value})
        found, masks = jprune.load(path, jprune.trees.shapes_of({"w": value}))
        assert_identical(found, {"w": value})
    assert masks["w"].shape == ()


def test_arrays_of_the_other_byte_order_keep_their_values(path):
    params = [np.arange(3.0).astype(">f4"), np.array([1 + 2j, 3j], ">c16")]
    masks = [np.array([False, True, True]), np.array([True, False])]
    jprune.save(path, params, masks=masks)
    found, _ = jprune.load(path, params)
    expected = [np.array([0, 1, 2], np.float32), np.array([1 + 2j, 0])]
    assert_identical(found, expected)


def test_containers_of_other_frameworks_come_back(path):
    model = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    for params in (eqx.filter(model, eqx.is_array), state):
        masks = jprune.prune(jprune.scores.magnitude(params), 0.5)
        jprune.save(path, params, masks=masks)
        found, found_masks = jprune.load(path, jax.eval_shape(lambda x=params: x))
        assert_identical(found, jprune.apply_masks(params, masks))
        assert_identical(found_masks, masks)


def test_standard_dtypes_are_read_by_any_reader_of_safetensors(path):
    params = {"w": jnp.arange(3, dtype=jnp.bfloat16), "n": jnp.arange(2)}
    jprune.save(path, params)
    found = safetensors.numpy.load_file(path)
    assert found["values/w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["values/n"], [0, 1])


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_keys_draw_the_same_numbers(path, impl, shape):
    key = jax.random.key(7, impl=impl)
    params = {"key": jax.random.split(key, shape) if shape else key}
    jprune.save(path, params)
    for like in (params, jax.eval_shape(lambda: params)):
        assert_identical(jprune.load(path, like)[0], params)
    with pytest.raises(ValueError, match=r"'key' has dtype uint32, but key<"):
        jprune.load(path, {"key": jnp.zeros(shape, jnp.uint32)})


def test_python_numbers_stay_what_they_are(path):
    params = [True, -3, 0.1, 1 + 2j, 2**62]
    jprune.save(path, params)
    found, _ = jprune.load(path, params)
    assert found == params
    assert list(map(type, found)) == list(map(type, params))


def test_values_outside_the_masks_are_not_stored(path, net):
    params, masks = net
    latent = jax.tree.map(lambda x: x + 1, params)
    jprune.save(path, latent, masks=masks)
    found, _ = jprune.load(path, params)
    assert_identical(found, jprune.apply_masks(latent, masks))


def test_an_optimiser_state_is_a_tree_as_well(path, net):
    params, _ = net
    state = optax.adam(1e-3).init(params["a"])
    jprune.save(path, state)
    assert_identical(jprune.load(path, state)[0], state)


def test_a_file_holds_one_bit_an_entry_and_the_living_values(path):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(200, 101)), jnp.float32)
    bias = jnp.ones(101)
    for mask in (rng.random(kernel.shape) < 0.1, rng.random((1, 101)) < 0.1):
        jprune.save(path, [kernel, bias], masks=[mask, np.ones((), bool)])
        living = int(np.broadcast_to(mask, kernel.shape).sum())
        content = -(-mask.size // 8) + 4 * living + 4 * 101
        # The header: text on three tensors.
        assert content < path.stat().st_size <= content + 1000
    assert path.stat().st_size < 0.2 * kernel.nbytes


# Shrunk networks.


@pytest.fixture(scope="module")
def conv():
    """A Linen net, shrunk to a half of its coupled channels."""
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 2)).astype(np.float32)
    module = reload_shrunk.Net()
    variables = module.init(jax.random.key(0), x)
    channels = jprune.couplings(module.apply, variables, x)
    scores = jprune.scores.magnitude(variables)
    masks = jprune.prune(scores, 0.5, units=channels)
    small_apply_fn, small = jprune.shrink(module.apply, variables, masks, x)
    return module.apply, variables, masks, x, small_apply_fn, small


def test_a_fresh_process_computes_the_same(conv, tmp_path):
    _, variables, _, x, small_apply_fn, small = conv
    assert jprune.trees.leaves_of(small)[0].shape != (0,)
    paths = [tmp_path / name for name in ("net", "x.npy", "y.npy")]
    jprune.save(paths[0], small, shrunk=small_apply_fn)
    np.save(paths[1], x)
    subprocess.run(
        [sys.executable, "-m", "tests.programs.reload_shrunk", *map(str, paths)],
        check=True,
        cwd=ROOT,
    )
    expected = jax.jit(small_apply_fn)(small, x)
    np.testing.assert_array_equal(np.load(paths[2]), expected)
    values = sum(leaf.size for leaf in jprune.trees.leaves_of(small))
    full = sum(leaf.size for leaf in jprune.trees.leaves_of(variables))
    assert values < 0.5 * full
    assert 4 * values < paths[0].stat().st_size < 4 * values + 4000


def test_a_shrunk_network_is_its_old_self(conv, path):
    apply_fn, variables, _, _, small_apply_fn, small = conv
    jprune.save(path, small, shrunk=small_apply_fn)
    found_fn, found = jprune.load_shrunk(path, variables, apply_fn)
    assert_identical(found, small)
    assert jax.tree.map(bits_of, found_fn.take(variables)) == jax.tree.map(
        bits_of, small_apply_fn.take(variables)
    )
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a == b, found_fn.tree, small_apply_fn.tree)
    )
    for place, sides in small_apply_fn.removed.items():
        np.testing.assert_equal(found_fn.removed[place], sides)


def test_a_shrunk_network_comes_back_at_full_size(conv, path):
    apply_fn, variables, masks, x, small_apply_fn, small = conv
    jprune.save(path, small, shrunk=small_apply_fn)
    found, found_masks = jprune.load(path, jax.eval_shape(lambda: variables))
    pruned = jprune.apply_masks(variables, masks)
    assert_identical(found["params"], pruned["params"])
    whole = [
        jax.tree.map(lambda m, p: jnp.broadcast_to(m, p.shape), tree, variables)
        for tree in (found_masks, masks)
    ]
    assert_identical(*whole)
    expected = small_apply_fn(small, x)
    np.testing.assert_allclose(apply_fn(found, x), expected, rtol=1e-5, atol=1e-6)


def mlp(params, x):
    hidden = jnp.tanh(x @ params["a"])
    # A norm, for which the full width matters.
    hidden /= jnp.sqrt(jnp.mean(hidden**2, -1, keepdims=True) + 0.1)
    return hidden @ params["b"]


def shrink_mlp(apply_fn, params, keep):
    masks = {"a": keep[None, :], "b": keep[:, None]}
    return jprune.shrink(apply_fn, params, masks, jnp.ones((1, 3)))


def test_what_was_shrunk_twice_is_loaded_with_the_first_function(path):
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(5, 2)), jnp.float32),
    }
    first_fn, first = shrink_mlp(mlp, params, np.arange(5) != 1)
    second_fn, second = shrink_mlp(first_fn, first, np.arange(4) != 1)
    jprune.save(path, second, shrunk=second_fn)
    found_fn, found = jprune.load_shrunk(path, params, mlp)
    assert_identical(found, second)
    x = jnp.ones((4, 3))
    np.testing.assert_array_equal(found_fn(found, x), second_fn(second, x))
    # Gone are position 1, and position 1 of the rest, which is 2.
    keep = jnp.array([True, False, False, True, True])
    masks = {"a": keep[None, :], "b": keep[:, None]}
    full, full_masks = jprune.load(path, params)
    assert_identical(full, jprune.apply_masks(params, masks))
    assert_identical(full_masks, masks)


def test_small_parameters_may_have_another_dtype_than_the_full(path):
    params = {"a": jnp.ones((3, 4), jnp.bfloat16), "b": jnp.ones((4, 2), jnp.bfloat16)}
    small_fn, small = shrink_mlp(mlp, params, np.arange(4) > 0)
    small = jax.tree.map(lambda x: x.astype(jnp.float16), small)
    jprune.save(path, small, shrunk=small_fn)
    found_fn, found = jprune.load_shrunk(path, params, mlp)
    assert_identical(found, small)
    assert found_fn.tree == small_fn.tree == jprune.trees.shapes_of(params)


# What goes wrong.


def test_an_interrupted_save_leaves_the_old_file(path, net, monkeypatch):
    params, masks = net
    jprune.save(path, params, masks=masks)
    before = path.read_bytes()

    def half_of_it(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half of it")
        raise KeyboardInterrupt

    def nothing(*_):
        raise KeyboardInterrupt

    steps = [
        (safetensors.numpy, "save_file", half_of_it),
        (os, "fsync", nothing),
        (os, "replace", nothing),
    ]
    for module, name, interrupted in steps:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupted)
            jprune.save(path, jax.tree.map(lambda x: x + 1, params))
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]


def test_a_killed_save_leaves_the_old_file(path, net):
    params, masks = net
    jprune.save(path, params, masks=masks)
    before = path.read_bytes()
    program = f"""
import os, jprune
os.fsync = lambda _: os._exit(9)
jprune.save({str(path)!r}, [1.0])
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 9
    assert path.read_bytes() == before


def test_a_link_goes_on_pointing_at_the_file(path, net):
    params, _ = net
    link = path.with_name("latest")
    link.symlink_to(path.name)
    jprune.save(str(link), params)
    assert link.is_symlink()
    assert_identical(jprune.load(path, params)[0], params)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("length", [0, 7, 30, -1])
def test_truncated_files_are_refused(path, net, length):
    params, masks = net
    jprune.save(path, params, masks=masks)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"net.safetensors' is truncated, damaged"):
        jprune.load(path, params)


def test_values_that_the_mask_does_not_count_are_refused(path, net):
    params, masks = net
    jprune.save(path, params, masks=masks)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    tensors["values/a/kernel"] = tensors["values/a/kernel"][1:]
    safetensors.numpy.save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"damaged: it holds \d values of 'a/kernel'"):
        jprune.load(path, params)


def test_other_files_and_other_versions_are_refused(path):
    for metadata in (None, {"format": "pt"}):
        safetensors.numpy.save_file({"w": np.ones(2)}, path, metadata)
        with pytest.raises(ValueError, match=r"was not written by jprune.save"):
            jprune.load(path, {"w": np.ones(2)})
    metadata = {"format": "jprune", "format_version": "2", "library_version": "7.1"}
    safetensors.numpy.save_file({"w": np.ones(2)}, path, metadata)
    with pytest.raises(ValueError, match=r"version 2 of the format.*jprune 7\.1"):
        jprune.load(path, {"w": np.ones(2)})


def test_the_manifest_names_the_library(path, net):
    jprune.save(path, net[0])
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["library_version"] == jprune.__version__
    entry = json.loads(metadata["manifest"])["leaves"]["a/kernel"]
    assert entry == {"dtype": "float32", "shape": [5, 4]}


def test_paths_that_cannot_be_read_or_written(tmp_path, net):
    params, _ = net
    with pytest.raises(FileNotFoundError, match=r"path: .*nowhere/net"):
        jprune.save(tmp_path / "nowhere" / "net", params)
    with pytest.raises(IsADirectoryError, match=r"path: "):
        jprune.save(tmp_path, params)
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError, match=r"net"):
        jprune.load(tmp_path / "net", params)
    with pytest.raises(IsADirectoryError):
        jprune.load(tmp_path, params)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": jnp.ones((2, 3))}, r"like: .*missing \['b'\]"),
        ({"a": jnp.ones((2, 3)), "c": 1}, r"missing \['b'\]; unexpected \['c'\]"),
        (
            {"a": jnp.ones((3, 2)), "b": 1.0},
            r"like: the leaf 'a' has shape \(3, 2\), but \(2, 3\) was saved",
        ),
        (
            {"a": jnp.ones((2, 3), jnp.bfloat16), "b": 1.0},
            r"like: the leaf 'a' has dtype bfloat16, but float32 was saved",
        ),
        ({"a": jnp.ones((2, 3)), "b": 1}, r"'b' has dtype python int, but python fl"),
        ({"a": "text", "b": 1.0}, r"like: the leaf 'a' is str"),
    ],
)
def test_another_tree_is_refused_by_the_path_of_its_leaf(path, like, message):
    jprune.save(path, {"a": jnp.ones((2, 3)), "b": 1.0})
    with pytest.raises((ValueError, TypeError), match=message):
        jprune.load(path, like)


def test_wide_arrays_are_not_narrowed(path):
    wide = {"w": np.full(2, 0.1)}
    jprune.save(path, wide)
    with pytest.raises(ValueError, match=r"'w' is float64.*jax_enable_x64"):
        jprune.load(path, {"w": jax.ShapeDtypeStruct((2,), np.float64)})
    assert_identical(jprune.load(path, wide)[0], wide)


@pytest.mark.parametrize(
    ("params", "masks", "message"),
    [
        ({"a": np.ones(3)}, {"b": np.ones(3, bool)}, r"missing \['a'\]"),
        ({"a": np.ones(3)}, {"a": np.ones(2, bool)}, r"'a' has shape \(2,\)"),
        ({"a": np.ones(3)}, {"a": np.ones(3)}, r"'a' has dtype float"),
        (
            {"a": jax.random.split(jax.random.key(0), 3)},
            {"a": np.ones(3, bool)},
            "'a' is a PRNG key",
        ),
        ({"a": "text"}, None, r"params: the leaf 'a' is str"),
        ({"a": np.array(["text"])}, None, r"params: the leaf 'a' is array of <U4"),
        ({"a": 2**70}, None, r"params: the leaf 'a' is 1180591620717411303424"),
        ({"a/b": 1, "a": {"b": 2}}, None, r"params: two leaves have the path 'a/b'"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_leaves_no_file(
    path, params, masks, message
):
    with pytest.raises((ValueError, TypeError), match=message):
        jprune.save(path, params, masks=masks)
    assert os.listdir(path.parent) == []


def test_what_does_not_belong_to_the_shrunk_function_is_refused(path, net):
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    keep = np.arange(4) > 0
    small_fn, small = shrink_mlp(mlp, params, keep)
    with pytest.raises(ValueError, match=r"'a' is \(3, 4\); .* takes \(3, 3\)"):
        jprune.save(path, params, shrunk=small_fn)
    with pytest.raises(ValueError, match=r"'b' is missing"):
        jprune.save(path, {"a": small["a"]}, shrunk=small_fn)
    with pytest.raises(ValueError, match=r"no leaves \['c'\]"):
        jprune.save(path, small | {"c": jnp.ones(1)}, shrunk=small_fn)
    with pytest.raises(ValueError, match=r"masks or shrunk"):
        jprune.save(path, small, shrunk=small_fn, masks=small)
    masks = {"a": keep[None, :], "b": keep[:, None]}
    chosen_fn, _ = jprune.shrink(
        mlp, params, masks, jnp.ones((1, 3)), mutable=lambda *_: False
    )
    with pytest.raises(ValueError, match=r"mutable is a function"):
        jprune.save(path, small, shrunk=chosen_fn)
    jprune.save(path, params, masks=masks)
    with pytest.raises(ValueError, match=r"read it with jprune\.load"):
        jprune.load_shrunk(path, params, mlp)
    jprune.save(path, small, shrunk=small_fn)
    for read in (jprune.load, lambda *args: jprune.load_shrunk(*args, mlp)):
        with pytest.raises(ValueError, match=r"'a' has shape \(3, 3\), but \(3, 4\)"):
            read(path, small)
