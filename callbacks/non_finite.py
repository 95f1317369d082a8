"""Steps with a loss or gradient that is not finite: all ranks undo them, and a file lists their pairs."""

import json
import math
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lit_clip import distributed
from lit_clip.errors import InputError, require
from lit_clip.module import TrainingStep
from lit_clip.tools import hardware
from lit_clip.tools.untrusted import Count, convert, entries
from lit_clip.training.lightning.loop_counts import validation_due
from lit_clip.training.lightning.run_folder import run_folder
from lit_clip.training.lightning.signals import signals_of
from lit_clip.training.optimizers import obeys_found_inf, skip_step
from lit_clip.training.schedules import log_interval

FILE = "non_finite.jsonl"
MOST_IN_A_ROW = 100  # weights that are not finite themselves never recover
Policy = Literal["stop", "skip"]
# Checked in this order; the first that is not finite is the reported reason.
REASONS = ("loss", "features", "gradient")


class Finding(NamedTuple):
    """One rank's line in the file: a step that is not finite."""

    step: int  # number of optimiser steps before it, the x axis of the curves
    rank: int
    reason: str  # one of REASONS
    loss: str  # this rank's, as text, because JSON has no nan
    keys: list[str]  # of the pairs whose features are not finite; of all of the step if no rank has such a pair
    non_finite_features: bool  # whether keys are those of such pairs


class _Checked(NamedTuple):
    step: TrainingStep
    number: int  # of optimiser steps before it
    counts: hardware.HostCopy  # how many ranks found each of REASONS
    trainer: Trainer


