"""The expected time of a run: exact on a clock of its own, in a resumed run, on two ranks, and below a progress bar."""

import csv
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

import callbacks
from callbacks import ExpectedTime, Preemption
from callbacks.progress import validations
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig
from lit_clip.module import LitCLIP
from lit_clip.tools.console import in_words
from lit_clip.training.schedules import WarmupConstant, WarmupCosine
from tests.conftest import TINY_YAML, without_packaged_defaults
from tests.helpers.small_sets import write_table
from tests.helpers.terminal import on_a_terminal, screen
from tests.test_module import data_for, trainer


class Ticks(Callback):
    """A clock on which step n takes ``steps[n]`` seconds, later ones as long as the last, and a validation another."""

    def __init__(self, steps: list[float], validation: float = 0.0) -> None:
        self.steps, self.validation, self.time, self.shown_at = steps, validation, 1000.0, [0.0]
        self.done = 0

    def __call__(self) -> float:
        return self.time

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self.time += self.steps[min(self.done, len(self.steps) - 1)]
        self.done += 1

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.time += self.validation


Fit = Callable[..., list[str]]


def fit_boring(fitting: Trainer, path: Path | None = None) -> None:
    """Fit a model whose steps take no time; an epoch has 8."""
    fitting.fit(BoringModel(), DataLoader(RandomDataset(32, 8)), DataLoader(RandomDataset(32, 1)), ckpt_path=path)


@pytest.fixture
def fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fit:
    def run(steps: list[float], validation: float = 0.0, path: Path | None = None, **options: Any) -> list[str]:
        """Return the lines about the time."""
        ticks, expected = Ticks(steps, validation), ExpectedTime()
        expected.now = ticks
        settings = {"limit_val_batches": 0, "num_sanity_val_steps": 0, "max_epochs": 20, **options}
        settings["max_steps"] = settings.get("max_steps", 160)
        stop = Stop(20, tmp_path / "end.ckpt")  # by then all is said
        fit_boring(trainer(tmp_path, callbacks=[Preemption(), ticks, expected, stop], **settings), path)
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith("expected time")]

    return run


class Stop(Callback):
    """Ends the run after some steps of this process, and saves a checkpoint."""

    def __init__(self, steps: int, path: Path) -> None:
        self.left, self.path = steps, path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([2.0], ["5.3 minutes (160 steps of 2 s)"]),
        ([0.25], []),  # 20 steps are too few, see below
        ([31.0, 5.0, 2.0], ["at most 1.4 hours (160 steps of 31 s)", "5.9 minutes (160 steps of 2 s)"]),
        ([20.0], ["at most 53 minutes (160 steps of 20 s)", "53 minutes (160 steps of 20 s)"]),
        ([12.0, 11.0, 10.0], ["at most 31 minutes (160 steps of 12 s)", "27 minutes (160 steps of 10 s)"]),
        ([9.0], ["24 minutes (160 steps of 9 s)"]),  # of one measured step after 27 seconds; and right
        ([1.0, 1.0, 28.5, 1.0], ["1.3 hours (160 steps of 28 s)", "27 minutes (160 steps of 10 s)"]),
        ([1000.0], ["at most 1.9 days (160 steps of 17 minutes)", "1.9 days (160 steps of 17 minutes)"]),
    ],
)
def test_the_time_is_measured_from_the_third_step_on(fit: Fit, steps: list[float], expected: list[str]) -> None:
    starts = ("expected time: ", "expected time now: ")
    assert fit(steps) == [f"{start}{line}" for start, line in zip(starts, expected, strict=False)]


