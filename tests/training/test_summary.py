"""The end of a run: its commands can be pasted into a shell, and steps that were not saved are named."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

import callbacks
from datamodules import Captions
from lit_clip import LitCLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.training.summary import print_next_steps, print_summary, print_trained, resume_command
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


def test_metrics_are_in_their_natural_order_and_shares_in_percent(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["val/loss", *(f"val/merged_image_to_text_recall@{k}" for k in (10, 1, 5)), "train/loss"]
    metrics = {name: torch.tensor(0.5) for name in names}
    print_summary(metrics, dict.fromkeys(names, 0.25), {"val/loss": 0.75})
    printed = capsys.readouterr().out
    rows = [line.replace("│", "").split() for line in printed.splitlines() if "val/" in line]
    assert rows[0] == ["val/loss", "0.5000", "0.2500", "0.7500", "-0.2500"]
    assert [row[0].partition("@")[2] for row in rows[1:]] == ["1", "5", "10"]
    assert rows[1][1:] == ["50.00", "%", "25.00", "%"]
    assert "equal ones count as one" in printed
    assert "train/loss" not in printed


def test_names_stay_whole_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = ["val/mean_recall", *(f"val/merged_image_to_text_recall@{k}" for k in (1, 5, 10))]
    metrics = {name: torch.tensor(0.5) for name in names}
    print_summary(metrics, dict.fromkeys(names, 0.25), dict.fromkeys(names, 0.25))
    printed = capsys.readouterr().out
    cells = [line.split("│")[1].strip() for line in printed.splitlines() if "│" in line]
    assert "".join(cells) == "".join(names)
    assert max(map(len, printed.splitlines())) <= 80
    assert "val/mean_recall is the one number to compare" in " ".join(printed.split())


def test_a_run_from_python_ends_with_its_results_and_without_advertisements(
    caption_table: Path, tiny_config: CLIPConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As ``fit`` does: the last metrics with their baselines, the checkpoint and the command for the curves."""
    logger = TensorBoardLogger(tmp_path, name="mine")
    trainer = Trainer(callbacks=callbacks.defaults(), logger=logger, max_epochs=1, accelerator="cpu")
    trainer.fit(LitCLIP(tiny_config), Captions(str(caption_table), num_workers=0))
    printed, messages = capfd.readouterr()
    assert "val/image_to_text_recall@1" in printed
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert f"checkpoint: {checkpoint}" in printed
    assert f"curves: tensorboard --logdir {tmp_path / 'mine' / 'version_0'}" in printed
    assert "pairs per step" in printed
    assert "Total FLOPs" not in printed + messages, "the plan is the only summary"
    assert "Tip" not in messages


@pytest.mark.parametrize(
    ("every", "best"), [("1", True), ("2", True), pytest.param("2", False, marks=pytest.mark.slow)]
)
def test_the_last_steps_are_saved_whether_or_not_a_validation_is_due(
    every: str, best: bool, cli: Callable[..., Any], caption_table: Path, tmp_path: Path
) -> None:
    data = ["--data", "datamodules.Captions", "--data.train", str(caption_table), "--data.val", str(caption_table)]
    data += ["--data.num_workers", "0", "--model.architecture", TINY_YAML, "--trainer.accelerator", "cpu"]
    saver = "lightning.pytorch.callbacks.ModelCheckpoint"
    if best:  # beside the last one
        data += [f"--trainer.callbacks+={saver}"] * 2 + ["--trainer.callbacks.monitor", "val/loss"]
    result = cli("fit", *data, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", every)
    assert result.returncode == 0, result.stderr
    last, *others = tmp_path.rglob("*.ckpt")
    assert len(others) == (best and every == "1")
    assert {torch.load(file, weights_only=True)["global_step"] for file in (last, *others)} == {1}
    assert ("too few to tell the best model; take" in result.stdout) == (best and every == "1")
    again = [*data, "--trainer.check_val_every_n_epoch", "5", "--ckpt_path", str(last), "--trainer.max_epochs", "3"]
    result = cli("fit", *again)
    assert result.returncode == 0, result.stderr
    (resumed,) = [file for file in tmp_path.rglob("*.ckpt") if torch.load(file, weights_only=True)["global_step"] == 3]
    assert str(resumed.name) in result.stdout


def test_groups_of_an_optimiser_without_weight_decay_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3))]
    groups = torch.optim.Rprop([{"params": parameters, "name": "heads"}], lr=0.1).param_groups
    print_trained(groups, torch.nn.Identity())
    assert re.search(r"heads +│ +full +│ +3 │ +1.00e-01 │ +- │", capsys.readouterr().out)
