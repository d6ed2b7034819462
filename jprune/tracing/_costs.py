"""What a network costs: operations, parameters and outputs of each leaf."""

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike

from jprune import masks as masks_lib
from jprune import trees
from jprune.tracing import _jax_api
from jprune.tracing._contractions import DATA, Contraction, Origin, Walk
from jprune.tracing._couplings import is_statistic
from jprune.types import ApplyFn, Masks, Params, Prunable

ACTIVATIONS = "activations x activations"
CONSTANTS = "constants"


class CostRow(NamedTuple):
    """The cost of a leaf, or of what is reported beside the leaves.

    Attributes:
        shape: the shape of the leaf.
        parameters: its living entries; none for a statistic.
        bytes: their bytes, without those of the mask.
        macs: the multiply-accumulate operations charged to it, at its density.
        outputs: the entries of what the contractions charged to it return.
        output_bytes: their bytes.
        dense_parameters: its entries, without masks.
        dense_macs: its operations, without masks.
    """

    shape: tuple[int, ...]
    parameters: int = 0
    bytes: int = 0
    macs: int = 0
    outputs: int = 0
    output_bytes: int = 0
    dense_parameters: int = 0
    dense_macs: int = 0


class Cost(NamedTuple):
    """The cost of one call of a function.

    Attributes:
        rows: by path, in flattening order: one for each leaf, one for each set of
            leaves that are multiplied as one (their paths joined by ``" + "``), and, if
            there are such contractions, ``"activations x activations"`` and
            ``"constants"`` (products in which no parameter takes part).
    """

    rows: Mapping[str, CostRow]

    @property
    def parameters(self) -> int:
        """The living parameters."""
        return self._total("parameters")

    @property
    def bytes(self) -> int:
        """The bytes of what lives, statistics included and masks not."""
        return self._total("bytes")

    @property
    def macs(self) -> int:
        """The multiply-accumulate operations at the density of the masks."""
        return self._total("macs")

    @property
    def flops(self) -> int:
        """Two for each MAC; see :func:`cost`."""
        return 2 * self.macs

    @property
    def outputs(self) -> int:
        """The entries of the results of contractions."""
        return self._total("outputs")

    @property
    def output_bytes(self) -> int:
        """Their bytes."""
        return self._total("output_bytes")

    @property
    def dense_parameters(self) -> int:
        """The parameters, without masks."""
        return self._total("dense_parameters")

    @property
    def dense_macs(self) -> int:
        """The multiply-accumulate operations, without masks."""
        return self._total("dense_macs")

    @property
    def dense_flops(self) -> int:
        """Two for each MAC, without masks."""
        return 2 * self.dense_macs

    def _total(self, name: str) -> int:
        return sum(getattr(row, name) for row in self.rows.values())

    def summary(self) -> str:
        """Returns a table for people; see :func:`cost` for an example."""
        header = ("leaf", "shape", "parameters", "bytes", "MACs", "output bytes")
        rows: list[tuple[str, ...]] = [header]
        for path, row in self.rows.items():
            rows.append(_printed(path, str(row.shape) if row.shape else "", row))
        total = [self._total(name) for name in CostRow._fields[1:]]
        rows.append(_printed("total", "", CostRow((), *total)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def _printed(path: str, shape: str, row: CostRow) -> tuple[str, ...]:
    macs = f"{row.macs:,}"
    if row.macs != row.dense_macs:
        macs += f" ({row.macs / row.dense_macs:.1%})"
    return (
        path,
        shape,
        f"{row.parameters:,}",
        f"{row.bytes:,}",
        macs,
        f"{row.output_bytes:,}",
    )


def cost(
    fn: ApplyFn,
    params: Params,
    *inputs: Any,
    masks: Masks | None = None,
    statistics: Prunable = None,
    unknown: str = "error",
) -> Cost:
    """Returns what a call of a function costs, for each leaf of its parameters.

    ``fn(params, *inputs)`` is traced, not run; shapes are enough. All numbers are for
    the inputs as given: one example is a batch of one.

    **MACs** are those of matrix products and convolutions, padding included, each
    charged to the parameters it multiplies by. Where these are several leaves side by
    side in one array, as the concatenated kernels of an LSTM, it is divided among them
    by size; where they are mixed, as in ``W + A @ B``, it has a row of its own; a leaf
    that only scales a larger one, as in weight normalisation, is charged nothing.
    Kernels that are looked up by data are data.

    **FLOPs** are two for each MAC. Biases, norms, activation functions, pooling and
    look-ups are not counted; a bias or an activation function takes about one operation
    for each of the ``outputs``.

    What a ``scan`` does counts as often as it does it, what a ``while`` does counts
    once, for the number of its turns is not known, and of the branches of a ``cond``
    the dearest counts. A gradient of a loss may be given too: its products of
    activations and cotangents are activations x activations.

    With **masks**, the parameters and MACs of a leaf are counted at the density of its
    own mask. So a removed channel saves the products that read it only if the masks of
    the next layer say so too, as masks from :func:`couplings` do. A row of several
    leaves stays dense. MACs are exact where every weight is used equally often, as in
    all but a transposed convolution, where they are rounded. Outputs keep their size;
    those of a smaller network, and products of activations with fewer channels, are in
    the cost of what :func:`shrink` returns.

    Args:
        fn: ``(params, *inputs) -> outputs``.
        params: any pytree of arrays or their shapes.
        *inputs: what else the function takes: arrays or shapes.
        masks: masks that fit the parameters.
        statistics: which leaves are no parameters, see :func:`couplings`.
        unknown: ``"error"``, or ``"free"`` to count nothing for a primitive of which
            nothing is known.

    Returns:
        A :class:`Cost`: rows by path, totals, and ``summary()``, a table.

    Raises:
        NotImplementedError: a primitive is unknown.
        ValueError: the masks do not fit or are traced, or a pattern matches nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> def fn(params, x):
        ...     return jnp.tanh(x @ params["a"] + params["bias"]) @ params["b"]
        >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)), "bias": jnp.ones(4)}
        >>> masks = {"a": jnp.arange(4)[None] > 0, "b": True, "bias": True}
        >>> print(cost(fn, params, jnp.ones((1, 3)), masks=masks).summary())
        leaf   shape   parameters  bytes        MACs  output bytes
        a      (3, 4)           9     36   9 (75.0%)            16
        b      (4, 2)           8     32           8             8
        bias   (4,)             4     16           0             0
        total                  21     84  17 (85.0%)            24
    """
    if unknown not in ("error", "free"):
        raise ValueError(f"unknown: {unknown!r} is neither 'error' nor 'free'")
    closed, _ = _jax_api.trace(fn, params, *inputs)
    leaves = trees.leaves_of(trees.shapes_of(params))
    variables = closed.jaxpr.invars
    args = [Origin(False, {frozenset([leaf.place]): leaf.size}) for leaf in leaves]
    rest = [DATA] * (len(variables) - len(leaves))
    _, found = Walk(unknown).run(closed, [*args, *rest])
    kept = [leaf.size for leaf in leaves] if masks is None else _kept(masks, params)
    still = trees.selector(statistics, leaves, "statistics", is_statistic)
    rows = {}
    for leaf, living in zip(leaves, kept, strict=True):
        itemsize = _jax_api.aval(variables[leaf.place]).dtype.itemsize
        counts = not still(leaf)
        rows[leaf.path] = CostRow(
            shape=leaf.shape,
            parameters=living * counts,
            bytes=living * itemsize,
            dense_parameters=leaf.size * counts,
        )
    for own in found:
        for path, row in _charges(own, leaves, kept):
            before = rows.get(path, CostRow(()))
            sums = map(operator.add, before[1:], row[1:])
            rows[path] = CostRow(before.shape, *sums)
    return Cost(rows)


def _charges(
    own: Contraction, leaves: Sequence[trees.Leaf], kept: Sequence[int]
) -> list[tuple[str, CostRow]]:
    """Returns what a contraction adds to which rows."""
    if not own.pieces:
        path = ACTIVATIONS if own.of_data else CONSTANTS
        pieces = {path: (1, 1, 1)}
    else:
        pieces = {}
        for places, size in own.pieces.items():
            path = " + ".join(leaves[place].path for place in sorted(places))
            # A mixture of leaves may be zero nowhere.
            alone = min(places) if len(places) == 1 else None
            density = (1, 1) if alone is None else (kept[alone], leaves[alone].size)
            pieces[path] = (size, *density)
    sizes = [size for size, _, _ in pieces.values()]
    macs, outputs = (_split(total, sizes) for total in (own.macs, own.outputs))
    return [
        (
            path,
            CostRow(
                shape=(),
                macs=_fraction(n, alive, of),
                outputs=out,
                output_bytes=out * own.itemsize,
                dense_macs=n,
            ),
        )
        for (path, (_, alive, of)), n, out in zip(
            pieces.items(), macs, outputs, strict=True
        )
    ]


def _split(total: int, sizes: Sequence[int]) -> list[int]:
    """Divides a number by size, into whole numbers with its sum."""
    whole = max(sum(sizes), 1)
    edges = [total * n // whole for n in itertools.accumulate(sizes, initial=0)]
    return [b - a for a, b in itertools.pairwise(edges)]


def _fraction(number: int, part: int, whole: int) -> int:
    """Returns ``number * part / whole``, rounded to a whole number, halves up."""
    whole = max(whole, 1)
    return (2 * number * part + whole) // (2 * whole)


def _kept(masks: Masks, params: Params) -> list[int]:
    """Returns the number of living entries of each leaf."""
    masks_lib.check(masks, params)
    found = []
    pairs = zip(trees.leaves_of(masks), trees.leaves_of(params), strict=True)
    for mask, leaf in pairs:
        if _jax_api.is_tracer(mask.value):
            raise ValueError(
                f"masks: {mask.path!r} is traced; costs are numbers, so take them "
                "outside of jit"
            )
        if not mask.shape:
            found.append(leaf.size)
            continue
        alive = int(np.count_nonzero(np.asarray(mask.value)))
        found.append(alive * (leaf.size // max(mask.size, 1)))
    return found


# Training.


def training_flops(
    method: str, dense: float, sparse: ArrayLike, *, every: int | None = None
) -> float:
    """Returns the FLOPs of a training step, by the accounting of RigL.

    A backward pass costs twice a forward pass. With ``f_D`` and ``f_S`` the FLOPs of a
    forward pass of the dense and the sparse network, a step costs on average::

        dense            3 f_D
        static, SET      3 f_S
        SNFS             2 f_S + f_D
        RigL             (3 f_S T + 2 f_S + f_D) / (T + 1)
        gradual          mean over steps t of 3 f_S(t)

    SNFS needs the dense gradient of the weights in every step, RigL in one step of
    each T + 1, which it takes to update the masks.

    Args:
        method: ``"dense"``, ``"static"``, ``"set"``, ``"snfs"``, ``"rigl"`` or
            ``"gradual"``.
        dense: f_D, such as ``cost(...).dense_flops``.
        sparse: f_S, such as ``cost(..., masks=masks).flops``. For ``"gradual"`` those
            of each step, or of equally long phases: with one density for all layers,
            ``f_D (1 - s_t)`` at sparsities s_t.
        every: T, the steps from one update of the masks to the next; only RigL's.

    Raises:
        ValueError: the method is none of these, ``every`` is missing or below 1, or
            there are several f_S for a method whose f_S is constant.

    Example:
        >>> training_flops("rigl", 100.0, 20.0, every=99)
        60.8

    Reference:
        Evci et al., Rigging the lottery: making all tickets winners, 2020,
        arXiv:1911.11134.
    """
    f_s = float(np.mean(np.asarray(sparse, np.float64)))
    if np.ndim(sparse) and method != "gradual":
        raise ValueError(f"sparse: shape {np.shape(sparse)}; {method!r} takes a number")
    if method == "rigl" and (every is None or every < 1):
        raise ValueError(
            f"every: {every!r}; RigL updates its masks every so many steps"
        )
    steps = every or 1
    totals = {
        "dense": 3 * dense,
        "static": 3 * f_s,
        "set": 3 * f_s,
        "snfs": 2 * f_s + dense,
        "rigl": (3 * f_s * steps + 2 * f_s + dense) / (steps + 1),
        "gradual": 3 * f_s,
    }
    if method not in totals:
        raise ValueError(f"method: {method!r} is none of {sorted(totals)}")
    return float(totals[method])
