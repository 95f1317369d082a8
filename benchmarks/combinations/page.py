"""Write the pages of combinations in docs/: ``python -m benchmarks.combinations.page``."""

from pathlib import Path

from benchmarks.combinations.rows import GROUPS, OURS
from benchmarks.combinations.table import ELSEWHERE, ROWS, Row
from lit_clip.training.checks import REFUSED

FOLDER = Path(__file__).parents[2] / "docs/evidence"
INTRODUCTION = """# Combinations

- **Question**: which options of Lightning work with lit-clip?
- **Answer**: all below but those marked "refused", which end with one line before the first step.
- **Command**: `make test-slow PART=combinations`; `python -m benchmarks.combinations.page` writes this page.

"Two ranks" is DDP by gloo on one machine, unless the row says otherwise. "The plain run" is the same training without
the option; with one process weights must be equal to the last bit, with two ranks to rounding. "Resumes exactly" is a
run that continues from a checkpoint of the third step and ends with weights and moments equal to the last bit.
[Another page](combinations_parts.md) has lit-clip's own parts.
"""
INTRODUCTION_OF_PARTS = """# Combinations with lit-clip's parts

- **Question**: which of lit-clip's own callbacks and options work with each other?
- **Answer**: all below but those marked "refused".
- **Command**: as for [Lightning's options](combinations.md), whose page says what the words mean.
"""
# To be set when all rows have been run: pytest benchmarks/combinations -m "slow or not slow"
LAST_RUN = "26, 27 and 29 November and 1 December 2026 with Lightning 2.6.6 and torch 2.13.0 on a CPU"
ROWS_RUN, REFUSED_THEN = 403, 25
HEAD = "| setting | one process | two ranks | what is checked, or the line |\n|---|---|---|---|"


def pages() -> dict[str, str]:
    """Return the text of each page by its name."""
    parts = "\n".join([INTRODUCTION_OF_PARTS, _table(OURS)])
    return {"combinations.md": _of_lightning(), "combinations_parts.md": parts.rstrip() + "\n"}


def _of_lightning() -> str:
    counts = f"{ROWS_RUN - REFUSED_THEN} work and {REFUSED_THEN} are refused"
    parts = [
        INTRODUCTION,
        f"All {ROWS_RUN} rows, a setting on one process or on two, were last run on {LAST_RUN}: {counts}.\n",
    ]
    parts += [_table(group) for group in GROUPS if group != OURS]
    parts.append("## Refused parts of Lightning\n\n| part | why | instead |\n|---|---|---|")
    parts[-1] += "".join(f"\n| `{each.kind.__name__}` | {each.why} | {each.instead} |" for each in REFUSED) + "\n"
    parts.append("## Not in the table\n\n| part | why |\n|---|---|")
    parts[-1] += "".join(
        f"\n| {', '.join(f'`{name}`' for name in names)} | {why} |" for why, names in ELSEWHERE.items()
    )
    return "\n".join(parts) + "\n"


def _table(group: str) -> str:
    by_name: dict[str, list[Row]] = {}
    for row in (row for row in ROWS if row.group == group):
        by_name.setdefault(row.name, []).append(row)
    lines = [_line(name, same) for name, same in by_name.items()]
    return "\n".join([f"## {group}\n", HEAD, *lines]) + "\n"


def _line(name: str, rows: list[Row]) -> str:
    cells = []
    for world in (1, 2):
        row = next((row for row in rows if row.world == world), None)
        cells.append("" if row is None else "refused" if row.refused else "works")
    notes: dict[str, None] = {}
    for row in rows:
        notes |= dict.fromkeys([f'"... {row.refused}"'] if row.refused else [check.words for check in row.checks])
    return f"| `{name}` | {cells[0]} | {cells[1]} | {'; '.join(notes)} |"


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
