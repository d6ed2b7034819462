"""Pruned networks as files: masks at one bit an entry and the living values alone.

A file is in the format safetensors, which holds arrays and text and no code, so that
reading one runs nothing. It holds one of two things:

* parameters and masks: for each pruned leaf its mask, packed to bits, and the values
  that live; all other leaves whole;
* a shrunk network: the small parameters, and for each leaf and axis the positions that
  were kept of the full ones.

Arrays come back bit for bit, whatever their dtype. The tensors of a file are named
``values/<path of the leaf>`` and ``masks/<path of the leaf>``; its metadata hold the
version of the format and of the library, and a manifest as JSON.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jprune import _files, trees
from jprune import masks as masks_lib
from jprune._files import Path
from jprune.tracing import Shrunk
from jprune.types import ApplyFn, Masks, Params

_PYTHON = {f"python {kind.__name__}": kind for kind in (bool, int, float, complex)}

_ALL = np.ones((), bool)  # The mask of a leaf that is never pruned.

_Entry = dict[str, Any]  # What the manifest says of a leaf.


def save(
    path: Path,
    params: Params,
    *,
    masks: Masks | None = None,
    shrunk: Shrunk | None = None,
) -> None:
    """Writes a pruned network to a file.

    The file appears under its name when it is complete, so an interrupted call leaves
    an older file of that name as it was.

    A leaf of n values under a mask of m entries takes ``ceil(m / 8)`` bytes and its
    living values; that is less than the dense array's from a density of
    ``1 - 1 / bits of a value`` down.

    Args:
        path: the file; its directory must exist.
        params: any pytree of arrays, PRNG keys and Python numbers; with ``shrunk``, the
            small parameters.
        masks: masks that fit ``params``. What they remove is not stored and comes back
            as zero, also where ``params`` has other values there. Without them,
            all is stored.
        shrunk: the small function that :func:`jprune.shrink` returned, also of one
            that had been shrunk before.

    Raises:
        ValueError: the masks or the small parameters do not fit, a PRNG key is masked,
            two leaves have the same path, or both ``masks`` and ``shrunk`` are given.
        TypeError: a leaf is not an array or a number.
        OSError: the file cannot be written.

    Example:
        >>> import os, tempfile
        >>> params = {"fc": jnp.arange(64.0).reshape(8, 8), "bias": jnp.ones(8)}
        >>> masks = {"fc": params["fc"] > 57, "bias": masks_lib.never_pruned()}
        >>> path = os.path.join(tempfile.mkdtemp(), "net.safetensors")
        >>> save(path, params, masks=masks)
        >>> params, masks = load(path, trees.shapes_of(params))
        >>> params["fc"][-1]
        Array([ 0.,  0., 58., 59., 60., 61., 62., 63.], dtype=float32)
    """
    if masks is not None and shrunk is not None:
        raise ValueError(
            "masks: a shrunk network is stored without masks; give masks or shrunk"
        )
    if shrunk is not None:
        _check_small(params, shrunk, "params")
    if masks is not None:
        masks_lib.check(masks, params)
    leaves = _by_path(params, "params")
    kept = {} if masks is None else _by_path(masks, "masks")
    tensors: _files.Tensors = {}
    entries = {}
    for name, leaf in leaves.items():
        entries[name] = entry = _describe(leaf, "params")
        values = _as_numpy(leaf, entry)
        mask = np.asarray(kept[name].value) if name in kept else _ALL
        if mask.ndim:
            if "impl" in entry:
                raise ValueError(f"masks: {name!r} is a PRNG key, which has no mask")
            entry["mask"] = list(mask.shape)
            tensors[f"masks/{name}"] = np.packbits(mask)
            values = values[np.broadcast_to(mask, values.shape)]
        if values.dtype.name not in _files.DTYPES:
            entry["bytes"] = values.dtype.name
            values = values.ravel().view(np.uint8)
        tensors[f"values/{name}"] = np.asarray(values, order="C")
    levels = [] if shrunk is None else [_describe_level(one) for one in _chain(shrunk)]
    _files.write(path, tensors, {"leaves": entries, "levels": levels})


def load(path: Path, like: PyTree) -> tuple[Params, Masks]:
    """Returns the parameters and masks that :func:`save` wrote.

    A shrunk network comes back at full size too: zeros where it was cut, and masks of
    what the masks removed that it was shrunk by. (What was cut with the channels
    without a mask of its own, as statistics are, is zero and unmasked.)

    Args:
        path: the file.
        like: the parameters, or their shapes as ``jax.eval_shape`` gives them; of a
            shrunk network the full ones. Where it holds arrays of NumPy, NumPy's are
            returned, and else arrays of JAX on the default device.

    Returns:
        The parameters, zero outside the masks, and the masks. A leaf that was saved
        without a mask has one of shape ``()``: never pruned.

    Raises:
        ValueError: not a file of :func:`save`, of another version of the format,
            truncated or damaged; ``like`` has other leaves, shapes or dtypes, and
            the message names them; or 64-bit types are not enabled.
        OSError: the file cannot be read.
    """
    manifest, tensors = _files.read(path)
    levels = manifest["levels"]
    owners = _matched(like, levels[0]["leaves"] if levels else manifest["leaves"])
    found: dict[int, Any] = {}
    masks: dict[int, Any] = {}
    for name, owner in owners.items():
        entry = manifest["leaves"][name]
        values, mask = _stored(path, name, entry, tensors)
        if levels:
            values, mask = _expanded(name, values, levels)
        found[owner.place] = _as_leaf(values, entry, owner)
        masks[owner.place] = (
            masks_lib.never_pruned() if mask.ndim == 0 else jnp.asarray(mask)
        )
    return (
        trees.replace_leaves(like, found, None),
        trees.replace_leaves(like, masks, None),
    )


def load_shrunk(path: Path, like: PyTree, apply_fn: ApplyFn) -> tuple[Shrunk, Params]:
    """Returns the shrunk network that :func:`save` wrote.

    A file holds no code, so the function that was shrunk is given again; it is traced
    at the first call of what is returned.

    Args:
        path: the file.
        like: the full parameters of ``apply_fn``, or their shapes as ``jax.eval_shape``
            gives them. Where it holds arrays of NumPy, NumPy's are returned.
        apply_fn: the function that was shrunk; of a network that was shrunk more than
            once the first one.

    Returns:
        The small function and its parameters, as :func:`jprune.shrink` returned them.

    Raises:
        ValueError: as :func:`load`, or the file holds no shrunk network.
        OSError: the file cannot be read.

    Example:
        >>> import os, tempfile
        >>> from jprune.tracing import shrink
        >>> def apply_fn(params, x):
        ...     return jnp.tanh(x @ params["a"]) @ params["b"]
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> keep = jnp.arange(4) > 0
        >>> masks = {"a": keep[None, :], "b": keep[:, None]}
        >>> small_apply_fn, small = shrink(apply_fn, params, masks, jnp.ones((1, 3)))
        >>> path = os.path.join(tempfile.mkdtemp(), "small.safetensors")
        >>> save(path, small, shrunk=small_apply_fn)
        >>> small_apply_fn, small = load_shrunk(path, params, apply_fn)
        >>> jax.tree.map(jnp.shape, small)
        {'a': (3, 3), 'b': (3, 2)}
    """
    manifest, tensors = _files.read(path)
    if not manifest["levels"]:
        raise ValueError(
            f"path: {os.fspath(path)!r} holds parameters and masks, not a shrunk "
            "network; read it with jprune.load"
        )
    owners = _matched(like, manifest["levels"][0]["leaves"])
    first, *others = manifest["levels"]
    small = _shrunk(apply_fn, like, owners, first)
    for level in others:
        small = _shrunk(small, like, owners, level)
    found: dict[int, Any] = {}
    for name, owner in owners.items():
        entry = manifest["leaves"][name]
        values, _ = _stored(path, name, entry, tensors)
        found[owner.place] = _as_leaf(values, entry, owner)
    params = trees.replace_leaves(like, found, None)
    _check_small(params, small, "path")
    return small, params


def _by_path(tree: PyTree, name: str) -> dict[str, trees.Leaf]:
    found: dict[str, trees.Leaf] = {}
    for leaf in trees.leaves_of(tree):
        if leaf.path in found:
            raise ValueError(f"{name}: two leaves have the path {leaf.path!r}")
        found[leaf.path] = leaf
    return found


def _describe(leaf: trees.Leaf, name: str) -> _Entry:
    """Returns what the manifest says of a leaf: its dtype and shape."""
    value = leaf.value
    if type(value) in _PYTHON.values():
        return {"dtype": f"python {type(value).__name__}", "shape": []}
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        found = {"dtype": dtype.name, "shape": list(leaf.shape)}
        if not isinstance(value, jax.ShapeDtypeStruct):
            found["impl"] = str(jax.random.key_impl(value))
        return found
    numbers = (np.number, np.bool_)
    if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in numbers):
        kind = type(value).__name__ if dtype is None else f"array of {dtype}"
        raise TypeError(
            f"{name}: the leaf {leaf.path!r} is {kind}; arrays of numbers or bools, "
            "PRNG keys and Python numbers can be stored"
        )
    return {"dtype": np.dtype(dtype).name, "shape": list(leaf.shape)}


def _as_numpy(leaf: trees.Leaf, entry: _Entry) -> np.ndarray:
    if "impl" in entry:
        return np.asarray(jax.random.key_data(leaf.value))
    values = np.asarray(leaf.value)
    if values.dtype == object:
        raise TypeError(
            f"params: the leaf {leaf.path!r} is {leaf.value}, more than 64 bits"
        )
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _as_leaf(values: np.ndarray, entry: _Entry, like: trees.Leaf) -> Any:
    """Returns a leaf as it was saved, in the kind of array that ``like`` is."""
    if entry["dtype"] in _PYTHON:
        return _PYTHON[entry["dtype"]](values.item())
    if "impl" in entry:
        return jax.random.wrap_key_data(jnp.asarray(values), impl=entry["impl"])
    if isinstance(like.value, np.ndarray | np.generic):
        return values
    array = jnp.asarray(values)
    if array.dtype != values.dtype:
        raise ValueError(
            f"path: the leaf {like.path!r} is {values.dtype}, for which JAX needs "
            "jax_enable_x64; or give arrays of NumPy as like"
        )
    return array


def _dtype(name: str) -> np.dtype:
    """Returns the dtype of a name; NumPy reads some of JAX's names otherwise."""
    return np.dtype(getattr(jnp, name).dtype)


