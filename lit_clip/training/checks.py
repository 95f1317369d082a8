"""Refuse, before the first step, settings that would not train what they say."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import CheckpointIO, XLACheckpointIO
from lightning.pytorch import callbacks, plugins, strategies
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lit_clip.errors import InputError, require
from lit_clip.losses.pairwise import Sigmoid

HALF = (torch.float16, torch.bfloat16)
FAR_BELOW = -7.0  # logit_bias plus log batch; published SigLIPs have -2.5 to -6.4 at their own 32,768 pairs


class Refusal(NamedTuple):
    """A part of Lightning that would not do here what its name says.

    Attributes:
        kind: its class.
        why: what would happen.
        instead: what to do.
        exactly: whether subclasses are accepted, which may mend it.
        when: of the trainer; the others are accepted.
    """

    kind: type
    why: str
    instead: str
    exactly: bool = False
    when: Callable[[Any], bool] = lambda trainer: True


_AVERAGE = (
    "would validate an average before its first update, and callbacks behind it would evaluate other weights",
    "use callbacks.EMA",
)
_UNTESTED = "has not been tried with this package"
_OTHER_STRATEGY = "use ddp, or lit_clip.training.lightning.fsdp.FSDP"

# docs/evidence/combinations.md lists them beside what works.
REFUSED = (
    Refusal(callbacks.WeightAveraging, *_AVERAGE, exactly=True),
    Refusal(callbacks.EMAWeightAveraging, *_AVERAGE),
    Refusal(
        callbacks.StochasticWeightAveraging,
        "would replace the schedule, and a resumed run would end with other weights",
        "use callbacks.EMA",
    ),
    Refusal(
        callbacks.LearningRateFinder,
        "would find a rate that the schedule replaces after the first step",
        "try a few with trainer.max_steps and set model.optimizer.lr",
    ),
    Refusal(
        callbacks.BatchSizeFinder,
        "would change the number of negatives, and not the schedule's length",
        "choose data.batch_size for the loss and set model.micro_batch_size to what fits into memory",
    ),
    Refusal(
        callbacks.BaseFinetuning,
        "would add parameters that the schedule does not know and no resumed run has",
        "set model.freeze, or model.layer_decay; for several stages start each from the last with model.pretrained",
    ),
    Refusal(
        callbacks.ModelPruning,
        "would rename the weights, so that no checkpoint could be read",
        "train without it and prune lit_clip.load_model(checkpoint)",
    ),
    Refusal(
        callbacks.SpikeDetection,
        "would end the run with a list of batches that nothing reads, and cannot resume",
        "use callbacks.NonFiniteSteps",
    ),
    Refusal(
        callbacks.OnExceptionCheckpoint,
        "would wait for the others to save when a rank fails",
        "remove it (a signal saves anyway), and set ModelCheckpoint.every_n_train_steps",
        when=lambda trainer: trainer.world_size > 1,
    ),
    Refusal(strategies.FSDPStrategy, "cannot shard the temperature, a scalar", _OTHER_STRATEGY, exactly=True),
    Refusal(strategies.ModelParallelStrategy, "cannot shard the temperature, a scalar", _OTHER_STRATEGY),
    Refusal(strategies.DeepSpeedStrategy, _UNTESTED, _OTHER_STRATEGY),
    Refusal(XLAStrategy, _UNTESTED, "use ddp on GPUs"),
    Refusal(SingleDeviceXLAStrategy, _UNTESTED, "use a GPU"),
    Refusal(plugins.BitsandbytesPrecision, "would replace the linear layers", "set trainer.precision to bf16-mixed"),
    Refusal(
        plugins.TransformerEnginePrecision, "would replace the linear layers", "set trainer.precision to bf16-mixed"
    ),
    Refusal(plugins.XLAPrecision, _UNTESTED, "set trainer.precision to bf16-mixed"),
    Refusal(XLACheckpointIO, _UNTESTED, "use lit_clip.training.lightning.checkpoint_io.WholeCheckpointIO"),
)


def check_parts(trainer: Any) -> None:
    """Check a trainer's callbacks, strategy and plugins, before any of them is set up."""
    for option, part in _parts(trainer):
        for refusal in REFUSED:
            found = type(part) is refusal.kind if refusal.exactly else isinstance(part, refusal.kind)
            if found and refusal.when(trainer):
                if getattr(part, "_early_exit", False):  # Lightning's Tuner added it, and leaves it when fit raises
                    trainer.callbacks.remove(part)
                raise InputError(f"{option}: {type(part).__name__} {refusal.why}; {refusal.instead}")


