"""Names of leaves, and which of them are prunable.

A leaf is known by its *path*, the keys that lead to it joined by ``/``:
``"conv1/kernel"`` in a Flax or Haiku dict, ``"layers/0/weight"`` in an Equinox module,
``"0/1"`` in nested lists. The box that NNX variables and ``flax.linen.Partitioned``
put around an array (a last key ``value``) is not part of the path.

A *pattern* is a shell pattern (``*``, ``?``, ``[...]``) for a whole path or for its
first components: ``"conv*/kernel"`` and ``"conv*"`` both match ``"conv1/kernel"``.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jprune.types import Prunable

T = TypeVar("T")

_KERNEL_NAMES = ("kernel", "weight", "w")
_NORM_OR_EMBEDDING = re.compile(r"norm|embed|^(bn|ln|gn)_?\d*$|^wte$|^wpe$", re.I)


class Leaf(NamedTuple):
    """A leaf of a pytree with its place in flattening order and its path."""

    place: int
    path: str
    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        return tuple(np.shape(self.value))

    @property
    def size(self) -> int:
        """The number of entries of the leaf."""
        return int(np.prod(self.shape, dtype=np.int64))


def path_of(keys: Sequence[Any]) -> str:
    """Returns the path that a sequence of pytree keys spells.

    Example:
        >>> path_of((jax.tree_util.DictKey("fc1"), jax.tree_util.DictKey("kernel")))
        'fc1/kernel'
    """
    names = [_name(key) for key in keys]
    boxed = len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey)
    if boxed and names[-1] == "value":
        names.pop()
    return "/".join(names)


def leaves_of(tree: PyTree) -> list[Leaf]:
    """Returns the leaves of ``tree`` with their paths, in flattening order.

    Example:
        >>> [leaf.path for leaf in leaves_of({"fc": [jnp.ones(2), jnp.ones(3)]})]
        ['fc/0', 'fc/1']
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [Leaf(i, path_of(keys), value) for i, (keys, value) in enumerate(flat)]


def replace_leaves(tree: PyTree, values: Mapping[int, T], default: Any) -> PyTree:
    """Returns ``tree`` with the leaves at the given indices replaced.

    All other leaves become ``default``, or ``default(leaf)`` if it is a function.
    """
    flat, treedef = jax.tree.flatten(tree)
    rest = default if callable(default) else lambda _: default
    new = [values[i] if i in values else rest(leaf) for i, leaf in enumerate(flat)]
    return jax.tree.unflatten(treedef, new)


def shapes_of(tree: PyTree) -> PyTree:
    """Returns the tree with ``ShapeDtypeStruct`` in the place of its arrays.

    Example:
        >>> shapes_of({"kernel": jnp.ones((3, 2))})
        {'kernel': ShapeDtypeStruct(shape=(3, 2), dtype=float32)}
    """

    def struct(leaf: Any) -> Any:
        dtype = getattr(leaf, "dtype", None)
        return leaf if dtype is None else jax.ShapeDtypeStruct(np.shape(leaf), dtype)

    return jax.tree.map(struct, tree)


def is_inexact(leaf: Any) -> bool:
    """Whether ``leaf`` is a floating or complex array (so not a PRNG key).

    Example:
        >>> is_inexact(jnp.ones(2)), is_inexact(jax.random.key(0)), is_inexact(1)
        (True, False, False)
    """
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def matches(pattern: str, path: str) -> bool:
    """Whether ``pattern`` matches ``path`` or its first components.

    Example:
        >>> matches("conv*", "conv1/kernel"), matches("kernel", "conv1/kernel")
        (True, False)
    """
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(
        path, pattern + "/*"
    )


def check_patterns(patterns: Iterable[str], leaves: Sequence[Leaf], name: str) -> None:
    """Raises if one of ``patterns`` matches no leaf.

    Args:
        patterns: the patterns.
        leaves: the leaves that they are meant for.
        name: the argument that holds the patterns, for the message.

    Raises:
        ValueError: a pattern matches nothing; the message names it and the paths.
    """
    for pattern in patterns:
        if not any(matches(pattern, leaf.path) for leaf in leaves):
            raise ValueError(
                f"{name}: the pattern {pattern!r} matches none of the leaves "
                f"{_listed(leaves)}"
            )


def lookup(
    table: Mapping[str, T], leaves: Sequence[Leaf], default: T, name: str
) -> list[T]:
    """Returns, for each leaf, the value of the first pattern that matches its path.

    Raises:
        ValueError: a pattern matches nothing.

    Example:
        >>> leaves = leaves_of({"conv": 1, "fc": 2})
        >>> lookup({"conv*": 0.5, "*": 0.9}, leaves, 0.0, "sparsity")
        [0.5, 0.9]
    """
    check_patterns(table, leaves, name)
    return [
        next((v for p, v in table.items() if matches(p, leaf.path)), default)
        for leaf in leaves
    ]