def _stored(
    path: Path, name: str, entry: _Entry, tensors: _files.Tensors
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of a leaf, zero where it is masked, and its mask."""
    values = tensors[f"values/{name}"]
    if "bytes" in entry:
        values = values.view(_dtype(entry["bytes"]))
    if "mask" not in entry:
        return values if "impl" in entry else values.reshape(entry["shape"]), _ALL
    bits = np.unpackbits(tensors[f"masks/{name}"], count=math.prod(entry["mask"]))
    mask = bits.astype(bool).reshape(entry["mask"])
    living = np.broadcast_to(mask, entry["shape"])
    if values.size != living.sum():
        raise ValueError(
            f"path: {os.fspath(path)!r} is damaged: it holds {values.size} values of "
            f"{name!r}, whose mask keeps {living.sum()}"
        )
    full = np.zeros(entry["shape"], values.dtype)
    full[living] = values
    return full, mask


def _matched(like: PyTree, expected: Mapping[str, _Entry]) -> dict[str, trees.Leaf]:
    """Returns the leaves of ``like`` by path; raises unless they are the saved ones."""
    found = _by_path(like, "like")
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing or extra:
        listed = [
            f"{label} {names[:5]}"
            for label, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
        raise ValueError(f"like: the tree is not the saved one: {'; '.join(listed)}")
    for name, leaf in found.items():
        own, saved = _describe(leaf, "like"), expected[name]
        for what in ("shape", "dtype"):
            if own[what] != saved[what]:
                shown = [
                    tuple(x[what]) if what == "shape" else x[what] for x in (own, saved)
                ]
                raise ValueError(
                    f"like: the leaf {name!r} has {what} {shown[0]}, but {shown[1]} "
                    "was saved"
                )
    return found


def _chain(shrunk: Shrunk) -> list[Shrunk]:
    """Returns the networks that were shrunk one from another, the largest first."""
    found = [shrunk]
    while isinstance(found[0].apply_fn, Shrunk):
        found.insert(0, found[0].apply_fn)
    return found


def _check_small(params: Params, shrunk: Shrunk, name: str) -> None:
    found = _by_path(params, name)
    expected = _by_path(shrunk.take(shrunk.tree), "shrunk")
    for path, leaf in expected.items():
        if path not in found or found[path].shape != leaf.shape:
            own = found[path].shape if path in found else "missing"
            raise ValueError(
                f"{name}: the leaf {path!r} is {own}; the shrunk function takes "
                f"{leaf.shape}"
            )
    if extra := [path for path in found if path not in expected]:
        raise ValueError(f"{name}: the shrunk function has no leaves {extra[:5]}")


def _describe_level(shrunk: Shrunk) -> dict[str, Any]:
    """Returns what the manifest says of a network that was shrunk."""
    if callable(shrunk.mutable):
        raise ValueError(
            "shrunk: mutable is a function, which a file cannot hold; shrink with a "
            "path pattern, or several"
        )
    leaves = _by_path(shrunk.tree, "shrunk")
    entries = {}
    for name, leaf in leaves.items():
        entries[name] = entry = _describe(leaf, "shrunk")
        keep = [
            None if at is None else np.isin(np.arange(n), at)
            for n, at in zip(leaf.shape, shrunk.kept[name], strict=True)
        ]
        if any(side is not None for side in keep):
            entry["kept"] = [None if side is None else _hex(side) for side in keep]
        if leaf.place in shrunk.removed:
            entry["removed"] = [_hex(side) for side in shrunk.removed[leaf.place]]
    mutable = shrunk.mutable
    patterns = mutable if mutable is None or isinstance(mutable, str) else list(mutable)
    return {"leaves": entries, "mutable": patterns, "unknown": shrunk.unknown}


def _shrunk(
    apply_fn: ApplyFn,
    like: PyTree,
    owners: Mapping[str, trees.Leaf],
    level: Mapping[str, Any],
) -> Shrunk:
    kept, removed, shapes = {}, {}, {}
    for name, entry in level["leaves"].items():
        shape, owner = entry["shape"], owners[name]
        kept[name] = tuple(_positions(entry, shape))
        if "removed" in entry:
            removed[owner.place] = _sides(entry["removed"], shape)
        if hasattr(owner.value, "dtype"):
            dtype = (
                owner.value.dtype if "<" in entry["dtype"] else _dtype(entry["dtype"])
            )
            shapes[owner.place] = jax.ShapeDtypeStruct(tuple(shape), dtype)
    tree = trees.replace_leaves(like, shapes, lambda leaf: leaf)
    return Shrunk(apply_fn, tree, kept, removed, level["mutable"], level["unknown"])


def _expanded(
    name: str, values: np.ndarray, levels: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the full values of a leaf that was cut, and the mask that it had."""
    full = levels[0]["leaves"][name]["shape"]
    places = [np.arange(n) for n in full]
    living = [np.ones(n, bool) for n in full]
    masked = False
    for level in levels:
        entry = level["leaves"][name]
        if "removed" in entry:
            masked = True
            sides = _sides(entry["removed"], entry["shape"])
            for keep, at, side in zip(living, places, sides, strict=True):
                keep[at[side]] = False
        own = _positions(entry, entry["shape"])
        places = [at if p is None else at[p] for at, p in zip(places, own, strict=True)]
    if any(len(at) < n for at, n in zip(places, full, strict=True)):
        small, values = values, np.zeros(full, values.dtype)
        values[np.ix_(*places)] = small
    if not masked:
        return values, _ALL
    mask = np.ones((1,) * len(full), bool)
    for axis, keep in enumerate(living):
        if not keep.all():
            others = [a for a in range(len(full)) if a != axis]
            mask = mask & np.expand_dims(keep, others)
    return np.where(mask, values, np.zeros((), values.dtype)), mask


def _positions(entry: _Entry, shape: Sequence[int]) -> list[np.ndarray | None]:
    """Returns the positions along each axis that are kept, None for all."""
    bits = entry.get("kept", [None] * len(shape))
    return [
        None if text is None else np.flatnonzero(_bools(text, n))
        for text, n in zip(bits, shape, strict=True)
    ]


def _sides(texts: Sequence[str], shape: Sequence[int]) -> list[np.ndarray]:
    return [_bools(text, n) for text, n in zip(texts, shape, strict=True)]


def _hex(bools: np.ndarray) -> str:
    return np.packbits(bools).tobytes().hex()


def _bools(text: str, count: int) -> np.ndarray:
    packed = np.array(list(bytes.fromhex(text)), np.uint8)
    return np.unpackbits(packed, count=count).astype(bool)
