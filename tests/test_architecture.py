"""docs/architecture.md says the truth about the ways through the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
MOST_FILES, MOST_LINES = 10, 2_000
# Underscored names of Lightning's objects; its loggers', loops' and connectors' too.
PRIVATE = re.compile(
    r"(?:trainer|strategy|loop|connector|logger|plugin|_trainer|epoch_loop|val_loop)\._[a-z]\w*|"
    r"from lightning[\w.]* import (?:.*, )?_[A-Za-z]"
)


def way(heading: str) -> list[Path]:
    """Return the files of a way through the code, from the block of code below a heading."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("    ")]
    return [ROOT / "lit_clip" / name for line in lines for name in line.split()]


def imported(file: Path) -> set[Path]:
    """Return the files of lit_clip that a file imports, at its top or within."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    return found


@pytest.mark.parametrize("heading", ["From a table row to the loss", "From a checkpoint to a model"])
def test_each_file_of_a_way_is_imported_by_one_before_it(heading: str) -> None:
    first, *others = way(heading)
    assert first.is_file()
    assert others
    known = {first}
    for file in others:
        assert any(file in imported(each) for each in known), file
        known.add(file)
    assert len(known) <= MOST_FILES
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in known) <= MOST_LINES


def test_the_module_is_small() -> None:
    text = (ROOT / "lit_clip/module.py").read_text(encoding="utf-8")
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(text.splitlines()) <= 200
    assert sum(len(node.names) for node in imports) <= 35


def test_one_room_touches_lightnings_private_parts() -> None:
    found = {
        f"{file.relative_to(ROOT)}: {match[0]}"
        for package in ("lit_clip", "callbacks", "datamodules")
        for file in (ROOT / package).rglob("*.py")
        if "lightning" not in file.parent.parts
        for match in PRIVATE.finditer(file.read_text(encoding="utf-8"))
    }
    assert found == set()
