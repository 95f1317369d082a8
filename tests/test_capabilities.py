"""A capability is a folder: without it, its commands' files and its lines of a few tables, everything else works."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT
from tests.helpers import forks
from tests.helpers.small_sets import write_table

PACKAGES = ("lit_clip", "callbacks", "datamodules")


class Capability(NamedTuple):
    """What goes when a capability goes, besides its folder.

    Attributes:
        files: its own, in other folders.
        lines: of others, by file: each text, which must be there once, and what stays in its place.
        left: command lines that work without it, and what their output has no more.
    """

    files: list[str]
    lines: dict[str, list[tuple[str, str]]]
    left: list[tuple[str, str]]


CAPABILITIES = {
    "approximate": Capability(
        ["lit_clip/commands/index.py"],
        {
            "lit_clip/cli/subcommands.py": [('    "index": "lit_clip.commands.index:index",\n', "")],
            "lit_clip/commands/search.py": [('INDICES = {".usearch": "lit_clip.approximate"}', "INDICES = {}")],
        },
        [("--help", "  index "), ("search --help", "no such text")],
    ),
    "heads": Capability(
        ["lit_clip/commands/class_heads.py"],
        {
            "lit_clip/cli/subcommands.py": [
                (
                    'HEADS = {"learning": "lit_clip.commands.class_heads:Learning", '
                    '"head": "lit_clip.commands.class_heads:HeadFile"}',
                    "HEADS: dict[str, str] = {}",
                )
            ]
        },
        [(f"{command} --help", "--head HEAD") for command in ("classify", "demo", "evaluate", "export")],
    ),
    "locating": Capability(
        ["lit_clip/commands/locate.py", "lit_clip/commands/demo_locate.py"],
        {
            "lit_clip/cli/subcommands.py": [('    "locate": "lit_clip.commands.locate:locate",\n', "")],
            "lit_clip/commands/search.py": [('HEAT_MAPS = ["lit_clip.locating.overlay"]', "HEAT_MAPS = []")],
            "lit_clip/commands/demo_server.py": [('TABS = {"locate": "lit_clip.commands.demo_locate"}', "TABS = {}")],
        },
        [("--help", "  locate "), ("demo --help", "no such text")],
    ),
    "recipes": Capability(
        ["lit_clip/cli/recipes.py"],
        {
            "lit_clip/cli/lightning.py": [('CHOOSERS = ["lit_clip.cli.recipes"]', "CHOOSERS = []")],
            "lit_clip/cli/plain_help.py": [('        "--recipe": "chooses settings by your data; null: none",\n', "")],
            "lit_clip/cli/fit.yaml": [("recipe: lit_clip.recipes.FromScratch", "")],
        },
        [("fit --help", "recipe"), ("fit --data.train captions.csv --print_plan", "Recipe")],
    ),
}

# Each module that is left is imported; then the command lines run. What others have made stays imported.
WITHOUT = """
import contextlib, importlib, io, sys
short = ("lit_clip", "callbacks", "datamodules")
for name in [name for name in sys.modules if name.partition(".")[0] in short]:
    del sys.modules[name]
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("lit_clip")]
for name in sys.argv[2].split():
    assert importlib.import_module(name).__file__.startswith(sys.argv[1]), name
from lit_clip.cli.main import _run
for words, gone in zip(sys.argv[3::2], sys.argv[4::2]):
    sys.argv = ["lit-clip", *words.split()]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        assert _run(words.split()) == 0
    assert len(text.getvalue()) > 500 and gone not in text.getvalue(), text.getvalue()
print("works")
"""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("heads", "locating"))) for name in CAPABILITIES],
)
def test_a_capability_can_be_removed(name: str, tmp_path: Path) -> None:
    removed = CAPABILITIES[name]
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "lit_clip" / name)
    for file in removed.files:
        (tmp_path / file).unlink()
    for file, lines in removed.lines.items():
        text = (tmp_path / file).read_text(encoding="utf-8")
        for line, instead in lines:
            assert text.count(line) == 1, f"{file}: {line}"
            text = text.replace(line, instead)
        (tmp_path / file).write_text(text, encoding="utf-8")
    (tmp_path / "folder").mkdir()
    write_table(tmp_path / "folder")
    (tmp_path / "without.py").write_text(WITHOUT, encoding="utf-8")
    words = [word for pair in removed.left for word in pair]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    files = [file.relative_to(tmp_path) for package in PACKAGES for file in (tmp_path / package).rglob("*.py")]
    names = [
        ".".join(("lit_clip", *file.with_suffix("").parts)).replace("lit_clip.lit_clip", "lit_clip") for file in files
    ]
    left = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    program = [str(tmp_path / "without.py"), f"{tmp_path}/", " ".join(left), *words]
    (done,) = forks.run([forks.Program(forks.script, program, tmp_path / "folder", environment)], timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "works\n"
