"""The table of recipes: mean and spread over seeds."""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(runs: list[dict[str, Any]], part: str) -> None:
    """Print a row for each recipe and each of its interpolations, in the order of their first runs."""
    columns = list(dict.fromkeys(name.partition("/")[0] for run in runs for name in run["metrics"][part]))
    table = Table(title=f"{part} half: accuracy in %, mean (and half the range over seeds); top-1, top-5")
    for heading in ("recipe", "seeds", "steps", "CPU s", "MB", *(column.replace("_", " ") for column in columns)):
        table.add_column(heading, justify="left" if heading == "recipe" else "right", no_wrap=heading == "recipe")
    for name in dict.fromkeys(run["recipe"] for run in runs):
        rows = [run for run in runs if run["recipe"] == name]
        costs = [f"{statistics.fmean(row[cost] for row in rows):,.0f}" for cost in ("seconds", "megabytes")]
        first = (name, str(len(rows)), f"{rows[0]['steps']:,}", *costs)
        table.add_row(*first, *cells([row["metrics"][part] for row in rows], columns))
        for alpha in rows[0].get("interpolated", ()):
            mixed = [row["interpolated"][alpha][part] for row in rows]
            table.add_row(f"{name}, alpha {float(alpha):g}", *first[1:], *cells(mixed, columns))
    Console(width=140).print(table)


def cells(rows: list[dict[str, float]], sets: list[str]) -> list[str]:
    """Return each set's metrics, such as ``3.4 (0.2)  8.6 (0.5)``."""
    return [
        cell([[100 * value for name, value in row.items() if name.startswith(f"{each}/")] for row in rows])
        for each in sets
    ]


def cell(rows: list[list[float]]) -> str:
    """Return one set's metrics: the mean over rows, and half the range."""
    if not all(rows):
        return "not measured"
    return "  ".join(
        f"{statistics.fmean(each):.1f}" + (f" ({(max(each) - min(each)) / 2:.1f})" if len(each) > 1 else "")
        for each in zip(*rows, strict=True)
    )
