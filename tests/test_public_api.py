"""docs/public_api.md and its list say what users may rely on; a change of it is seen."""

from pathlib import Path

import pytest

from lit_clip.cli.lightning import CLI
from tests.conftest import ROOT
from tests.helpers import public_api
from tests.helpers.wheels import PROJECT

PAGE = (ROOT / "docs/public_api.md").read_text(encoding="utf-8")


def test_the_list_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLI, "instantiate_classes", lambda self: None)
    listed = public_api.FILE.read_text(encoding="utf-8")
    assert public_api.text(tmp_path) == listed, "run make house, and see whether users must change something"
    for line in ("load_model(source: Source", "--ckpt_path\n", "# lit-clip wise-ft\n", "head: lit-clip head 1\n"):
        assert line in listed


def test_signatures_are_read_from_the_source(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("from .one import A, f\n__all__ = ['f', 'A']\n")
    (tmp_path / "one.py").write_text(
        "class A(B):\n    x: int = 1\n    def _y(self): ...\n    def z(self, k=2): ...\ndef f(a, *, b=3) -> int: ...\n"
    )
    assert [*public_api._names(tmp_path)] == ["class A(B)", "    x: int = 1", "    z(self, k=2)", "f(a, *, b=3) -> int"]


def test_the_page_names_each_package_extra_and_file() -> None:
    others = {"bench", "dev", "docs", "notebooks", "programs", "release"}  # of those who work on lit-clip
    assert all(f"| `{extra}` |" in PAGE for extra in PROJECT["optional-dependencies"].keys() - others)
    assert all(f"`{package}`" in PAGE for package in public_api.PACKAGES)
    assert PROJECT["version"] in PAGE
