"""Write docs/evidence/combinations.md: ``python -m benchmarks.combinations.page``; ``--rows`` prints every row."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.combinations.rows import GROUPS
from benchmarks.combinations.table import ELSEWHERE, ROWS, Row
from lit_clip.training.checks import REFUSED

PAGE = Path(__file__).parents[2] / "docs/evidence/combinations.md"
INTRODUCTION = """# Combinations

- **Question**: which options of Lightning, and which of lit-clip's own, work with lit-clip and with each other?
- **Answer**: all except the settings and parts below, which end with one line before the first step.
- **Command**: `make test-slow PART=combinations`; `python -m benchmarks.combinations.page` writes this page.

`python -m benchmarks.combinations.page --rows` prints every row with what is checked. A row is one setting on one
process or on two ranks of one machine (DDP by gloo, unless it names another strategy). "The plain run" is the same
training without the setting; with one process weights must be equal to the last bit, with two ranks to rounding.
"Resumes exactly": the run continues from a checkpoint of the third step and ends with weights and moments equal to the
last bit.
"""
# To be set when all rows have been run: pytest benchmarks/combinations -m "slow or not slow"
LAST_RUN = "26, 27 and 29 November and 1 December 2026 with Lightning 2.6.6 and torch 2.13.0 on a CPU"
ROWS_RUN, REFUSED_THEN = 403, 25
HEAD = "| setting | one process | two ranks | what is checked, or the line |\n|---|---|---|---|"


def page() -> str:
    """Return the page: how many rows of each group work, and what is refused."""
    counts = f"{ROWS_RUN - REFUSED_THEN} work and {REFUSED_THEN} are refused"
    parts = [INTRODUCTION, f"All {ROWS_RUN} rows were last run on {LAST_RUN}: {counts}.\n"]
    parts.append("| rows | work | refused |\n|---|--:|--:|")
    for group in GROUPS:
        rows = [bool(row.refused) for row in ROWS if row.group == group]
        parts.append(f"| {group} | {rows.count(False)} | {rows.count(True)} |")
    named = {refusal.kind.__name__ for refusal in REFUSED} - {row.name for row in ROWS if not row.refused}
    names = {row.name for row in ROWS if row.refused} - named
    parts += ["\n## Refused settings\n", HEAD]
    for group in GROUPS:
        parts += _lines(row for row in ROWS if row.group == group and row.name in names)
    parts += ["\n## Refused parts of Lightning\n", "| part | why | instead |\n|---|---|---|"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in REFUSED:
        reasons.setdefault((each.why, each.instead), []).append(each.kind.__name__)
    parts += [f"| {_code(kinds)} | {why} | {instead} |" for (why, instead), kinds in reasons.items()]
    parts += ["\n## Without a row\n", "| part | why |\n|---|---|"]
    parts += [f"| {_code(left_out)} | {why} |" for why, left_out in ELSEWHERE.items()]
    return "\n".join(parts) + "\n"


def every_row() -> str:
    """Return the tables of all rows, by group."""
    return "\n".join(
        "\n".join([f"## {group}\n", HEAD, *_lines(row for row in ROWS if row.group == group), ""]) for group in GROUPS
    )


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _lines(rows: Iterable[Row]) -> list[str]:
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    return [_line(name, same) for name, same in by_name.items()]


def _line(name: str, rows: list[Row]) -> str:
    cells = []
    for world in (1, 2):
        row = next((row for row in rows if row.world == world), None)
        cells.append("" if row is None else "refused" if row.refused else "works")
    notes: dict[str, None] = {}
    for row in rows:
        notes |= dict.fromkeys([f'"... {row.refused}"'] if row.refused else [check.words for check in row.checks])
    return f"| `{name}` | {cells[0]} | {cells[1]} | {'; '.join(notes)} |"


def main(words: Sequence[str]) -> None:
    if "--rows" in words:
        sys.stdout.write(every_row())
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
