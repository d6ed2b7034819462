"""Tables and pictures of the runs in ``results.jsonl``, and of nothing else.

``python -m experiments.report --workdir=runs/compare`` makes again what
:mod:`experiments.compare` shows at its end. Runs belong together if they share the
task, the epochs and the batch size; each such *setting* gets a table and two pictures.
Where a method, a sparsity and a seed occur twice, the later line counts.
"""

import collections
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table
from absl import app, flags
from matplotlib import axes as mpl_axes
from matplotlib import colormaps, lines, ticker
from matplotlib import figure as mpl_figure

from experiments import methods, results
from experiments.results import Record

DENSE = "dense"
# Paul Tol's "muted" scheme: distinct also for the colour-blind, and told apart by
# markers where it is not.
_COLORS = (
    "#332288",
    "#CC6677",
    "#117733",
    "#DDAA33",
    "#88CCEE",
    "#882255",
    "#44AA99",
    "#AA4499",
)
_MARKERS = "osD^vPX*"
_PERCENTS = (0, 20, 40, 60, 70, 80, 90, 95, 97, 98, 99, 100)


class Setting(NamedTuple):
    """What runs must share to stand in one table."""

    task: str
    epochs: int
    batch_size: int

    @property
    def stem(self) -> str:
        """The beginning of the names of the setting's files."""
        return f"{self.task}-epochs{self.epochs}-batch{self.batch_size}"


class Summary(NamedTuple):
    """A test metric over seeds: mean, standard deviation (n - 1) and number."""

    mean: float
    std: float
    seeds: int


def by_setting(records: Sequence[Record]) -> dict[Setting, list[Record]]:
    """Returns the runs of each setting; of equal runs the last."""
    groups = collections.defaultdict(dict)
    for record in records:
        config = record["config"]
        setting = Setting(*(config[name] for name in Setting._fields))
        run = config["method"], config["sparsity"], config["seed"]
        groups[setting][run] = record
    return {setting: list(runs.values()) for setting, runs in groups.items()}


def summarize(
    records: Sequence[Record], metric: str = "accuracy"
) -> dict[tuple[str, float], Summary]:
    """Returns the test metric over seeds, by method and sparsity.

    A run without a finite value counts as nan.

    Example:
        >>> config = {"method": "snip", "sparsity": 0.9}
        >>> runs = [{"config": config, "test": {"accuracy": a}} for a in (0.8, 0.9)]
        >>> summary = summarize(runs)["snip", 0.9]
        >>> round(summary.mean, 3), round(summary.std, 3), summary.seeds
        (0.85, 0.071, 2)
    """
    values = collections.defaultdict(list)
    for record in records:
        value = record["test"][metric]
        run = record["config"]["method"], record["config"]["sparsity"]
        values[run].append(np.nan if value is None else value)
    return {
        run: Summary(
            float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, len(v)
        )
        for run, v in values.items()
    }


def ordered(names: Sequence[str]) -> list[str]:
    """Returns names of methods without repetition, in the order of the registry.

    Names that the registry does not have come last.
    """
    known = [name for name in methods.__all__ if name in names]
    return known + sorted(set(names) - set(known))


def table(setting: Setting, records: Sequence[Record]) -> rich.table.Table:
    """Returns the test accuracies: a row a method, a column a sparsity."""
    summary = summarize(records)
    names, sparsities = axes_of(records)
    most = max((s.seeds for s in summary.values()), default=0)
    best = {
        s: max((e.mean for (n, at), e in summary.items() if at == s), key=_or_lowest)
        for s in sparsities
    }
    out = rich.table.Table(
        title=f"{setting.task}: test accuracy in %, mean ± std of {count(most)}",
        caption=_caption(setting, records),
        box=rich.box.SIMPLE_HEAD,
        title_style="bold",
        min_width=72,
        padding=(0, 0, 0, 1),
    )
    out.add_column("sparsity", no_wrap=True)
    for sparsity in sparsities:
        out.add_column(f"{sparsity:g}", justify="right", no_wrap=True)
    for name in names:
        cells = []
        for sparsity in sparsities:
            entry = summary.get((name, sparsity))
            cell = _cell(entry, most)
            is_best = entry is not None and entry.mean == best[sparsity]
            cells.append(f"[bold]{cell}[/bold]" if is_best else cell)
        out.add_row(name, *cells)
    return out


