"""The results as files: ``results.csv``, one value a line, and ``results.tex``, tables for a paper."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_clip.evaluation.comparison import THIS, THIS_RUN, over_seeds
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
from lit_clip.evaluation.report.chart_style import run_names
from lit_clip.evaluation.report.result_columns import Groups, Quantity, quantities, seed_values
from lit_clip.tools.atomic import replacing
from lit_clip.tools.text_files import no_formula

Results = Mapping[str, Any]
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
    """A line of ``results.csv``; values are fractions, empty where there is none.

    Attributes:
        run: ``this run``, or the other run's name.
        model: its name.
        set: name of the set, or of a group of sets.
        task: as in ``results.json``.
        shots: examples per class of a few-shot result, which is the mean over draws.
        metric: as in ``results.json``; ``mean`` for a group of sets, each by its own metric.
        value: of the metric.
        low: lower end of its 99.5 % interval.
        high: upper end.
        baseline: of the set's own metric.
        images: number of images evaluated.
    """

    run: str
    model: str
    set: str
    task: str
    shots: int | None
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    baseline: float | None = None
    images: int | None = None


def write_tables(results: Results, out: Path, others: Mapping[str, Results], groups: Groups | None = None) -> None:
    """Write ``results.csv`` and ``results.tex``.

    Args:
        results: contents of ``results.json``.
        out: the run's folder.
        others: results of other runs, by path or name.
        groups: names of runs that are seeds of one recipe.
    """
    runs = {THIS_RUN: results, **others}
    with (
        replacing(out / "results.csv") as draft,
        draft.open("w", newline="", encoding="utf-8", errors="replace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(Line._fields)
        writer.writerows(map(no_formula, line) for name, run in runs.items() for line in lines(name, run))
    with replacing(out / "results.tex") as draft:
        draft.write_text(latex(results, others, groups or {}), encoding="utf-8", errors="replace")


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
        for shots, mean in shots_of(entry).items():
            yield Line(run, model, name, "few_shot", shots, str(entry.get("metric") or "top1"), mean)
    found = rows(results)
    for column in COLUMNS:
        for mean in group_means(found, column):
            if mean.ours is not None:
                yield Line(run, model, mean.group, column, None, "mean", mean.ours)


class _Cell(NamedTuple):
    """A number of a LaTeX table: a value with its interval, or a mean over seeds with its standard deviation."""

    value: float
    interval: tuple[float, float] | None = None
    deviation: float | None = None


def latex(results: Results, others: Mapping[str, Results], groups: Groups) -> str:
    """Return a ``booktabs`` table for zero-shot, the linear probe and each number of shots that there are values of."""
    found = rows(results)
    tables = {name: {(row.name, row.metric): row for row in rows(other)} for name, other in others.items()}
    head = [
        r"% In %, with 99.5 % intervals; +/- is the standard deviation over seeds. Needs \usepackage{booktabs}.",
        "% Bold: not below the interval of the set's best result (Radford et al. 2021, appendix A.3).",
    ]
    blocks = [_latex_table(quantity, found, tables, groups) for quantity in quantities(found)]
    return "\n".join([*head, *(line for block in blocks for line in block), ""])


def _latex_table(
    quantity: Quantity,
    found: Sequence[Row],
    tables: Mapping[str, Mapping[tuple[str, str], Row]],
    groups: Groups,
) -> list[str]:
    grouped = {name for names in groups.values() for name in names}
    titles = run_names(name for name in tables if name not in grouped)
    columns: list[tuple[str, list[_Cell | None]]] = [(THIS_RUN, [_cell(quantity, row) for row in found])]
    for name, table in tables.items():
        if name in titles:
            columns.append((titles[name], [_cell(quantity, table.get((row.name, row.metric))) for row in found]))
    for group, names in groups.items():
        title = f"{group}, {len(names) + (group == THIS)} runs"
        columns.append((title, [_seeds(quantity, of_row) for of_row in seed_values(found, tables, names, group)]))
    columns = [(title, cells) for title, cells in columns if any(cells)]
    if not columns:
        return []
    kept = [place for place in range(len(found)) if any(cells[place] for _, cells in columns)]
    body = []
    for place in kept:
        cells = [of_run[place] for _, of_run in columns]
        names = [escape(found[place].name), escape(metric_words(found[place].metric))]
        body.append(" & ".join([*names, *_texts(cells)]) + r" \\")
    return [
        "",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(quantity.title.capitalize())}, \%}}",
        rf"\begin{{tabular}}{{ll{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(["set", "metric", *(escape(title) for title, _ in columns)]) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def _cell(quantity: Quantity, row: Row | None) -> _Cell | None:
    value = None if row is None else quantity.value(row)
    if row is None or value is None:
        return None
    return _Cell(value, row.intervals.get(quantity.column) if quantity.column else None)


def _seeds(quantity: Quantity, runs: Sequence[Row | None]) -> _Cell | None:
    seeds = over_seeds([None if run is None else quantity.value(run) for run in runs])
    return _Cell(seeds.mean, deviation=seeds.deviation) if seeds else None


def _texts(cells: Sequence[_Cell | None]) -> Iterator[str]:
    """Format the cells of a row, bold by the paper's rule if there are several."""
    known = [cell for cell in cells if cell]
    best = max(known, key=lambda cell: cell.value)
    least = best.interval[0] if best.interval else best.value
    for cell in cells:
        if cell is None:
            yield "--"
            continue
        text = percent(cell.value)
        if len(known) > 1 and cell.value >= least:
            text = rf"\textbf{{{text}}}"
        if cell.deviation is not None:
            text += rf" $\pm$ {percent(cell.deviation)}"
        elif cell.interval:
            text += rf" {{\scriptsize [{percent(cell.interval[0])}, {percent(cell.interval[1])}]}}"
        yield text


def escape(text: str) -> str:
    """Escape a text for LaTeX."""
    return "".join(SPECIAL.get(letter, letter if letter.isprintable() else " ") for letter in text)
