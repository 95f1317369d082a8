"""The table of recipes: mean and spread over seeds."""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = (
    *("trained_names/top1", "unseen_names/top1", "unseen_names/top5", "unseen_groups/top1"),
    *("line_art/top1", "line_art/top5"),
)


def print_table(runs: list[dict[str, Any]], part: str) -> None:
    """Print a row for each recipe, the best line drawings first; metrics in per cent."""
    table = Table(title=f"{part} half, mean +- half the range over seeds, in %")
    for heading in ("recipe", "seeds", "steps", "CPU s", *COLUMNS):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_recipe.setdefault(run["recipe"], []).append(run)

    def mean(rows: list[dict[str, Any]], column: str) -> float:
        return statistics.fmean(row["metrics"][part][column] for row in rows)

    for name, rows in sorted(by_recipe.items(), key=lambda each: -mean(each[1], COLUMNS[-1])):
        cells = [name, str(len(rows)), f"{rows[0]['steps']:,}", f"{statistics.fmean(r['seconds'] for r in rows):.0f}"]
        for column in COLUMNS:
            values = [100 * row["metrics"][part][column] for row in rows]
            spread = (max(values) - min(values)) / 2
            cells.append(f"{statistics.fmean(values):.1f}" + (f" +- {spread:.1f}" if len(values) > 1 else ""))
        table.add_row(*cells)
    Console(width=160).print(table)
