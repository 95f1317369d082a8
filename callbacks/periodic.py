"""Base of the evaluations that run with validation: when they run, and what is logged when they do not."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from lit_clip import distributed
from lit_clip.errors import InputError, require
from lit_clip.models.evaluation_mode import evaluation_mode
from lit_clip.module import LitCLIP
from lit_clip.retrieval.retrieval_set import Evaluation
from lit_clip.tools.untrusted import Count, convert, entries
from lit_clip.training.lightning.fsdp import whole_weights

Result = TypeVar("Result")


class PeriodicEvaluation(Callback):
    """Evaluates on all ranks every n-th validation or every n steps.

    The first evaluation is at the first opportunity, so that a checkpoint callback always finds the metrics.
    Validations of ``fit`` without an evaluation log the last values again, also after resuming. ``validate`` and
    ``test`` always evaluate; with the same weights and ``trainer.precision`` their metrics equal those of ``fit``.

    Args:
        every_n_epochs: evaluate at every n-th validation of ``fit`` (one per epoch, unless the trainer sets another
            interval).
        every_n_steps: evaluate every n optimiser steps instead, between two steps.
    """

    def __init__(self, every_n_epochs: int = 1, every_n_steps: int | None = None) -> None:
        name = type(self).__name__
        for option, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            require(value is None or value >= 1, f"{name}.{option}: {value} must be at least 1")
        require(every_n_steps is None or every_n_epochs == 1, f"{name}: give either every_n_epochs or every_n_steps")
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self._last = Evaluation()
        self._waited = 0  # validations since the last evaluation
        self._logged = False  # whether the trainer has the last values

    @abstractmethod
    def evaluate(self, trainer: Trainer, module: LitCLIP) -> Evaluation:
        """Compute the metrics: on all ranks, in evaluation mode, without gradients, under the trainer's autocast."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of an earlier run; a checkpoint's state is loaded after this."""
        if stage != "fit":
            return
        self._last, self._waited, self._logged = Evaluation(), 0, False
        callbacks: list[Callback] = cast(Any, trainer).callbacks  # set by a connector
        late = [callback for callback in callbacks[callbacks.index(self) :] if isinstance(callback, WeightAveraging)]
        require(
            not late or self.every_n_steps is None,
            f"{type(self).__name__}.every_n_steps: would evaluate averaged weights without the last step; put "
            f"{type(late[0]).__name__ if late else ''} before it in the list of callbacks",
        )

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self._last.metrics, "baselines": self._last.baselines, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        types = {"metrics": dict[str, object], "baselines": dict[str, object], "waited": Count}
        convert(state_dict, entries(types, total=True), f"callbacks.{type(self).__name__}")
        self._last = Evaluation(dict(state_dict["metrics"]), dict(state_dict["baselines"]))
        self._waited = state_dict["waited"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._waited += 1
        due = self.every_n_steps is None and self._waited >= self.every_n_epochs
        if due or not self._last.metrics or trainer.state.fn != TrainerFn.FITTING:
            self._run(trainer, pl_module)
        pl_module.log_dict(self._last.metrics)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run(trainer, pl_module)
        pl_module.log_dict(self._last.metrics)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps is None:
            return
        due = trainer.global_step % self.every_n_steps == 0 or not self._last.metrics
        if due:
            with _as_in_validation(trainer, pl_module):
                self._run(trainer, pl_module)
            for logger in trainer.loggers:  # at this step, even if it is not a logged step of training
                logger.log_metrics(self._last.metrics, trainer.global_step)
        if due or not self._logged:
            pl_module.log_dict(self._last.metrics, logger=False, on_step=True, on_epoch=False)
        self._logged = True

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(LitCLIP, pl_module)
        with trainer.precision_plugin.forward_context(), whole_weights(module):
            self._last = self.evaluate(trainer, module)
        self._waited = 0
        module.baselines |= self._last.baselines


@contextmanager
def _as_in_validation(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Set up between two steps what a validation has: averaged weights, evaluation mode, one rank's statistics."""
    averages = [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, WeightAveraging)]
    distributed.same_buffers(cast(LitCLIP, module).model)
    with evaluation_mode(module):
        for average in averages:
            average.on_validation_start(trainer, module)
        try:
            with torch.no_grad():
                yield
        finally:
            for average in averages:
                average.on_validation_end(trainer, module)


def from_first_rank(compute: Callable[[], Result]) -> Result:
    """Compute a result on the first rank while the others wait, and return it on all ranks."""
    results: list[tuple[Result | None, str]] = []
    if distributed.rank_and_world()[0] == 0:
        try:
            results.append((compute(), ""))
        except InputError as error:
            results.append((None, str(error) or type(error).__name__))
    ((result, reason),) = distributed.gather_objects(results)
    if reason:
        raise InputError(reason)
    return cast(Result, result)
