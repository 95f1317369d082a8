"""Class paths in settings: the short names of lit-clip's packages, and modules of the user's with these names."""

import re
import sys
from argparse import ArgumentError
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from lit_clip import callbacks, datamodules
from lit_clip.evaluation.suite import read_suite
from lit_clip.tools.class_paths import find_object, full_name, short_names
from lit_clip.tools.messages import one_line
from tests.conftest import ROOT


class Mine(Callback):
    """Of the user's module."""


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module ``callbacks`` of the user's, with one class of its own and one whose name is also lit-clip's."""
    module = ModuleType("callbacks")
    vars(module).update(Mine=Mine, EMA=Mine)
    module.__spec__ = type(sys.__spec__)("callbacks", None, origin="/home/user/callbacks.py")
    monkeypatch.setitem(sys.modules, "callbacks", module)
    return module


@pytest.mark.parametrize("path", ["callbacks.EMA", "lit_clip.callbacks.EMA", "callbacks.ema.EMA"])
@pytest.mark.usefixtures("own")
def test_the_class_of_lit_clip_comes_first(path: str) -> None:
    assert find_object(path) is callbacks.EMA


@pytest.mark.usefixtures("own")
def test_a_class_that_lit_clip_lacks_is_the_users() -> None:
    assert find_object("callbacks.Mine") is Mine
    with pytest.raises(AttributeError, match="module 'callbacks' has no attribute 'Min'") as caught:
        find_object("callbacks.Min")
    assert one_line(caught.value).endswith("did you mean callbacks.Mine?")
    with pytest.raises(AttributeError) as caught:
        find_object("callbacks.ZeroSho")
    assert one_line(caught.value).endswith("did you mean callbacks.ZeroShot?")


@pytest.mark.parametrize("path", ["callbacks", "torch.nn.Linear", "my_callbacks.EMA", "lit_clip.callbacks.EMA"])
def test_other_names_stay_as_they_are(path: str) -> None:
    assert full_name(path) == path


def test_without_a_module_of_the_users_an_unknown_name_is_missing_in_lit_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "callbacks", callbacks)  # as in a clone
    with pytest.raises(AttributeError, match=r"module 'lit_clip\.callbacks' has no attribute 'ZeroSho'") as caught:
        find_object("callbacks.ZeroSho")
    assert one_line(caught.value).endswith("did you mean callbacks.ZeroShot?")
    with pytest.raises(ModuleNotFoundError, match="other"):
        find_object("other.EMA")


@pytest.mark.usefixtures("own")
def test_parsers_of_the_users_keep_pythons_rules() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    with short_names():
        with short_names():
            pass
        parsed = parser.parse_args(["--callback", "callbacks.ProgressLines"])
    assert parsed.callback.class_path == "lit_clip.callbacks.ProgressLines"  # which other processes know too
    assert type(parser.instantiate(parsed).callback) is callbacks.ProgressLines
    theirs = parser.parse_args(["--callback", "callbacks.EMA"])
    assert type(parser.instantiate(theirs).callback) is Mine


@pytest.mark.parametrize("module", ["callbacks", "broken_callbacks"])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def half(n):\n    return 1 / n\nhalf(0)", "{}, line 3, raises ZeroDivisionError: division by zero"),
        ("import no_such_module", "{}, line 1, raises ModuleNotFoundError: No module named 'no_such_module'"),
        ("import os\nclass Mine:\n  pass pass", r"SyntaxError: invalid syntax \({.name}, line 3\)"),
    ],
)
def test_an_error_in_the_users_module_is_told_with_its_file_and_line(
    module: str, code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"{module}.py"
    file.write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback] | Callback | None)
    with short_names(), pytest.raises(ArgumentError) as caught:
        parser.parse_args([f"--callbacks+={module}.Mine"])
    assert re.search(message.format(file), one_line(caught.value))


def test_short_names_hold_in_a_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datamodules", ModuleType("datamodules"))  # a stranger's
    (tmp_path / "classes/one").mkdir(parents=True)
    (tmp_path / "classes/one/1.png").write_bytes((ROOT / "docs/images/search-light.png").read_bytes())
    entry = {"data": {"class_path": "datamodules.ImageFolderClasses", "init_args": {"root": "classes"}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"sets": {"mine": entry}}), encoding="utf-8")
    opened = read_suite(tmp_path / "suite.yaml")["mine"].open("test", 0, tmp_path)
    assert type(opened) is datamodules.ImageFolderClasses
