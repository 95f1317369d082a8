"""The last lines of a run: the best model, by which metric, and what a small validation set can say."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

import callbacks
from callbacks.print_results import PrintResults, misleading_loss
from datamodules import Captions
from lit_clip import LitCLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.training.optimizers import PaperAdamW
from tests.conftest import ROOT

LOSSES, RECALLS = (1.0, 1.5, 2.0, 2.5), (0.2, 0.5, 0.7, 0.6)


class Misled(LitCLIP):
    """Logs these losses and recalls, one for each validation of an epoch."""

    def on_validation_epoch_end(self) -> None:
        epoch = min(self.current_epoch, 3)
        self.log("val/loss", LOSSES[epoch])
        self.log("val/mean_recall", RECALLS[epoch])


def trained(config: CLIPConfig, table: Path, folder: Path, epochs: int, resumed: Path | None = None) -> Trainer:
    best = ModelCheckpoint(folder, "best", monitor="val/mean_recall", mode="max", enable_version_counter=False)
    last = ModelCheckpoint(folder, "last", enable_version_counter=False)
    trainer = Trainer(
        callbacks=callbacks.defaults(last, best),
        logger=CSVLogger(folder),
        max_epochs=epochs,
        accelerator="cpu",
        enable_progress_bar=False,
    )
    data = Captions(str(table), val=str(table), num_workers=0, batch_size=32)
    trainer.fit(Misled(config), data, ckpt_path=resumed, weights_only=True)
    return trainer


def test_the_last_line_names_the_best_model_by_recall_where_the_loss_misleads(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also of a run that was resumed, whose first epochs were another process's."""
    trained(tiny_config, caption_table, tmp_path, 2)
    *_, note, _, _ = capfd.readouterr().out.splitlines()
    assert "recall rose until epoch 2" in note
    trained(tiny_config, caption_table, tmp_path, 4, tmp_path / "last.ckpt")
    *_, note, best, preferred = capfd.readouterr().out.splitlines()
    assert note == (
        "val/loss rose from epoch 1 on, while val/mean_recall rose until epoch 3: the best model is by recall"
    )
    assert best == f"best val/mean_recall (0.7): {tmp_path / 'best.ckpt'}"
    told = "64 pairs to validate are too few to tell the best model; take"
    assert preferred == f"{told} {tmp_path / 'last.ckpt'}"
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 2