class NonFiniteSteps(Callback):
    """Detect steps with loss, features or gradients that are not finite on any rank, and undo them on all ranks.

    Ranks sum a few numbers once a step, between the backward pass and the optimiser, together with the step's metrics.
    An undone step changes neither weights, moments nor BatchNorm's statistics; it still counts in ``global_step`` and
    for the learning rate's schedule. It is listed with the keys of its pairs in ``non_finite.jsonl`` in the run's
    folder. Under ``16-mixed`` the gradient scaler skips steps whose gradients alone are not finite, uncounted here.

    On a GPU, reading the result would wait for the device. Torch's fused Adam and AdamW are told on the device to leave
    everything as it is, and the result is read just before the next optimiser step, or before anything is saved or
    validated: an error and a line in the file come one step later, and the weights are the same. Steps that are logged
    are read at once, and so are all steps of other optimisers and under ``16-mixed``.

    Args:
        policy: ``stop``: raise the same error on all ranks. ``skip``: continue with the next step, but stop after
            ``MOST_IN_A_ROW`` such steps in a row.

    Attributes:
        steps: number of such steps so far, kept in checkpoints and logged as ``train/non_finite_steps`` under ``skip``.
    """

    stops_at_non_finite = True

    def __init__(self, policy: Policy = "stop") -> None:
        require(policy in get_args(Policy), f"NonFiniteSteps.policy: {policy!r} must be 'stop' or 'skip'")
        self.policy = policy
        self.steps = 0
        self._in_a_row = 0
        self._norms: list[_BatchNorm] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._unread: _Checked | None = None
        self._at_once = False

    def state_dict(self) -> dict[str, Any]:
        self._read()  # before a checkpoint is written that ``stop`` would not have
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = convert(state_dict, entries({"steps": Count}), "callbacks.NonFiniteSteps")["steps"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unread = None
        # A file of weights alone holds no callback's state, so saving it would not read the step before.
        self._at_once = any(getattr(each, "save_weights_only", False) for each in trainer.checkpoint_callbacks)
        self._norms = [layer for layer in pl_module.modules() if isinstance(layer, _BatchNorm)]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        pl_module.step_skipped = False  # pyright: ignore[reportArgumentType]  # nn.Module declares no bool
        layers = (layer for layer in self._norms if layer.training)
        self._statistics = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._read()
        at_once = self._at_once or (trainer.global_step + 1) % log_interval(trainer) == 0
        step: TrainingStep | None = getattr(pl_module, "last_step", None)
        if step is not None:
            self._check(step, trainer, pl_module, optimizer, at_once=at_once)
        if self.policy == "skip":  # as a tensor of the host: a number would be copied to the device
            pl_module.log("train/non_finite_steps", torch.tensor(float(self.steps)))

    def _check(self, step: TrainingStep, trainer: Trainer, module: Any, optimizer: Any, at_once: bool) -> None:
        """Decide with all ranks whether a step may change the weights; undo the step if not."""
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradients = torch.zeros_like(step.loss) if scaled else largest_gradient(module.parameters()).to(step.loss)
        bad = torch.stack([~step.loss.isfinite(), bad_rows(step).any(), ~gradients.isfinite()]).float()
        counts = module.sum_over_ranks(bad)
        self._unread = _Checked(step, trainer.global_step, hardware.HostCopy(counts), trainer)
        if (
            hardware.runs_ahead(module.device)
            and not scaled
            and not at_once
            and obeys_found_inf(optimizer, module.device)
        ):
            undone = counts.any()
            optimizer.found_inf = undone.float()
            for buffer, before in self._statistics:
                buffer.copy_(torch.where(undone, before, buffer))
            return
        optimizer.found_inf = None
        if self._read():
            skip_step(module)
            module.step_skipped = True
            for buffer, before in self._statistics:
                buffer.copy_(before)

    def _read(self) -> bool:
        """Return whether the last checked step is undone, and report it once."""
        unread, self._unread = self._unread, None
        if unread is None:
            return False
        counts = unread.counts.read()
        if not any(counts):
            self._in_a_row = 0
            return False
        self.steps, self._in_a_row = self.steps + 1, self._in_a_row + 1
        reason = next(name for name, count in zip(REASONS, counts, strict=True) if count)
        self._report(unread, reason)
        return True

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        # Before a validation, and before a signal ends the run: raised by saving, the error would come while the run is
        # being ended, and other callbacks would not be told of it.
        signals = signals_of(trainer)
        if self._unread and ((signals and signals.agreed) or validation_due(trainer)):
            self._read()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read()

    def _report(self, checked: _Checked, reason: str) -> None:
        trainer, number = checked.trainer, checked.number
        findings = _findings(checked.step, reason, number)
        folder = run_folder(trainer)  # every rank must ask
        path = folder and folder / FILE
        if path and trainer.is_global_zero:
            _append(path, findings)
        what = _sentence(findings, path)
        if self.policy == "stop":
            advice = (
                "fix or remove those pairs, lower the learning rate or clip gradients (trainer.gradient_clip_val); "
                "callbacks.NonFiniteSteps with policy: skip trains without such steps"
            )
        elif self._in_a_row >= MOST_IN_A_ROW:
            advice = (
                f"so were {self._in_a_row} steps in a row: resume from a checkpoint before them, with a lower learning "
                "rate or clipped gradients (trainer.gradient_clip_val)"
            )
        else:
            if self.steps & (self.steps - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
                rank_zero_warn(f"step {number} is skipped: {what}; {self.steps} such steps so far")
            return
        signals = signals_of(trainer)  # one would otherwise have saved a checkpoint
        name = signal.Signals(signals.agreed).name if signals and signals.agreed else ""
        unsaved = f"; {name} saved nothing, so resume from an earlier checkpoint" if name else ""
        raise InputError(f"training stopped at step {number}: {what}; {advice}{unsaved}")


def bad_rows(step: TrainingStep) -> Tensor:
    """Return bool ``[B]``: True for a pair with an image or caption feature that is not finite."""
    return ~(step.image.isfinite().all(dim=1) & step.text.isfinite().all(dim=1))


def largest_gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the largest magnitude among this rank's gradients, a scalar; not finite if any gradient is not."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    gradients = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
    gradients = [each for each in gradients if each.numel()]  # FSDP has empty shards
    return nn.utils.get_total_norm(gradients, norm_type=torch.inf)  # the square of a finite one may overflow


def _findings(step: TrainingStep, reason: str, number: int) -> list[Finding]:
    """Return, in rank order, the findings with non-finite features, or all if there are none; a collective."""
    rank, _ = distributed.rank_and_world()
    bad = bad_rows(step).tolist()
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
    except OSError as error:  # raising on this rank only would leave the others waiting
        rank_zero_warn(f"{path}: {error.strerror}; the keys of step {findings[0].step} are lost")


def _sentence(findings: list[Finding], path: Path | None) -> str:
    losses, reason = [finding.loss for finding in findings], findings[0].reason
    loss = next((loss for loss in losses if not math.isfinite(float(loss))), losses[0])
    what = f"the loss is {loss}" if reason == "loss" else f"a {reason.removesuffix('s')} is not finite"
    keys = [key for finding in findings for key in finding.keys]
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    of = "pairs with such features" if findings[0].non_finite_features else "the pairs of the step"
    return f"{what} ({of}: {', '.join(keys[:3])}{more}{f'; all keys in {path}' if path else ''})"
