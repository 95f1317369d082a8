"""Change random lines of the heart one at a time, and count the changes that the tests of their room catch.

``python benchmarks/mutation.py --count 40 --seed 0`` flips a comparison, drops a statement or changes a constant in a
copy of the working tree, and runs the quick tests of the room, which must pass without it, until one fails. The same
seed changes the same lines of the same sources: ``--tests OTHER_TREE`` compares two states of the tests.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {  # sources, and the tests that are run when one of them is changed
    "lit_clip/losses": ["tests/losses"],
    "lit_clip/training": ["tests/training", "tests/test_module.py"],
    "lit_clip/models/clip.py": ["tests/models/test_clip.py", "tests/models/test_encoding.py"],
    "datamodules/pairs": ["tests/datamodules/pairs", "tests/datamodules/test_captions.py"],
    "datamodules/loading": ["tests/datamodules/loading", "tests/datamodules/test_caption_datamodule.py"],
}
OPPOSITES = {"Lt": "< >=", "LtE": "<= >", "Gt": "> <=", "GtE": ">= <", "Eq": "== !=", "NotEq": "!= =="}


class Mutation(NamedTuple):
    """A change of one line: characters ``start`` to ``end`` (1-based ``line``) become ``text``."""

    path: str
    line: int
    start: int
    end: int
    text: str
    kind: str


def mutations(path: Path) -> Iterator[Mutation]:
    """Yield every change of a file that stays within a line."""
    source = path.read_bytes()
    name, lines = str(path.relative_to(ROOT)), source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and (known := OPPOSITES.get(type(node.ops[0]).__name__)):
            left, right = node.left, node.comparators[0]
            if left.end_lineno == right.lineno and left.end_col_offset is not None:
                between = lines[right.lineno - 1][left.end_col_offset : right.col_offset].decode()  # with brackets
                old, new = known.split()
                text = between.replace(old, new)
                yield Mutation(name, right.lineno, left.end_col_offset, right.col_offset, text, "comparison")
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float) and node.end_col_offset:
            text = repr(not node.value) if isinstance(node.value, bool) else repr(node.value + 1)
            yield Mutation(name, node.lineno, node.col_offset, node.end_col_offset, text, "constant")
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.Expr) and node.lineno == node.end_lineno:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not docstring and node.col_offset and node.end_col_offset:  # within a function or class
                yield Mutation(name, node.lineno, node.col_offset, node.end_col_offset, "pass", "statement")


def mutated(source: str, change: Mutation) -> str:
    """Return a source with one line changed; the offsets of ``ast`` count UTF-8 bytes."""
    lines = source.encode().splitlines(keepends=True)
    line = lines[change.line - 1]
    lines[change.line - 1] = line[: change.start] + change.text.encode() + line[change.end :]
    return b"".join(lines).decode()


def sample(count: int, seed: int) -> list[tuple[Mutation, list[str]]]:
    """Return changes with the tests of their rooms, as many of each room and, where there are enough, of each kind."""
    generator, rooms = random.Random(seed), []
    for room, tests in ROOMS.items():
        files = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
        by_kind: dict[str, list[Mutation]] = {"comparison": [], "constant": [], "statement": []}
        for change in (change for path in files for change in mutations(path)):
            by_kind[change.kind].append(change)
        for some in by_kind.values():
            generator.shuffle(some)
        longest = max(map(len, by_kind.values()))
        rooms.append([(some[i], tests) for i in range(longest) for some in by_kind.values() if i < len(some)])
    return [room[i] for i in range(max(map(len, rooms))) for room in rooms if i < len(room)][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="changes")
    parser.add_argument("--seed", type=int, default=0, help="of their choice")
    parser.add_argument("--seconds", type=float, default=300, help="a change whose tests take longer is caught")
    parser.add_argument("--tests", type=Path, default=ROOT, help="tree from which the tests are taken")
    options = parser.parse_args()
    caught, chosen = 0, sample(options.count, options.seed)
    with tempfile.TemporaryDirectory() as name:
        ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "site", "tests")
        folder = shutil.copytree(ROOT, Path(name) / "tree", ignore=ignored)
        shutil.copytree(options.tests / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        here = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        for change, tests in chosen:
            source, start = (ROOT / change.path).read_text(encoding="utf-8"), time.monotonic()
            (folder / change.path).write_text(mutated(source, change), encoding="utf-8")
            command = [sys.executable, "-m", "pytest", "-xqm", "not slow", "-p", "no:cacheprovider", *tests]
            try:
                done = subprocess.run(command, cwd=folder, env=here, timeout=options.seconds, capture_output=True)
                outcome = "caught" if done.returncode else "SURVIVED"
            except subprocess.TimeoutExpired:
                outcome = "caught by the time limit"
            (folder / change.path).write_text(source, encoding="utf-8")
            caught += outcome != "SURVIVED"
            line, seconds = source.splitlines()[change.line - 1].strip(), time.monotonic() - start
            print(
                f"{outcome} {change.path}:{change.line} in {seconds:.0f} s: {line} -> {change.text.strip()}", flush=True
            )
    print(f"{caught} of {len(chosen)} changes were caught")


if __name__ == "__main__":
    main()
