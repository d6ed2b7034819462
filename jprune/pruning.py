"""The verb: scores to masks, at once or in rounds.

Both functions take any pytree and are pure. ``prune`` decides once;
``prune_iteratively`` runs score -> select -> score as one compiled program, and has as
special cases::

    # SynFlow
    prune_iteratively(scores.synflow(apply_fn), params, inputs, 0.99, rounds=100)
    # iterative SNIP
    prune_iteratively(scores.snip(loss_fn), params, batch, 0.99, rounds=60)
    # FORCE: removed weights may return
    prune_iteratively(scores.snip(loss_fn), params, batch, 0.99, rounds=60, revive=True)
    # GRASP-It
    prune_iteratively(
        scores.squared_gradient(loss_fn), params, batch, 0.99, rounds=60
    )
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from jprune import allocation as allocation_lib
from jprune import masks as masks_lib
from jprune import schedules, selection, trees
from jprune import units as units_lib
from jprune.allocation import Allocation, Layer
from jprune.types import Batch, Masks, Params, Prunable, Schedule, ScoreFn, Scores
from jprune.units import Units

Sparsity = float | Mapping[str, float]


def prune(
    scores: Scores,
    sparsity: Sparsity | None = None,
    *,
    keep: int | Int[Array, ""] | None = None,
    units: Units | None = None,
    allocation: Allocation | None = None,
    prunable: Prunable = None,
    within: Masks | None = None,
) -> Masks:
    """Returns the masks that keep the units with the largest scores.

    Exactly ``n - round_half_even(sparsity * n)`` of the n prunable units survive, ties
    going to the lower index.

    Args:
        scores: real scores with the structure of the parameters; larger = keep. With
            ``units`` they may be in unit space, a list with one array for each group,
            or those of channels, see :func:`jprune.units.pool`.
        sparsity: the fraction of the prunable units to remove, in [0, 1), also when
            ``within`` restricts who may survive; or a table of path patterns to
            sparsities, of which the first match decides.
        keep: in place of ``sparsity``, how many units survive. It may be traced, if
            all units compete under one threshold.
        units: what is removed at once, see :mod:`jprune.units`; single weights unless
            given.
        allocation: how the budget is spread over layers, see :mod:`jprune.allocation`;
            one global threshold unless given.
        prunable: which leaves are pruned, see :func:`jprune.trees.prunable_leaves`;
            ``units`` bring their own.
        within: only what lives in these masks may survive.

    Returns:
        Masks with the structure of ``scores``; leaves that are not prunable have masks
        of shape ``()``.

    Raises:
        ValueError: a sparsity outside [0, 1), none or two budgets given, nothing
            prunable, a pattern that matches nothing, a budget out of reach (also of
            the ``units.least`` that survive in each group), NaN scores (under ``jit``
            they rank lowest instead), or masks that do not fit.

    Example:
        >>> kernel = jnp.array([[3.0, 1.0], [2.0, 4.0]])
        >>> scores = {"kernel": kernel, "bias": jnp.ones(2)}
        >>> prune(scores, 0.5)
        {'bias': Array(True, dtype=bool), 'kernel': Array([[ True, False],
               [False,  True]], dtype=bool)}
    """
    units = _resolve(units, scores, prunable)
    in_unit_space = _in_unit_space(units, scores)
    # Scores of channels have not the shapes of the parameters.
    tree = scores if units.tree is None else units.tree
    leaves = _named(units, scores) if in_unit_space else _leaves_of(units, scores)
    selection.check_no_nan(leaves)
    if units.choose is not None:
        _check_no_budget(sparsity, keep, allocation)
        pairs = zip(leaves, units.groups, strict=True)
        keeps = [units.choose(leaf.value, group) for leaf, group in pairs]
        return _expand(units, tree, keeps, within)
    plan = _plan(units, allocation, sparsity)
    if isinstance(keep, jax.Array):
        counts = _traced_counts(plan, sparsity, keep)
    else:
        counts = _counts(plan, _budget(plan, sparsity, keep))
    if in_unit_space:
        pooled = [jnp.asarray(leaf.value) for leaf in leaves]
    else:
        pooled = units_lib.pool(units, scores)
    living = None if within is None else units_lib.living(units, tree, within)
    if living is not None:
        _check_room(units, plan, counts, living)
    keeps = _choose(pooled, living, jnp.asarray(counts), _floors(plan), **_static(plan))
    return _expand(units, tree, keeps, within)


def prune_iteratively(
    score_fn: ScoreFn,
    params: Params,
    batch: Batch = None,
    sparsity: Sparsity | None = None,
    *,
    rounds: int | None = None,
    schedule: Callable[..., Schedule] = schedules.exponential,
    keep: Sequence[int] | None = None,
    revive: bool = False,
    batches: Batch = None,
    units: Units | None = None,
    allocation: Allocation | None = None,
    prunable: Prunable = None,
    key: PRNGKeyArray | None = None,
) -> Masks:
    """Prunes in rounds: score what is left, select, and again.

    Round t of n scores at the masks of round t - 1 and keeps what ``schedule`` says for
    step t. All rounds are one compiled program, made once for each ``score_fn``; other
    sparsities, seeds and batches of the same shapes run it again.

    Args:
        score_fn: what a criterion makes, such as ``scores.snip(loss_fn)``; make it once
            and use it again, for it identifies the compiled program.
        params: any pytree.
        batch: what ``score_fn`` takes, the same in every round.
        sparsity: the removed fraction in the end, in [0, 1).
        rounds: the number of rounds.
        schedule: ``(sparsity, steps=rounds) -> (step -> sparsity)``.
        keep: in place of the three before, how many units survive each round.
        revive: whether removed weights may return. They compete by the score that
            ``score_fn`` gives them at the masks; otherwise masks are nested.
        batches: in place of ``batch``, one for each round along a leading axis.
        units: see :func:`prune`.
        allocation: see :func:`prune`.
        prunable: see :func:`prune`.
        key: is split into one for each round; only for a ``score_fn`` that takes one.

    Returns:
        The masks of the last round.

    Raises:
        ValueError: as :func:`prune`; or ``rounds`` is below 1, or does not agree with
            ``batches``; or masks are to be nested and ``keep`` rises.

    Example:
        >>> from jprune.scores import magnitude
        >>> params = {"w": jnp.array([[0.1, -2.0], [3.0, 0.5]])}
        >>> prune_iteratively(magnitude, params, sparsity=0.5, rounds=2)
        {'w': Array([[False,  True],
               [ True, False]], dtype=bool)}
    """
    resolved = _resolve(units, params, prunable)
    if resolved.choose is not None:
        raise ValueError("units: N:M leaves no budget to approach in rounds; use prune")
    plan = _plan(resolved, allocation, sparsity)
    budgets = _budgets(plan, sparsity, rounds, schedule, keep)
    if not revive and np.any(np.diff(budgets) > 0):
        raise ValueError(
            f"keep: {budgets} rises, but without revive=True masks are nested"
        )
    counts = np.stack([_counts(plan, budget) for budget in budgets])
    if batches is not None:
        _check_batches(batch, batches, len(budgets))
    keys = None if key is None else jax.random.split(key, len(budgets))
    return _run_rounds(
        params,
        batch,
        (jnp.asarray(counts), batches, keys),
        _floors(plan),
        score_fn=score_fn,
        revive=revive,
        units=None if units is None else _Identity(units),
        prunable=tuple(prunable) if isinstance(prunable, list) else prunable,
        **_static(plan),
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "score_fn",
        "revive",
        "units",
        "prunable",
        "together",
        "stacks",
        "normalize",
    ),
)
def _run_rounds(
    params: Params,
    batch: Batch,
    by_round: tuple[Array, Batch, Array | None],
    floors: Array | None,
    *,
    score_fn: ScoreFn,
    revive: bool,
    units: "_Identity | None",
    prunable: Prunable,
    **static: Any,
) -> Masks:
    own = _resolve(units and units.value, params, prunable)

    def one_round(masks: Masks, inputs: tuple) -> tuple[Masks, None]:
        counts, round_batch, key = inputs
        chosen = batch if round_batch is None else round_batch
        named = {} if key is None else {"key": key}
        scores = score_fn(params, chosen, masks=masks, **named)
        within = None if revive else masks
        living = None if revive else units_lib.living(own, params, masks)
        if _in_unit_space(own, scores):
            pooled = list(scores)
        else:
            pooled = units_lib.pool(own, scores)
        keeps = _choose(pooled, living, counts, floors, **static)
        return _expand(own, params, keeps, within), None

    everything = [jnp.ones(group.shape, bool) for group in own.groups]
    start = units_lib.expand(own, params, everything)
    return jax.lax.scan(one_round, start, by_round)[0]


@functools.partial(jax.jit, static_argnames=("together", "stacks", "normalize"))
def _choose(
    scores: Sequence[Array],
    living: Sequence[Array] | None,
    counts: Int[Array, " groups"],
    floors: Int[Array, " layers"] | None,
    *,
    together: bool,
    stacks: tuple[int | None, ...],
    normalize: Callable[[Array], Array] | None,
) -> list[Array]:
    """Selects units: their scores -> which of them survive."""
    if normalize is not None:
        scores = [
            normalize(score) if axis is None else jax.vmap(normalize, axis, axis)(score)
            for score, axis in zip(scores, stacks, strict=True)
        ]
    if floors is not None:
        safe = selection.select(scores, floors, stacks=stacks, among=living)
        scores = [
            jnp.where(best, jnp.inf, _floating(score))
            for score, best in zip(scores, safe, strict=True)
        ]
    return selection.select(
        scores, counts, together=together, stacks=stacks, among=living
    )


def _floating(score: Array) -> Array:
    return score if jnp.issubdtype(score.dtype, jnp.floating) else score.astype(float)


class _Plan(NamedTuple):
    """The layers that compete, and how their budget is spread."""

    layers: tuple[Layer, ...]
    stacks: tuple[int | None, ...]
    allocation: Allocation
    least: int

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers)


class _Identity(NamedTuple("_Identity", [("value", Any)])):
    """A static argument that equals itself alone, whatever its fields can do."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _resolve(units: Units | None, tree: PyTree, prunable: Prunable) -> Units:
    if units is None:
        return units_lib.weights(tree, prunable=prunable)
    if prunable is not None:
        raise ValueError("prunable: the units say what is pruned; give it to them")
    return units


