"""Lines of the packages by room; ``make house`` writes them into docs/evidence/lines.md."""

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/evidence/lines.md"
HEAD = """# Lines of the packages

All lines of Python files, by room. A test compares them; `make house` writes them.

| room | files | lines |
|---|--:|--:|
"""


def table() -> str:
    """Return the page."""
    files, lines = Counter[str](), Counter[str]()
    for package in ("lit_clip", "datamodules", "callbacks"):
        for file in sorted((ROOT / package).rglob("*.py")):
            room = "/".join(file.relative_to(ROOT).parts[:2]) if file.parent != ROOT / package else package
            files[room] += 1
            lines[room] += len(file.read_text(encoding="utf-8").splitlines())
    rows = [f"| {room} | {files[room]:,} | {lines[room]:,} |" for room in lines]
    return HEAD + "\n".join([*rows, f"| **all** | {files.total():,} | {lines.total():,} |"]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(table(), encoding="utf-8")
