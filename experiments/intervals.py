"""Means with intervals, and differences of methods, as Markdown for the documents.

``python -m experiments.intervals --workdir=runs/compare --pairs=snip:random`` prints
them for the runs in ``results.jsonl``. The runs of one seed make a pair.
"""

import math
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from experiments import methods, report, results, statistics
from experiments.results import Record
from experiments.statistics import Interval

Pair = tuple[str, str]


def tables(
    setting: report.Setting, records: Sequence[Record], pairs: Sequence[Pair] = ()
) -> str:
    """Returns the table of means and, if there are pairs, that of differences.

    Args:
        setting: of the runs.
        records: the runs.
        pairs: names of two methods to compare over the seeds that both have.
    """
    parts = [_means(setting, records)]
    if pairs:
        parts.append(_differences(records, pairs))
    return "\n\n".join(parts)


def _means(setting: report.Setting, records: Sequence[Record]) -> str:
    values = statistics.by_seed(records)
    names, sparsities = report.axes_of(records)
    found = {
        run: statistics.interval(list(seeds.values())) for run, seeds in values.items()
    }
    most = max(entry.seeds for entry in found.values())
    dense = found.get((report.DENSE, 0.0))
    lead = f"Test accuracy in % on `{setting.task}` ({report.sources(records)}), "
    lead += f"{setting.epochs} epochs: mean and 95 % interval over "
    lead += f"{report.count(most)}"
    if dense is not None:
        lead += f"; the dense network reaches {_cell(dense, most)}"
    if most == 1:
        lead += "; one seed is too few for an interval"
    rows = [
        [f"`{name}`", *(_cell(found.get((name, s)), most) for s in sparsities)]
        for name in names
    ]
    return f"{lead}.\n\n{_table(sparsities, rows)}"


def _cell(entry: Interval | None, most: int) -> str:
    if entry is None:
        return "-"
    text = f"{100 * entry.mean:.2f}"
    if entry.seeds > 1:
        text += f" ± {100 * entry.half:.2f}"
    return text if entry.seeds == most else f"{text} (n={entry.seeds})"


def _differences(records: Sequence[Record], pairs: Sequence[Pair]) -> str:
    values = statistics.by_seed(records)
    _, sparsities = report.axes_of(records)

    def of(name: str, sparsity: float) -> dict[int, float]:
        return values.get((name, 0.0 if name == report.DENSE else sparsity), {})

    rows = [
        [f"`{first}` - `{second}`"]
        + [verdict(statistics.paired(of(first, s), of(second, s))) for s in sparsities]
        for first, second in pairs
    ]
    lead = (
        "Differences in percentage points over pairs of the same seed: mean and 95 % "
        "interval, each for itself. Bold where the interval leaves 0 out; elsewhere "
        "these seeds are too few to tell the two apart."
    )
    return f"{lead}\n\n{_table(sparsities, rows)}"


def verdict(difference: Interval | None) -> str:
    """Returns a difference of accuracies in words.

    Example:
        >>> verdict(Interval(0.012, 0.004, 8)), verdict(Interval(-0.001, 0.004, 8))
        ('**+1.20 ± 0.40** (n=8)', '-0.10 ± 0.40 (n=8), too few to tell')
        >>> verdict(Interval(0.012, math.inf, 1)), verdict(None)
        ('+1.20 (n=1), too few to tell', '-')
    """
    if difference is None:
        return "-"
    text = f"{100 * difference.mean:+.2f}"
    if math.isfinite(difference.half):
        text += f" ± {100 * difference.half:.2f}"
    number = f"(n={difference.seeds})"
    if difference.is_decided:
        return f"**{text}** {number}"
    return f"{text} {number}, too few to tell"


def _table(sparsities: Sequence[float], rows: Sequence[Sequence[str]]) -> str:
    head = ["sparsity", *(f"{100 * s:g} %" for s in sparsities)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str]) -> None:
    """Prints the tables of every setting in ``--workdir``."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    path = pathlib.Path(flags.FLAGS.workdir) / results.FILE
    try:
        records = results.read(path).records
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not records:
        sys.exit(f"error: workdir: no results in {path}")
    pairs = [tuple(text.split(":")) for text in flags.FLAGS.pairs]
    settings = report.by_setting(records).items()
    print("\n\n".join(tables(setting, runs, pairs) for setting, runs in settings))


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the binary."""
    flags.DEFINE_string(
        "workdir",
        "runs/compare",
        "The directory of the results.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "pairs",
        [],
        "Methods to compare over the same seeds, such as rigl:set_,set_:static.",
        flag_values=values,
    )
    flags.register_validator(
        "pairs",
        lambda given: all(_is_pair(text) for text in given),
        f"must be first:second, with names out of {', '.join(methods.__all__)}",
        flag_values=values,
    )


def _is_pair(text: str) -> bool:
    names = text.split(":")
    return len(names) == 2 and set(names) <= set(methods.__all__)


if __name__ == "__main__":
    define_flags()
    app.run(main)