def _plan(
    units: Units, allocation: Allocation | None, sparsity: Sparsity | None
) -> _Plan:
    if isinstance(sparsity, Mapping):
        if allocation is not None:
            raise ValueError("allocation: a table of sparsities is one already")
        allocation = allocation_lib.by_pattern(sparsity)
    layers, stacks = [], []
    for group in units.groups:
        axis = group.stack
        stacks.append(axis)
        path, shape, units_shape = group.leaf.path, group.leaf.shape, group.shape
        if axis is None:
            size = math.prod(units_shape)
            layers.append(Layer(path, shape, size, group.layout))
            continue
        depth = shape[axis]
        size = math.prod(units_shape) // max(depth, 1)
        rest = shape[:axis] + shape[axis + 1 :]
        layout = group.layout.replace("L", "")
        layers += [Layer(f"{path}[{i}]", rest, size, layout) for i in range(depth)]
    allocation = allocation or allocation_lib.global_threshold()
    if units.least and allocation.budget is None:
        allocation = allocation_lib.with_floor(allocation, units.least)
    return _Plan(tuple(layers), tuple(stacks), allocation, units.least)


def _static(plan: _Plan) -> dict[str, Any]:
    return {
        "together": plan.allocation.densities is None
        and plan.allocation.budget is None,
        "stacks": plan.stacks,
        "normalize": plan.allocation.normalize,
    }


