"""A step whose loss or gradient is not finite: one decision of all ranks, and the pairs that it came from in a file."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip import distributed
from lit_clip.errors import InputError, require

FILE = "non_finite.jsonl"
MOST_IN_A_ROW = 100  # weights that are not finite themselves never recover
HALF = (torch.float16, torch.bfloat16)
NonFinite = Literal["stop", "skip"]
# What is looked at, in this order: the first that is not finite is the reason that is told.
REASONS = ("loss", "features", "gradient")


class _Step(NamedTuple):
    """What a training step leaves: the keys of this rank's pairs, their unit features ``[B, D]``, and its loss."""

    keys: Sequence[str]
    image: Tensor
    text: Tensor
    loss: Tensor

    def bad_rows(self) -> Tensor:
        """Pairs, as bool ``[B]``, whose image or caption has a feature that is not finite."""
        return ~(self.image.isfinite().all(dim=1) & self.text.isfinite().all(dim=1))


class Finding(NamedTuple):
    """What one rank knows of a step that is not finite: a line of the file.

    Attributes:
        step: optimiser steps before it, as the curves' x axis counts.
        rank: whose pairs these are.
        reason: one of ``REASONS``.
        loss: of this rank, as text: JSON has no nan.
        keys: of the pairs whose features are not finite; of all pairs of the step if there is none on any rank.
        non_finite_features: which of the two.
    """

    step: int
    rank: int
    reason: str
    loss: str
    keys: list[str]
    non_finite_features: bool


class NonFiniteSteps:
    """Finds steps whose loss, features or gradients are not finite on any rank, and takes all of them back.

    The ranks add up a few numbers once a step, between backward pass and optimiser; every rank does so in every step,
    so no rank can wait for another. A step that is taken back has no gradients: AdamW leaves weights, moments and its
    count of steps as they are. What BatchNorm layers had learnt from it is undone. It still counts in ``global_step``
    and for the learning rate's schedule.

    Under ``16-mixed`` gradients that are not finite, with a loss that is, are how the gradient scaler finds its scale;
    it leaves such steps out by itself and they are not counted here.

    Args:
        policy: ``stop``: raise the same error on all ranks. ``skip``: go on with the next step, but not after
            ``MOST_IN_A_ROW`` such steps in a row.

    Attributes:
        steps: how many there have been.
        left_out: whether the step that was looked at last is one.
    """

    def __init__(self, policy: NonFinite = "stop") -> None:
        require(policy in get_args(NonFinite), f"model.non_finite: {policy!r} is neither stop nor skip")
        self.policy = policy
        self.steps = 0
        self.left_out = False
        self._in_a_row = 0
        self._step: _Step | None = None
        self._norms: list[_BatchNorm] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def watch(self, module: nn.Module) -> None:
        """Tell whose BatchNorm layers learn from the coming steps; call it when training starts."""
        self._norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]

    def before_step(self) -> None:
        """Remember what a forward pass changes."""
        layers = (layer for layer in self._norms if layer.training)
        self._statistics = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]

    def observe(self, keys: Sequence[str], image_BD: Tensor, text_BD: Tensor, loss: Tensor) -> None:
        """Take note of a training step, without waiting for the device.

        Args:
            keys: of this rank's pairs.
            image_BD: their images' unit features.
            text_BD: their captions'.
            loss: a scalar.
        """
        self._step = _Step(keys, image_BD.detach(), text_BD.detach(), loss.detach())

    @torch.no_grad()
    def check(self, module: LightningModule) -> None:
        """Decide, together with all other ranks, whether the observed step may change the weights.

        Call it after the backward pass and before gradients are clipped, on every rank.

        Raises:
            InputError: it may not, and the policy is ``stop`` or there have been too many in a row.
        """
        step, self._step, self.left_out = self._step, None, False
        if step is None:  # of a subclass that does not tell
            return
        parameters = list(module.parameters())
        scaled = getattr(module.trainer.precision_plugin, "scaler", None) is not None
        gradients = torch.zeros_like(step.loss) if scaled else largest_gradient(parameters).to(step.loss)
        bad = torch.stack([~step.loss.isfinite(), step.bad_rows().any(), ~gradients.isfinite()]).float()
        ranks = distributed.sum_over_ranks(bad, module.device).tolist()  # the one wait for the device
        if not any(ranks):
            self._in_a_row = 0
            return
        self.leave_out(module)
        self.steps, self._in_a_row = self.steps + 1, self._in_a_row + 1
        reason = next(name for name, count in zip(REASONS, ranks, strict=True) if count)
        self._report(step, reason, module.trainer)

    @torch.no_grad()
    def leave_out(self, module: nn.Module) -> None:
        """Take the step back: no gradients, and BatchNorm's statistics as they were; on all ranks."""
        self.left_out = True
        for parameter in module.parameters():
            parameter.grad = None
        for buffer, before in self._statistics:
            buffer.copy_(before)

    def _report(self, step: _Step, reason: str, trainer: Trainer) -> None:
        findings = _findings(step, reason, trainer.global_step)
        folder = trainer.log_dir if trainer.loggers else None  # a broadcast: every rank must ask
        path = Path(folder) / FILE if folder else None
        if path and trainer.is_global_zero:
            _append(path, findings)
        what = _sentence(findings, path)
        stopped = f"training stopped at step {trainer.global_step}: {what}"
        if self.policy == "stop":
            raise InputError(
                f"{stopped}; fix or remove those pairs, lower the learning rate or clip gradients "
                "(trainer.gradient_clip_val); --model.non_finite skip goes on without such steps"
            )
        if self._in_a_row >= MOST_IN_A_ROW:
            raise InputError(
                f"{stopped}; so were {self._in_a_row} steps in a row: go on from a checkpoint before them, with a "
                "lower learning rate or gradients clipped (trainer.gradient_clip_val)"
            )
        if self.steps & (self.steps - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
            rank_zero_warn(f"step {trainer.global_step} is left out: {what}; {self.steps} such steps so far")


def largest_gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The largest magnitude in this rank's gradients, a scalar; not finite if any of them is not."""
    gradients = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]  # FSDP has empty shards
    return nn.utils.get_total_norm(gradients, norm_type=torch.inf)  # the square of a finite one may overflow


