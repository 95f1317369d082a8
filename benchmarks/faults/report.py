"""The document about the matrix: ``docs/evidence/faults.md``."""

import datetime
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from string import Template

from benchmarks.faults.catalogue import FAULTS, STORE_TIMEOUT, Fault
from benchmarks.faults.cells import TOLERANCE, Cell, Outcome, all_cells
from benchmarks.faults.runs import EPOCHS, EVERY, GROUP_TIMEOUT, STEPS
from benchmarks.faults.surroundings import tables as surroundings

Outcomes = Mapping[tuple[Cell, int], Outcome]

TEMPLATE = Path(__file__).with_name("template.md")


def markdown(outcomes: Outcomes) -> str:
    """Return ``docs/evidence/faults.md``."""
    values = {"steps": STEPS, "epochs": EPOCHS, "every": EVERY, "tolerance": f"{TOLERANCE:g}"}
    limits = {"group": GROUP_TIMEOUT, "store": f"{STORE_TIMEOUT:g}"}
    tables = {
        "outcomes": _summary(outcomes),
        "others": _others(outcomes),
        "surroundings": surroundings(),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values | limits | tables)


def _summary(outcomes: Outcomes) -> str:
    counts = Counter(one.outcome for one in outcomes.values())
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "fsspec", "aiohttp"))
    rows = [_row(fault, [one for (cell, _), one in outcomes.items() if cell.fault == fault.name]) for fault in FAULTS]
    lines = [
        "## Outcomes",
        "",
        f"{datetime.date.today()}, {machine}, {versions}; other programs used the machine too.",
        f"{len({cell for cell, _ in outcomes})} of {len(all_cells())} cells run: {counts['same']} same, "
        f"{counts['clear end']} clear ends, {counts['other']} others.",
        "",
        "Seconds are from the fault to the end of the run.",
        "",
        "| name | fault | required | exit code | runs | as required | longest, s | limit, s |",
        "|---|---|---|---|--:|--:|--:|--:|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def _row(fault: Fault, outcomes: list[Outcome]) -> str:
    goes_on = fault.codes == (0,)
    required = "same" if goes_on else "clear end"
    code = ", ".join(map(str, fault.codes)) or "none: it is stopped"
    done = [one for one in outcomes if one.outcome != "skipped"]
    right = sum(one.outcome == required for one in done)
    longest = f"{max(one.seconds for one in done):.1f}" if done else ""
    values = (f"`{fault.name}`", fault.text, required, code, len(done), right, longest, f"{fault.limit:g}")
    return f"| {' | '.join(map(str, values))} |"


def _others(outcomes: Outcomes) -> str:
    found: Iterable[str] = (
        f"- `{cell}`: {' '.join(one.message.split())[:300].replace('|', '/') or _unequal(one)}"
        for (cell, _), one in outcomes.items()
        if one.outcome == "other"
    )
    lines = list(found)
    return "\n".join(["## Others", "", *lines, ""]) if lines else ""


def _unequal(outcome: Outcome) -> str:
    wrong = [name for name in ("ids_equal", "weights_equal") if getattr(outcome, name) is False]
    return f"not {', '.join(wrong).replace('_', ' ')}"
