"""Progress of a run as lines, where Lightning's progress bar cannot be drawn."""

import math
import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, Timer, TQDMProgressBar

from lit_clip.batch import CaptionBatch
from lit_clip.tools.console import ProgressLog, can_draw, duration, per_second
from lit_clip.training.schedules import known_steps
from .training_clock import TimedCallback, samples_of

LIGHTNINGS = (TQDMProgressBar, RichProgressBar)


class ProgressLines(TimedCallback):
    """Write progress as lines on standard error when standard output is no terminal: a file, a pipe, a notebook.

    Each line has the step, the last losses of training and validation, samples per second of all ranks in training
    time (see :class:`callbacks.training_clock.TimedCallback`) and the time left until ``max_steps``, ``max_epochs`` or
    ``max_time``, whichever is first, if steps go on to take as long as so far in this process, with validations and
    checkpoints. The last line has the time since the start, or since the step at which the run was resumed.
    Lightning's progress bars are disabled then. A progress bar of another class stays, and there are no lines; nor are
    there with ``enable_progress_bar=False``.
    """

    def __init__(self) -> None:
        self._writes = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        bar = trainer.progress_bar_callback
        self._writes = trainer.is_global_zero and type(bar) in LIGHTNINGS and not can_draw(sys.stdout)
        if self._writes and bar:
            bar.disable()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._log = ProgressLog("fit", self.now)
        self._samples = self._all_samples = 0
        self._all_seconds = 0.0
        self._first: tuple[int, float] | None = None  # step and time after the first batch, which starts workers

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: CaptionBatch, batch_idx: int
    ) -> None:
        if not self._writes:
            return
        if self._first is None:
            self._first = trainer.global_step, self.now()
            self.clock.lap()
        else:
            self._samples += samples_of(trainer, pl_module, batch)
        if self._log.due and trainer.global_step != known_steps(trainer):  # the last line is below
            left = self._seconds_left(trainer)
            rate = per_second(*self._lap(), "samples")
            self._log.write(_step(trainer), _losses(trainer), rate, "" if left is None else f"{duration(left)} left")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._writes:
            self._lap()
            rate = per_second(self._all_samples, self._all_seconds, "samples")
            since = f"since step {self.steps_before:,}" if self.steps_before else "in all"
            self._log.write(_step(trainer), _losses(trainer), rate, f"{duration(self._log.seconds)} {since}")

    def _lap(self) -> tuple[int, float]:
        samples, seconds = self._samples, self.clock.lap().seconds
        self._samples, self._all_samples = 0, self._all_samples + samples
        self._all_seconds += seconds
        return samples, seconds

    def _seconds_left(self, trainer: Any) -> float | None:
        bounds = [each.time_remaining() for each in trainer.callbacks if isinstance(each, Timer)]
        steps, (first_step, since) = known_steps(trainer), self._first or (0, 0.0)
        if steps is not None and trainer.global_step > first_step:
            per_step = (self.now() - since) / (trainer.global_step - first_step)
            bounds.append(per_step * max(0, steps - trainer.global_step))
        return min((max(0.0, bound) for bound in bounds if bound is not None), default=None)

    def on_validation_start(self, trainer: Any, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if trainer.sanity_checking:
            self._begin("sanity check", trainer.num_sanity_val_batches)
        else:
            self._begin("validation", trainer.num_val_batches)

    def on_test_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self._begin("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self._begin("predict", trainer.num_predict_batches)

    def _begin(self, title: str, batches: Sequence[float]) -> None:
        self._evaluation, self._batches, self._images = ProgressLog(title, self.now), 0, 0
        self._of = sum(batches)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: CaptionBatch, *_: Any, **__: Any
    ) -> None:
        self._batches, self._images = self._batches + 1, self._images + len(batch.images) * trainer.world_size
        log = self._evaluation
        if self._writes and log.due:
            known = math.isfinite(self._of)
            left = log.seconds / self._batches * (self._of - self._batches) if known else 0
            of, remaining = (f" of {self._of:,}", f"{duration(left)} left") if known else ("", "")
            log.write(f"batch {self._batches:,}{of}", per_second(self._images, log.seconds, "samples"), remaining)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


def _step(trainer: Trainer) -> str:
    steps = known_steps(trainer)
    return f"step {trainer.global_step:,}" + ("" if steps is None else f" of {steps:,}")


def _losses(trainer: Trainer) -> str:
    found = trainer.progress_bar_metrics  # not read from the device here: see LitCLIP.optimizer_step
    shown = {"train/loss": "loss", "val/loss": "val/loss"}
    return ", ".join(f"{title} {found[name]:.3f}" for name, title in shown.items() if name in found)
