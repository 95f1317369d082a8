"""Finished runs, kept as JSON lines, and how their results are shown."""

import json
import statistics
from pathlib import Path
from typing import Any


def finished(out: Path) -> list[dict[str, Any]]:
    """Return the finished runs of a folder."""
    file = out / "runs.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def keep(out: Path, run: dict[str, Any]) -> None:
    """Add a finished run."""
    with (out / "runs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")


def cell(values: list[float]) -> str:
    """Return the mean, and half the range, such as ``31.5 (2.0)``."""
    return f"{statistics.fmean(values):.1f} ({(max(values) - min(values)) / 2:.1f})"
