"""Numbers that tell whether training is healthy and fast."""

import sys
import time
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_clip.batch import CaptionBatch
from lit_clip.model import CLIP
from lit_clip.module import LitCLIP


def gradient_norms(model: CLIP) -> dict[str, Tensor]:
    """The L2 norm of each encoder's gradient; ``logit_scale`` and ``logit_bias`` belong to neither."""
    towers: dict[str, list[Tensor]] = {"image": [], "text": []}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name not in ("logit_scale", "logit_bias"):
            towers["image" if name.startswith("visual.") else "text"].append(parameter.grad)
    return {tower: nn.utils.get_total_norm(gradients) for tower, gradients in towers.items() if gradients}


def _interval(trainer: Any) -> int:
    return (
        trainer.log_every_n_steps or sys.maxsize
    )  # 0 is never; set by a connector, so the type checker does not know it


class TrainingMonitor(Callback):
    """Logs, every ``log_every_n_steps``, what a person wants beside the loss.

    ``train/learning_rate`` (of the head, where layers have rates of their own); ``train/image_gradient_norm`` and
    ``train/text_gradient_norm`` (before clipping); ``train/samples_per_second`` over all ranks, validation not counted;
    ``train/samples_seen``.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._samples = 0
        self._samples_seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self._samples_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._samples_seen = state_dict["samples_seen"]

    def _restart(self) -> None:
        self._since, self._samples = time.perf_counter(), 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if (trainer.global_step + 1) % _interval(trainer) == 0:
            for tower, norm in gradient_norms(cast(LitCLIP, pl_module).model).items():
                pl_module.log(f"train/{tower}_gradient_norm", norm)
            pl_module.log("train/learning_rate", max(group["lr"] for group in optimizer.param_groups))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: CaptionBatch, batch_idx: int
    ) -> None:
        samples = len(batch.images) * trainer.world_size
        self._samples += samples
        self._samples_seen += samples
        if trainer.global_step % _interval(trainer) == 0:
            rate = self._samples / (time.perf_counter() - self._since)
            pl_module.log("train/samples_per_second", rate, prog_bar=True)
            pl_module.log("train/samples_seen", float(self._samples_seen))
            self._restart()
