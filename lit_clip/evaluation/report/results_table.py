"""What an evaluation found, for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_clip.evaluation.overview import (
    COLUMNS,
    STATUSES,
    Column,
    Row,
    means,
    metric_words,
    papers_percent,
    percent,
    rows,
)
from lit_clip.evaluation.published import nearest, papers_name

WIDE = 130  # columns of a file
HEADS: dict[Column, str] = {"zero_shot": "zero-\nshot", "linear_probe": "linear\nprobe", "few_shot": "few-\nshot"}


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print :func:`results_table`, and below it what was not done and why."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDE)  # a file has room
    console.print(results_table(results))
    for row in rows(results):
        if row.status != "done":
            reason = f": {row.reason}" if row.reason else ""
            console.print(f"{row.name}: {STATUSES.get(row.status, row.status)}{reason}", markup=False, soft_wrap=True)


def results_table(results: Mapping[str, Any]) -> Table:
    """A row a set and metric, in %, with the paper's figures of the nearest of its models beside.

    Args:
        results: what a ``results.json`` holds.
    """
    found = rows(results)
    near = nearest(results.get("model") or {})
    columns: list[Column] = [column for column in COLUMNS if any(column in row.values for row in found)]
    caption = Text(_caption(found, columns, near.name, near.rule), justify="left")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, caption=caption)
    table.add_column("set", overflow="fold", min_width=12)
    table.add_column("metric", overflow="fold", min_width=10)
    for column in columns:
        table.add_column(HEADS[column], justify="right", no_wrap=True)
        if any(column in row.papers for row in found):
            table.add_column("paper", justify="right", no_wrap=True, style="dim")
    for name in ("prediction-\ning", "images", "skip-\nped"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        table.add_row(*(Text(cell) for cell in _cells(row, columns, found)))
    if sum(bool(row.values) for row in found) > 1:
        _add_means(table, found, columns)
    return table


def _cells(row: Row, columns: Sequence[Column], found: Sequence[Row]) -> list[str]:
    cells = [row.name, STATUSES.get(row.status, row.status) or metric_words(row.metric)]
    for column in columns:
        cells.append(percent(row.values.get(column)))
        if any(column in other.papers for other in found):
            cells.append(papers_percent(row.papers.get(column)))
    return [*cells, percent(row.baseline), "" if row.images is None else f"{row.images:,}", f"{row.skipped or ''}"]


def _add_means(table: Table, found: Sequence[Row], columns: Sequence[Column]) -> None:
    """Last, the means over the sets that have a figure in the paper too."""
    of_column = {column: means(found, column) for column in columns}
    known = [mean for mean in of_column.values() if mean]
    if not known:
        return
    counts = sorted({mean.sets for mean in known})
    cells = ["mean", f"of {' and '.join(map(str, counts))} sets"]
    for column, mean in of_column.items():
        cells.append(percent(mean and mean.ours))
        if any(column in other.papers for other in found):
            cells.append(percent(mean and mean.papers))
    table.add_section()
    table.add_row(*(Text(cell) for cell in cells))


def _caption(found: Sequence[Row], columns: Sequence[Column], model: str, rule: str) -> str:
    figures = [row.papers[column] for row in found for column in columns if column in row.papers]
    if not figures:
        return "in %"
    unchecked = "" if all(figure.verified for figure in figures) else "; ? a figure that could not be checked"
    return f"in %; paper: Radford et al. 2021, {papers_name(model)} ({rule}){unchecked}"
