"""The results of an evaluation as a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from lit_clip.evaluation.overview import COLUMNS, STATUSES, means, metric_words, rows
from lit_clip.evaluation.published import PAPER, nearest, papers_name
from lit_clip.evaluation.report.result_columns import ResultColumn, result_columns
from lit_clip.tools.console import Console, Text

WIDE = 130  # columns of a file
HEADS = {  # narrow
    "zero-shot": "zero-\nshot",
    "linear probe": "linear\nprobe",
    "few-shot": "few-\nshot",
    "baseline": "base-\nline",
    "skipped": "skip-\nped",
}


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print :func:`results_table`, and below it what was not evaluated and why."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDE)  # a file has room
    console.print(results_table(results))
    for row in rows(results):
        if row.status != "done":
            reason = f": {row.reason}" if row.reason else ""
            console.print(f"{row.name}: {STATUSES.get(row.status, row.status)}{reason}", soft_wrap=True)


def results_table(results: Mapping[str, Any]) -> Table:
    """Return a row for each set and metric, in %, with the figures of the paper's nearest model.

    Args:
        results: contents of a ``results.json``.
    """
    found = rows(results)
    columns = list(result_columns(found, {}))
    caption = Text(_caption(results, columns), justify="left")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, caption=caption)
    table.add_column("set", overflow="fold", min_width=12)
    table.add_column("metric", overflow="fold", min_width=10)
    for column in columns:
        style = "dim" if column.title == "paper" else ""
        table.add_column(HEADS.get(column.title, column.title), justify="right", no_wrap=True, style=style)
    for place, row in enumerate(found):
        metric = STATUSES.get(row.status, row.status) or metric_words(row.metric)
        table.add_row(*map(Text, [row.name, metric, *(column.cells[place] for column in columns)]))
    counts = sorted({mean.sets for mean in (means(found, column) for column in COLUMNS) if mean})
    if counts and sum(bool(row.values) for row in found) > 1:
        table.add_section()
        table.add_row(
            "mean",
            f"of {' and '.join(map(str, counts))} set{'s' * (counts != [1])}",
            *(column.mean for column in columns),
        )
    return table


def _caption(results: Mapping[str, Any], columns: Sequence[ResultColumn]) -> str:
    papers = [column for column in columns if column.title == "paper"]
    if not papers:
        return "in %"
    near = nearest(results.get("model") or {})
    unchecked = any(cell.endswith("?") for column in papers for cell in column.cells)
    note = "; ? a figure that could not be checked" if unchecked else ""
    return f"in %; paper: {PAPER}, {papers_name(near.name)} ({near.rule}){note}"