def _parts(trainer: Any) -> Iterator[tuple[str, Any]]:
    """Yield each part of a trainer with the option that sets it."""
    for callback in trainer.callbacks:
        yield "trainer.callbacks", callback
    strategy = trainer.strategy
    yield "trainer.strategy", strategy
    yield "trainer.plugins", strategy.precision_plugin
    io: CheckpointIO | None = strategy.checkpoint_io
    while io is not None:  # one may wrap another
        yield "trainer.plugins", io
        io = getattr(io, "checkpoint_io", None)


def check_counts(trainer: Any) -> None:
    """Check the numbers by which Lightning divides in the middle of a run, and the limit of gradients."""
    clip = getattr(trainer, "gradient_clip_val", None)
    require(clip is None or clip >= 0, f"trainer.gradient_clip_val: {clip} must be at least 0; null clips nothing")
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"):
        value = getattr(trainer, name, None)
        unset = value is None and name != "accumulate_grad_batches"
        share = isinstance(value, float)  # of an epoch
        require(unset or share or (value or 0) >= 1, f"trainer.{name}: {value} must be at least 1")


def check_run(module: Any) -> None:
    """Check a module's trainer and weights before the first step."""
    trainer: Any = module.trainer  # its callbacks and data module are set by connectors
    _check_master_weights(module, str(trainer.precision))
    _check_accumulation(trainer)
    _check_moves(module, getattr(trainer, "datamodule", None))
    _check_negatives(module, getattr(trainer, "datamodule", None))
    _check_bias(module, trainer)
    if not any(getattr(callback, "stops_at_non_finite", False) for callback in trainer.callbacks):
        rank_zero_warn(
            "nothing stops this run when its loss is not finite, and a resumed run draws other random numbers; pass "
            "Trainer(callbacks=callbacks.defaults())"
        )


def check_skipped_samples(trainer: Any) -> None:
    """Check that a callback counts and limits the samples that the data module skips."""
    if getattr(getattr(trainer, "datamodule", None), "on_error", "error") == "skip":
        require(
            any(getattr(callback, "counts_skipped_samples", False) for callback in trainer.callbacks),
            "data.bad_samples.on_error: skip needs the callback that counts and limits skipped samples; pass "
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


def _check_moves(module: Any, data: Any) -> None:
    """Check that the module has no hook that Lightning replaces by the data module's, with a mere warning."""
    name = "transfer_batch_to_device"
    require(
        not (data and is_overridden(name, module) and is_overridden(name, data)),
        f"{type(module).__name__}.{name}: Lightning would not call it, because {type(data).__name__} has its own; use "
        "on_before_batch_transfer or on_after_batch_transfer",
    )


def _check_negatives(module: Any, data: Any) -> None:
    column = getattr(data, "negative_column", None)
    require(
        column is None or module.loss.uses_negatives,
        f"data.columns.negative: {column!r} would have no effect, because {type(module.loss).__name__} does not use "
        "hard negatives; leave it out, or use lit_clip.losses.Contrastive",
    )


def _check_bias(module: Any, trainer: Any) -> None:
    """Warn of a sigmoid loss whose bias fits only far larger batches, see :class:`lit_clip.losses.Sigmoid`."""
    batch = getattr(getattr(trainer, "datamodule", None), "train_batch_size", None)
    told = not isinstance(module.loss, Sigmoid) or module.loss.pretraining_batch is not None
    if told or not module.starts_trained or not batch:
        return
    bias, pairs = float(module.model.logit_bias), batch * trainer.world_size
    if bias + math.log(pairs) < FAR_BELOW:
        rank_zero_warn(
            f"model.loss: logit_bias {bias:.1f} was learned with far larger batches than this one of {pairs:,} pairs: "
            "training would first pull all features together; set model.loss.pretraining_batch (32768 for the "
            "published SigLIPs, docs/finetuning.md)"
        )


def check_lora_gradients(model: nn.Module) -> None:
    """Check after a backward pass that every LoRA addition got a gradient."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None and parameter.numel():  # a shard may be empty
            raise InputError(
                f"model.lora: {name} has no effect, because its layer is never called; see model.lora.targets"
            )
