"""Optimiser and schedule: the paper's AdamW with warm-up and a cosine; overriding a checkpoint's settings on resume."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_clip.errors import InputError, require

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


@dataclass
class AdamWSettings:
    """Settings of AdamW; the defaults are the paper's for a ViT (table 18).

    Attributes:
        lr: learning rate at the end of the warm-up (table 20: 5e-4 for ViT-B at 32,768 pairs a step).
        weight_decay: applied to weights, not to gains and biases.
        betas: decay rates of the two moments.
        eps: added to the denominator.
    """

    lr: float = 5e-4
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        self.betas = (self.betas[0], self.betas[1])  # a checkpoint holds a list
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"model.optimizer.{name}: {value} must be at least 0")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"model.optimizer.betas: {list(self.betas)} must be at least 0 and below 1",
        )
        require(self.eps > 0, f"model.optimizer.eps: {self.eps} must be above 0")


@dataclass
class WarmupCosineSettings:
    """Linear warm-up, then a cosine to 0 at the end of the run.

    Attributes:
        warmup_steps: optimiser steps of warm-up (table 18: 2,000).
    """

    warmup_steps: int = 2000

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, f"model.lr_scheduler.warmup_steps: {self.warmup_steps} must be at least 0")


def decay_groups(module: nn.Module | Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: decay on "all weights that are not gains or biases" (paper, section 2.5).

    As in open_clip, gains and biases are the parameters with fewer than two dimensions: LayerNorm's, biases, the class
    token and ``logit_scale``.
    """
    parameters = module.parameters() if isinstance(module, nn.Module) else module
    trainable = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def parameter_groups(
    layers: Iterable[tuple[str, float, Sequence[nn.Parameter]]], settings: AdamWSettings
) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups, at most two for each layer; frozen parameters are in none.

    Args:
        layers: name, factor on the learning rate, parameters.
        settings: learning rate at factor 1, and weight decay.

    Returns:
        Groups with ``name``, ``lr`` and ``weight_decay``; none is empty.
    """
    return [
        {"name": name + kind, "lr": settings.lr * factor, **group}
        for name, factor, parameters in layers
        for kind, group in zip(("", ", no decay"), decay_groups(parameters, settings.weight_decay), strict=True)
        if group["params"]
    ]


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the factor on the learning rate at an optimiser step (0 first): linear to 1, then a cosine to 0.

    The paper states warm-up over 2,000 iterations and cosine decay; that the warm-up is linear and the end 0
    follow open_clip.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def batches_per_epoch(trainer: "Trainer") -> int | None:
    """Return each rank's training batches per epoch, within the trainer's limit; None if unknown."""
    steps: int | None = getattr(getattr(trainer, "datamodule", None), "steps_per_epoch", None)
    limit = trainer.limit_train_batches
    if steps is None:
        return None
    return int(steps * limit) if isinstance(limit, float) else min(steps, limit)


def total_steps(trainer: "Trainer") -> int:
    """Return the optimiser steps of the whole run.

    Counted from the data module's ``steps_per_epoch`` where it has one: Lightning's ``estimated_stepping_batches`` sets
    up the data loaders early, and a loader that was resumed would lose its position.
    """
    batches = batches_per_epoch(trainer)
    if batches is None:
        return int(trainer.estimated_stepping_batches)
    per_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    epochs = trainer.max_epochs
    bounds = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if epochs is not None and epochs >= 0:
        bounds.append(epochs * per_epoch)
    return max(1, min(bounds, default=per_epoch * 1000))


def configure_adamw(
    groups: list[dict[str, Any]], settings: AdamWSettings, schedule: WarmupCosineSettings, trainer: "Trainer"
) -> dict[str, Any]:
    """Return AdamW and its schedule in Lightning's form; AdamW is fused where precision and clipping allow it."""
    scaled = trainer.precision == "16-mixed"  # a fused step would leave the gradients scaled for later hooks
    # Lightning assumes that a fused optimiser unscales gradients itself, and refuses to clip.
    clipped = trainer.precision == "bf16-mixed" and bool(trainer.gradient_clip_val)
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=not (scaled or clipped))
    total = total_steps(trainer)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, schedule.warmup_steps, total)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}


def skip_step(module: nn.Module) -> None:
    """Remove all gradients, so that the optimiser step changes neither weights nor moments nor its step count."""
    for parameter in module.parameters():
        parameter.grad = None


def override_checkpoint_settings(
    checkpoint: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], settings: AdamWSettings, name: str
) -> None:
    """Overwrite a checkpoint's optimiser settings with this run's; a resumed run keeps its moments and its position.

    Args:
        checkpoint: changed in place.
        groups: this run's, see :func:`parameter_groups`.
        settings: this run's.
        name: of the checkpoint, for messages.

    Raises:
        InputError: the checkpoint has other parameter groups.
    """
    for optimizer in checkpoint.get("optimizer_states", []):
        saved = optimizer["param_groups"]
        if [_shape(group) for group in saved] != [_shape(group) for group in groups]:
            raise InputError(f"{name}: resume with the model.freeze, layer_decay and lora of the run that wrote it")
        for group, ours in zip(saved, groups, strict=True):
            group["lr"] *= ours["lr"] / (group["initial_lr"] or 1.0)
            group |= {
                "name": ours["name"],
                "initial_lr": ours["lr"],
                "weight_decay": ours["weight_decay"],
                "betas": settings.betas,
                "eps": settings.eps,
            }
    for schedule in checkpoint.get("lr_schedulers", []):
        schedule["base_lrs"] = [group["lr"] for group in groups]


def _shape(group: Mapping[str, Any]) -> tuple[str, int]:
    """Return a parameter group's layer and its number of parameters."""
    return group["name"].partition(",")[0], len(group["params"])