def test_a_run_that_keeps_only_the_best_model_is_told_to_take_no_other(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    best = ModelCheckpoint(tmp_path, "best", monitor="val/mean_recall", mode="max")
    trainer = Trainer(callbacks=callbacks.defaults(best), logger=CSVLogger(tmp_path), max_epochs=1, accelerator="cpu")
    trainer.fit(Misled(tiny_config), Captions(str(caption_table), val=str(caption_table), num_workers=0, batch_size=32))
    *_, last = capfd.readouterr().out.splitlines()
    assert last == f"best val/mean_recall (0.2): {tmp_path / 'best.ckpt'}"
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["best.ckpt"]


def test_the_best_model_of_the_run_before_stays_the_best_until_there_is_a_better_one(
    tiny_config: CLIPConfig, caption_table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where each run has a folder of its own, as every ``fit`` of the command line has."""
    trained(tiny_config, caption_table, tmp_path / "0", 1)
    trained(tiny_config, caption_table, tmp_path / "1", 3, tmp_path / "0/last.ckpt")
    assert f"best val/mean_recall (0.7): {tmp_path / '1/best.ckpt'}" in capfd.readouterr().out
    trained(tiny_config, caption_table, tmp_path / "2", 4, tmp_path / "1/last.ckpt")  # worse
    trained(tiny_config, caption_table, tmp_path / "3", 4, tmp_path / "2/last.ckpt")  # nothing is left to train
    for line in capfd.readouterr().out.splitlines():
        assert not line.startswith("best") or line == f"best val/mean_recall (0.7): {tmp_path / '1/best.ckpt'}"
    assert [(tmp_path / name / "best.ckpt").exists() for name in "0123"] == [True, True, False, False]


@pytest.mark.parametrize(
    ("losses", "recalls"),
    [
        ((1.0,), (0.2,)),
        ((1.0, 0.9, 2.0), (0.2, 0.5, 0.7)),  # the loss fell at first
        ((1.0, 1.5, 2.0), (0.7, 0.5, 0.6)),  # so did recall: both name the first
        ((1.0, 1.5, 2.0), (0.7, 0.7, 0.7)),
        ((1.0, 1.0, 1.0), (0.2, 0.5, 0.7)),  # the loss says nothing
    ],
)
def test_a_loss_that_does_not_mislead_is_not_mentioned(losses: tuple[float, ...], recalls: tuple[float, ...]) -> None:
    seen = [(number + 1, *both) for number, both in enumerate(zip(losses, recalls, strict=True))]
    assert misleading_loss(seen) == ""


@pytest.mark.parametrize(
    ("changes", "loss", "counted"),
    [
        ({}, 1.0, 1),
        ({}, float("nan"), 0),
        ({"global_step": 0}, 1.0, 0),
        ({"sanity_checking": True}, 1.0, 0),
        ({"state": SimpleNamespace(fn="validate")}, 1.0, 0),
    ],
)
def test_validations_before_the_first_step_and_of_nothing_do_not_count(
    changes: dict[str, Any], loss: float, counted: int
) -> None:
    found = {"val/loss": torch.tensor(loss), "val/mean_recall": torch.tensor(0.5)}
    values = {"callback_metrics": found, "state": SimpleNamespace(fn="fit"), "sanity_checking": False}
    trainer: Any = SimpleNamespace(**{**values, "global_step": 3, "current_epoch": 0, **changes})
    results = PrintResults()
    results.on_validation_end(trainer, cast(Any, None))
    assert len(results.state_dict()["validations"]) == counted


def white(folder: Path, caption: str) -> Path:
    """Write a table of 24 white images; the caption is formatted with their number."""
    Image.new("L", (40, 40), 255).save(folder / "white.png")
    for row in range(24):
        (folder / f"{row}.png").write_bytes((folder / "white.png").read_bytes())
    rows = "".join(f"{row}.png,{caption.format(row)}\n" for row in range(24))
    (folder / "t.csv").write_text(f"image,caption\n{rows}")
    return folder / "t.csv"


@pytest.mark.parametrize(("caption", "alike"), [("number {}", "images"), ("the same", "images and captions")])
def test_a_run_that_learned_nothing_says_so_and_names_no_model_the_best(
    caption: str, alike: str, tiny_config: CLIPConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """However short. With equal captions every recall is 100 %, which is its baseline."""
    table = white(tmp_path, caption)
    savers = [
        ModelCheckpoint(tmp_path, f"best {monitor[4:]}", monitor=monitor, mode=mode)
        for monitor, mode in (("val/mean_recall", "max"), ("val/loss", "min"))
    ]
    options: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 50}
    every = callbacks.defaults(callbacks.TrainingMonitor(), *savers)
    trainer = Trainer(callbacks=every, logger=CSVLogger(tmp_path), max_epochs=1, **options)
    data = Captions(str(table), val=str(table), num_workers=0, batch_size=8)
    with pytest.warns(UserWarning, match=r"learned nothing: .* last 3 of 3 steps, and its baseline is 2.079"):
        trainer.fit(LitCLIP(tiny_config), data)  # ln 8
    lines = capfd.readouterr().out.splitlines()
    assert f"all {alike} have the same features: the recalls say nothing" in " ".join(" ".join(lines).split())
    assert not [line for line in lines if line.startswith("best")]
    for name in ("val/mean_recall", "val/loss"):
        assert any(line.startswith(f"no model is the best by {name}: ") for line in lines)
    if caption == "the same":
        assert float(trainer.callback_metrics["val/mean_recall"]) == 1


def test_a_run_that_learns_says_nothing_of_the_kind(
    overfitted: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    checkpoint, table = overfitted
    best = ModelCheckpoint(tmp_path, "best", monitor="val/mean_recall", mode="max")
    every = callbacks.defaults(callbacks.TrainingMonitor(), best)
    trainer = Trainer(callbacks=every, logger=CSVLogger(tmp_path), max_epochs=1, accelerator="cpu")
    module = LitCLIP.load_from_checkpoint(checkpoint, optimizer=partial(PaperAdamW, lr=1e-5))
    trainer.fit(module, Captions(str(table), val=str(table), num_workers=0, batch_size=16))
    printed = capfd.readouterr().out
    assert "best val/mean_recall (" in printed
    assert "no model is" not in printed
    assert "same features" not in printed
    assert not [each for each in recwarn if "learned nothing" in str(each.message)]


@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_every_config_chooses_its_best_model_by_recall(config: Path) -> None:
    text = config.read_text(encoding="utf-8")
    assert text.count("filename: best") == text.count("monitor: val/mean_recall, mode: max")
    assert "monitor: val/loss" not in text
