"""What is removed at once: weights, kernels, filters, rows, blocks, whole layers.

A builder divides every prunable leaf into *units* along a grid: each axis is left as it
is, cut into blocks, or taken as a whole. The scores of a unit's entries are pooled into
one, and a decision about units is expanded to masks that broadcast to the leaves::

    units = filters(params)
    pooled = pool(units, scores)                     # one array a leaf
    masks = expand(units, params, [x > 0 for x in pooled])

Which axis is which comes from the layout (:mod:`jprune.layouts`), so that the builders
work for HWIO, OIHW and scanned kernels alike. The axis of a stack of layers is never
pooled. An axis of attention heads belongs to the side that it splits: to the outputs of
``INO`` (query, key, value), to the inputs of ``NIO`` (out).

======================  ===============================  ==========================
builder                 a unit of an HWIO kernel         axes taken as a whole
======================  ===============================  ==========================
:func:`weights`         ``W[a, b, i, o]``                none
:func:`kernels`         ``W[:, :, i, o]``                spatial
:func:`filters`         ``W[:, :, :, o]``                spatial, input
:func:`input_channels`  ``W[:, :, i, :]``                spatial, output
:func:`stripes`         ``W[a, b, :, o]``                input
:func:`shape_columns`   ``W[a, b, i, :]``                output
:func:`rows`            ``W[a, :, i, o]``                W (output if there is none)
:func:`layers`          ``W[:, :, :, :]``                all
:func:`blocks`          any tile                         as asked
:func:`n_m`             n of m consecutive weights       none
======================  ===============================  ==========================

Ways to pool, over the true entries of a unit: ``"sum"``, ``"mean"``, ``"max"``,
``"l1"`` (the sum of absolute values) and ``"l2"`` (the root of the sum of squares). The
default is the sum, because a score already says *larger = keep*: the sum of ``|w|`` is
the l1 norm of the weights, while absolute values would turn a negative score around.
Units of unequal sizes, as ragged blocks and layers are, default to the mean.

Coupled channels, whose units span several leaves, come from :func:`jprune.couplings`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, PyTree

from jprune import _per_channel, _tiles, layouts, trees
from jprune import masks as masks_lib
from jprune._groups import Group, Member, Pinned, Units
from jprune.types import Layouts, Masks, Params, Prunable, Scores

__all__ = [
    "Group",
    "Member",
    "Pinned",
    "Units",
    "blocks",
    "expand",
    "filters",
    "input_channels",
    "kernels",
    "layers",
    "living",
    "n_m",
    "pool",
    "pool_leaves",
    "rows",
    "shape_columns",
    "stripes",
    "weights",
]


def pool(units: Units, scores: Scores) -> list[Array]:
    """Returns the scores of all units, one array for each group.

    Scores may also be those of channels, one a channel in place of one an entry: arrays
    with size 1 on every axis of the leaf but those that are channels, such as ``(1, 1,
    1, out)``, and scalars for leaves without any. Filters then have these scores, and
    coupled units pool those of their channels.

    Half-precision scores are pooled in float32. NaN among its entries makes a unit NaN.

    Args:
        units: the units of a tree.
        scores: scores with the structure of that tree.

    Returns:
        Arrays of the groups' shapes.

    Raises:
        ValueError: the scores do not fit the tree; the message names the leaf. Units
            are not the channels that have scores.

    Example:
        >>> scores = {"kernel": jnp.array([[1.0, 2.0], [3.0, 5.0]])}
        >>> pool(filters(scores), scores)
        [Array([[4., 7.]], dtype=float32)]
    """
    found = {leaf.place: leaf for leaf in trees.leaves_of(scores)}
    for expected in units.leaves:
        leaf = found.get(expected.place)
        fits = leaf is not None and _per_channel.fits(leaf.shape, expected.shape)
        if leaf is None or leaf.path != expected.path or not fits:
            raise ValueError(
                f"scores: {leaf and (leaf.path, leaf.shape)} stands where the leaf "
                f"{expected.path!r} of shape {expected.shape} is expected"
            )
    if all(found[leaf.place].shape == leaf.shape for leaf in units.leaves):
        return pool_leaves(units, [found[leaf.place].value for leaf in units.leaves])
    return [
        _per_channel.pool(
            group,
            [jnp.asarray(found[leaf.place].value) for leaf in group.leaves],
            units.how,
        )
        for group in units.groups
    ]


def pool_leaves(units: Units, values: Sequence[ArrayLike]) -> list[Array]:
    """Returns the scores of all units from those of ``units.leaves``, one each.

    Example:
        >>> kernel = jnp.array([[1.0, 2.0], [3.0, 5.0]])
        >>> pool_leaves(filters([kernel]), [kernel])
        [Array([[4., 7.]], dtype=float32)]
    """
    places = [leaf.place for leaf in units.leaves]
    found = dict(zip(places, map(jnp.asarray, values), strict=True))
    return [
        group.pool([found[leaf.place] for leaf in group.leaves], units.how)
        for group in units.groups
    ]


def expand(units: Units, tree: PyTree, keeps: Sequence[Bool[Array, "..."]]) -> Masks:
    """Returns the masks that a decision about units means.

    Args:
        units: the units of a tree.
        tree: that tree, or another of its structure.
        keeps: for each group a bool array of its shape.

    Returns:
        Masks with the structure of ``tree``; leaves without units are never pruned.

    Raises:
        ValueError: there are more or fewer decisions than groups, or one has another
            shape than its group.

    Example:
        >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
        >>> expand(filters(params), params, [jnp.array([[True, False]])])
        {'bias': Array(True, dtype=bool), 'kernel': Array([[ True, False]], dtype=bool)}
    """
    if len(keeps) != len(units.groups):
        raise ValueError(
            f"keeps: {len(keeps)} decisions for {len(units.groups)} groups of units"
        )
    found: dict[int, Array] = {}
    for group, keep in zip(units.groups, keeps, strict=True):
        if keep.shape != group.shape:
            raise ValueError(
                f"keeps: the units of {group.leaf.path!r} have shape {group.shape}, "
                f"the decision {keep.shape}"
            )
        for leaf, mask in zip(group.leaves, group.expand(keep), strict=True):
            # Two groups meet at the two sides of a kernel.
            other = found.get(leaf.place)
            found[leaf.place] = mask if other is None else mask & other
    return trees.replace_leaves(tree, found, masks_lib.never_pruned())


def living(units: Units, tree: PyTree, masks: Masks) -> list[Bool[Array, "..."]]:
    """Returns which units have an entry that lives in the masks.

    Args:
        units: the units of a tree.
        tree: that tree, or another of its structure.
        masks: masks that fit it.

    Returns:
        Arrays of the groups' shapes.

    Raises:
        ValueError: the masks do not fit.

    Example:
        >>> params = {"kernel": jnp.ones((2, 2))}
        >>> masks = {"kernel": jnp.array([[True, False], [True, False]])}
        >>> living(filters(params), params, masks)
        [Array([[ True, False]], dtype=bool)]
    """
    masks_lib.check(masks, tree)
    found = jax.tree.leaves(masks)
    spread = [
        jnp.broadcast_to(found[leaf.place], leaf.shape).astype(jnp.float32)
        for leaf in units.leaves
    ]
    return [alive > 0 for alive in pool_leaves(units._replace(how="max"), spread)]


def weights(
    params: Params, *, prunable: Prunable = None, layout: Layouts = None
) -> Units:
    """Returns every weight as a unit of its own; pooling and expanding cost nothing.

    Args:
        params: any pytree of arrays, or of their shapes.
        prunable: which leaves have units, see :func:`jprune.trees.prunable_leaves`.
        layout: see :func:`jprune.layouts.layouts_of`; only a stack axis matters here.

    Example:
        >>> (group,) = weights({"kernel": jnp.ones((3, 2))}).groups
        >>> group.shape
        (3, 2)
    """
    return _grid(params, lambda own: "", "sum", prunable, layout)


def kernels(
    params: Params,
    *,
    prunable: Prunable = None,
    layout: Layouts = None,
    how: str = "sum",
) -> Units:
    """Returns the spatial kernels ``W[:, :, i, o]`` (in a dense layer, the weights).

    Args:
        params: any pytree of arrays, or of their shapes.
        prunable: which leaves have units, see :func:`jprune.trees.prunable_leaves`.
        layout: see :func:`jprune.layouts.layouts_of`.
        how: ``"sum"``, ``"mean"``, ``"max"``, ``"l1"`` or ``"l2"``.

    Raises:
        ValueError: no leaf is prunable, a layout does not fit, or ``how`` is unknown.

    Example:
        >>> kernels({"kernel": jnp.ones((3, 3, 4, 8))}).groups[0].shape
        (1, 1, 4, 8)
    """
    return _grid(params, lambda own: "HWD", how, prunable, layout)


def filters(
    params: Params,
    *,
    prunable: Prunable = None,
    layout: Layouts = None,
    how: str = "sum",
) -> Units:
    """Returns the filters ``W[..., o]``: all that feeds one output channel.

    Takes the arguments of :func:`kernels`.

    Example:
        >>> filters({"kernel": jnp.ones((3, 3, 4, 8))}).groups[0].shape
        (1, 1, 1, 8)
    """
    return _grid(params, lambda own: "HWD" + _inputs(own), how, prunable, layout)


def input_channels(
    params: Params,
    *,
    prunable: Prunable = None,
    layout: Layouts = None,
    how: str = "sum",
) -> Units:
    """Returns the input channels ``W[:, :, i, :]``: all that reads one channel.

    Takes the arguments of :func:`kernels`.

    Example:
        >>> input_channels({"kernel": jnp.ones((3, 3, 4, 8))}).groups[0].shape
        (1, 1, 4, 1)
    """
    return _grid(params, lambda own: "HWD" + _outputs(own), how, prunable, layout)


def stripes(
    params: Params,
    *,
    prunable: Prunable = None,
    layout: Layouts = None,
    how: str = "sum",
) -> Units:
    """Returns the stripes ``W[a, b, :, o]``: one position of one filter.

    Takes the arguments of :func:`kernels`.

    Example:
        >>> stripes({"kernel": jnp.ones((3, 3, 4, 8))}).groups[0].shape
        (3, 3, 1, 8)

    Reference:
        Meng et al., Pruning filter in filter, 2020, arXiv:2009.14410.
    """
    return _grid(params, _inputs, how, prunable, layout)


def shape_columns(
    params: Params,
    *,
    prunable: Prunable = None,
    layout: Layouts = None,
    how: str = "sum",
) -> Units:
    """Returns the columns ``W[a, b, i, :]``: one position in all filters.

    Takes the arguments of :func:`kernels`.

    Example:
        >>> shape_columns({"kernel": jnp.ones((3, 3, 4, 8))}).groups[0].shape
        (3, 3, 4, 1)

    Reference:
        Wen et al., Learning structured sparsity in deep neural networks, 2016,
        arXiv:1608.03665.
    """
    return _grid(params, _outputs, how, prunable, layout)


def rows(
    params: Params,
    *,
    prunable: Prunable = None,
    layout: Layouts = None,
    how: str = "sum",
) -> Units:
    """Returns the rows ``W[a, :, i, o]`` of kernels, along their last spatial axis.

    A dense kernel has no spatial axis: there a row is one of the matrix (in, out),
    ``W[i, :]``. Takes the arguments of :func:`kernels`.

    Example:
        >>> params = [jnp.ones((3, 3, 4, 8)), jnp.ones((4, 8))]
        >>> [group.shape for group in rows(params).groups]
        [(3, 1, 4, 8), (4, 1)]
    """
    return _grid(
        params, lambda own: "W" if "W" in own else _outputs(own), how, prunable, layout
    )


def layers(
    params: Params,
    *,
    prunable: Prunable = None,
    layout: Layouts = None,
    how: str = "mean",
) -> Units:
    """Returns whole layers; a stack of n layers is n units.

    Takes the arguments of :func:`kernels`. Layers differ in size, so the default pools
    by the mean.

    Example:
        >>> layers({"kernel": jnp.ones((5, 4, 8))}, layout="LIO").groups[0].shape
        (5, 1, 1)
    """
    return _grid(params, lambda own: own, how, prunable, layout)


def blocks(
    params: Params,
    shape: Mapping[str, int | None] | tuple[int | None, int | None],
    *,
    prunable: Prunable = None,
    layout: Layouts = None,
    how: str = "mean",
) -> Units:
    """Returns blocks of weights, of any size and with ragged edges.

    Blocks tile every axis from its beginning; the last of an axis that their size does
    not divide is smaller, and is pooled over the entries it has.

    Args:
        params: any pytree of arrays, or of their shapes.
        shape: the size of a block along each axis letter, such as ``{"I": 4, "O": 4}``,
            or for ``(I, O)`` as a tuple; None takes the axis as a whole. Letters that
            are not given have size 1, and those that a leaf does not have are ignored.
        prunable: which leaves have units, see :func:`jprune.trees.prunable_leaves`.
        layout: see :func:`jprune.layouts.layouts_of`.
        how: ``"sum"``, ``"mean"``, ``"max"``, ``"l1"`` or ``"l2"``.

    Raises:
        ValueError: a size is below 1, a letter is ``L`` or in no leaf's layout, or what
            :func:`kernels` raises.

    Example:
        >>> (group,) = blocks({"kernel": jnp.ones((4, 5))}, (2, 4)).groups
        >>> group.shape, group.sizes.tolist()
        ((2, 2), [[8, 2]])
    """
    sizes = shape if isinstance(shape, Mapping) else dict(zip("IO", shape, strict=True))
    leaves = trees.prunable_leaves(params, prunable)
    chosen = layouts.layouts_of(leaves, layout)
    for letter, size in sizes.items():
        if letter == "L" or not any(letter in own for own in chosen):
            raise ValueError(
                f"shape: {letter!r} is no axis to cut in any of the layouts "
                f"{sorted(set(chosen))}"
            )
        if size is not None and size < 1:
            raise ValueError(f"shape: the block size {size} of {letter!r} is below 1")
    tiles = [
        tuple(
            min(sizes.get(letter, 1) or length, length)
            for letter, length in zip(own, leaf.shape, strict=True)
        )
        for own, leaf in zip(chosen, leaves, strict=True)
    ]
    return _tiled(params, leaves, chosen, tiles, how)


def n_m(
    params: Params,
    n: int,
    m: int,
    *,
    axis: str = "I",
    prunable: Prunable = None,
    layout: Layouts = None,
) -> Units:
    """Returns N:M units: exactly n of each m consecutive weights along an axis live.

    The n largest scores of each group survive, ties to the lower index; NaN ranks
    lowest. There is no budget: the density is ``n / m``.

    Args:
        params: any pytree of arrays, or of their shapes.
        n: how many of a group live, 1 <= n <= m.
        m: the size of a group.
        axis: the letter of the axis, ``"I"`` for the one that a matrix product sums
            over, as sparse tensor cores want it.
        prunable: which leaves have units, see :func:`jprune.trees.prunable_leaves`.
        layout: see :func:`jprune.layouts.layouts_of`.

    Raises:
        ValueError: n is not in 1, ..., m, or m does not divide the axis of a leaf, or a
            leaf has no such axis; the message names it.

    Example:
        >>> units = n_m({"kernel": jnp.ones((4, 1))}, 2, 4)
        >>> scores = jnp.array([[1.0], [4.0], [3.0], [2.0]])
        >>> units.choose(scores, units.groups[0])[:, 0]
        Array([False,  True,  True, False], dtype=bool)

    References:
        Mishra et al., Accelerating sparse deep neural networks, 2021, arXiv:2104.08378.

        Zhou et al., Learning N:M fine-grained structured sparse neural networks from
        scratch, 2021, arXiv:2102.04010.
    """
    if not 1 <= n <= m:
        raise ValueError(f"n: {n} of {m} is not in 1, ..., {m}")
    units = weights(params, prunable=prunable, layout=layout)
    for group in units.groups:
        found = layouts.axes_of(group.layout, axis) if axis != "L" else ()
        lengths = [group.shape[a] for a in found]
        if len(found) != 1 or lengths[0] % m:
            raise ValueError(
                f"axis: {axis!r} of {group.leaf.path!r} (layout {group.layout!r}, "
                f"shape {group.shape}) is no axis that {m} divides; leave the leaf out "
                "by `prunable=`"
            )

    def choose(scores: Array, group: Group) -> Bool[Array, "..."]:
        (along,) = layouts.axes_of(group.layout, axis)
        return _tiles.largest(scores, n, m, along)

    return units._replace(choose=choose, density=n / m)


def _grid(
    params: Params,
    whole: Callable[[str], str],
    how: str,
    prunable: Prunable,
    layout: Layouts,
) -> Units:
    """Units that take the axes of the letters ``whole(layout)`` as a whole."""
    leaves = trees.prunable_leaves(params, prunable)
    chosen = layouts.layouts_of(leaves, layout)
    tiles = [
        tuple(
            length if letter in whole(own) and letter != "L" else 1
            for letter, length in zip(own, leaf.shape, strict=True)
        )
        for own, leaf in zip(chosen, leaves, strict=True)
    ]
    return _tiled(params, leaves, chosen, tiles, how)


def _tiled(
    params: Params,
    leaves: Sequence[trees.Leaf],
    chosen: Sequence[str],
    tiles: Sequence[_tiles.Tile],
    how: str,
) -> Units:
    if how not in _tiles.HOW:
        raise ValueError(f"how: {how!r} is none of {_tiles.HOW}")
    groups = tuple(
        _group(leaf, own, tuple(max(size, 1) for size in tile))
        for leaf, own, tile in zip(leaves, chosen, tiles, strict=True)
    )
    return Units(groups, how, tree=trees.shapes_of(params))


def _group(leaf: trees.Leaf, layout: str, tile: _tiles.Tile) -> Group:
    # The array itself is not kept alive by its units.
    shape, value = leaf.shape, jax.ShapeDtypeStruct(leaf.shape, leaf.value.dtype)
    if all(size == 1 for size in tile):
        pool_leaf, expand_leaf = _pool_single, lambda keep: [keep]
    else:
        pool_leaf = functools.partial(_pool_tiles, tile=tile)
        expand_leaf = functools.partial(_expand_tiles, shape=shape, tile=tile)
    return Group(
        leaves=(trees.Leaf(leaf.place, leaf.path, value),),
        layout=layout,
        shape=_tiles.shape_of(shape, tile),
        pool=pool_leaf,
        expand=expand_leaf,
        sizes=_tiles.sizes(shape, tile),
        stack=next(iter(layouts.axes_of(layout, "L")), None),
    )


def _pool_single(scores: Sequence[Array], how: str) -> Array:
    return jnp.abs(scores[0]) if how in ("l1", "l2") else scores[0]


def _pool_tiles(scores: Sequence[Array], how: str, tile: _tiles.Tile) -> Array:
    return _tiles.pool(scores[0], how, tile)


def _expand_tiles(
    keep: Bool[Array, "..."], shape: tuple[int, ...], tile: _tiles.Tile
) -> list[Array]:
    return [_tiles.expand(keep, shape, tile)]


def _inputs(layout: str) -> str:
    return "IN" if _heads_split_inputs(layout) else "I"


def _outputs(layout: str) -> str:
    return "O" if _heads_split_inputs(layout) else "ON"


def _heads_split_inputs(layout: str) -> bool:
    return layout.find("N") < layout.find("I")
