"""The page for those who come from open_clip."""

import argparse
import re
from typing import Any

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs/from_open_clip.md"


def open_clips_flags(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the options of open_clip's training command."""
    params = pytest.importorskip("open_clip_train.params")
    parsers: list[argparse.ArgumentParser] = []

    def keep(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        parsers.append(self)
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep)
    with pytest.raises(InterruptedError):
        params.parse_args([])
    return [option for action in parsers[0]._actions for option in action.option_strings if option.startswith("--")]


def test_the_page_for_those_who_come_from_open_clip_has_every_flag_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of lit-clip that it names are parsed by tests/test_readme.py."""
    rows = re.findall(r"^\| (`--[^|]*) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    flags = [flag for row, _ in rows for flag in re.findall(r"`(--[\w-]+)`", row)]
    assert sorted(flags) == sorted(flag for flag in open_clips_flags(monkeypatch) if flag != "--help")
