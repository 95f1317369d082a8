"""The table of ``on_a_gpu.py``, from its lines."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gpu.setting import Row

TARGETS = {"ViT-B-32": 12000, "ViT-B-16": 3200, "ViT-L-14": 800}  # samples per second on an H100
GAPS = 5


def print_summary(rows: Sequence[Row]) -> None:
    """Print what failed, then target, reached and open_clip for each model, then the largest gaps."""
    console = Console(width=120)
    for row in rows:
        if "failed" in row:
            console.print(f"failed: {row['part']}: {row.get('what', 'the part')}: {row['failed']}", markup=False)
    console.print(models(rows))
    console.print(gaps(rows))


def models(rows: Sequence[Row]) -> Table:
    table = Table("model", "target", "reached", "open_clip", title="samples per second, bfloat16")
    for model, target in TARGETS.items():
        of_model = [row for row in rows if row.get("model") == model]
        table.add_row(model, str(target), *(_fastest(of_model, side) for side in ("lit-clip", "open_clip")))
    return table


def _fastest(rows: Sequence[Row], side: str) -> str:
    found = [row for row in rows if row["side"].startswith(side)]
    if not found:
        return "not measured"
    best = max(found, key=lambda row: row["samples_per_second"])
    return f"{best['samples_per_second']:.0f} ({best['what'].partition(', ')[2]})"


def gaps(rows: Sequence[Row]) -> Table:
    """Return the largest gaps: how many times as fast it could be, by the targets and by what was measured beside."""
    found = [(row["times"], row["part"], row["gap"]) for row in rows if "gap" in row]
    for model, target in TARGETS.items():
        speeds = [row["samples_per_second"] for row in rows if row.get("model") == model and "lit" in row["side"]]
        if speeds:
            found.append((target / max(speeds), "target", model))
    table = Table("times as fast", "part", "what", title="largest gaps")
    for times, part, what in sorted(found, reverse=True)[:GAPS]:
        table.add_row(f"{times:.2f}", part, what)
    return table
