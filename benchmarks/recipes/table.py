"""The table of recipes: mean and spread over seeds."""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = {
    "trained names": ("trained_names", ("top1",)),
    "unseen names": ("unseen_names", ("top1", "top5")),
    "groups": ("unseen_groups", ("top1",)),
    "line art": ("line_art", ("top1", "top5")),
    "other artist": ("other_artist", ("top1", "top5")),
}


def print_table(runs: list[dict[str, Any]], part: str) -> None:
    """Print a row for each recipe, in the order of their first runs."""
    table = Table(title=f"{part} half: accuracy in %, mean (and half the range over seeds); top-1, top-5")
    for heading in ("recipe", "seeds", "steps", "CPU s", *COLUMNS):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for name in dict.fromkeys(run["recipe"] for run in runs):
        rows = [run for run in runs if run["recipe"] == name]
        seconds = statistics.fmean(row["seconds"] for row in rows)
        cells = (cell([row["metrics"][part] for row in rows], *column) for column in COLUMNS.values())
        table.add_row(name, str(len(rows)), f"{rows[0]['steps']:,}", f"{seconds:.0f}", *cells)
    Console(width=140).print(table)


def cell(rows: list[dict[str, float]], name: str, metrics: tuple[str, ...]) -> str:
    """Return one set's metrics, such as ``3.4 (0.2) 8.6 (0.5)``."""
    if any(f"{name}/{metrics[0]}" not in row for row in rows):
        return "not measured"
    values = [[100 * row[f"{name}/{metric}"] for row in rows] for metric in metrics]
    return "  ".join(
        f"{statistics.fmean(each):.1f}" + (f" ({(max(each) - min(each)) / 2:.1f})" if len(each) > 1 else "")
        for each in values
    )
