"""Hooks for Lightning around a training step: set-up, collectives, validation of wrapped models, checkpoints."""

import inspect
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.distributed import RankCounts
from lit_clip.errors import InputError, require
from lit_clip.losses.loss import Loss
from lit_clip.models.clip import CLIP
from lit_clip.models.config import Preprocessing
from lit_clip.models.finetuning import Freeze, batch_norms, changing_weights, frozen_modules, frozen_names
from lit_clip.models.lora import LoRA, add_lora
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.secrets import plain_without_secrets
from lit_clip.tools import hardware
from lit_clip.tools.atomic import release, remove_leftovers
from lit_clip.tools.parts import Description
from lit_clip.tools.reading import naming
from lit_clip.training.checkpoint_contents import pack_checkpoint, unpack_checkpoint
from lit_clip.training.checks import check_counts, check_lora_gradients, check_parts, check_run, check_skipped_samples
from lit_clip.training.even_batches import even_batches, hard_negatives
from lit_clip.training.lightning.checkpoint_io import load_the_same_checkpoint, remove_after_writing
from lit_clip.training.lightning.loop_counts import enter_epoch, resumed_counts, settle_counts
from lit_clip.training.lightning.resume_checks import check_same_parts
from lit_clip.training.lightning.run_folder import claim_folders, note_unnumbered
from lit_clip.training.lightning.signals import signals_of
from lit_clip.training.lightning.strategies import (
    keep_gradients_in_buckets,
    synchronise_batch_norm,
    validate_without_synchronising,
)
from lit_clip.training.micro_batches import StepCounts
from lit_clip.training.optimizers import Optimization, skip_step
from lit_clip.training.schedules import batches_per_epoch, total_steps
from lit_clip.weights.checkpoints import checked
from lit_clip.weights.load import open_checkpoint, weights_come_later