def _floors(plan: _Plan) -> Int[Array, " layers"] | None:
    floors = plan.allocation.floors
    return None if floors is None else jnp.asarray(floors(plan.layers))


def _budget(plan: _Plan, sparsity: Sparsity | None, keep: int | None) -> int:
    if plan.allocation.budget is not None:
        if keep is not None or isinstance(sparsity, float):
            raise ValueError(
                "sparsity, keep: the table of sparsities fixes the budget, got "
                f"{sparsity!r} and {keep!r}"
            )
        return plan.allocation.budget(plan.layers)
    if keep is not None and sparsity is None:
        return operator.index(keep)
    if keep is None and isinstance(sparsity, (float, int)):
        return selection.keep_count(plan.size, sparsity)
    raise ValueError(f"sparsity, keep: give one of them, got {sparsity!r} and {keep!r}")


def _counts(plan: _Plan, budget: int) -> np.ndarray:
    if not 0 <= budget <= plan.size:
        raise ValueError(f"keep: {budget} of {plan.size} units cannot survive")
    counts = plan.allocation.counts(plan.layers, budget)
    if plan.allocation.budget is not None:
        _check_least(plan, counts)
    return counts


def _check_least(plan: _Plan, counts: np.ndarray) -> None:
    for layer, count in zip(plan.layers, counts.tolist(), strict=True):
        if count < min(plan.least, layer.size):
            raise ValueError(
                f"sparsity: the table leaves {count} of {layer.size} units of "
                f"{layer.path!r}, but {plan.least} must survive"
            )


