"""A run's expected time, from its first steps, and its progress in lines or a bar."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, Timer, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from lit_clip.batch import CaptionBatch
from lit_clip.tools.console import ProgressLog, can_draw, duration, in_words, per_second, plural
from lit_clip.training.schedules import known_steps, resumed_after, samples_of

FIRST = 2  # steps that are not measured: they compile, fill caches and wait for data workers
ENOUGH = 3, 5.0  # measured steps, and seconds in them
LATEST = 30.0  # seconds after which an estimate by fewer steps is printed
MUCH = 0.2  # relative change of an estimate that is printed again
SHOWN = {"train/loss": "loss", "val/loss": "val/loss"}
BAR_WIDTH = 8  # columns; a line then fits into 80


class ShortBar(RichProgressBar):
    """Lightning's progress bar in one line of a terminal; it shows only the losses."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        columns = super().configure_columns(trainer)
        columns[1].bar_width = BAR_WIDTH
        return columns

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        found = trainer.progress_bar_metrics
        return {title: found[name] for name, title in SHOWN.items() if name in found}


LIGHTNINGS = (TQDMProgressBar, RichProgressBar, ShortBar)


class ExpectedTime(Callback):
    """Print a run's expected duration in one line below the plan.

    Steps are measured from the third on, until there are 3 of them and 5 seconds have passed; after 30 seconds the line
    is printed with what is known by then. It is printed again if it changes by more than a fifth: when more steps
    have been measured, and after the first validation, whose time is unknown before. A resumed run counts the steps and
    validations that are left. Waiting for data, checkpoints and evaluations between steps are part of the steps'
    time, as far as they occurred. Validations are not counted where a time decides when they run. Without a known
    number of steps or a ``max_time`` there is no line.

    ``train/expected_hours`` is logged with each line. The device is synchronised when the measurement begins and for
    each line, in no other step.
    """

    now: Callable[[], float] = staticmethod(time.perf_counter)
    _per_validation: float | None = None  # seconds, kept from a validation before fit
    # A resumed run may validate before it trains.
    _measures = False
    _last = 0.0
    _printed: tuple[float, bool] | None = None  # seconds, and whether they were the most

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self._measures = trainer.is_global_zero and not trainer.fast_dev_run
        self._first_step, self._printed = trainer.global_step, None
        self._steps = 0
        self._start = self._seconds = 0.0  # of the first steps, and of those after them
        self._began = self._last = self.now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps += 1
        if self._measures and self._steps == FIRST:
            _synchronise(trainer)
        seconds = self._count_time()
        enough = self._steps - FIRST >= ENOUGH[0] and self._seconds >= ENOUGH[1]
        late = self._printed is None and self._last + seconds - self._began > LATEST  # the next step would be too late
        if self._measures and (enough or late):
            self._measures = not enough
            self._report(trainer, pl_module)

    def _count_time(self) -> float:
        """Record the time since the last call as the latest step's, and return it."""
        before, self._last = self._last, self.now()
        if self._steps > FIRST:
            self._seconds += self._last - before
        else:
            self._start += self._last - before
        return self._last - before

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_began = self.now()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        known, seconds = self._per_validation is not None, self.now() - self._validation_began
        self._per_validation = seconds
        self._last += seconds  # it belongs to no step
        if trainer.state.fn == TrainerFn.FITTING and not known and not self._measures and self._printed is not None:
            self._report(trainer, pl_module)

    def _report(self, trainer: Trainer, module: LightningModule) -> None:
        """Print and log the expected time, if it is new."""
        _synchronise(trainer)
        self._count_time()
        at_most, (before, was_at_most) = self._steps <= FIRST, self._printed or (0.0, False)
        seconds, text = self._estimate(trainer)
        if math.isfinite(seconds) and (was_at_most or abs(seconds - before) > MUCH * before):
            self._printed = seconds, at_most
            module.print(f"expected time{' now' if before else ''}: {'at most ' if at_most else ''}{text}")
            for logger in trainer.loggers:
                logger.log_metrics({"train/expected_hours": seconds / 3600}, trainer.global_step)

    def _estimate(self, trainer: Trainer) -> tuple[float, str]:
        """Return the expected seconds of the run, from its first step in this process, and a text about them."""
        measured, start = self._steps - FIRST, 0.0
        per_step = self._seconds / measured if measured > 0 else self._start / self._steps
        if measured > 0:
            start = max(0.0, self._start - FIRST * per_step)  # that the first steps took longer than others
        limit, last = self._last - self._began + _time_left(trainer), known_steps(trainer)
        if last is None:
            return limit, f"{in_words(limit)} by max_time"
        steps, count = max(0, last - self._first_step), validations(trainer, self._first_step, last)
        seconds = start + steps * per_step + count * (self._per_validation or 0.0)
        if limit <= seconds:
            return limit, f"{in_words(limit)} by max_time"
        of_each = "" if self._per_validation is None else f" of {in_words(self._per_validation)}"
        validated = f", {plural(count, 'validation')}{of_each}" if count else ""
        return seconds, f"{in_words(seconds)} ({plural(steps, 'step')} of {in_words(per_step)}{validated})"