def test_the_line_comes_within_30_seconds_or_after_one_step(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[float] = []
    monkeypatch.setattr(BoringModel, "print", lambda *_: printed.append(ticks[-1].time - 1000))
    ticks: list[Ticks] = []
    made = Ticks.__init__

    def remembered(self: Ticks, *options: Any) -> None:
        ticks.append(self)
        made(self, *options)

    monkeypatch.setattr(Ticks, "__init__", remembered)
    for seconds in (0.5, 1.0, 4.0, 7.0, 9.9, 14.0, 29.0):
        printed.clear()
        fit([seconds])
        assert printed[0] <= max(30, seconds), seconds
    printed.clear()
    fit([40.0])
    assert printed[0] == 40


def test_validations_count_once_their_time_is_known(fit: Fit) -> None:
    options = {"limit_val_batches": 1, "val_check_interval": 4, "max_steps": 40}
    (first,) = fit([2.0], 6.0, **options)  # measured in 5 steps, of which 2 do not count, and a validation after 4
    assert first == "expected time: 2.3 minutes (40 steps of 2 s, 10 validations of 6 s)"
    options["val_check_interval"] = 8
    first, second = fit([2.0], 6.0, **options)
    assert first == "expected time: 1.3 minutes (40 steps of 2 s, 5 validations)"
    assert second == "expected time now: 1.8 minutes (40 steps of 2 s, 5 validations of 6 s)"
    options["val_check_interval"] = 2  # also after the first steps, which are not measured
    (first,) = fit([2.0], 60.0, **options)
    assert first == "expected time: 21 minutes (40 steps of 2 s, 20 validations of 1 minute)"
    (first,) = fit([20.0], 600.0, **{**options, "val_check_interval": 1})[1:]
    assert first == "expected time now: 6.9 hours (40 steps of 20 s, 40 validations of 10 minutes)"
    options["val_check_interval"] = 8
    (first,) = fit([2.0], 1.0, **options)  # 5 seconds of 80 change little
    (first,) = fit([2.0], 6.0, **{**options, "limit_val_batches": 0})
    assert first == "expected time: 1.3 minutes (40 steps of 2 s)"


def test_a_resumed_run_counts_the_steps_that_are_left(fit: Fit, tmp_path: Path) -> None:
    assert fit([2.0]) == ["expected time: 5.3 minutes (160 steps of 2 s)"]
    assert fit([2.0], path=tmp_path / "end.ckpt") == ["expected time: 4.7 minutes (140 steps of 2 s)"]


def test_a_validation_that_is_due_when_a_run_is_resumed_is_not_counted(fit: Fit, tmp_path: Path) -> None:
    options = {"limit_val_batches": 1, "val_check_interval": 4, "max_steps": 40}
    fit([2.0], 6.0, **options)  # saved after step 20, before its validation
    assert fit([2.0], 6.0, tmp_path / "end.ckpt", **options) == [
        "expected time: 1.2 minutes (20 steps of 2 s, 5 validations of 6 s)"
    ]


def test_max_time_ends_a_run_before_its_steps(fit: Fit) -> None:
    """The timer's clock is the real one."""
    first, line = fit([60.0], max_time={"minutes": 12})
    assert re.fullmatch(r"expected time: at most 1[23] minutes by max_time", first)  # no number of steps is known yet
    assert line == "expected time now: 17 minutes by max_time"  # after 5 steps, with 12 minutes less a few seconds left
    (line,) = fit([2.0], max_time={"minutes": 12})
    assert line == "expected time: 5.3 minutes (160 steps of 2 s)"
    (line,) = fit([2.0], max_time={"minutes": 12}, max_steps=-1, max_epochs=-1)
    assert line == "expected time: 12 minutes by max_time"


class Endless(IterableDataset[CaptionBatch]):
    """Batches without a length."""

    def __init__(self, module: LitCLIP) -> None:
        images = torch.zeros(4, *module.preprocessing.shape, dtype=torch.uint8)
        self.batch = CaptionBatch(images, module.tokenize(list("abcd")), list("abcd"))

    def __iter__(self) -> Iterator[CaptionBatch]:
        return iter([self.batch] * 9)


def test_data_of_unknown_length_have_a_time_only_with_max_steps(
    tiny_config: CLIPConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(schedule: Any = WarmupCosine, **options: Any) -> list[str]:
        module, ticks, expected = LitCLIP(tiny_config, lr_scheduler=schedule), Ticks([3.0]), ExpectedTime()
        expected.now = ticks
        fitting = trainer(tmp_path, callbacks=callbacks.defaults(ticks, expected), **options)
        fitting.fit(module, DataLoader(Endless(module), batch_size=None))
        assert fitting.global_step == 9
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("expected")]

    assert lines(partial(WarmupConstant, warmup_steps=1), max_epochs=1) == []
    assert lines(max_steps=9) == ["expected time: 27 s (9 steps of 3 s)"]
    with pytest.raises(InputError, match=r"^trainer\.max_steps: not set, and the data do not tell their length"):
        lines(max_epochs=1)


@pytest.mark.parametrize(
    "when",
    [
        {},
        {"val_check_interval": 3},
        {"val_check_interval": 0.5},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": 2, "val_check_interval": 3},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
        {"limit_train_batches": 5, "check_val_every_n_epoch": 3},
        {"limit_val_batches": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("end", [{"max_epochs": 4}, {"max_steps": 19}], ids=str)
def test_validations_are_those_that_lightning_runs(when: dict[str, Any], end: dict[str, Any], tmp_path: Path) -> None:
    counted: list[int] = []

    class Count(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            counted.append(trainer.global_step)

    options = {"limit_val_batches": 1, "num_sanity_val_steps": 0, **when, **end}
    fitting = trainer(tmp_path, callbacks=[Count()], **options)
    fit_boring(fitting)
    steps = fitting.global_step
    for first in range(steps):
        assert validations(fitting, first, steps) == sum(step > first for step in counted), first


def test_the_log_has_the_hours_and_each_line_synchronises_once(
    tiny_config: CLIPConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    monkeypatch.setattr("callbacks.progress._synchronise", lambda trainer: waits.append(trainer.global_step))
    module, ticks, expected = LitCLIP(tiny_config), Ticks([2.0]), ExpectedTime()
    expected.now = ticks
    used = callbacks.defaults(ticks, expected)
    fitting = trainer(tmp_path, max_epochs=2, logger=CSVLogger(tmp_path), callbacks=used, limit_val_batches=0)
    fitting.fit(module, data_for(module, write_table(tmp_path, 32), batch_size=4))
    assert waits == [2, 5]
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/expected_hours"]]
    assert [(row["step"], float(row["train/expected_hours"])) for row in rows] == [("5", pytest.approx(32 / 3600))]


def test_a_trial_prints_nothing(fit: Fit) -> None:
    assert fit([100.0], fast_dev_run=5) == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0042, "0.0042 s"), (1, "1 s"), (59, "59 s"), (60, "1 minute"), (90, "1.5 minutes"), (3599, "60 minutes")]
    + [(3600, "1 hour"), (5400, "1.5 hours"), (86400, "1 day"), (3e6, "35 days"), (9e9, "104,167 days")],
)
def test_times_are_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.fixture
def slow(tmp_path: Path) -> list[str]:
    """A run in which steps take 0.1 s, measured in 0.25 s of them; it ends after 9 of 3,600."""
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "from callbacks import progress\n"
        "from lightning.pytorch import Callback\n"
        "progress.ENOUGH = 3, 0.25\n"
        "class Slow(Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        time.sleep(0.1)\n"
        "        trainer.should_stop = trainer.global_step >= 8\n"
    )
    table = str(write_table(tmp_path, 80))
    data = ["--data", "datamodules.Captions", "--data.train", table, "--data.val", table]
    data += ["--data.batch_size", "4", "--data.num_workers", "0"]
    options = ["--model.architecture", TINY_YAML, "--model.lr_scheduler.warmup_steps", "50"]
    options += ["--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0", "--trainer.max_epochs", "180"]
    return ["fit", *data, *options, "--trainer.callbacks+=slow.Slow"]


REAL = re.compile(r"expected time: (?:[6-9]|[1-5]\d)(?:\.\d)? minutes \(3,600 steps of 0\.[1-9]\d* s\)")


def test_a_terminal_of_80_columns_shows_it_above_the_progress_bar(slow: list[str], tmp_path: Path) -> None:
    lines = screen(on_a_terminal(tmp_path, *without_packaged_defaults(slow)))
    (place,) = (number for number, line in enumerate(lines) if line.startswith("expected time:"))
    assert REAL.fullmatch(lines[place])
    assert lines[place + 1].startswith("Epoch 0")  # the bar, which is drawn again in its place
    assert not any("Epoch" in line for line in lines[:place])
