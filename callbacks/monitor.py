"""Metrics and a warning that show whether a model is learning."""

from collections import deque
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_clip.batch import CaptionBatch
from lit_clip.errors import require
from lit_clip.models.clip import CLIP
from lit_clip.models.layers import SCALARS
from lit_clip.module import LitCLIP
from lit_clip.tools.untrusted import Count, convert, entries
from lit_clip.training.schedules import log_interval, samples_of

STUCK = 0.99  # of the baseline: a loss above it has learned nothing
LAST_STEPS = 50  # whose mean loss is compared with the baseline


def gradient_norms(model: CLIP) -> dict[str, Tensor]:
    """Return the L2 norm of each trainable encoder's gradient, without ``logit_scale`` and ``logit_bias``.

    A collective if the gradients are sharded (FSDP).
    """
    encoders: dict[str, list[nn.Parameter]] = {"image": [], "text": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in SCALARS:
            encoders["image" if name.startswith("visual.") else "text"].append(parameter)
    norms = {
        encoder: nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        for encoder, parameters in encoders.items()
        if parameters
    }
    return {encoder: norm.full_tensor() if isinstance(norm, DTensor) else norm for encoder, norm in norms.items()}


class TrainingMonitor(Callback):
    """Log learning rate, gradient norms and samples every ``log_every_n_steps``; warn if the model is not learning.

    - ``train/learning_rate``: the highest, where parts or layers have different rates
    - ``train/image_gradient_norm``, ``train/text_gradient_norm``: before clipping, and without the scale of
      ``16-mixed``
    - ``train/samples_seen``

    ``stuck_steps`` optimiser steps after warm-up, after each further ``stuck_steps``, and at the end of a run, however
    short it was, the mean loss of the last steps on the first rank is compared with its baseline
    (:meth:`lit_clip.losses.Loss.chance_loss`). One that is not more than 1 % below it is reported once. A loss without
    a baseline is not watched.

    Args:
        stuck_steps: number of optimiser steps from one comparison to the next.
    """

    def __init__(self, stuck_steps: int = 500) -> None:
        require(stuck_steps >= 1, f"TrainingMonitor.stuck_steps: {stuck_steps} must be at least 1")
        self.stuck_steps = stuck_steps
        self._samples_seen = 0
        self._last: deque[tuple[Tensor, float]] = deque(maxlen=LAST_STEPS)  # loss on this rank, not yet read; baseline
        self._compared = 0  # step after which the loss was last compared
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self._samples_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = convert(state_dict, entries({"samples_seen": Count}), "callbacks.TrainingMonitor")
        self._samples_seen = saved["samples_seen"]

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if (trainer.global_step + 1) % log_interval(trainer) == 0:
            for encoder, norm in gradient_norms(cast(LitCLIP, pl_module).model).items():
                pl_module.log(f"train/{encoder}_gradient_norm", norm)
            pl_module.log("train/learning_rate", max(group["lr"] for group in optimizer.param_groups))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: CaptionBatch, batch_idx: int
    ) -> None:
        module = cast(LitCLIP, pl_module)
        if module.last_step and (baseline := module.loss.chance_loss(module.last_step.pairs)) is not None:
            self._last.append((module.last_step.loss, baseline))
        self._samples_seen += samples_of(trainer, module, batch)
        if trainer.global_step % log_interval(trainer):
            return
        pl_module.log("train/samples_seen", float(self._samples_seen))
        warmup = module.parts["lr_scheduler"]["init_args"].get("warmup_steps", 0)
        self._compared = max(self._compared, warmup)
        if trainer.global_step - self._compared >= self.stuck_steps:
            self._compared = trainer.global_step
            self._warn_if_stuck(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compared = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn_if_stuck(trainer)

    def _warn_if_stuck(self, trainer: Trainer) -> None:
        if not self._last or self._warned:
            return
        losses = torch.stack([loss for loss, _ in self._last])
        loss = float(losses[losses.isfinite()].mean())  # synchronises the device; NonFiniteSteps reports the others
        baseline = sum(baseline for _, baseline in self._last) / len(self._last)
        if loss >= STUCK * baseline:
            self._warned = True
            rank_zero_warn(
                f"the model has learned nothing: train/loss was {loss:.3f} on average in the last {len(self._last)} of "
                f"{trainer.global_step} steps, and its baseline is {baseline:.3f}. Check that captions belong to their "
                "images (one column of the table may have been sorted without the other, or all captions may be the "
                "same), that the learning rate (train/learning_rate) is not far too high or too low, that the right "
                "encoders are trainable, and that the gradients (train/image_gradient_norm, train/text_gradient_norm) "
                "are not near 0"
            )
