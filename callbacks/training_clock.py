"""Training time, without validations, checkpoints and evaluations, and the part of it spent waiting for data."""

import sys
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler

from lit_clip.batch import CaptionBatch
from .periodic import PeriodicEvaluation

# Names of profiler actions: Lightning's fetching of a batch and writing of a checkpoint; a callback's own counting.
FETCH, SAVE, MEASURE = "[_TrainingEpochLoop].train_dataloader_next", "save_checkpoint", "count_flops"


class Lap(NamedTuple):
    """Seconds of training, and the part of them in which the loop waited for a batch."""

    seconds: float
    waited: float


class TrainingClock:
    """A stopwatch that can be paused for several reasons at once, and that measures waiting for data."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.start()

    def start(self) -> None:
        """Start from zero, running; training is waiting for its first batch."""
        self._seconds = self._waited = 0.0  # until _since
        self._since = self._now()
        self._pauses: set[str] = set()
        self._waiting = True

    def _advance(self) -> None:
        if not self._pauses:
            before, self._since = self._since, self._now()
            self._seconds += self._since - before
            self._waited += self._waiting * (self._since - before)

    def pause(self, reason: str) -> None:
        """Pause until this and all other reasons are gone."""
        self._advance()
        self._pauses.add(reason)

    def resume(self, reason: str) -> None:
        """Remove a reason to pause, if it was one."""
        if reason in self._pauses:
            self._pauses.remove(reason)
            self._since = self._now()

    def wait(self, waiting: bool) -> None:
        """Note whether training waits for a batch."""
        if self._waiting != waiting:
            self._advance()
            self._waiting = waiting

    def lap(self) -> Lap:
        """Return the time since the last lap or the start."""
        self._advance()
        lap = Lap(self._seconds, self._waited)
        self._seconds, self._since, self._waited = 0.0, self._now(), 0.0
        return lap


def log_interval(trainer: Any) -> int:
    """Return the number of steps from one logged step to the next."""
    return trainer.log_every_n_steps or sys.maxsize  # 0 means never; a connector sets it


def samples_of(trainer: Trainer, module: Any, batch: CaptionBatch) -> int:
    """Return how many pairs of all ranks a step has had, skipped ones included where a sample is a pair."""
    if batch.image_of is None:  # every rank has the same number
        return (len(batch.images) + len(batch.skipped)) * trainer.world_size
    step = getattr(module, "last_step", None)
    return step.pairs if step else 0


class TimedCallback(Callback):
    """A callback that measures training time.

    Validations, checkpoints, evaluations between steps (:class:`callbacks.periodic.PeriodicEvaluation`), the time
    between two epochs and what is profiled as ``MEASURE`` are not counted. Waiting for data is the time in which the
    loop fetches a batch, which includes the start of data workers and an epoch's first batch. The clock follows what
    is reported to Lightning's profiler.
    """

    clock: TrainingClock
    steps_before = 0  # of the run when this process began to train; 0 unless it was resumed
    now: Callable[[], float] = staticmethod(time.perf_counter)

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        self.clock = TrainingClock(self.now)
        if stage == "fit":
            keys = [each.state_key for each in trainer.callbacks if isinstance(each, PeriodicEvaluation)]
            others = (f"[Callback]{key}.on_train_batch_end" for key in keys)
            _follow(trainer.profiler, self.clock, {SAVE, MEASURE, *others})

    def teardown(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        for name in ("start", "stop"):  # undoes every _follow
            vars(trainer.profiler).pop(name, None)

    def on_exception(self, trainer: Any, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps_before = trainer.global_step
        self.clock.start()  # a run that is resumed within an epoch has no on_train_epoch_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.resume("between epochs")
        self.clock.wait(True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.pause("between epochs")

    def is_whole_interval(self, trainer: Trainer) -> bool:
        """Return whether this process took all steps of the logged interval that ends now, enough for a rate."""
        return trainer.global_step - self.steps_before >= log_interval(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.pause("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.resume("validation")


def _follow(profiler: Profiler, clock: TrainingClock, pauses: Collection[str]) -> None:
    """Make the clock wait during ``FETCH`` and pause during other actions that are reported to the profiler.

    This patches the one object instead of using a profiler of our own, because Lightning and users look for theirs.
    """
    start, stop = profiler.start, profiler.stop

    def started(action_name: str) -> None:
        start(action_name)
        if action_name == FETCH:
            clock.wait(True)
        elif action_name in pauses:
            clock.pause(action_name)

    def stopped(action_name: str) -> None:
        if action_name == FETCH:
            clock.wait(False)
        elif action_name in pauses:
            clock.resume(action_name)
        stop(action_name)

    profiler.start, profiler.stop = started, stopped