def _or_lowest(value: float) -> float:
    return value if np.isfinite(value) else -np.inf


def _caption(setting: Setting, records: Sequence[Record]) -> str:
    dense = summarize(records).get((DENSE, 0.0))
    parts = [] if dense is None else [f"dense: {_cell(dense, dense.seeds)}"]
    parts.append(f"{setting.epochs} epochs")
    twice = ordered([r["config"]["method"] for r in records if len(r["history"]) > 1])
    if twice:
        parts.append(f"as many before pruning for {', '.join(twice)}")
    return "; ".join([*parts, sources(records)])


def sources(records: Sequence[Record]) -> str:
    """Returns where the data of runs comes from."""
    return "; ".join(sorted({record["source"] for record in records}))


def _cell(summary: Summary | None, most: int) -> str:
    if summary is None:
        return "-"
    text = f"{100 * summary.mean:.1f}"
    if summary.seeds > 1:
        text += f" ± {100 * summary.std:.1f}"
    return text if summary.seeds == most else f"{text} (n={summary.seeds})"


def count(seeds: int) -> str:
    """Returns a number of seeds in words."""
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def axes_of(records: Sequence[Record]) -> tuple[list[str], list[float]]:
    """Returns the rows and columns of a table: methods but dense, and sparsities."""
    sparse = [r["config"] for r in records if r["config"]["method"] != DENSE]
    names = ordered([config["method"] for config in sparse])
    return names, sorted({config["sparsity"] for config in sparse})


