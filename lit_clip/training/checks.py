"""Refuse, before the first step, settings that would not do what they say."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import XLACheckpointIO
from lightning.pytorch import callbacks, plugins, strategies
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lit_clip.errors import InputError, require
from lit_clip.losses.pairwise import Sigmoid
from lit_clip.models.lora import is_added
from lit_clip.training.even_batches import captions_together
from lit_clip.training.lightning.checkpoint_io import wrapped

HALF = (torch.float16, torch.bfloat16)
FAR_BELOW = -7.0  # logit_bias plus log batch; published SigLIPs have -2.5 to -6.4 at their own 32,768 pairs


class Refusal(NamedTuple):
    """A part of Lightning that would not do here what its name says."""

    kind: type
    why: str  # it is refused
    instead: str  # what to do
    exactly: bool = False  # subclasses are accepted, which may mend it
    when: Callable[[Any], bool] = lambda trainer: True  # of the trainer; the others are accepted


_AVERAGE = "would validate an average before its first update, and callbacks behind it would evaluate other weights"
_SCALAR, _UNTESTED = "cannot shard the temperature, a scalar", "has not been tried with this package"
_LAYERS = "would replace the linear layers"
_OTHER_STRATEGY = "use ddp, or lit_clip.training.lightning.fsdp.FSDP"
_MIXED, _EMA = "set trainer.precision to bf16-mixed", "use callbacks.EMA"

# docs/evidence/combinations.md lists them.
REFUSED = (
    Refusal(callbacks.WeightAveraging, _AVERAGE, _EMA, exactly=True),
    Refusal(callbacks.EMAWeightAveraging, _AVERAGE, _EMA),
    Refusal(
        callbacks.StochasticWeightAveraging,
        "would replace the schedule, and a resumed run would end with other weights",
        _EMA,
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
        "set model.freeze, or model.rates; for several stages start each from the last with model.pretrained",
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
    Refusal(strategies.FSDPStrategy, _SCALAR, _OTHER_STRATEGY),
    Refusal(strategies.ModelParallelStrategy, _SCALAR, _OTHER_STRATEGY),
    Refusal(strategies.DeepSpeedStrategy, _UNTESTED, _OTHER_STRATEGY),
    Refusal(XLAStrategy, _UNTESTED, "use ddp on GPUs"),
    Refusal(SingleDeviceXLAStrategy, _UNTESTED, "use a GPU"),
    Refusal(plugins.BitsandbytesPrecision, _LAYERS, _MIXED),
    Refusal(plugins.TransformerEnginePrecision, _LAYERS, _MIXED),
    Refusal(plugins.XLAPrecision, _UNTESTED, _MIXED),
    Refusal(XLACheckpointIO, _UNTESTED, "use lit_clip.training.lightning.checkpoint_io.WholeCheckpointIO"),
)


def check_parts(trainer: Any) -> None:
    """Check a trainer's callbacks, strategy and plugins before any of them is set up."""
    for option, part in _parts(trainer):
        for refusal in REFUSED:
            found = type(part) is refusal.kind if refusal.exactly else isinstance(part, refusal.kind)
            if found and refusal.when(trainer):
                if getattr(part, "_early_exit", False):  # Lightning's Tuner added it, and leaves it when fit raises
                    trainer.callbacks.remove(part)
                raise InputError(f"{option}: {type(part).__name__} {refusal.why}; {refusal.instead}")


def _parts(trainer: Any) -> Iterator[tuple[str, Any]]:
    yield from (("trainer.callbacks", each) for each in trainer.callbacks)
    yield "trainer.strategy", trainer.strategy
    yield "trainer.plugins", trainer.strategy.precision_plugin
    yield from (("trainer.plugins", io) for io in wrapped(trainer.strategy.checkpoint_io))


