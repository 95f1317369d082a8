"""Each promise of docs/evidence/promises.md names tests that exist and run."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/evidence/promises.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`( \(\*slow\*\))?", PAGE)
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise")]


def is_slow(node: ast.stmt) -> bool:
    """Return whether a test, or by its ``pytestmark`` a file, is left to ``make test-slow``."""
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) == "pytestmark" and "pytest.mark.slow" in ast.unparse(node.value)
    return "pytest.mark.slow" in map(ast.unparse, getattr(node, "decorator_list", []))


@pytest.mark.parametrize("file", sorted({file for file, *_ in NAMED}))
def test_every_test_that_a_promise_names_exists_and_is_marked_if_it_is_slow(file: str) -> None:
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    all_are = any(is_slow(node) for node in body if isinstance(node, ast.Assign))
    there = {node.name: all_are or is_slow(node) for node in body if isinstance(node, ast.FunctionDef)}
    for other, name, mark in NAMED:
        if other == file:
            assert there[name] == bool(mark), name


def test_every_promise_names_a_test() -> None:
    assert len(ROWS) > 40
    assert [row for row in ROWS if not re.search(r"`tests/[\w/]+\.py::\w+`", row)] == []
