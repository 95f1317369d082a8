"""The results as files: ``results.csv`` with one value per line, ``results.tex`` with tables, TensorBoard's curves."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from lit_clip.errors import InputError
from lit_clip.evaluation.comparison import THIS_RUN
from lit_clip.evaluation.overview import (
    COLUMNS,
    Row,
    group_means,
    interval_of,
    metric_words,
    number,
    percent,
    rows,
    sets_of,
    shots_of,
    tasks_of,
)
from lit_clip.evaluation.report.results_table import Cell, Groups, result_columns
from lit_clip.tools.atomic import replacing
from lit_clip.tools.reading import write_csv

Results = Mapping[str, Any]
MEAN = "mean"  # of a group of sets
ORDER = ("ours", "run", "recipe")  # of columns in LaTeX
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{letter: f"{{{letter}}}" for letter in "[]*"},  # which the end of the row above would take for its options
}


class Line(NamedTuple):
    """A line of ``results.csv``; values are fractions, empty if missing.

    Few-shot values are means over draws. ``mean`` is the metric of a group of sets, each by its own.
    """

    run: str  # ``this run``, or the other run's name
    model: str
    set: str  # name of the set, or of a group of sets
    task: str  # as in results.json
    shots: int | None
    metric: str
    value: float
    low: float | None = None  # ends of the 99.5 % interval
    high: float | None = None
    baseline: float | None = None  # of the set's own metric
    images: int | None = None


def write_tables(results: Results, out: Path, others: Mapping[str, Results], groups: Groups | None = None) -> None:
    """Write ``results.csv`` and ``results.tex`` to the run's folder, with other runs by path or name."""
    runs = {THIS_RUN: results, **others}
    write_csv(out / "results.csv", [Line._fields, *(line for name, run in runs.items() for line in lines(name, run))])
    with replacing(out / "results.tex") as draft:
        draft.write_text(latex(results, others, groups or {}), encoding="utf-8", errors="replace")


def write_tensorboard(results: Results, out: Path) -> None:
    """Write event files to ``out/tensorboard``, and replace an earlier evaluation's.

    Scalars are named as in training (``zero_shot/<set>/top1``). The step of a few-shot scalar is its number of examples
    per class, that of everything else 0.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = out / "tensorboard"
    try:
        for old in folder.glob("events.out.tfevents.*"):  # TensorBoard would show both
            old.unlink()
        with SummaryWriter(folder) as writer:
            for line in lines("", results):
                if line.metric != MEAN:
                    writer.add_scalar(f"{line.task}/{line.set}/{line.metric}", line.value, line.shots or 0)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error


def lines(run: str, results: Results) -> Iterator[Line]:
    """Yield all metrics of a run, then the means over groups of sets."""
    model = str((results.get("model") or {}).get("name") or "")
    for name, entry in sets_of(results):
        for task, result in tasks_of(entry).items():
            for metric, value in (result.get("metrics") or {}).items():
                known, (low, high) = number(value), interval_of(result, metric) or (None, None)
                own = number(result.get("baseline")) if metric == entry.get("metric") else None
                if known is not None:
                    yield Line(run, model, name, task, None, metric, known, low, high, own, result.get("images"))
        for task, of in (("few_shot", "shots"), ("few_shot_head", "head")):
            for shots, mean in shots_of(entry, of).items():
                yield Line(run, model, name, task, shots, str(entry.get("metric") or "top1"), mean)
    found = rows(results)
    for column in COLUMNS:
        for mean in group_means(found, column):
            if mean.ours is not None:
                yield Line(run, model, mean.group, column, None, MEAN, mean.ours)


def latex(results: Results, others: Mapping[str, Results], groups: Groups) -> str:
    """Return a ``booktabs`` table for zero-shot, linear probe, and each number of shots with values."""
    found = rows(results)
    lines_of = [
        r"% In %, with 99.5 % intervals; +/- is the standard deviation over seeds. Needs \usepackage{booktabs}.",
        "% Bold: not below the interval of the set's best result (Radford et al. 2021, appendix A.3).",
    ]
    told = [column for column in result_columns(found, others, groups) if column.kind in ORDER]
    for title, of_quantity in groupby(told, key=lambda column: column.quantity):
        columns = sorted(of_quantity, key=lambda column: ORDER.index(column.kind))
        titles = [THIS_RUN if column.kind == "ours" else column.title for column in columns]
        cells = {name: column.cells for name, column in zip(titles, columns, strict=True) if any(column.cells)}
        lines_of += _table(title, cells, found)
    return "\n".join([*lines_of, ""])


def _table(title: str, columns: Mapping[str, Sequence[Cell | None]], found: Sequence[Row]) -> list[str]:
    body = []
    for row, *cells in zip(found, *columns.values(), strict=True):
        if any(cells):
            words = [escape(row.name), escape(metric_words(row.metric)), *_texts(cells)]
            body.append(" & ".join(words) + r" \\")
    return [
        "",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(title.capitalize())}, \%}}",
        rf"\begin{{tabular}}{{ll{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(["set", "metric", *map(escape, columns)]) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def _texts(cells: Sequence[Cell | None]) -> Iterator[str]:
    """Format the cells of a row; bold follows the paper's rule if there are several."""
    known = [cell for cell in cells if cell]
    best = max(known, key=lambda cell: cell.value or 0)
    least = best.interval[0] if best.interval else best.value or 0
    for cell in cells:
        if cell is None:
            yield "--"
            continue
        text = percent(cell.value)
        if len(known) > 1 and (cell.value or 0) >= least:
            text = rf"\textbf{{{text}}}"
        if cell.deviation is not None:
            text += rf" $\pm$ {percent(cell.deviation)}"
        elif cell.interval:
            text += rf" {{\scriptsize [{percent(cell.interval[0])}, {percent(cell.interval[1])}]}}"
        yield text


def escape(text: str) -> str:
    """Escape a text for LaTeX."""
    return "".join(SPECIAL.get(letter, letter if letter.isprintable() else " ") for letter in text)