def check_counts(trainer: Any) -> None:
    """Check the trainer's divisors, with which Lightning would fail in the middle of a run, and the gradient limit."""
    clip = getattr(trainer, "gradient_clip_val", None)
    if clip is not None:
        require(clip >= 0, f"trainer.gradient_clip_val: {clip:g} must be at least 0; null clips nothing")
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"):
        value = getattr(trainer, name, None)
        unset = value is None and name != "accumulate_grad_batches"
        share = isinstance(value, float)  # of an epoch
        require(unset or share or (value or 0) >= 1, f"trainer.{name}: {value} must be at least 1")
    require(
        trainer.world_size == 1 or getattr(trainer, "_val_check_time_interval", None) is None,
        "trainer.val_check_interval: each rank measures a time by its own clock, and would validate after another step "
        "than the others; set a number of steps",
    )


def check_run(module: Any) -> None:
    """Check a module's trainer and weights before the first step."""
    trainer: Any = module.trainer  # its callbacks and data module are set by connectors
    data = getattr(trainer, "datamodule", None)
    _check_master_weights(module, str(trainer.precision))
    planned = [each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]
    batches = max([trainer.accumulate_grad_batches, *(n for each in planned for n in each.scheduling.values())])
    require(
        batches == 1,
        f"trainer.accumulate_grad_batches: {batches} adds no negatives, the point of a larger batch; "
        f"set data.batch_size to {batches} times its value and model.micro_batch_size to the old data.batch_size",
    )
    name = "transfer_batch_to_device"
    require(
        not (data and is_overridden(name, module) and is_overridden(name, data)),
        f"{type(module).__name__}.{name}: Lightning would not call it, because {type(data).__name__} has its own; use "
        "on_before_batch_transfer or on_after_batch_transfer",
    )
    column = getattr(data, "negative_column", None)
    require(
        column is None or module.loss.uses_negatives,
        f"data.columns.negative: {column!r} would have no effect, because {type(module.loss).__name__} does not use "
        "hard negatives; leave it out, or use lit_clip.losses.Contrastive",
    )
    for part in module.loss.modules():
        teacher: Any = getattr(part, "loaded", None)
        if hasattr(teacher, "check"):  # tables, which must have what the data ask for
            teacher.check(data)
        if captions_together(data) and getattr(part, "duplicates", "") == "negatives":
            raise InputError(
                f"model.loss.duplicates: negatives of {type(part).__name__} would make an image's own captions wrong "
                "for it, which data.captions.per_image together has in a step; set it to positives"
            )
    batch = getattr(data, "train_batch_size", None)
    _check_bias(module, batch, trainer.world_size)
    compares = not module.loss.chance_loss(1) and module.loss.chance_loss(2)
    if compares and batch is not None and batch * trainer.world_size == 1:
        rank_zero_warn(
            f"data.batch_size: a step has one pair, so {type(module.loss).__name__} has no negatives: without hard "
            "negatives the loss is 0 and nothing is learned; set data.batch_size to 2 or more"
        )
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


def _check_bias(module: Any, batch: int | None, world: int) -> None:
    """Warn about a sigmoid loss with a bias for far larger batches; see :class:`lit_clip.losses.Sigmoid`."""
    told = not isinstance(module.loss, Sigmoid) or module.loss.pretraining_batch is not None
    if told or not module.starts_trained or not batch:
        return
    bias, pairs = float(module.model.logit_bias), batch * world
    if bias + math.log(pairs) < FAR_BELOW:
        rank_zero_warn(
            f"model.loss: logit_bias {bias:.1f} was learned with far larger batches than this one of {pairs:,} pairs: "
            "training would first pull all features together; set model.loss.pretraining_batch (32768 for the "
            "published SigLIPs, docs/finetuning.md)"
        )


def check_lora_gradients(model: nn.Module) -> None:
    """Check after a backward pass that every LoRA addition got a gradient."""
    for name, parameter in model.named_parameters():
        if is_added(name) and parameter.grad is None and parameter.numel():  # a shard may be empty
            raise InputError(
                f"model.lora: {name} has no effect, because its layer is never called; see model.lora.targets"
            )
