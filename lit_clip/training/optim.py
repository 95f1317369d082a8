"""The paper's optimiser settings: what decays, and the learning rate of each step."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def decay_groups(module: nn.Module | Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: decay on "all weights that are not gains or biases" (paper, section 2.5).

    As in open_clip, gains and biases are the parameters with fewer than two dimensions: LayerNorm's, biases, the class
    token and ``logit_scale``.
    """
    parameters = module.parameters() if isinstance(module, nn.Module) else module
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def parameter_groups(
    layers: Iterable[tuple[str, float, Sequence[nn.Parameter]]], learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's parameter groups, two a layer at most; what is frozen is in none.

    Args:
        layers: a name, the factor on the learning rate, the parameters.
        learning_rate: at factor 1.
        weight_decay: see :func:`decay_groups`.

    Returns:
        Groups that state ``name``, ``lr`` and ``weight_decay``; none is empty.
    """
    return [
        {"name": name + kind, "lr": learning_rate * factor, **group}
        for name, factor, parameters in layers
        for kind, group in zip(("", ", no decay"), decay_groups(parameters, weight_decay), strict=True)
        if group["params"]
    ]


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """The factor on the learning rate at optimiser step ``step`` (0 first): linear to 1, then a cosine to 0.

    The paper states warm-up over 2,000 iterations and cosine decay; that the warm-up is linear and the end 0 is
    open_clip's reading.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def batches_per_epoch(trainer: "Trainer") -> int | None:
    """Training batches of an epoch on each rank, within the trainer's limit; None: the data module does not tell."""
    steps: int | None = getattr(getattr(trainer, "datamodule", None), "steps_per_epoch", None)
    limit = trainer.limit_train_batches
    if steps is None:
        return None
    return int(steps * limit) if isinstance(limit, float) else min(steps, limit)


def total_steps(trainer: "Trainer") -> int:
    """Optimiser steps of the whole run.

    Counted from the data module where it tells its ``steps_per_epoch``: asking Lightning instead
    (``estimated_stepping_batches``) sets the data loaders up early, and a loader that was resumed loses its position.
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


def adamw(groups: list[dict[str, Any]], betas: Sequence[float], eps: float, trainer: "Trainer") -> torch.optim.AdamW:
    """AdamW, fused where a trainer's precision and clipping allow it."""
    scaled = trainer.precision == "16-mixed"  # a fused step would leave the gradients scaled for all others
    # Lightning takes every fused step for one that scales, and refuses to clip.
    clipped = trainer.precision == "bf16-mixed" and bool(trainer.gradient_clip_val)
    first, second = betas
    return torch.optim.AdamW(groups, betas=(first, second), eps=eps, fused=not (scaled or clipped))
