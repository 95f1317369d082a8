"""Import rules: ``lit_clip`` imports neither of the other two packages, and these do not import each other.

They import their own modules relatively, because their names are longer in the wheel: ``lit_clip.callbacks``.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import callbacks
import datamodules
import lit_clip
from tests.conftest import ROOT
from tests.helpers import forks

PACKAGES = ("lit_clip", "callbacks", "datamodules")


def imported(file: Path) -> set[str]:
    """Return the top-level names of all absolute imports in a file, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_downwards(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert not imported(file) & {"callbacks", "datamodules"}, file


def test_the_three_packages_come_from_this_checkout() -> None:
    """Another package could shadow names as common as ``callbacks`` and ``datamodules``."""
    for package in (lit_clip, callbacks, datamodules):
        assert Path(str(package.__file__)).parents[1] == ROOT


# The imports that are given, in this order; then each file of the clone is one module, whose classes have one name.
# What others have made stays imported, because it takes seconds.
ONE_MODULE = """
import collections, importlib, pickle, sys
short = ("lit_clip", "callbacks", "datamodules")
for name in [name for name in sys.modules if name.partition(".")[0] in short]:
    del sys.modules[name]
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("lit_clip")]
for name in sys.argv[1:]:
    importlib.import_module(name)
import datamodules.captions, datamodules.pairs.source, lit_clip.datamodules.pairs.source
import datamodules.open_source, datamodules.pairs.decisions, datamodules.pairs.folder, datamodules.pairs.remote
import datamodules.shards.pairs, datamodules.shards.writing, datamodules.overlap.search
from callbacks.ema import EMA
from lit_clip import callbacks
assert datamodules.pairs.source is lit_clip.datamodules.pairs.source
assert sys.modules["datamodules"].captions is sys.modules["lit_clip.datamodules.captions"]
assert EMA is callbacks.EMA and EMA.__module__ == "lit_clip.callbacks.ema" and EMA is pickle.loads(pickle.dumps(EMA))
modules = {id(module): module for module in sys.modules.values()}.values()
folders = tuple(f"{package.__path__[0]}/" for package in (callbacks, datamodules))
ours = [module for module in modules if str(getattr(module, "__file__", None)).startswith(folders)]
assert max(collections.Counter(module.__file__ for module in ours).values()) == 1
assert all(module.__spec__.name == module.__name__ and module.__name__.startswith("lit_clip.") for module in ours)
assert importlib.util.find_spec("datamodules.pairs.other") is None
print(len(ours))
"""


@pytest.mark.parametrize("names", [["datamodules.pairs.text_table", "callbacks"], ["lit_clip.callbacks.ema"]], ids=str)
def test_a_module_of_a_clone_exists_once_under_its_short_and_its_full_name(names: list[str], tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(ONE_MODULE, encoding="utf-8")
    program = forks.Program(forks.script, [str(tmp_path / "one.py"), *names], ROOT, {**os.environ})
    (done,) = forks.run([program], timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


def test_importing_lit_clip_imports_nothing_heavy() -> None:
    code = "import sys, lit_clip; print([m for m in ('torch', 'lightning', 'open_clip') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    for name in lit_clip.__all__:
        assert getattr(lit_clip, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'CLIPP'"):
        _ = lit_clip.CLIPP
