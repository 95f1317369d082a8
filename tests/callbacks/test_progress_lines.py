"""Lines of progress instead of a bar: in a run, in a resumed one, on two ranks, and in a terminal's place."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

import callbacks
from callbacks import PrintPlan, ProgressLines
from callbacks.progress import validations
from lit_clip.models.config import CLIPConfig
from lit_clip.module import LitCLIP
from lit_clip.training.schedules import known_steps
from tests.conftest import TINY_YAML, run_lightning_ranks, without_packaged_defaults
from tests.helpers.small_sets import write_table
from tests.helpers.terminal import on_a_terminal, screen
from tests.test_module import data_for, trainer


class Left(Callback):
    """Count the steps and validations that are expected, and those that come."""

    expected = (0, 0)
    validated = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        steps = known_steps(trainer) or 0
        self.expected = steps, validations(trainer, self.first, steps)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated += not trainer.sanity_checking


LINE = re.compile(
    r"fit: step (\d+) of (\d+), loss [\d.]+(?:, val/loss [\d.]+)?(?:, [\d.,]+ samples/s)?"
    r"(?:, \d+:\d\d:\d\d (?:left|in all|since step \d+))?"
)


class Ticks(Callback):
    """A clock on which a training step takes 10 seconds and a batch of validation 15."""

    time = 0.0

    def __call__(self) -> float:
        return self.time

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self.time += 10

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self.time += 15


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """32 pairs: 8 steps with batches of 4."""
    return write_table(tmp_path, 32)


@pytest.fixture
def fit(
    tiny_config: CLIPConfig, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    def run(path: Path | None = None, own: Callback | None = None, **options: Any) -> list[str]:
        """Return the lines of a run."""
        module, ticks, lines = LitCLIP(tiny_config), Ticks(), ProgressLines()
        lines.now = ticks
        settings = {"limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_progress_bar": True, **options}
        used = callbacks.defaults(ticks, lines, *([own] if own else []))
        fitting = trainer(tmp_path, log_every_n_steps=1, callbacks=used, **settings)
        fitting.fit(module, data_for(module, table, batch_size=4), ckpt_path=path)
        fitting.save_checkpoint(tmp_path / "end.ckpt")
        return [line for line in capsys.readouterr().err.splitlines() if re.match("fit|validation", line)]

    return run


def without_loss(lines: list[str]) -> list[str]:
    return [re.sub(r" (val/)?loss [\d.]+,?", "", line) for line in lines]


def test_lines_have_the_time_left_over_all_epochs_and_the_rate_of_training(fit: Callable[..., list[str]]) -> None:
    lines = fit(max_epochs=2)
    assert all(" loss " in line for line in lines)
    assert without_loss(lines) == [
        "fit: step 1 of 16,",
        "fit: step 4 of 16, 0.4 samples/s, 0:02:00 left",
        "fit: step 7 of 16, 0.4 samples/s, 0:01:30 left",
        "fit: step 10 of 16, 0.4 samples/s, 0:01:00 left",
        "fit: step 13 of 16, 0.4 samples/s, 0:00:30 left",
        "fit: step 16 of 16, 0.4 samples/s, 0:02:40 in all",
    ]


class Stop(Callback):
    """Ends a run after its second line."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 4


def test_max_steps_and_max_time_end_a_run_before_its_epochs(fit: Callable[..., list[str]]) -> None:
    assert without_loss(fit(max_epochs=9, max_steps=6))[1:] == [
        "fit: step 4 of 6, 0.4 samples/s, 0:00:20 left",
        "fit: step 6 of 6, 0.4 samples/s, 0:01:00 in all",
    ]
    line = fit(max_epochs=9, max_time={"minutes": 2}, own=Stop())[1]  # the timer's clock is the real one
    assert re.search(r"step 4 of 72, .*, 0:0[12]:\d\d left", line)
    line = fit(max_epochs=-1, max_steps=-1, max_time={"seconds": 2}, limit_train_batches=5, own=Stop())[1]
    assert re.search(r"step 4, .*, 0:00:0[012] left", line)


def test_a_resumed_run_counts_from_its_step(fit: Callable[..., list[str]], tmp_path: Path) -> None:
    fit(max_epochs=1)
    assert without_loss(fit(tmp_path / "end.ckpt", max_epochs=2)) == [
        "fit: step 9 of 16,",
        "fit: step 12 of 16, 0.4 samples/s, 0:00:40 left",
        "fit: step 15 of 16, 0.4 samples/s, 0:00:10 left",
        "fit: step 16 of 16, 0.4 samples/s, 0:01:20 since step 8",
    ]


def test_validations_have_lines_and_count_for_the_time_left_but_not_the_rate(fit: Callable[..., list[str]]) -> None:
    lines = fit(max_epochs=1, limit_val_batches=4, val_check_interval=4)
    assert ["val/loss" in line for line in lines if line.startswith("fit")] == [False, False, True, True]
    assert without_loss(lines) == [
        "fit: step 1 of 8,",
        "fit: step 4 of 8, 0.4 samples/s, 0:00:40 left",
        "validation: batch 1 of 4, 0.267 samples/s, 0:00:45 left",
        "validation: batch 3 of 4, 0.267 samples/s, 0:00:15 left",
        "fit: step 5 of 8, 0.4 samples/s, 0:01:15 left",  # 4 steps in 100 seconds
        "validation: batch 1 of 4, 0.267 samples/s, 0:00:45 left",
        "validation: batch 3 of 4, 0.267 samples/s, 0:00:15 left",
        "fit: step 8 of 8, 0.4 samples/s, 0:03:20 in all",
    ]


