"""Evaluations beside validation: when they run, and what is logged when they do not."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from lit_clip import distributed
from lit_clip.errors import InputError, require
from lit_clip.module import LitCLIP

Made = TypeVar("Made")


@dataclass
class PeriodicResult:
    """What an evaluation found, the same on every rank.

    Attributes:
        metrics: by whole name.
        baselines: what a constant answer reaches, for some of the metrics.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)


class PeriodicEvaluation(Callback):
    """Evaluates on all ranks at the end of every validation, of some, or every so many steps.

    It runs the first time that it can, so that its metrics exist whenever a checkpoint asks for them. Validations of
    ``fit`` at which it does not run log its last values again, a resumed run those of before. ``validate`` and ``test``
    always run it, and find the numbers that ``fit`` found with the same weights, at the same ``trainer.precision``.

    Args:
        every_n_epochs: the number of validations of ``fit`` (one an epoch, unless the trainer is told otherwise) from
            one evaluation to the next.
        every_n_steps: the number of optimiser steps instead; the evaluation is then between two steps.
    """

    needs_whole_weights = True  # it encodes images outside of the steps for which FSDP puts the weights together

    def __init__(self, every_n_epochs: int = 1, every_n_steps: int | None = None) -> None:
        name = type(self).__name__
        require(every_n_epochs >= 1, f"{name}.every_n_epochs: {every_n_epochs} must be at least 1")
        steps = every_n_steps is None or every_n_steps >= 1
        require(steps, f"{name}.every_n_steps: {every_n_steps} must be at least 1")
        require(every_n_steps is None or every_n_epochs == 1, f"{name}: give either every_n_epochs or every_n_steps")
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self._last = PeriodicResult()
        self._waited = 0  # validations since then
        self._told = False  # whether the trainer knows the last values

    @abstractmethod
    def evaluate(self, trainer: Trainer, module: LitCLIP) -> PeriodicResult:
        """Find the numbers; called on all ranks, the module in evaluation mode, without gradients."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget another run; a checkpoint is read after this."""
        if stage != "fit":
            return
        self._last, self._waited, self._told = PeriodicResult(), 0, False
        callbacks = _callbacks(trainer)
        late = [one for one in callbacks[callbacks.index(self) :] if isinstance(one, WeightAveraging)]
        require(
            not late or self.every_n_steps is None,
            f"{type(self).__name__}.every_n_steps: would see an average without the last step; put "
            f"{type(late[0]).__name__ if late else ''} before it in the list of callbacks",
        )

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self._last.metrics, "baselines": self._last.baselines, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last = PeriodicResult(dict(state_dict["metrics"]), dict(state_dict["baselines"]))
        self._waited = state_dict["waited"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._waited += 1
        due = self.every_n_steps is None and self._waited >= self.every_n_epochs
        if due or not self._last.metrics or trainer.state.fn != TrainerFn.FITTING:
            self._run(trainer, pl_module)
        for name, value in self._last.metrics.items():
            pl_module.log(name, value)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run(trainer, pl_module)
        for name, value in self._last.metrics.items():
            pl_module.log(name, value)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps is None:
            return
        due = trainer.global_step % self.every_n_steps == 0 or not self._last.metrics
        if due:
            with _as_in_validation(trainer, pl_module):
                self._run(trainer, pl_module)
            for logger in trainer.loggers:  # at this step, however rarely training's own metrics are written
                logger.log_metrics(self._last.metrics, trainer.global_step)
        if due or not self._told:
            for name, value in self._last.metrics.items():
                pl_module.log(name, value, logger=False, on_step=True, on_epoch=False)
        self._told = True

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(LitCLIP, pl_module)
        with trainer.precision_plugin.forward_context():
            self._last = self.evaluate(trainer, module)
        self._waited = 0
        module.baselines |= self._last.baselines


def _callbacks(trainer: Trainer) -> list[Callback]:
    return cast(Any, trainer).callbacks  # set by a connector


@contextmanager
def _as_in_validation(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Between two steps, what a validation would see: averaged weights, evaluation mode, statistics of one rank."""
    training = [one for one in module.modules() if one.training]
    averages = [one for one in _callbacks(trainer) if isinstance(one, WeightAveraging)]
    distributed.same_buffers(cast(LitCLIP, module).model)
    for average in averages:
        average.on_validation_start(trainer, module)
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for average in averages:
            average.on_validation_end(trainer, module)
        for one in training:
            one.training = True


def of_first_rank(make: Callable[[], Made]) -> Made:
    """What the first rank makes while the others wait, given to all.

    Raises:
        InputError: on all ranks, what the first raised.
    """
    made: list[tuple[Made | None, str]] = []
    if distributed.rank_and_world()[0] == 0:
        try:
            made.append((make(), ""))
        except InputError as error:
            made.append((None, str(error) or type(error).__name__))
    ((value, reason),) = distributed.gather_objects(made)
    if reason:
        raise InputError(reason)
    return cast(Made, value)
