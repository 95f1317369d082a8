"""The end of a run: its commands can be pasted into a shell, and steps that were not saved are named."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_clip.training.summary import print_next_steps, resume_command
from tests.conftest import TINY_YAML


@pytest.mark.parametrize("name", ["a run", "$(touch ran)", "it's", "[red]x", "a;b"])
def test_printed_commands_name_the_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / name
    folder.mkdir()
    config, checkpoint = folder / "fit_config.yaml", folder / "last.ckpt"
    config.touch()
    print_next_steps(checkpoint, folder, [])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("validate again: "))
    for command in (line.removeprefix("validate again: "), resume_command(checkpoint, folder)):
        assert shlex.split(command)[2:] == ["--config", str(config), "--ckpt_path", str(checkpoint)]


@pytest.mark.parametrize(("every", "warned"), [("1", False), ("2", True)])
def test_steps_that_no_checkpoint_holds_are_named(
    every: str, warned: bool, cli: Callable[..., Any], caption_table: Path
) -> None:
    data = ["--data", "datamodules.Captions", "--data.train", str(caption_table), "--data.val", str(caption_table)]
    data += ["--data.num_workers", "0", "--model.architecture", TINY_YAML, "--trainer.accelerator", "cpu"]
    result = cli("fit", *data, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", every)
    assert result.returncode == 0, result.stderr
    assert ("ModelCheckpoint: no checkpoint holds the last 1 of 1 steps" in result.stderr) == warned
