"""The results of an evaluation as a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from lit_clip.evaluation.overview import COLUMNS, STATUSES, Row, given_metrics, group_means, metric_words, rows, sets_of
from lit_clip.evaluation.published import PAPER, measured_weights, nearest, papers_name
from lit_clip.evaluation.report.result_columns import ResultColumn, merged_note, result_columns
from lit_clip.tools.console import Console, Text

WIDE = 130  # columns of a file
SET, METRIC = 12, 10  # least widths
SIDES = SET + METRIC + 5  # with the space around them
HEADS = {  # narrow
    "zero-shot": "zero-\nshot",
    "linear probe": "linear\nprobe",
    "measured": "meas-\nured",
    "baseline": "base-\nline",
    "skipped": "skip-\nped",
}


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print :func:`results_table`, and what was not evaluated; the report explains how to get missing sets."""
    console = console or Console(file_width=WIDE)
    console.print(results_table(results, console.width))
    found = rows(results)
    for line in incomplete_means(found):
        console.print(line, soft_wrap=True)
    missing = [row.name for row in found if row.status == "missing"]
    if missing:
        console.print(f"{STATUSES['missing']}: {', '.join(missing)}", soft_wrap=True)
    for row in found:
        if row.status not in ("done", "missing"):
            reason = f": {row.reason}" if row.reason else ""
            console.print(f"{row.name}: {STATUSES.get(row.status, row.status)}{reason}", soft_wrap=True)


def results_table(results: Mapping[str, Any], width: int = WIDE) -> Table:
    """Return a row for each metric of the evaluated sets, in %, beside the paper's nearest model.

    Columns that do not fit the terminal's ``width`` are left out, the least needed first.
    """
    found = [row for row in rows(results) if row.status == "done"]
    entries = dict(sets_of(results))
    columns = _fitting(list(result_columns(found, {})), width)
    caption = Text(_caption(results, columns, found), justify="left")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, caption=caption)
    table.add_column("set", overflow="fold", min_width=SET)
    table.add_column("metric", overflow="fold", min_width=METRIC)
    for column in columns:
        style = "dim" if column.title == "paper" else ""
        table.add_column(_head(column), justify="right", no_wrap=True, style=style)
    for place, row in enumerate(found):
        cells = [column.texts()[place] for column in columns]
        table.add_row(*map(Text, [row.name, metric_words(row.metric), *cells]))
        if found[place + 1 : place + 2] and found[place + 1].name == row.name:
            continue  # a set's rows are followed by those of its --metrics
        for metric, values in given_metrics(entries[row.name]).items():
            texts = {COLUMNS[column]: f"{value:.4g}" for column, value in values.items()}
            table.add_row(*map(Text, [row.name, metric, *(texts.get(column.title, "") for column in columns)]))
    for group in mean_groups(columns):
        table.add_section()
        table.add_row("mean", Text(f"of {group}"), *(column.means.get(group, "") for column in columns))
    return table


def _head(column: ResultColumn) -> str:
    return HEADS.get(column.title, column.title.replace(" ", "\n"))


def _fitting(columns: Sequence[ResultColumn], width: int) -> list[ResultColumn]:
    """Leave out columns that do not fit the terminal; the report has them."""
    few_shot = [column.title for column in columns if column.title[0].isdecimal()]
    for title in ("", "measured", *few_shot[:-1], "images", *few_shot[-1:], "paper", "baseline"):
        columns = [column for column in columns if column.title != title]
        cells = [[*_head(column).split("\n"), *column.texts(), *column.means.values()] for column in columns]
        if SIDES + sum(2 + max(map(len, of_column)) for of_column in cells) <= width:
            break
    return list(columns)


def mean_groups(columns: Sequence[ResultColumn]) -> list[str]:
    """Return the groups of sets for which a column has a mean."""
    return list(dict.fromkeys(group for column in columns for group, mean in column.means.items() if mean))


def incomplete_means(found: Sequence[Row]) -> list[str]:
    """Return a line for each incomplete group of sets; its mean is not shown."""
    lines: dict[str, list[str]] = {}
    for column, title in COLUMNS.items():
        for mean in group_means(found, column):
            if mean.missing:
                lines.setdefault(f"{mean.group}: no mean, {mean.counted}", []).append(title)
    return [f"{' and '.join(titles)}, {line}" for line, titles in lines.items()]


def _caption(results: Mapping[str, Any], columns: Sequence[ResultColumn], found: Sequence[Row]) -> str:
    model, titles = results.get("model") or {}, {column.title for column in columns}
    near, notes = nearest(model), ["in %"]
    if any(given_metrics(entry) for _, entry in sets_of(results)):
        notes = ["in %, --metrics as they are"]
    notes += [note] if (note := merged_note(found)) else []
    if "paper" in titles:
        notes.append(f"paper: {PAPER}, {papers_name(near.name)} ({near.rule})")
    if any(text.endswith("?") for column in columns if column.kind == "paper" for text in column.texts()):
        notes.append("? a figure that could not be checked")
    if "measured" in titles:
        notes.append(measured_note(model))
    return "; ".join(notes)


def measured_note(model: Mapping[str, Any]) -> str:
    """Return a note about the source of the figures in the column ``measured``."""
    weights = measured_weights(model)
    whose = weights if ":" in weights else f"OpenAI's {papers_name(weights)}"
    return f"measured: {whose} by open_clip or CLIP_benchmark, if the paper's figure is 1 point or more away or unknown"
