"""Exponential moving average of the weights."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lit_clip.errors import InputError, require
from lit_clip.weights.checkpoints import EMA_WEIGHTS


class EMA(WeightAveraging):
    """Average the weights after every optimiser step: ``average = decay * average + (1 - decay) * weights``.

    Validation, including all callbacks, uses the average as soon as there is one. In a checkpoint ``state_dict`` is the
    average, which ``weights`` states, and ``current_model_state`` holds the weights of the last step, from which a
    resumed run continues. When training ends the module has the average.

    Args:
        decay: at least 0 and below 1.
        start_step: optimiser steps before the first update, which copies the weights.
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0) -> None:
        require(0 <= decay < 1, f"EMA.decay: {decay} must be at least 0 and below 1")
        require(start_step >= 0, f"EMA.start_step: {start_step} must be at least 0")
        super().__init__()
        self.decay, self.start_step = decay, start_step
        self._swapped = False

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= self.start_step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise InputError("ModelCheckpoint.save_weights_only: would leave out EMA's average; remove it")
        super().setup(trainer, pl_module, stage)
        self._swapped &= stage != "fit"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # It was created and loaded before the model was converted to the run's precision and moved to its device.
        trainer.precision_plugin.convert_module(self._average).to(pl_module.device)
        self._average.n_averaged = self._average.n_averaged.cpu()  # read in each step, without a wait

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step - 1):
            self._update(pl_module)
            self._latest_update_step = step

    @torch.no_grad()
    def _update(self, pl_module: LightningModule) -> None:
        """Update all weights in a few kernels; AveragedModel would synchronise the device and launch three a tensor."""
        kernels: Any = torch  # which exports them under no public name
        pairs = list(zip(_tensors(self._average.module), _tensors(pl_module), strict=True))
        first = int(self._average.n_averaged) == 0
        copied = [pair for pair in pairs if first or not pair[0].is_floating_point()]  # counts have no average
        if copied:
            kernels._foreach_copy_([ours for ours, _ in copied], [theirs for _, theirs in copied])
        if not first:
            floats = [pair for pair in pairs if pair[0].is_floating_point()]
            kernels._foreach_lerp_([ours for ours, _ in floats], [theirs for _, theirs in floats], 1 - self.decay)
        self._average.n_averaged += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # after fitting the module keeps the average
            self._swap_back(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: this hook is too late, see :meth:`on_validation_start`."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: this hook is too early, because other callbacks and the module evaluate in it."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap_back(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)  # a swap, not a copy: a checkpoint saved after this still holds both

    on_fit_end = on_train_end  # of a finished run that was resumed; Lightning calls no on_train_end then

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None and "averaging_state" in checkpoint:
            self._swapped = False  # the module was given the weights of the last step
            if trainer.state.fn != TrainerFn.FITTING:
                self._swap(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is None:
            return
        module, averaged_model = checkpoint["state_dict"], self._average.module.state_dict()
        average, current = (module, averaged_model) if self._swapped else (averaged_model, module)
        if self._average.n_averaged > 0:
            checkpoint["state_dict"], checkpoint["weights"] = average, EMA_WEIGHTS
        checkpoint["current_model_state"] = current
        checkpoint["averaging_state"] = {"n_averaged": self._average.n_averaged}

    @property
    def _average(self) -> AveragedModel:
        assert self._average_model is not None, "created by setup"
        return self._average_model

    def _swap(self, pl_module: LightningModule) -> None:
        if self._average_model is not None and self._average.n_averaged > 0 and not self._swapped:
            self._swap_models(pl_module)
            self._swapped = True

    def _swap_back(self, pl_module: LightningModule) -> None:
        if self._swapped:
            self._swap_models(pl_module)
            self._swapped = False


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
