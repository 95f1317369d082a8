"""Options and commands of other tools are answered with lit-clip's."""

import argparse
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest

from lit_clip.cli.argv import part_options
from lit_clip.cli.lightning import CLI, run
from lit_clip.cli.main import CONFIGURED
from lit_clip.cli.other_names import COMMANDS, OPTIONS, check_options, command_for
from lit_clip.cli.subcommands import COMMANDS as OTHER_COMMANDS
from lit_clip.errors import InputError
from lit_clip.module import LitCLIP
from lit_clip.tools.messages import options_of, parameters
from tests.cli.test_packaged_defaults import parsed
from tests.conftest import ROOT

__all__ = ["parsed"]
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


def test_every_option_of_open_clips_training_command_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [flag for flag in open_clips_flags(monkeypatch) if flag not in ("--help", "--model")]
    assert len(flags) > 80
    for flag in flags:
        with pytest.raises(InputError, match=rf"^{flag}: no such option; \w"):
            check_options([flag])


def test_the_page_for_those_who_come_from_open_clip_has_every_flag_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of lit-clip that it names are parsed by tests/test_readme.py."""
    rows = re.findall(r"^\| (`--[^|]*) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    flags = [flag for row, _ in rows for flag in re.findall(r"`(--[\w-]+)`", row)]
    assert sorted(flags) == sorted(flag for flag in open_clips_flags(monkeypatch) if flag != "--help")


def test_every_option_that_is_named_instead_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CLI, "instantiate_classes", lambda self: None)
    fit: Any = run(args=["--data", "datamodules.Captions"], execute=False)
    known = {"--ckpt_path", *options_of(fit.parser), *(f"--data.{name}" for name in parameters("datamodules.Captions"))}
    nested = ("--trainer.logger.", "--trainer.callbacks.", "--model.freeze.", "--data.augmentation.")
    known |= {*part_options(LitCLIP, [], "fit")}
    named = {option for answer in OPTIONS.values() for option in re.findall(r"--[\w.]*\w", answer)}
    assert len(named) > 30
    for option in named:
        assert option in known or option.startswith(nested), option


@pytest.mark.parametrize("name", ["lock_image", "lock_text_unlocked_layers", "force_patch_dropout", "beta1", "fp16"])
def test_a_whole_answer_can_be_typed(name: str, parsed: Callable[..., Any]) -> None:
    parsed("fit", "--data.train", "x.csv", *shlex.split(OPTIONS[name].removeprefix("use ")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "5"], "--epochs: no such option; use --trainer.max_epochs 5"),
        (["--lr=1e-3"], "--lr: no such option; use --model.optimizer.lr 1e-3"),
        (["--train-data", "my table.csv"], "--train-data: no such option; use --data.train 'my table.csv'"),
        (["--wd", "--name", "x"], "--wd: no such option; use --model.optimizer.weight_decay"),
        (
            ["--model", "ViT-B-32"],
            "--model: ViT-B-32 is a model's name, not a class or a YAML file; use --model.architecture ViT-B-32",
        ),
        (["--data", "."], "--data: . is a path, not a class or a YAML file; use --data.train ."),
    ],
)
def test_the_answer_repeats_the_typed_value(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_options(["--trainer.max_epochs", "1", *words])
    assert str(caught.value) == message


def test_lit_clips_own_options_are_not_refused() -> None:
    check_options(["--model", "my.Class", "--data", "datamodules.OpenMoji", "--data", "data.yaml", "--config", "x"])
    check_options(["--seed_everything", "1", "--ckpt_path=last", "-c", "x.yaml"])


def test_every_command_that_is_named_instead_exists() -> None:
    assert set(COMMANDS.values()) <= {*CONFIGURED, *OTHER_COMMANDS}
    assert not set(COMMANDS) & {*CONFIGURED, *OTHER_COMMANDS}
    assert (command_for("zero_shot"), command_for("Train"), command_for("fti")) == ("evaluate", "fit", None)