class OwnBar(ProgressBar):
    def disable(self) -> None: ...


@pytest.mark.parametrize("options", [{"enable_progress_bar": False}, {"own": OwnBar()}], ids=["no bar", "own bar"])
def test_no_lines_without_a_bar_or_beside_a_bar_of_ones_own(
    options: dict[str, Any], fit: Callable[..., list[str]]
) -> None:
    assert fit(max_steps=4, max_epochs=9, **options) == []


def words(table: Path, *more: str) -> list[str]:
    data = ["--data", "datamodules.Captions", "--data.train", str(table), "--data.val", str(table)]
    options = ["--data.batch_size", "4", "--data.num_workers", "0", "--model.architecture", TINY_YAML]
    options += ["--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--trainer.max_epochs", "1"]
    return ["fit", *data, *options, *more]


def test_a_run_to_a_file_and_its_resumption_have_whole_lines_and_no_advice_of_lightnings(
    cli: Callable[..., subprocess.CompletedProcess[str]], table: Path
) -> None:
    first = cli(*words(table))
    again = cli(*words(table, "--trainer.max_epochs", "2", "--ckpt_path", "last"))
    for result, steps in ((first, "8"), (again, "16")):
        assert result.returncode == 0, result.stderr
        assert not re.search("[\r\x1b]", result.stdout + result.stderr)
        lines = [line for line in result.stderr.splitlines() if line.startswith("fit: step")]
        assert [LINE.fullmatch(line).groups() for line in lines][-1] == (steps, steps)
        assert "Epoch" not in result.stdout
        assert "site-packages" not in result.stderr  # where a warning comes from
        assert "TPU" not in result.stderr


@pytest.mark.slow
def test_two_ranks_write_once(table: Path, tmp_path: Path) -> None:
    output = run_lightning_ranks(2, tmp_path, "lit-clip", *words(table, "--trainer.devices", "2"))
    assert len(re.findall(r"^fit: step 4 of 4,.* in all$", output, re.MULTILINE)) == 1
    assert len(LINE.findall(output)) == 1


def test_on_a_terminal_the_plan_stays_whole_above_the_bar_and_results_below(table: Path, tmp_path: Path) -> None:
    shown = screen(on_a_terminal(tmp_path, *without_packaged_defaults(words(table))))
    title = next(row for row, line in enumerate(shown) if line.strip() == "Plan")
    end = next(row for row, line in enumerate(shown) if row > title and line.startswith("└"))
    top, *rows, bottom = shown[title + 1 : end + 1]
    assert (top[0], top[-1], bottom[-1], len(top), len(bottom)) == ("┌", "┐", "┘", 80, 80)
    assert all(row[0] == row[-1] == "│" and len(row) == 80 for row in rows)
    assert ("parameters" in rows[0], any("schedule" in row for row in rows)) == (True, True)
    assert ["Epoch" in "\n".join(part) for part in (shown[:end], shown[end:])] == [False, True]
    assert not any("fit: step" in line for line in shown)
    results = next(row for row, line in enumerate(shown) if line.strip() == "Results")
    bar = [row for row, line in enumerate(shown) if line.startswith("Epoch")]
    assert (len(bar), end < bar[0] < results, results - bar[0] < 6) == (1, True, True)
    assert re.search(r"it/s loss: [\d.]+ val/loss: [\d.]+$", shown[bar[0]])  # one line, not a column of metrics
    assert not "".join(shown[bar[0] + 1 : results]).strip()
    starts = [line.split(": ")[0] for line in shown[results:] if ": " in line]
    assert starts[-4:] == ["checkpoint", "logs and images", "validate again", "curves"]


@pytest.mark.parametrize("batch", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_resumed_with_another_batch_counts_the_steps_that_are_done_and_those_that_are_left(
    batch: int, tiny_config: CLIPConfig, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs of 8 steps are done, and three are left."""
    path, module = tmp_path / "saved.ckpt", LitCLIP(tiny_config)
    first = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    first.fit(module, data_for(module, table, batch_size=4))
    first.save_checkpoint(path)
    capsys.readouterr()
    module, left = LitCLIP(tiny_config), Left()
    own: list[Callback] = [PrintPlan(), ProgressLines(), left]
    resumed = trainer(
        tmp_path,
        callbacks=own,
        max_epochs=5,
        check_val_every_n_epoch=2,
        num_sanity_val_steps=0,
        enable_progress_bar=True,
    )
    resumed.fit(module, data_for(module, table, batch_size=batch), ckpt_path=path, weights_only=True)
    steps = 16 + 3 * (32 // batch)
    out, err = capsys.readouterr()
    assert resumed.global_step == steps
    assert f"fit: step {steps} of {steps}" in err
    assert re.search(rf"steps +│ {steps}, {32 // batch} per epoch", out)
    assert left.expected == (steps, left.validated) == (steps, 1)