def check_master_weights(module: LightningModule) -> None:
    """Refuse to train weights that are kept in half precision.

    Raises:
        InputError: a trained parameter is float16 or bfloat16.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype in HALF:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise InputError(
                f"trainer.precision: {module.trainer.precision} trains weights kept in {kind} ({name}), in which "
                "AdamW's small updates are rounded away and float16 ends in nan; use bf16-mixed (or 16-mixed): it "
                "computes in half precision and keeps the weights in float32"
            )


def _findings(step: _Step, reason: str, number: int) -> list[Finding]:
    """Of all ranks that have something to tell, in their order; every rank must ask."""
    rank, _ = distributed.rank_and_world()
    bad = step.bad_rows().tolist()
    keys = [key for key, is_bad in zip(step.keys, bad, strict=True) if is_bad]
    mine = Finding(number, rank, reason, str(float(step.loss)), keys or list(step.keys), bool(keys))
    findings: list[Finding] = distributed.gather_objects([mine])
    return [finding for finding in findings if finding.non_finite_features] or findings


def _append(path: Path, findings: list[Finding]) -> None:
    lines = [json.dumps(finding._asdict()) + "\n" for finding in findings]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:  # raised on this rank alone it would leave the others waiting
        rank_zero_warn(f"{path}: {error.strerror}; the keys of step {findings[0].step} could not be written")


def _sentence(findings: list[Finding], path: Path | None) -> str:
    """What was not finite, and the first of the keys."""
    losses, reason = [finding.loss for finding in findings], findings[0].reason
    loss = next((loss for loss in losses if not math.isfinite(float(loss))), losses[0])
    what = f"the loss is {loss}" if reason == "loss" else f"a {reason.removesuffix('s')} is not finite"
    keys = [key for finding in findings for key in finding.keys]
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    of = "pairs with such features" if findings[0].non_finite_features else "the pairs of the step"
    return f"{what} ({of}: {', '.join(keys[:3])}{more}{f'; all keys in {path}' if path else ''})"
