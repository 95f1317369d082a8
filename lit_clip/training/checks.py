"""Refuse, before the first step, settings that would not train what they say."""

from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lit_clip.errors import InputError, require

HALF = (torch.float16, torch.bfloat16)


def check_run(module: Any) -> None:
    """Check a module's trainer and weights before the first step.

    Raises:
        InputError: weights in half precision, accumulated gradients, or hard negatives that the loss does not use.
    """
    trainer: Any = module.trainer  # its callbacks and data module are set by connectors
    _check_master_weights(module, str(trainer.precision))
    _check_accumulation(trainer)
    _check_negatives(module, getattr(trainer, "datamodule", None))
    if not any(getattr(callback, "stops_at_non_finite", False) for callback in trainer.callbacks):
        rank_zero_warn(
            "nothing stops this run when its loss is not finite, and a resumed run draws other random numbers; pass "
            "Trainer(callbacks=callbacks.defaults())"
        )


def check_skipped_samples(trainer: Any) -> None:
    """Check that a callback counts and limits the samples that the data module skips.

    Raises:
        InputError: the data module skips samples, and nobody counts them.
    """
    if getattr(getattr(trainer, "datamodule", None), "on_error", "error") == "skip":
        require(
            any(getattr(callback, "counts_skipped_samples", False) for callback in trainer.callbacks),
            "data.on_error: skip needs the callback that counts and limits skipped samples; pass "
            "Trainer(callbacks=callbacks.defaults())",
        )


def _check_master_weights(module: nn.Module, precision: str) -> None:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype in HALF:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise InputError(
                f"trainer.precision: {precision} trains weights kept in {kind} ({name}), which rounds away "
                "AdamW's small updates and ends in nan under float16; use bf16-mixed (or 16-mixed): it computes in "
                "half precision and keeps the weights in float32"
            )


def _check_accumulation(trainer: Any) -> None:
    planned = [each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]
    batches = max([trainer.accumulate_grad_batches, *(n for each in planned for n in each.scheduling.values())])
    require(
        batches == 1,
        f"trainer.accumulate_grad_batches: {batches} adds no negatives, the point of a larger batch; "
        f"set data.batch_size to {batches} times its value and model.micro_batch_size to the old data.batch_size",
    )


def _check_negatives(module: Any, data: Any) -> None:
    column = getattr(data, "negative_column", None)
    require(
        column is None or module.loss.uses_negatives,
        f"data.negative_column: {column!r} would have no effect, because {type(module.loss).__name__} does not use "
        "hard negatives; leave it out, or use lit_clip.losses.Contrastive",
    )


def check_lora_gradients(model: nn.Module) -> None:
    """Check after a backward pass that every LoRA addition got a gradient.

    Raises:
        InputError: an addition belongs to a layer that is never called.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None and parameter.numel():  # a shard may be empty
            raise InputError(
                f"model.lora: {name} has no effect, because its layer is never called; see model.lora.targets"
            )