class RunHooks(LightningModule):
    """Base of :class:`lit_clip.LitCLIP`: everything a run needs outside the training step.

    Attributes:
        step_skipped: whether the step under way changes nothing, on all ranks; callbacks may set it after the backward
            pass.
        baselines: for a logged metric its baseline, filled by whoever logs the metric.
        alike: of the last validation, what the model could not tell apart: images, captions, both or nothing.
        before: metrics of a validation before the first step, if there was one; kept in checkpoints.
        starts_trained: whether training starts from pretrained weights.
        resumed_after: complete epochs before the run was resumed, and the steps in them.
        base_sha256: fingerprint of the weights that the ``lora`` belongs to; empty without one.
    """

    model: CLIP
    loss: Loss
    optimization: Optimization
    step_skipped: bool = False
    starts_trained: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.base_sha256 = ""
        self.resumed_after = (0, 0)
        self.baselines: dict[str, float] = {}
        self.alike = ""
        self.before: dict[str, float] = {}
        self._step_metrics: dict[str, Tensor] | None = None  # of this rank's step, until they are averaged
        self._frozen_modules: list[str] = []
        self._changing: set[str] = set()  # names of the model's weights

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a module for use, in training mode; arguments of its class override the checkpoint's settings.

        The file is read once, and only as data, whatever ``weights_only``; the settings are its own: no
        ``hparams_file``. Without ``map_location`` the module is on the CPU. A checkpoint names the optimiser, schedule
        and loss that it was trained with, but only arguments set them.
        """
        require(hparams_file is None, "load_from_checkpoint: has no hparams_file; pass settings as arguments")
        known = inspect.signature(cls).parameters
        every = any(parameter.kind == parameter.VAR_KEYWORD for parameter in known.values())
        for name in kwargs.keys() - known.keys() if not every else ():
            raise InputError(f"{cls.__name__} has no argument {name!r}; there are {', '.join(known)}")
        checkpoint, name = open_checkpoint(checkpoint_path)
        hparams = {key: value for key, value in checkpoint["hyper_parameters"].items() if every or key in known}
        has_lora = "base" in checkpoint  # then the base has weights, and the checkpoint the LoRA's
        with nullcontext() if has_lora else weights_come_later(checkpoint["state_dict"], name):
            module = cls(**{**hparams, **kwargs})
        with naming(name):
            module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], module.strict_loading if strict is None else strict)
        return module.to(map_location)

    # Data modules ask for these two, so that nothing has to be written twice in a YAML file.

    @property
    def preprocessing(self) -> Preprocessing:
        """The model's image preprocessing."""
        return self.model.preprocessing

    @property
    def tokenize(self) -> TextTokenizer:
        """Tokenizer: texts -> int64 ``[N, context_length]``, picklable for data workers."""
        return self.model.tokenizer

    @property
    def parts(self) -> dict[str, Description]:
        """Class and settings of the exchangeable parts, as plain values; checkpoints keep them for comparison."""
        return {**self.optimization.descriptions, "loss": self.loss.describe()}

    def _freeze(self, freeze: Freeze, lora: LoRA | None) -> None:
        """Freeze encoders or layers, add a LoRA, and remember which modules stay in evaluation mode."""
        for name in frozen_names(self.model, freeze):
            self.model.get_parameter(name).requires_grad_(False)
        if lora:
            require(self.starts_trained, "model.lora: adds to a trained model; set model.pretrained")
            self.base_sha256 = add_lora(self.model, lora)
        norms = batch_norms(self.model) if freeze.batch_norm else []
        self._frozen_modules = [*frozen_modules(self.model, freeze), *norms]  # names: a strategy replaces modules
        self._changing = changing_weights(self.model, self._frozen_modules)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of trainable modules; frozen ones stay in evaluation mode, including statistics and dropout."""
        super().train(mode)
        for name in self._frozen_modules:
            self.model.get_submodule(name).eval()
        return self

    # Set-up, in the order in which Lightning calls the hooks.

    def configure_callbacks(self) -> list[Callback]:
        # The first hook: callbacks' setup would fail less clearly, and next a trainer asks its loggers for folders.
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_parts(self.trainer)
            check_counts(self.trainer)
        note_unnumbered(self.trainer)
        return []

    def prepare_data(self) -> None:
        # The only hook between the ranks' meeting and the loggers' opening of files.
        claim_folders(self.trainer)

    def setup(self, stage: str) -> None:
        if self._trainer:
            keep_gradients_in_buckets(self.trainer.strategy)
            load_the_same_checkpoint(self.trainer)
            remove_after_writing(self.trainer.strategy.checkpoint_io)
            if stage != "predict":
                check_skipped_samples(self.trainer)
        if stage == "fit":
            if self._trainer:
                synchronise_batch_norm(self.trainer.strategy)
            self.loss.prepare(self.model)

    def on_fit_start(self) -> None:
        check_run(self)

    def on_train_start(self) -> None:
        enter_epoch(self.trainer)

    def teardown(self, stage: str) -> None:
        release()

    # A step: numbers of pairs before it, its one collective after the backward pass.

    def begin_step(self, batch: CaptionBatch) -> StepCounts:
        """Return each rank's numbers of pairs and hard negatives, without communication if guaranteed.

        A step without any pair is skipped.
        """
        pairs, negatives = batch.pairs, hard_negatives(batch, self.loss)
        even = even_batches(self._trainer, self.loss.uses_negatives) if self._trainer else None
        require(
            even in (None, pairs),
            f"training_step: got {pairs} pairs of a batch of {even}; a hook that changes their number needs "
            "data.bad_samples.on_error: skip",
        )
        rank, world = distributed.rank_and_world()
        if even is None or world == 1:
            counts = StepCounts(*distributed.shards_of(pairs, negatives))
        else:
            unknown = "training_step: got hard negatives of which other ranks do not know"
            require(not negatives, f"{unknown}; add them in on_after_batch_transfer of the module")
            counts = StepCounts(RankCounts(rank, (pairs,) * world), RankCounts(rank, (0,) * world))
        self.step_skipped, self._step_metrics = counts.pairs.total == 0, {}
        return counts

    def zero_loss(self, image_BD: Tensor, text_BD: Tensor) -> Tensor:
        """Return 0 with a gradient for every parameter: DDP and FSDP need one even if the loss uses none."""
        own = [p for p in self.loss.parameters() if p.requires_grad]
        scalars = [p for p in (self.model.logit_scale, self.model.logit_bias, *own) if p is not None]
        return sum((p.sum() * 0 for p in scalars), image_BD[:0].sum() + text_BD[:0].sum())

    def log_step(self, values: dict[str, Tensor | float], world: int) -> None:
        """Log a step's values as ``train/<name>``: tensors averaged over ranks, in the step's one collective."""
        assert self._step_metrics is not None, "set by begin_step"
        for name, value in values.items():
            if isinstance(value, Tensor) and world > 1:
                self._step_metrics[f"train/{name}"] = value.detach()
            else:  # a number as a tensor: Lightning would copy it to the device, and wait for it
                self.log(f"train/{name}", torch.as_tensor(value, dtype=torch.float32).detach())

    def sum_over_ranks(self, numbers: Tensor) -> Tensor:
        """Return the sum over ranks of floats ``[N]``; this is the step's one collective, and also logs its metrics.

        The collective also exchanges the ranks' signals. Called in ``on_before_optimizer_step``, at most once a step
        and then by all ranks; if no callback does, the module does.
        """
        metrics, self._step_metrics = self._step_metrics or {}, None
        world = distributed.rank_and_world()[1]
        signals = signals_of(self.trainer) if world > 1 else None
        flags = signals.flags(numbers) if signals else []
        own = [value.to(numbers.device).reshape(1) for value in metrics.values()]
        total = distributed.sum_over_ranks(torch.cat([numbers, *flags, *own]), numbers.device)
        summed, received, of_metrics = total.split([len(numbers), len(flags), len(own)])
        if signals:
            signals.note(received)
        for name, mean in zip(metrics, (of_metrics / world).unbind(), strict=True):
            self.log(name, mean)
        return summed

    def on_after_backward(self) -> None:
        if self.base_sha256 and self.global_step == 0:
            check_lora_gradients(self.model)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._step_metrics is not None:
            self.sum_over_ranks(torch.zeros(0, device=self.device))
        if self.step_skipped:  # otherwise AdamW's momentum would move the weights
            skip_step(self)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if not self.step_skipped:  # which has no gradients
            super().configure_gradient_clipping(*args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Not in on_train_batch_end: callbacks' hooks run before the module's, and one of them saves the checkpoint.
        self.model.clamp_logit_scale()
        trainer: Any = self.trainer
        logged = (self.global_step + 1) % (trainer.log_every_n_steps or sys.maxsize) == 0
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None and (logged or not hardware.runs_ahead(self.device)):
            # With prog_bar=True Lightning would read it in every step, twice.
            trainer.progress_bar_metrics["train/loss"] = float(loss)

    def on_validation_epoch_start(self) -> None:
        if missing := getattr(self.trainer.strategy, "compute_missing_batches", None):  # ours for shards
            missing()
        validate_without_synchronising(self.trainer.strategy, self.model)

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()  # the module's, which begins a new set of pairs too

    # The optimiser, and checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        base = {"pretrained": self.hparams["pretrained"], "sha256": self.base_sha256} if self.base_sha256 else None
        pack_checkpoint(checkpoint, self.model, base, self._changing)
        settle_counts(checkpoint)
        checkpoint |= {"parts": plain_without_secrets(self.parts), "before": dict(self.before)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # ``self.trainer`` raises where there is none: then load_from_checkpoint has checked the file.
        name = str((self._trainer and self._trainer.ckpt_path) or "the checkpoint")
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if self._trainer:
            checked(checkpoint, name)
        if fitting:
            self.trainer.precision_plugin.convert_module(self)  # Lightning's turn comes after 64-bit weights are loaded
            if "parts" in checkpoint:
                check_same_parts(self.parts, checkpoint["parts"], name)
            if self.trainer.is_global_zero:
                remove_leftovers(Path(name))
        unpack_checkpoint(checkpoint, self, name, self.trainer if fitting else None)
        self.before = dict(checkpoint.get("before", {}))  # wise-ft writes none
        if fitting:
            resumable = "optimizer_states" in checkpoint and "parts" in checkpoint
            weights_only = f"{name}: holds weights only, so training cannot resume"
            require(resumable, f"{weights_only}; start from it with model.pretrained")
            self.resumed_after = resumed_counts(checkpoint, batches_per_epoch(self.trainer))
            steps = total_steps(self.trainer, *self.resumed_after)
            self.optimization.resume(checkpoint, self.optimization.groups(self), steps, name)
