"""The columns of the table of all results, for the terminal and for the page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lit_clip.evaluation.overview import COLUMNS, Column, Row, means, papers_percent, percent, rows
from lit_clip.evaluation.report.chart_style import run_name


class ResultColumn(NamedTuple):
    """A column, as text.

    Attributes:
        title: its heading.
        cells: one for each row of the overview.
        mean: over the sets that have a figure in the paper too.
        ours: whether the values are this run's.
    """

    title: str
    cells: list[str]
    mean: str = ""
    ours: bool = False


def result_columns(found: Sequence[Row], others: Mapping[str, Mapping[str, Any]]) -> Iterator[ResultColumn]:
    """Yield the columns that have values: results with the paper's and other runs' beside them, then the counts.

    Args:
        found: rows of this run.
        others: results of other runs to compare with, by path or name.
    """
    for column in COLUMNS:
        yield from _compared(found, others, column)
    yield ResultColumn("baseline", [percent(row.baseline) for row in found])
    yield ResultColumn("images", ["" if row.images is None else f"{row.images:,}" for row in found])
    yield ResultColumn("skipped", [f"{row.skipped:,}" if row.skipped else "" for row in found])


def _compared(found: Sequence[Row], others: Mapping[str, Mapping[str, Any]], column: Column) -> list[ResultColumn]:
    mean = means(found, column)
    values = [percent(row.values.get(column)) for row in found]
    ours = ResultColumn(COLUMNS[column], values, percent(mean and mean.ours), ours=True)
    papers = ResultColumn(
        "paper", [papers_percent(row.papers.get(column)) for row in found], percent(mean and mean.papers)
    )
    runs = []
    for name, other in others.items():
        known = {(row.name, row.metric): row.values.get(column) for row in rows(other)}
        runs.append(ResultColumn(run_name(name), [percent(known.get((row.name, row.metric))) for row in found]))
    runs = [run for run in runs if any(run.cells)]
    if not runs and not any(values):
        return []
    return [ours, *([papers] if any(papers.cells) else []), *runs]
