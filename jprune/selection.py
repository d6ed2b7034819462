"""Exact top-k by counting: the one hot kernel of the library.

*Which of n scores are the k largest?* Sorting answers far more than that. Here a
search over thresholds counts how many scores lie at or above each, and ends at a *cut*
``(level, index)``: an entry survives if it ranks above the level, or on it with a lower
index than the cut's. Exactly k entries survive, ties go to the lower index, and k may
be traced.

Scores are compared through integer *ranks* that order them as numbers do, with three
decisions of their own: NaN ranks below everything, also minus infinity; -0.0 equals
0.0; and subnormal numbers differ from zero, although the processor may flush them.

**The rounding rule of the library** stands in :func:`keep_count`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from jprune.trees import Leaf

# A pass counts in uint8 along an axis of _CHUNK, which vectorises far better than
# int32. XLA splits longer reductions, and then stores what it would otherwise fuse.
_CHUNK = 32
_LANES = 1024
# Entries of the sample from which a search takes its first bracket.
_SAMPLE = 2048
# Up to this size, whole passes settle ties: slower, but a simpler program to compile.
_FEW = 2**20


def keep_count(n: int, sparsity: float) -> int:
    """Returns how many of ``n`` units survive at ``sparsity``.

    ``k = n - round_half_even(sparsity * n)`` in float64, on the host: in float32, 0.9
    of 25,557,032 is off by one.

    Args:
        n: the number of prunable units.
        sparsity: the fraction to remove, in [0, 1).

    Raises:
        ValueError: ``sparsity`` is outside [0, 1).

    Example:
        >>> keep_count(1000, 0.9), keep_count(5, 0.5), keep_count(7, 0.5)
        (100, 3, 3)
    """
    check_sparsity(sparsity)
    return n - round(float(sparsity) * n)


def check_sparsity(sparsity: float, name: str = "sparsity") -> None:
    """Raises unless ``sparsity`` is a number in [0, 1).

    Raises:
        ValueError: it is not; the message holds ``name`` and the value.
    """
    if not 0.0 <= float(sparsity) < 1.0:
        raise ValueError(
            f"{name}: {sparsity!r} is outside [0, 1); it is the removed fraction"
        )


def check_no_nan(leaves: Sequence[Leaf]) -> None:
    """Raises if scores hold NaN. Does nothing under ``jit``, where NaN ranks lowest.

    Args:
        leaves: the scores.

    Raises:
        ValueError: NaN; the message has the leaf's path and the number of them.
    """
    values = [leaf.value for leaf in leaves if leaf.size]
    if not values or not is_concrete(*values):
        return
    suspicious = _suspicious(values)
    # Inside jit, even what is computed from constants is traced.
    if not is_concrete(suspicious) or not bool(suspicious):
        return
    for leaf in leaves:
        if count := int(jnp.sum(jnp.isnan(leaf.value))):
            raise ValueError(
                f"scores: {count} of the {leaf.size} scores of {leaf.path!r} are NaN"
            )


def is_concrete(*values: Any) -> bool:
    """Whether no value is traced, so that a decision can be made on the host.

    Example:
        >>> is_concrete(jnp.ones(2), 3), jax.jit(is_concrete)(1.0).item()
        (True, False)
    """
    return not any(isinstance(value, jax.core.Tracer) for value in values)


@jax.jit
def _suspicious(values: Sequence[Array]) -> Bool[Array, ""]:
    # A sum is the cheapest pass to run and to compile. It hands NaN on, and makes one
    # only of opposite infinities. (A maximum loses NaN in XLA's vectorised loops.)
    return jnp.any(jnp.stack([jnp.isnan(jnp.sum(value)) for value in values]))


def top_k(scores: Array, k: jax.typing.ArrayLike) -> Bool[Array, "..."]:
    """Returns the mask of the ``k`` largest entries of an array.

    Args:
        scores: real scores of any shape and floating or integer dtype.
        k: how many survive, 0 <= k <= scores.size; may be traced.

    Returns:
        A bool array of the shape of ``scores`` with exactly ``k`` entries ``True``.
        Equal scores survive in order of their (row-major) index.

    Example:
        >>> top_k(jnp.array([[3.0, 1.0], [2.0, 2.0]]), 2)
        Array([[ True, False],
               [ True, False]], dtype=bool)
    """
    return select([scores], jnp.asarray(k)[None])[0]


def select(
    scores: Sequence[Array],
    keep: Int[Array, " groups"],
    *,
    together: bool = False,
    stacks: Sequence[int | None] | None = None,
    among: Sequence[Bool[Array, "..."]] | None = None,
) -> list[Bool[Array, "..."]]:
    """Returns the masks of the largest entries of several arrays, in one search.

    All arrays share one threshold, or each has its own (each layer of a stack, where an
    array is one). The index that breaks ties runs through the arrays in order. Arrays
    of different dtypes are compared in their common dtype.

    In a process with several devices, every pass over arrays that are sharded is local
    but for an all-reduce of one number per group.

    Args:
        scores: real scores; arrays of any shapes.
        keep: how many survive in each group; may be traced. One number if ``together``,
            else one for each array or, in order, for each layer of a stack.
        together: whether all arrays are one group.
        stacks: for each array, the axis along which it is a stack of layers, or None.
        among: for each array, which entries may survive; the others rank as NaN.

    Raises:
        ValueError: ``keep`` has another length than there are groups, or there are 2^31
            scores or more and 64-bit types are off.

    Example:
        >>> a, b = jnp.array([1.0, 5.0]), jnp.array([4.0, 6.0])
        >>> [mask.tolist() for mask in select([a, b], jnp.array([2]), together=True)]
        [[False, True], [False, True]]
        >>> [mask.tolist() for mask in select([a, b], jnp.array([0, 2]))]
        [[False, False], [True, True]]
        >>> alive = jnp.array([True, False]), jnp.array([True, False])
        >>> masks = select([a, b], jnp.array([1]), together=True, among=alive)
        >>> [mask.tolist() for mask in masks]
        [[False, False], [True, False]]
    """
    stacks = [None] * len(scores) if stacks is None or together else list(stacks)
    total = sum(math.prod(np.shape(score)) for score in scores)
    if total >= 2**31 and _count_dtype().itemsize < 8:
        raise ValueError(
            f"scores: {total} of them need 64-bit counts; set jax_enable_x64"
        )
    layers = [
        1 if axis is None else np.shape(score)[axis]
        for score, axis in zip(scores, stacks, strict=True)
    ]
    groups = 1 if together else sum(layers)
    keep = jnp.asarray(keep, _count_dtype())
    if keep.shape != (groups,):
        raise ValueError(f"keep: shape {keep.shape}, but there are {groups} groups")
    if total == 0:
        return [jnp.zeros(np.shape(score), bool) for score in scores]
    dtype = jnp.result_type(*scores)
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        dtype = jnp.float32
    ranks = [_rank(jnp.asarray(score, dtype)) for score in scores]
    if among is not None:
        ranks = [_among(a, b) for a, b in zip(ranks, among, strict=True)]
    if jax.device_count() > 1:
        return _select_leaves(ranks, keep, together, stacks)
    if together:
        shapes = [rank.shape for rank in ranks]
        flat = [rank.ravel() for rank in ranks]
        line = _join(flat)
        (mask,) = _select_blocks([line[None]], keep)
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        pieces = jnp.split(mask[0], ends)
        return [x.reshape(shape) for x, shape in zip(pieces, shapes, strict=True)]
    fronts = [
        rank[None] if axis is None else jnp.moveaxis(rank, axis, 0)
        for rank, axis in zip(ranks, stacks, strict=True)
    ]
    masks = _select_blocks([x.reshape(x.shape[0], -1) for x in fronts], keep)
    return [
        mask.reshape(rank.shape)
        if axis is None
        else jnp.moveaxis(mask.reshape(front.shape), 0, axis)
        for mask, rank, front, axis in zip(masks, ranks, fronts, stacks, strict=True)
    ]


def _select_blocks(
    rows: Sequence[Array], keep: Int[Array, " groups"]
) -> list[Bool[Array, "..."]]:
    """Selects in each row of several ``(layers, entries)`` arrays, on one device.

    All rows are laid out as one array of equal blocks, each of a single group, so that
    the program does not grow with the number of arrays. Padding ranks as NaN and comes
    last, so it can survive only after every entry of its group.
    """
    chunk, lanes = _block_shape(rows)
    block = chunk * lanes
    per_row = [-(-row.shape[1] // block) for row in rows]
    padded = [
        _pad(row, count * block).reshape(-1, chunk, lanes)
        for row, count in zip(rows, per_row, strict=True)
    ]
    blocks = _join(padded)
    lengths = np.repeat(per_row, [row.shape[0] for row in rows])
    sizes = np.repeat([x.shape[1] for x in rows], [x.shape[0] for x in rows])
    group_of = np.repeat(np.arange(len(lengths)), lengths)
    first_block = np.cumsum(lengths) - lengths

    def by_group(counts: Array) -> Array:
        if len(lengths) == 1:
            return jnp.sum(counts, dtype=keep.dtype)[None]
        return jax.ops.segment_sum(counts, group_of, len(lengths))

    def hits_by_block(hits: Array) -> Array:
        return hits.sum(1, dtype=jnp.uint8).sum(1, dtype=keep.dtype)

    def on_blocks(values: Array) -> Array:
        return jnp.asarray(values)[group_of][:, None, None]

    def count_from(level: Array) -> Array:
        return by_group(hits_by_block(blocks >= on_blocks(level)))

    def tie_by_passes(level: Array, room: Array) -> Array:
        on_level, place = blocks == on_blocks(level), _flat_index(blocks.shape)

        def count_before(end: Array) -> Array:
            return by_group(hits_by_block(on_level & (place < on_blocks(end))))

        return _first_index(count_before, room, blocks.size)

    def tie_by_blocks(level: Array, room: Array) -> Array:
        # First the block in which the room runs out, then the place inside it.
        counts = hits_by_block(blocks == on_blocks(level))
        before = jnp.cumsum(counts) - counts
        before = before - before[first_block][group_of]
        passed = by_group((before + counts < room[group_of]).astype(keep.dtype))
        chosen = jnp.asarray(first_block) + passed
        hits = blocks[chosen].reshape(-1, block) == level[:, None]
        place = _flat_index((block,))

        def count_before(end: Array) -> Array:
            inside = jnp.sum(hits & (place < end[:, None]), axis=1, dtype=keep.dtype)
            return before[chosen] + inside

        return chosen * block + _first_index(count_before, room, block)

    level, index = _cut(
        count_from,
        tie_by_blocks if blocks.size > _FEW else tie_by_passes,
        keep,
        jnp.asarray(sizes, keep.dtype),
        blocks.dtype,
        _guess(blocks, keep, sizes, first_block * block),
    )
    place = _flat_index(blocks.shape)
    keeps = _survives(blocks, on_blocks(level), place, on_blocks(index))
    # Stored in the layout in which it vectorises, before it is cut up.
    keeps = lax.optimization_barrier(keeps)
    ends = np.cumsum([len(x) for x in padded])[:-1]
    return [
        piece.reshape(row.shape[0], -1)[:, : row.shape[1]]
        for piece, row in zip(jnp.split(keeps, ends), rows, strict=True)
    ]


def _join(pieces: Sequence[Array]) -> Array:
    """Concatenates along the first axis, by copies; XLA's own is ten times slower."""
    if len(pieces) == 1:
        return pieces[0]
    rest = pieces[0].shape[1:]
    joined = jnp.zeros((sum(len(piece) for piece in pieces), *rest), pieces[0].dtype)
    # Or the first copy would become a pad, which XLA computes entry by entry.
    joined = lax.optimization_barrier(joined)
    start = 0
    for piece in pieces:
        joined = lax.dynamic_update_slice_in_dim(joined, piece, start, axis=0)
        start += len(piece)
    return joined