def _traced_counts(plan: _Plan, sparsity: Sparsity | None, keep: Array) -> Array:
    if sparsity is not None:
        raise ValueError(f"sparsity, keep: give one of them, got both ({sparsity!r})")
    if not _static(plan)["together"]:
        raise ValueError("keep: counts for each layer need a Python int, not an array")
    return keep.reshape(1)


def _budgets(
    plan: _Plan,
    sparsity: Sparsity | None,
    rounds: int | None,
    schedule: Callable[..., Schedule],
    keep: Sequence[int] | None,
) -> list[int]:
    if keep is not None:
        if sparsity is not None or rounds not in (None, len(keep)):
            raise ValueError(
                f"keep: it has {len(keep)} rounds and takes the place of sparsity "
                f"({sparsity!r}) and rounds ({rounds!r})"
            )
        return [operator.index(k) for k in keep]
    if isinstance(sparsity, Mapping):
        raise ValueError(
            "sparsity: in rounds it is one number; spread it with `allocation`"
        )
    if sparsity is None or rounds is None or rounds < 1:
        raise ValueError(
            f"sparsity, rounds: give both (at least one round), got {sparsity!r} and "
            f"{rounds!r}"
        )
    selection.check_sparsity(sparsity)
    at = schedule(sparsity, steps=rounds)
    return [selection.keep_count(plan.size, float(at(t + 1))) for t in range(rounds)]


def _check_room(
    units: Units, plan: _Plan, counts: np.ndarray | Array, living: Sequence[Array]
) -> None:
    if not selection.is_concrete(counts, *living):
        return
    alive = []
    for group, units_alive in zip(units.groups, living, strict=True):
        axis = group.stack
        front = (
            units_alive[None] if axis is None else jnp.moveaxis(units_alive, axis, 0)
        )
        alive += jnp.sum(front.reshape(front.shape[0], -1), axis=1).tolist()
    if _static(plan)["together"]:
        _check_counts([sum(alive)], counts, ["the network"])
    else:
        _check_counts(alive, counts, [layer.path for layer in plan.layers])


def _check_counts(
    alive: Sequence[int], counts: np.ndarray | Array, names: Sequence[str]
) -> None:
    for have, want, name in zip(alive, np.asarray(counts).tolist(), names, strict=True):
        if want > have:
            raise ValueError(
                f"within: {want} units of {name} are to survive, but only {have} live"
            )


def _check_no_budget(
    sparsity: Sparsity | None, keep: Any, allocation: Allocation | None
) -> None:
    for name, value in (
        ("sparsity", sparsity),
        ("keep", keep),
        ("allocation", allocation),
    ):
        if value is not None:
            raise ValueError(f"{name}: N:M units fix the budget, got {value!r}")


def _check_batches(batch: Batch, batches: Batch, rounds: int) -> None:
    if batch is not None:
        raise ValueError("batch, batches: give one of them")
    for leaf in trees.leaves_of(batches):
        if leaf.shape[:1] != (rounds,):
            raise ValueError(
                f"batches: the leaf {leaf.path!r} has shape {leaf.shape}, but there "
                f"are {rounds} rounds"
            )


def _leaves_of(units: Units, tree: PyTree) -> list[trees.Leaf]:
    leaves = jax.tree.leaves(tree)
    return [leaf._replace(value=leaves[leaf.place]) for leaf in units.leaves]


def _in_unit_space(units: Units, scores: Any) -> bool:
    if units.tree is None or not isinstance(scores, list | tuple):
        return False
    if jax.tree.structure(scores) == jax.tree.structure(units.tree):
        return False
    found = [np.shape(score) for score in jax.tree.leaves(scores)]
    return found == [group.shape for group in units.groups]


def _named(units: Units, scores: Sequence[Array]) -> list[trees.Leaf]:
    pairs = zip(units.groups, scores, strict=True)
    return [group.leaf._replace(value=score) for group, score in pairs]


def _expand(
    units: Units, tree: PyTree, keeps: Sequence[Array], within: Masks | None
) -> Masks:
    masks = units_lib.expand(units, tree, keeps)
    return masks if within is None else masks_lib.intersection(masks, within)