def selector(
    given: Prunable,
    leaves: Sequence[Leaf],
    name: str,
    default: Callable[[Leaf], bool],
) -> Callable[[Leaf], bool]:
    """Returns the predicate on leaves that patterns, a predicate or None mean.

    Args:
        given: a path pattern, several, a predicate ``(path, value) -> bool``, or None.
        leaves: the leaves that patterns are meant for.
        name: the argument that holds them, for the message.
        default: the predicate that None means.

    Raises:
        ValueError: a pattern matches none of the leaves.

    Example:
        >>> leaves = leaves_of({"conv": 1, "fc": 2})
        >>> chosen = selector("fc", leaves, "prunable", lambda leaf: True)
        >>> [chosen(leaf) for leaf in leaves]
        [False, True]
    """
    if given is None:
        return default
    if callable(given):
        return lambda leaf: bool(given(leaf.path, leaf.value))
    patterns = (given,) if isinstance(given, str) else tuple(given)
    check_patterns(patterns, leaves, name)
    return lambda leaf: any(matches(p, leaf.path) for p in patterns)


class Owners:
    """Finds the parameter that a leaf of an optimiser's state belongs to.

    It is the one whose path the leaf's path ends in.

    Args:
        params: the parameters.
        optional: the beginning of their paths that may be missing there.

    Example:
        >>> owner_of = Owners({"fc": jnp.ones((3, 2))})
        >>> keys = (jax.tree_util.GetAttrKey("mu"), jax.tree_util.DictKey("fc"))
        >>> owner_of(keys, (3, 2)).path, owner_of(keys, (2,)), owner_of(keys[:1])
        ('fc', None, None)
    """

    def __init__(self, params: PyTree, *, optional: str = ""):
        leaves = leaves_of(params)
        self.leaves = {leaf.path.removeprefix(optional): leaf for leaf in leaves}
        self.leaves |= {leaf.path: leaf for leaf in leaves}

    def __call__(
        self, keys: Sequence[Any], shape: tuple[int, ...] | None = None
    ) -> Leaf | None:
        """Returns the parameter, of a given shape if there is one; None for none."""
        names = path_of(keys).split("/")
        for start in range(len(names) + 1):
            leaf = self.leaves.get("/".join(names[start:]))
            if leaf is not None and (shape is None or leaf.shape == shape):
                return leaf
        return None


def prunable_leaves(tree: PyTree, prunable: Prunable = None) -> list[Leaf]:
    """Returns the leaves of ``tree`` that are prunable.

    By default these are the leaves named ``kernel``, ``weight`` or ``w`` (in lists,
    where a leaf has no name, any leaf) of rank 2 or more that do not stand under a
    normalisation or an embedding.

    Args:
        tree: parameters, or scores with their structure.
        prunable: a path pattern, several of them, or a predicate
            ``(path, leaf) -> bool`` to use in place of the default rule. Leaves that
            are not floating arrays and leaves of rank 0 are never prunable.

    Raises:
        ValueError: no leaf is prunable, or a pattern matches nothing.

    Example:
        >>> params = {"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
        >>> [leaf.path for leaf in prunable_leaves(params)]
        ['fc/kernel']
        >>> [leaf.path for leaf in prunable_leaves(params, prunable="fc")]
        ['fc/bias', 'fc/kernel']
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [Leaf(i, path_of(keys), value) for i, (keys, value) in enumerate(flat)]
    eligible = [x for x in leaves if is_inexact(x.value) and len(x.shape) > 0]
    accept = selector(
        prunable, eligible, "prunable", lambda x: _is_kernel(flat[x.place][0], x)
    )
    chosen = [x for x in eligible if accept(x)]
    if not chosen:
        rule = "the default rule" if prunable is None else f"{prunable!r}"
        raise ValueError(
            f"prunable: {rule} accepts none of the leaves {_listed(leaves)}; give a "
            "path pattern or a predicate (path, leaf) -> bool"
        )
    return chosen


def _is_kernel(keys: Sequence[Any], leaf: Leaf) -> bool:
    names = leaf.path.split("/")
    last = keys[len(keys) - 2] if _name(keys[-1]) == "value" and keys[1:] else keys[-1]
    unnamed = isinstance(last, jax.tree_util.SequenceKey) or _name(last).isdigit()
    named = unnamed or names[-1] in _KERNEL_NAMES
    under = any(_NORM_OR_EMBEDDING.search(name) for name in names)
    return named and len(leaf.shape) >= 2 and not under


def _name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _listed(leaves: Sequence[Leaf], most: int = 12) -> str:
    shown = ", ".join(repr(leaf.path) for leaf in leaves[:most])
    return f"[{shown}{', ...' if len(leaves) > most else ''}]"