def _block_shape(rows: Sequence[Array]) -> tuple[int, int]:
    """Returns the chunk to count in uint8, and the lanes beside it, of a block."""
    length = max(row.shape[1] for row in rows)
    if len(rows) == 1:
        # A shape that divides the row spares a padded copy of it.
        chunk = next(c for c in range(_CHUNK, 0, -1) if length % c == 0)
        rest = length // chunk
        lanes = next(w for w in range(min(_LANES, rest), 0, -1) if rest % w == 0)
        if chunk * lanes >= 2048:
            return chunk, lanes
    wanted = -(-length // _CHUNK)
    return _CHUNK, min(max(1 << (wanted - 1).bit_length(), 8), _LANES)


def _pad(row: Array, size: int) -> Array:
    missing = size - row.shape[1]
    if not missing:
        return row
    lowest = jnp.iinfo(row.dtype).min
    return jnp.pad(row, ((0, 0), (0, missing)), constant_values=lowest)


def _guess(
    blocks: Array, keep: Array, sizes: np.ndarray, starts: np.ndarray
) -> tuple[Array, Array] | None:
    """Returns levels that probably bracket the cut of each group, from a sample."""
    samples = max(_SAMPLE // len(sizes), 128)
    if sizes.min() < 4 * samples:
        return None
    places = starts[:, None] + np.linspace(0, sizes - 1, samples, dtype=np.int64).T
    sample = jnp.sort(blocks.ravel()[places], axis=1)
    part = keep.astype(jnp.float32) / sizes.astype(np.float32)
    spread = 3 * jnp.sqrt(part * (1 - part) * samples) + 1

    def level_at(place: Array) -> Array:
        order = jnp.clip(place, 0, samples - 1).astype(jnp.int32)
        return jnp.take_along_axis(sample, order[:, None], axis=1)[:, 0]

    middle = samples * (1 - part)
    return level_at(middle - spread), level_at(middle + spread)


def _select_leaves(
    ranks: Sequence[Array],
    keep: Int[Array, " groups"],
    together: bool,
    stacks: Sequence[int | None],
) -> list[Bool[Array, "..."]]:
    """Selects in ranks that may be sharded: they are never reshaped, only counted."""
    layers = [
        1 if x is None else a.shape[x] for a, x in zip(ranks, stacks, strict=True)
    ]
    group_starts = np.cumsum([0, *layers[:-1]]) * (not together)
    starts = np.cumsum([0] + [rank.size for rank in ranks[:-1]]) * together

    def along(values: Array, which: int) -> Array:
        """Returns the groups' values, to broadcast against an array."""
        axis, first = stacks[which], group_starts[which]
        if axis is None:
            return values[first]
        shape = [1] * ranks[which].ndim
        shape[axis] = layers[which]
        return values[first : first + layers[which]].reshape(shape)

    def by_group(hits: Callable[[int], Array]) -> Array:
        counts = []
        for which, axis in enumerate(stacks):
            others = tuple(i for i in range(ranks[which].ndim) if i != axis)
            counts.append(jnp.sum(hits(which), axis=others, dtype=keep.dtype).ravel())
        return (
            jnp.sum(jnp.stack(counts), axis=0) if together else jnp.concatenate(counts)
        )

    def place(which: int) -> Array:
        return starts[which] + _flat_index(ranks[which].shape)

    def count_from(level: Array) -> Array:
        return by_group(lambda i: ranks[i] >= along(level, i))

    def tie_index(level: Array, room: Array) -> Array:
        def count_before(end: Array) -> Array:
            return by_group(
                lambda i: (ranks[i] == along(level, i)) & (place(i) < along(end, i))
            )

        longest = sum(x.size for x in ranks) if together else max(map(np.size, ranks))
        return _first_index(count_before, room, longest)

    sizes = [rank.size for rank in ranks]
    group_sizes = (
        [sum(sizes)]
        if together
        else np.repeat(
            [n // max(s, 1) for n, s in zip(sizes, layers, strict=True)], layers
        )
    )
    level, index = _cut(
        count_from,
        tie_index,
        keep,
        jnp.asarray(group_sizes, keep.dtype),
        ranks[0].dtype,
        None,
    )
    return [
        _survives(rank, along(level, i), place(i), along(index, i))
        for i, rank in enumerate(ranks)
    ]


def _cut(
    count_from: Callable[[Array], Array],
    tie_index: Callable[[Array, Array], Array],
    keep: Int[Array, " groups"],
    sizes: Int[Array, " groups"],
    dtype: jnp.dtype,
    first: tuple[Array, Array] | None,
) -> tuple[Array, Array]:
    """Returns the cut ``(level, index)`` of each group.

    Args:
        count_from: levels -> the number of entries of rank at or above them.
        tie_index: levels and rooms -> the indices before which that many entries lie
            on the level.
        keep: how many are to survive.
        sizes: how many there are.
        dtype: of the levels.
        first: two levels to try first, a low and a high one.
    """
    level, at_level, above = _search(count_from, keep, sizes, dtype, first)
    tied = at_level != keep
    everything = jnp.full_like(keep, jnp.iinfo(keep.dtype).max)

    # A loop of no turn or one, rather than a cond, stays cheap under vmap.
    def turn(state: tuple[Array, Array]) -> tuple[Array, Array]:
        index = jnp.where(tied, tie_index(level, keep - above), everything)
        return jnp.zeros((), bool), index.astype(keep.dtype)

    start = (jnp.any(tied), everything)
    return level, lax.while_loop(lambda state: state[0], turn, start)[1]


def _search(
    count_from: Callable[[Array], Array],
    keep: Int[Array, " groups"],
    sizes: Int[Array, " groups"],
    dtype: jnp.dtype,
    first: tuple[Array, Array] | None,
) -> tuple[Array, Array, Array]:
    """Finds the highest levels from which on at least ``keep`` entries lie.

    A bracket ``low < high`` has ``count(low) >= keep`` and ``count(high) < keep`` (or
    0). It closes by interpolation between the counts, aimed a little beyond ``keep`` as
    seen from the nearer end so that both ends move, and twice as far with every turn
    in which the same end did; a bisection every eighth turn is the guarantee.

    Returns:
        The levels, the counts from them on, and the counts above them.
    """
    info = jnp.iinfo(dtype)
    unsigned = jnp.dtype(f"uint{info.bits}")
    real = jnp.dtype(f"float{info.bits}")

    def width_of(low: Array, high: Array) -> Array:
        return high.astype(unsigned) - low.astype(unsigned)

    def open_groups(low: Array, high: Array, at_low: Array) -> Array:
        return (at_low != keep) & (width_of(low, high) > 1)

    def narrow(state: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, at_low, at_high, run, turn = state
        width = width_of(low, high)
        surplus, lack = (at_low - keep).astype(real), (keep - at_high).astype(real)
        near, total = jnp.minimum(surplus, lack), surplus + lack
        further = near * jnp.exp2(jnp.maximum(jnp.abs(run) - 1, 0).astype(real))
        aim = jnp.minimum(further + 0.3 * jnp.sqrt(near), total / 2)
        part = jnp.where(surplus < lack, aim, total - aim) / total
        step = (part * width.astype(real)).astype(unsigned)
        step = jnp.where(turn % 8 == 7, width // 2, step)
        level = low + jnp.clip(step, 1, width - 1).astype(dtype)
        # Ranks are all but logarithmic; around zero, values themselves are straight.
        value = (1 - part) * _value(low) + part * _value(high)
        around_zero = (low <= 1) & (high >= 0) & jnp.isfinite(value)
        straight = around_zero & (turn % 8 != 7)
        level = jnp.where(straight, jnp.clip(_rank(value), low + 1, high - 1), level)
        if first is not None:
            guess = jnp.where(turn == 0, first[0], first[1])
            level = jnp.where(turn < 2, jnp.clip(guess, low + 1, high - 1), level)
        # Zeros, and what is NaN, are often many: see at once on which side they are.
        border = jnp.where(turn == 2, 1, 0).astype(dtype)
        at_border = (turn >= 2) & (turn < 4) & (low < border) & (border < high)
        level = jnp.where(at_border, border, level)
        count = count_from(level)
        is_open = open_groups(low, high, at_low)
        up, down = is_open & (count >= keep), is_open & (count < keep)
        return (
            jnp.where(up, level, low),
            jnp.where(down, level, high),
            jnp.where(up, count, at_low),
            jnp.where(down, count, at_high),
            jnp.where(up, jnp.maximum(run, 0) + 1, jnp.minimum(run, 0) - 1),
            turn + 1,
        )

    start = (
        jnp.full(keep.shape, info.min, dtype),
        jnp.full(keep.shape, info.max, dtype),
        sizes,
        jnp.zeros_like(keep),
        jnp.zeros(keep.shape, jnp.int32),
        jnp.asarray(2 if first is None else 0, jnp.int32),
    )
    low, _, at_low, at_high, *_ = lax.while_loop(
        lambda state: jnp.any(open_groups(*state[:3])), narrow, start
    )
    return low, at_low, at_high


def _first_index(
    count_before: Callable[[Array], Array], room: Int[Array, " groups"], length: int
) -> Int[Array, " groups"]:
    """Returns the first indices in (0, length] with ``room`` hits before them."""

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = low + (high - low) // 2
        enough = count_before(middle) >= room
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    bracket = (jnp.zeros_like(room), jnp.full_like(room, length))
    return lax.fori_loop(0, length.bit_length(), halve, bracket)[1]


def _rank(scores: Array) -> Int[Array, "..."]:
    """Returns integers in the order of the scores; the lowest stands for NaN."""
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        return scores.astype(_rank_dtype(scores.dtype))
    info = jnp.iinfo(_rank_dtype(scores.dtype))
    bits = lax.bitcast_convert_type(scores, info.dtype)
    magnitude = bits & info.max
    infinity = np.asarray(np.inf, scores.dtype).view(info.dtype)
    signed = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > infinity, info.min, signed)


def _among(ranks: Int[Array, "..."], eligible: Bool[Array, "..."]) -> Array:
    """Returns ranks that are the lowest where entries are not eligible."""
    # By bits, which vectorises better than a select.
    barred = eligible.astype(ranks.dtype) - 1
    return (ranks & ~barred) | (barred & jnp.iinfo(ranks.dtype).min)


def _value(ranks: Int[Array, "..."]) -> Array:
    """Returns the floats of the given ranks; NaN where a rank has none."""
    magnitude = jnp.abs(jnp.maximum(ranks, -jnp.iinfo(ranks.dtype).max))
    real = jnp.dtype(f"float{jnp.iinfo(ranks.dtype).bits}")
    return jnp.sign(ranks) * lax.bitcast_convert_type(magnitude, real)


def _survives(
    ranks: Array, level: Array, place: Array, index: Array
) -> Bool[Array, "..."]:
    """Whether ranks are above the cut ``(level, index)``, places breaking ties."""
    return (ranks > level) | ((ranks == level) & (place < index))


def _rank_dtype(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype("int64" if jnp.dtype(dtype).itemsize == 8 else "int32")


def _count_dtype() -> jnp.dtype:
    return jax.dtypes.canonicalize_dtype(np.int64)


def _flat_index(shape: tuple[int, ...]) -> Int[Array, "..."]:
    """Returns each entry's row-major index, without a reshape."""
    index = jnp.zeros(shape, _count_dtype())
    stride = 1
    for axis in reversed(range(len(shape))):
        index += stride * lax.broadcasted_iota(index.dtype, shape, axis)
        stride *= shape[axis]
    return index
