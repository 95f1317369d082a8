"""Change random lines of the heart one at a time, and count the changes that the tests of their room catch.

``python benchmarks/mutation.py --count 40 --seed 0`` flips a comparison, drops a statement or changes a constant in a
copy of the working tree, and runs the quick tests of the room until one fails. The same seed changes the same lines of
the same sources, so that two states of the tests can be compared: ``--tests OTHER_TREE`` takes tests from elsewhere.
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

ROOT = Path(__file__).parents[1]
ROOMS = {  # sources, and the tests that are run when one of them is changed
    "lit_clip/losses": ["tests/losses"],
    "lit_clip/training": ["tests/training", "tests/test_module.py"],
    "lit_clip/models/clip.py": ["tests/models/test_clip.py", "tests/models/test_encoding.py"],
    "datamodules/pairs": ["tests/datamodules/pairs", "tests/datamodules/test_captions.py"],
    "datamodules/loading": ["tests/datamodules/loading", "tests/datamodules/test_caption_datamodule.py"],
}
FLIPPED = {
    **{ast.Lt: ">=", ast.LtE: ">", ast.Gt: "<=", ast.GtE: "<", ast.Eq: "!=", ast.NotEq: "=="},
    **{ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"},
}


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
    name, tree = str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right, flipped = node.left, node.comparators[0], FLIPPED[type(node.ops[0])]
            if left.end_lineno == right.lineno and left.end_col_offset is not None:
                yield Mutation(name, right.lineno, left.end_col_offset, right.col_offset, f" {flipped} ", "comparison")
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float) and node.end_col_offset:
            text = repr(not node.value) if isinstance(node.value, bool) else repr(node.value + 1)
            yield Mutation(name, node.lineno, node.col_offset, node.end_col_offset, text, "constant")
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.Expr) and node.lineno == node.end_lineno:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # a docstring
            if not text and node.col_offset and node.end_col_offset:  # within a function or class
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


def copy_tree(tests: Path, folder: Path) -> None:
    """Copy the working tree, with the tests of another one."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, listed):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(tests / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="changes")
    parser.add_argument("--seed", type=int, default=0, help="of their choice")
    parser.add_argument(
        "--seconds", type=float, default=300, help="time limit of the tests; a change that needs more is caught"
    )
    parser.add_argument("--tests", type=Path, default=ROOT, help="tree from which the tests are taken")
    options = parser.parse_args()
    caught, chosen = 0, sample(options.count, options.seed)
    with tempfile.TemporaryDirectory() as name:
        copy_tree(options.tests, folder := Path(name))
        environment = {**os.environ, "PYTHONPATH": name, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        for change, tests in chosen:
            source, start = (ROOT / change.path).read_text(encoding="utf-8"), time.monotonic()
            (folder / change.path).write_text(mutated(source, change), encoding="utf-8")
            command = [sys.executable, "-m", "pytest", "-xqm", "not slow", "-p", "no:cacheprovider", *tests]
            process = subprocess.Popen(
                command, cwd=name, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
            )
            try:
                survived = process.wait(options.seconds) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                survived = process.wait() == 0
            (folder / change.path).write_text(source, encoding="utf-8")
            caught += not survived
            line = source.splitlines()[change.line - 1].strip()
            print(
                "SURVIVED" if survived else "caught",
                f"{change.path}:{change.line}",
                f"{time.monotonic() - start:.0f} s",
            )
            print(f"    {change.kind} -> {change.text.strip()}: {line}", flush=True)
    print(f"{caught} of {len(chosen)} changes were caught")


if __name__ == "__main__":
    main()
