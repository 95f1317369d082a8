"""The time that a run will take, measured on its first steps."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn

from lit_clip.tools.console import Console, in_words
from lit_clip.training.schedules import known_steps, resumed_after

FIRST = 2  # steps that are not measured: they compile, fill caches and wait for data workers
ENOUGH = 3, 5.0  # measured steps, and seconds in them
LATEST = 30.0  # seconds after which an estimate by fewer steps is printed
MUCH = 0.2  # relative change of an estimate that is printed again
DAY = 24 * 3600.0
MORE_THAN_A_DAY = (
    "the run takes more than a day: lower trainer.max_epochs, choose a smaller model.architecture, train part of a "
    "pretrained model on stored features (docs/finetuning.md), or use more GPUs (docs/many_gpus.md)"
)


class Estimate(NamedTuple):
    """The time of a run in seconds, from its first step in this process, and what it consists of."""

    steps: int | None  # None: unknown
    per_step: float
    validations: int = 0
    per_validation: float | None = None  # None: not measured yet
    start: float = 0.0  # that the first steps took longer than others
    limit: float | None = None  # of max_time
    at_most: bool = False  # the first steps alone are known, which take longer than others

    @property
    def unlimited(self) -> float | None:
        """The time without ``max_time``; None if the number of steps is unknown."""
        if self.steps is None:
            return None
        return self.start + self.steps * self.per_step + self.validations * (self.per_validation or 0.0)

    @property
    def total(self) -> float | None:
        """The time; None if the number of steps is unknown and no time is set."""
        return min((bound for bound in (self.unlimited, self.limit) if bound is not None), default=None)

    def __str__(self) -> str:
        each, most = in_words(self.per_step), "at most " * self.at_most
        if self.total is None:
            of_steps = in_words(1000 * self.per_step)
            return f"{most}{of_steps} per 1,000 steps of {each}; the number of steps is unknown"
        if self.limit is not None and self.total == self.limit:
            done, of = self.limit / self.per_step, ""
            if self.steps is not None and self.unlimited:
                done, of = self.steps * self.limit / self.unlimited, f" of {self.steps:,}"
            return f"{in_words(self.total)} by max_time (about {int(done):,}{of} steps of {each})"
        parts = [f"{_counted(self.steps or 0, 'step')} of {each}"]
        several = _counted(self.validations, "validation")
        if self.validations and self.per_validation is not None:
            parts.append(f"{several} of {in_words(self.per_validation)}")
        if self.start > 0.05 * self.total:
            parts.append(f"{in_words(self.start)} to start")
        unmeasured = f" and {several}" if self.validations and self.per_validation is None else ""
        return f"{most}{in_words(self.total)} ({', '.join(parts)}){unmeasured}"


def _counted(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'s' * (number != 1)}"


class ExpectedTime(Callback):
    """Print how long a run will take, in one line below the plan, and warn in another if that is more than a day.

    Steps are measured from the third on, until there are 3 of them and 5 seconds have passed; after 30 seconds the line
    is printed with what is known by then. It is printed again if it changes by more than a fifth: when more steps
    have been measured, and after the first validation, whose time is unknown before. A resumed run counts the steps and
    validations that are left. Waiting for data, checkpoints and evaluations between steps are part of the steps'
    time, as far as they occurred. Validations are not counted where a time decides when they run.

    ``train/expected_hours`` is logged with each line. The device is synchronised when the measurement begins and for
    each line, in no other step.
    """

    now: Callable[[], float] = staticmethod(time.perf_counter)
    _per_validation: float | None = None  # kept from a validation before fit
    # A resumed run may validate before it trains.
    _measures = False
    _validated = 0.0  # seconds
    _printed: tuple[float, bool] | None = None  # seconds, and whether they were the most

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self._measures = trainer.is_global_zero and not trainer.fast_dev_run
        self._first_step, self._validated, self._warned = trainer.global_step, 0.0, False
        self._printed = None
        self._began = self._last = self.now()
        self._since: tuple[int, float] | None = None  # step and time after the first steps
        self._start = 0.0  # seconds of the first steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = trainer.global_step - self._first_step
        if not self._measures or not done:
            return
        before, self._last = self._last, self.now()
        if done >= FIRST and self._since is None:
            _synchronise(trainer)
            self._last = self.now()
            self._since, self._start = (trainer.global_step, self._last), self._last - self._began - self._validated
            self._validated = 0.0
        steps, seconds = self._measured(trainer)
        if steps >= ENOUGH[0] and seconds >= ENOUGH[1]:
            self._measures = False
            self._report(trainer, pl_module)
        elif self._printed is None and 2 * self._last - before - self._began > LATEST:  # the next step would be late
            self._report(trainer, pl_module)

    def _measured(self, trainer: Trainer) -> tuple[int, float]:
        """Return the measured steps, and the seconds that they took."""
        if self._since is None:
            return 0, 0.0
        return trainer.global_step - self._since[0], self.now() - self._since[1] - self._validated

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_began = self.now()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        known, seconds = self._per_validation is not None, self.now() - self._validation_began
        self._per_validation = seconds
        if trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero:
            self._validated += seconds
            if not known and not self._measures and self._printed is not None:
                self._report(trainer, pl_module)

    def _report(self, trainer: Trainer, module: LightningModule) -> None:
        """Print and log the expected time, if it is new."""
        _synchronise(trainer)
        estimate = self._estimate(trainer)
        seconds = estimate.total or 1000 * estimate.per_step
        before, at_most = self._printed or (0.0, False)
        if at_most or abs(seconds - before) > MUCH * before:
            self._printed = seconds, estimate.at_most
            _print(module, f"expected time{' now' * bool(before)}: {estimate}")
            for logger in trainer.loggers if estimate.total is not None else ():
                logger.log_metrics({"train/expected_hours": seconds / 3600}, trainer.global_step)
        if not self._warned and not estimate.at_most and (estimate.total or 0.0) > DAY:
            self._warned = True
            _print(module, f"warning: {MORE_THAN_A_DAY}", "yellow")

    def _estimate(self, trainer: Any) -> Estimate:
        elapsed = self.now() - self._began
        steps, seconds = self._measured(trainer)
        if steps:
            per_step = seconds / steps
            start = max(0.0, self._start - FIRST * per_step)
        else:
            per_step, start = (elapsed - self._validated) / (trainer.global_step - self._first_step), 0.0
        left = None if (of_run := known_steps(trainer)) is None else max(0, of_run - self._first_step)
        timers = [each.time_remaining() for each in trainer.callbacks if isinstance(each, Timer)]
        limit = min((elapsed + max(0.0, each) for each in timers if each is not None), default=None)
        count = 0 if of_run is None else validations(trainer, self._first_step, of_run)
        return Estimate(left, per_step, count, self._per_validation, start, limit, at_most=not steps)


def validations(trainer: Any, first: int, last: int) -> int:
    """Return how many validations come after the steps from ``first`` (excluded) to ``last``; 0 if that is unknown."""
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


def _print(module: LightningModule, text: str, style: str | None = None) -> None:
    """Print a line through the progress bar, if there is one."""
    console = Console()
    with console.capture() as captured:
        console.print(text, style=style, soft_wrap=True)
    module.print(captured.get(), end="")