def _time_left(trainer: Any) -> float:
    """Return the seconds until ``max_time``; infinity without one."""
    left = [each.time_remaining() for each in trainer.callbacks if isinstance(each, Timer)]
    return min((max(0.0, seconds) for seconds in left if seconds is not None), default=math.inf)


def validations(trainer: Any, first: int, last: int) -> int:
    """Return the number of validations after step ``first``, up to step ``last``; 0 if unknown."""
    every, per_epoch, epochs = trainer.val_check_batch, trainer.num_training_batches, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or not sum(trainer.num_val_batches) or every in (None, float("inf")):
        return 0

    epochs_before, steps_before = resumed_after(trainer)

    def until(step: int) -> int:
        if epochs is None:
            return int(step // every)
        whole, within = divmod(step - steps_before, per_epoch)
        whole += epochs_before
        return int(whole // epochs * (per_epoch // every) + ((whole + 1) % epochs == 0) * (within // every))

    return until(last) - until(first)


def _synchronise(trainer: Trainer) -> None:
    if trainer.strategy.root_device.type != "cpu":
        torch.accelerator.synchronize()


class ProgressLines(Callback):
    """Write progress as lines on standard error when standard output is a file, a pipe or a notebook.

    Each line has the step, the last losses of training and validation, samples per second of all ranks since the first
    step of this process, without validations, and the time left until ``max_steps``, ``max_epochs`` or ``max_time``,
    whichever is first, if steps go on to take as long as so far in this process, with validations and checkpoints. The
    last line has the time since the start, or since the step at which the run was resumed.
    Lightning's progress bars are disabled then. A progress bar of another class stays, and there are no lines; nor are
    there with ``enable_progress_bar=False``.
    """

    now: Callable[[], float] = staticmethod(time.perf_counter)
    _first: tuple[int, float] | None = None  # step and time after the first batch, which starts workers

    def __init__(self) -> None:
        self._writes = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        bar = trainer.progress_bar_callback
        self._writes = trainer.is_global_zero and type(bar) in LIGHTNINGS and not can_draw(sys.stdout)
        if self._writes and bar:
            bar.disable()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log, self._steps_before = ProgressLog("fit", self.now), trainer.global_step
        self._first, self._samples, self._validating = None, 0, 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: CaptionBatch, batch_idx: int
    ) -> None:
        if not self._writes:
            return
        if self._first is None:
            self._first = trainer.global_step, self.now()
        else:
            self._samples += samples_of(trainer, pl_module, batch)
        if self._log.due and trainer.global_step != known_steps(trainer):  # the last line is below
            self._log.write(_step(trainer), _losses(trainer), self._rate(), _left(self._seconds_left(trainer)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._writes:
            since = f"since step {self._steps_before:,}" if self._steps_before else "in all"
            self._log.write(_step(trainer), _losses(trainer), self._rate(), f"{duration(self._log.seconds)} {since}")

    def _rate(self) -> str:
        since = self._first[1] if self._first else self.now()
        return per_second(self._samples, self.now() - since - self._validating, "samples")

    def _seconds_left(self, trainer: Trainer) -> float:
        left, steps, (first_step, since) = _time_left(trainer), known_steps(trainer), self._first or (0, 0.0)
        if steps is not None and trainer.global_step > first_step:
            per_step = (self.now() - since) / (trainer.global_step - first_step)
            left = min(left, per_step * max(0, steps - trainer.global_step))
        return left

    def on_validation_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self._began = self.now()
        if trainer.sanity_checking:
            self._begin("sanity check", trainer.num_sanity_val_batches)
        else:
            self._begin("validation", trainer.num_val_batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._first is not None:
            self._validating += self.now() - self._began

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
            of = f" of {self._of:,}" if math.isfinite(self._of) else ""
            left = log.seconds / self._batches * (self._of - self._batches)
            log.write(f"batch {self._batches:,}{of}", per_second(self._images, log.seconds, "samples"), _left(left))

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


def _left(seconds: float) -> str:
    return f"{duration(seconds)} left" if math.isfinite(seconds) else ""


def _step(trainer: Trainer) -> str:
    steps = known_steps(trainer)
    return f"step {trainer.global_step:,}" + ("" if steps is None else f" of {steps:,}")


def _losses(trainer: Trainer) -> str:
    found = trainer.progress_bar_metrics  # not read from the device here: see LitCLIP.optimizer_step
    return ", ".join(f"{title} {found[name]:.3f}" for name, title in SHOWN.items() if name in found)
