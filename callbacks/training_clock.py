"""Training time, without validations, checkpoints and evaluations, and the part of it spent waiting for data."""

import sys
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler

from callbacks.periodic import PeriodicEvaluation

# Names of Lightning's profiler actions: fetching a batch, and writing a checkpoint.
FETCH, SAVE = "[_TrainingEpochLoop].train_dataloader_next", "save_checkpoint"


class Lap(NamedTuple):
    """Seconds of training, and the part of them in which the loop waited for a batch."""

    seconds: float
    waited: float


class TrainingClock:
    """A stopwatch that can be paused for several reasons at once, and that measures waiting for data.

    Args:
        now: returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.start()

    def start(self) -> None:
        """Start from zero, running; training is waiting for its first batch."""
        self._seconds, self._since = 0.0, self._now()
        self._waited, self._waiting_since = 0.0, 0.0
        self._pauses: set[str] = set()
        self._waiting = True

    def _read(self) -> float:
        return self._seconds if self._pauses else self._seconds + self._now() - self._since

    def pause(self, reason: str) -> None:
        """Pause until this and all other reasons are gone."""
        self._seconds = self._read()
        self._pauses.add(reason)

    def resume(self, reason: str) -> None:
        """Remove a reason to pause, if it was one."""
        if reason in self._pauses:
            self._pauses.remove(reason)
            self._since = self._now()

    def start_waiting(self) -> None:
        """Note that training waits for a batch; no effect if it does so already."""
        if not self._waiting:
            self._waiting, self._waiting_since = True, self._read()

    def stop_waiting(self) -> None:
        """Note that the batch has arrived."""
        if self._waiting:
            self._waiting, self._waited = False, self._waited + self._read() - self._waiting_since

    def lap(self) -> Lap:
        """Return the time since the last lap or the start."""
        seconds = self._read()
        waited = self._waited + (seconds - self._waiting_since if self._waiting else 0.0)
        self._seconds, self._since, self._waited, self._waiting_since = 0.0, self._now(), 0.0, 0.0
        return Lap(seconds, waited)


def log_interval(trainer: Any) -> int:
    """Return the number of steps from one logged step to the next."""
    return trainer.log_every_n_steps or sys.maxsize  # 0 means never; a connector sets it


class TimedCallback(Callback):
    """A callback that measures training time.

    Validations, checkpoints, evaluations between steps (:class:`callbacks.periodic.PeriodicEvaluation`) and the time
    between two epochs are not counted. Waiting for data is the time in which the loop fetches a batch, which includes
    the start of data workers and an epoch's first batch. Lightning reports all this to its profiler, of whatever class,
    and the clock follows these reports.

    Attributes:
        clock: runs while the model is trained.
        steps_before: steps that the run had taken when this process began to train; 0 unless it was resumed.
        now: returns the time in seconds.
    """

    clock: TrainingClock
    steps_before = 0
    now: Callable[[], float] = staticmethod(time.perf_counter)

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        self.clock = TrainingClock(self.now)
        if stage == "fit":
            keys = [each.state_key for each in trainer.callbacks if isinstance(each, PeriodicEvaluation)]
            _follow(trainer.profiler, self.clock, {SAVE, *(f"[Callback]{key}.on_train_batch_end" for key in keys)})

    def teardown(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        _unfollow(trainer.profiler)

    def on_exception(self, trainer: Any, pl_module: LightningModule, exception: BaseException) -> None:
        _unfollow(trainer.profiler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps_before = trainer.global_step
        self.clock.start()  # a run that is resumed within an epoch has no on_train_epoch_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.resume("between epochs")
        self.clock.start_waiting()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.pause("between epochs")

    def is_whole_interval(self, trainer: Trainer) -> bool:
        """Return whether this process took all steps of the logged interval that ends now.

        The first of a resumed run may be a few steps with the start of data workers among them, too few for a rate.
        """
        return trainer.global_step - self.steps_before >= log_interval(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.pause("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.resume("validation")


def _follow(profiler: Profiler, clock: TrainingClock, pauses: Collection[str]) -> None:
    """Make the clock follow what is reported to the profiler.

    This patches the one object instead of using a profiler of our own, because Lightning and users look for theirs.

    Args:
        profiler: the trainer's.
        clock: waits during ``FETCH``.
        pauses: names of actions during which the clock is paused.
    """
    start, stop = profiler.start, profiler.stop

    def started(action_name: str) -> None:
        start(action_name)
        if action_name == FETCH:
            clock.start_waiting()
        elif action_name in pauses:
            clock.pause(action_name)

    def stopped(action_name: str) -> None:
        if action_name == FETCH:
            clock.stop_waiting()
        elif action_name in pauses:
            clock.resume(action_name)
        stop(action_name)

    profiler.start, profiler.stop = started, stopped


def _unfollow(profiler: Profiler) -> None:
    """Undo every :func:`_follow`."""
    for name in ("start", "stop"):
        vars(profiler).pop(name, None)
