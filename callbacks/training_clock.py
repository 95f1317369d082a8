"""How long training has taken, without what is beside it, and how much of that it waited for data."""

import sys
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler

from callbacks.periodic import PeriodicEvaluation

# What Lightning tells its profiler: that the loop asks for a batch, and that the trainer writes a checkpoint.
FETCH, SAVE = "[_TrainingEpochLoop].train_dataloader_next", "save_checkpoint"


class Lap(NamedTuple):
    """Seconds of training, and those of them in which the loop waited for a batch."""

    seconds: float
    waited: float


class TrainingClock:
    """A stopwatch that can be interrupted for several reasons at a time, and knows when training waits for data.

    Args:
        now: the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.start()

    def start(self) -> None:
        """From zero, and not interrupted: training waits for its first batch."""
        self._seconds, self._since = 0.0, self._now()
        self._waited, self._waiting_since = 0.0, 0.0
        self._interruptions: set[str] = set()
        self._waiting = True

    def _read(self) -> float:
        return self._seconds if self._interruptions else self._seconds + self._now() - self._since

    def interrupt(self, reason: str) -> None:
        """Stand still until this and all other reasons are gone."""
        self._seconds = self._read()
        self._interruptions.add(reason)

    def go_on(self, reason: str) -> None:
        """That reason is gone, if it was one."""
        if reason in self._interruptions:
            self._interruptions.remove(reason)
            self._since = self._now()

    def wait(self) -> None:
        """Training begins to wait for a batch, unless it does so already."""
        if not self._waiting:
            self._waiting, self._waiting_since = True, self._read()

    def got(self) -> None:
        """The batch is there."""
        if self._waiting:
            self._waiting, self._waited = False, self._waited + self._read() - self._waiting_since

    def lap(self) -> Lap:
        """What has passed since the last lap, or the start."""
        seconds = self._read()
        waited = self._waited + (seconds - self._waiting_since if self._waiting else 0.0)
        self._seconds, self._since, self._waited, self._waiting_since = 0.0, self._now(), 0.0, 0.0
        return Lap(seconds, waited)


def log_interval(trainer: Any) -> int:
    """Steps from one logged step to the next."""
    return trainer.log_every_n_steps or sys.maxsize  # 0 is never; a connector sets it


class TimedCallback(Callback):
    """A callback that knows how long training takes.

    Validations, checkpoints, evaluations between steps (:class:`callbacks.periodic.PeriodicEvaluation`) and what comes
    between two epochs are not counted. Waiting for data is the time in which the loop asks for a batch, the start of
    data workers and an epoch's first batch with it. Lightning tells its profiler of these things, whatever profiler
    the user has chosen, and the clock listens.

    Attributes:
        clock: runs while the model is trained.
    """

    clock: TrainingClock

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        self.clock = TrainingClock()
        if stage == "fit":
            evaluations = [one.state_key for one in trainer.callbacks if isinstance(one, PeriodicEvaluation)]
            _listen(
                trainer.profiler, self.clock, {SAVE, *(f"[Callback]{key}.on_train_batch_end" for key in evaluations)}
            )

    def teardown(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        _leave_alone(trainer.profiler)

    def on_exception(self, trainer: Any, pl_module: LightningModule, exception: BaseException) -> None:
        _leave_alone(trainer.profiler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.start()  # here too: a run that goes on within an epoch has no on_train_epoch_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.go_on("between epochs")
        self.clock.wait()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.interrupt("between epochs")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.interrupt("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.go_on("validation")


def _listen(profiler: Profiler, clock: TrainingClock, interruptions: Collection[str]) -> None:
    """Let the clock hear what the profiler is told.

    On this one object and not by a profiler of our own: Lightning and users look for theirs.
    """
    start, stop = profiler.start, profiler.stop

    def started(action_name: str) -> None:
        start(action_name)
        if action_name == FETCH:
            clock.wait()
        elif action_name in interruptions:
            clock.interrupt(action_name)

    def stopped(action_name: str) -> None:
        if action_name == FETCH:
            clock.got()
        elif action_name in interruptions:
            clock.go_on(action_name)
        stop(action_name)

    profiler.start, profiler.stop = started, stopped


def _leave_alone(profiler: Profiler) -> None:
    """Undo every :func:`_listen`."""
    for name in ("start", "stop"):
        vars(profiler).pop(name, None)