def accuracy_figure(setting: Setting, records: Sequence[Record]) -> mpl_figure.Figure:
    """Draws test accuracy against compression, 1 / density, for each method.

    Lines are means over seeds, bands one standard deviation to either side, and the
    dashed line is the dense network. The scale is that of the logarithm of the error,
    which tells methods apart that are all close to the dense network.
    """
    summary = summarize(records)
    names, sparsities = axes_of(records)
    compression = {s: 1 / (1 - s) for s in sparsities}
    figure = mpl_figure.Figure(figsize=(8.0, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    dense = summary.get((DENSE, 0.0))
    if dense is not None:
        axes.axhspan(
            100 * (dense.mean - dense.std),
            100 * (dense.mean + dense.std),
            color="0.5",
            alpha=0.15,
            linewidth=0,
        )
        axes.axhline(
            100 * dense.mean, color="0.3", linestyle="--", linewidth=1.2, label=DENSE
        )
    for name in names:
        have = [s for s in sparsities if (name, s) in summary]
        x = [compression[s] for s in have]
        mean = np.array([100 * summary[name, s].mean for s in have])
        std = np.array([100 * summary[name, s].std for s in have])
        style = _style(name)
        low, high = np.clip([mean - std, mean + std], 0, 100)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)
        axes.plot(x, mean, markersize=5, linewidth=1.6, label=name, **style)
    axes.set_xscale("log")
    ticks = list(compression.values())
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("compression of the prunable weights, 1 / density")
    axes.set_yscale("function", functions=(_from_percent, _to_percent))
    axes.set_ylim(*_limits(summary.values()))
    axes.yaxis.set_major_locator(ticker.FixedLocator(_PERCENTS))
    axes.set_ylabel("test accuracy in % (log scale of the error)")
    most = max((s.seeds for s in summary.values()), default=0)
    title = f"{setting.task}, mean ± std of {count(most)}\n{sources(records)}"
    axes.set_title(title, loc="left", fontsize="medium")
    _tidy(axes)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def density_figure(setting: Setting, records: Sequence[Record]) -> mpl_figure.Figure:
    """Draws the kept fraction of each layer: a panel a method, a line a sparsity.

    The densities are means over seeds on a logarithmic axis that is linear near 0, so
    that a layer from which everything was removed can be seen.
    """
    names, sparsities = axes_of(records)
    values = collections.defaultdict(list)
    for record in records:
        config = record["config"]
        values[config["method"], config["sparsity"]].append(record["density"])
    layers = list(next(d for runs in values.values() for d in runs))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = mpl_figure.Figure(
        figsize=(2.4 * columns + 1.4, 2.3 * rows + 0.6), dpi=150, layout="constrained"
    )
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    shades = colormaps["viridis"](np.linspace(0.9, 0.0, len(sparsities)))
    lowest = min((1 - s for s in sparsities), default=0.1) / 10
    for name, axes in zip(names, panels.flat, strict=False):
        for sparsity, color in zip(sparsities, shades, strict=True):
            runs = values.get((name, sparsity))
            if runs is None:
                continue
            mean = [float(np.mean([run[layer] for run in runs])) for layer in layers]
            axes.plot(
                mean, color=color, marker="o", markersize=4, label=f"{sparsity:g}"
            )
        axes.set_title(name, loc="left", fontsize="medium")
        axes.set_yscale("symlog", linthresh=lowest, linscale=0.4)
        axes.set_ylim(0, 1.3)
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        # A deep network has more layers than there is room for names.
        named = range(0, len(layers), -(-len(layers) // 10))
        labels = [layers[i].removesuffix("/kernel") for i in named]
        axes.set_xticks(named, labels, rotation=90 if len(layers) > 4 else 0)
        axes.set_xlim(-0.3, len(layers) - 0.7)
        _tidy(axes)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("layer")
    figure.supylabel("density: kept fraction of the layer's weights")
    title = f"{setting.task}: where the weights are kept\n{sources(records)}"
    figure.suptitle(title, x=0.02, ha="left", fontsize="medium")
    keys = [
        lines.Line2D([], [], color=color, marker="o", markersize=4, label=f"{s:g}")
        for s, color in zip(sparsities, shades, strict=True)
    ]
    figure.legend(
        handles=keys, title="sparsity", loc="outside right center", frameon=False
    )
    return figure


def _limits(summaries: Iterable[Summary]) -> tuple[float, float]:
    """Returns limits that hold all bands, with some air."""
    means = np.array([100 * summary.mean for summary in summaries])
    stds = np.array([100 * summary.std for summary in summaries])
    lowest, highest = np.nanmin(means - stds), np.nanmax(means + stds)
    return max(lowest - 5, 0), min(highest + 0.4 * (100 - highest), 100)


def _from_percent(accuracy: np.ndarray) -> np.ndarray:
    # Half a percent more than the error, so that 100 % has a place.
    return -np.log10(np.maximum(100.5 - accuracy, 1e-3))


def _to_percent(place: np.ndarray) -> np.ndarray:
    return 100.5 - 10.0**-place


def _style(name: str) -> dict[str, Any]:
    sparse = [method for method in methods.__all__ if method != DENSE]
    # A method that is not in the registry any more gets the style after the last.
    place = sparse.index(name) if name in sparse else len(sparse)
    color, turn = _COLORS[place % len(_COLORS)], place // len(_COLORS)
    return {
        "color": color,
        # In the second turn of the colours lines are dashed and markers hollow.
        "marker": _MARKERS[(place + 3 * turn) % len(_MARKERS)],
        "linestyle": ("-", (0, (4, 1.5)))[turn % 2],
        "markerfacecolor": (color, "white")[turn % 2],
    }


def _tidy(axes: mpl_axes.Axes) -> None:
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def write(
    workdir: pathlib.Path, records: Sequence[Record], console: rich.console.Console
) -> list[pathlib.Path]:
    """Prints the table of every setting and saves its pictures beside the results.

    Args:
        workdir: where the pictures go.
        records: the runs.
        console: where the tables go.

    Returns:
        The paths of the pictures.
    """
    paths = []
    for setting, runs in by_setting(records).items():
        console.print(table(setting, runs))
        if not axes_of(runs)[0]:
            continue
        for kind, draw in _PICTURES.items():
            path = workdir / f"{setting.stem}-{kind}.png"
            draw(setting, runs).savefig(path)
            paths.append(path)
    for path in paths:
        console.print(f"saved {path}", highlight=False, soft_wrap=True)
    return paths


_PICTURES: Mapping = {"accuracy": accuracy_figure, "density": density_figure}


def main(argv: Sequence[str]) -> None:
    """Reports on the results in ``--workdir``."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    workdir = pathlib.Path(flags.FLAGS.workdir)
    try:
        found = results.read(workdir / results.FILE)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not found.records:
        sys.exit(f"error: workdir: no results in {workdir / results.FILE}")
    console = rich.console.Console()
    if found.torn:
        path = workdir / results.FILE
        text = f"{path}: the last line is half-written and left out"
        console.print(text, soft_wrap=True)
    write(workdir, found.records, console)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/compare", "The directory of the results.")
    app.run(main)
