"""The LightningModule: a training step, its optimiser, and what a checkpoint holds."""

import dataclasses
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, TypedDict

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError, require
from lit_clip.losses.contrastive import at_least_float32
from lit_clip.losses.loss import Loss, Pairs, build_loss, check_gradient, check_resumed_loss, evaluate_loss
from lit_clip.losses.pairwise import Contrastive, Sigmoid
from lit_clip.losses.tiled import HardNegatives
from lit_clip.models.config import CLIPConfig, Preprocessing, Size
from lit_clip.models.finetuning import (
    Freeze,
    LayerDecay,
    batch_norms,
    frozen_modules,
    frozen_names,
    learning_rate_factors,
)
from lit_clip.models.lora import LoRA, add_lora
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.retrieval.retrieval_set import RetrievalSet, token_hashes
from lit_clip.tools import host_copy
from lit_clip.tools.untrusted import given
from lit_clip.training.checkpoint_contents import close_epoch, pack_checkpoint, reopen_epoch, unpack_checkpoint
from lit_clip.training.checks import check_counts, check_lora_gradients, check_parts, check_run, check_skipped_samples
from lit_clip.training.lightning.checkpoint_io import load_the_same_checkpoint, remove_after_writing
from lit_clip.training.lightning.folder_locks import claim_folders, note_unnumbered, release_folders, remove_leftovers
from lit_clip.training.lightning.fsdp import compute_missing_batches
from lit_clip.training.lightning.signals import Signals
from lit_clip.training.lightning.sync_batch_norm import synchronise_batch_norm
from lit_clip.training.micro_batches import encode_pairs, encode_parts, hard_negatives, placeholder, split_batch
from lit_clip.training.optim import (
    EXCEPT_GAINS_AND_BIASES,
    Decays,
    OptimizerFactory,
    PaperAdamW,
    even_batches,
    skip_step,
    total_steps,
)
from lit_clip.training.optimization import Optimization
from lit_clip.training.schedules import ScheduleFactory, WarmupCosine
from lit_clip.weights.checkpoints import base_name, check_settings, checked
from lit_clip.weights.fingerprint import weights_sha256
from lit_clip.weights.load import check_before_loading, create_model, whole_name


class Features(TypedDict):
    """Result of a validation step: unit features ``[B, D]`` of both modalities, and the pairs' tokens and keys."""

    image: Tensor
    text: Tensor
    tokens: Tensor
    keys: list[str]


class TrainingStep(NamedTuple):
    """Results of the current training step, detached, for callbacks.

    Attributes:
        keys: of this rank's pairs.
        image: their images' unit features ``[B, D]``.
        text: their captions' unit features ``[B, D]``.
        loss: this rank's loss, a scalar.
        pairs: number of pairs of all ranks.
    """

    keys: list[str]
    image: Tensor
    text: Tensor
    loss: Tensor
    pairs: int


class LitCLIP(LightningModule):
    """Train a :class:`lit_clip.CLIP` on pairs of images and captions.

    A checkpoint holds the model under OpenAI's key names and the architecture as plain values, so
    ``LitCLIP.load_from_checkpoint(path)`` and open_clip read it unchanged.

    Args:
        architecture: a name from :func:`lit_clip.list_models`, or a configuration; None: that of ``pretrained``, or
            ViT-B-32 without it.
        pretrained: weights to start from: anything :func:`lit_clip.load_model` opens, of this architecture.
        image_size: if other than the architecture's; the position embedding of ``pretrained`` is interpolated.
        context_length: if other than the architecture's, see :func:`lit_clip.load_model`.
        loss: the training loss. None: :class:`lit_clip.losses.Sigmoid` for a model with a ``logit_bias`` (SigLIP),
            otherwise :class:`lit_clip.losses.Contrastive`. ``val/loss`` is this default for every training loss, so
            that runs can be compared. A checkpoint holds the loss as class path and arguments, which only training
            reads.
        optimizer: creates the optimiser of parameter groups: a class of ``torch.optim`` or ``timm.optim``, one's own,
            or a ``functools.partial`` of it.
        lr_scheduler: creates the learning rate's schedule of the optimiser; it is stepped after each optimiser step,
            and one with an argument ``total_steps`` gets the number of steps of the run.
        decay: which parameters have weight decay, by name.
        freeze: encoders, or all but their last blocks, that are not trained: not in the optimiser, always in evaluation
            mode; and whether BatchNorm keeps its statistics.
        layer_decay: the learning rate of each layer relative to the next one: one value, or one for each encoder.
        lora: train low-rank additions to the blocks that are not frozen, and nothing else. A checkpoint then holds
            only the additions and the name of their base weights (``pretrained``).
        micro_batch_size: most pairs of this rank that are encoded at once, while the loss sees all pairs of all ranks
            (GradCache, Gao et al. 2021). Activations of all but the last are computed again in the backward pass, so
            activation memory is that of one micro-batch; loss and gradients are those of the whole batch. Only
            BatchNorm sees the micro-batches.

    Attributes:
        last_step: the training step under way; None if no rank had a pair.
        optimization: the optimiser, schedule and rule of weight decay.
        step_skipped: whether the step under way changes nothing, on all ranks; callbacks may set it after the backward
            pass.
        baselines: for a logged metric its baseline, filled by whoever logs the metric.
        before: metrics of a validation before the first step, if there was one; kept in checkpoints.
        starts_trained: whether training starts from pretrained weights.
        base_sha256: fingerprint of the weights that the ``lora`` belongs to; empty without one.
    """

    def __init__(
        self,
        architecture: str | CLIPConfig | None = None,
        pretrained: str | os.PathLike[str] | None = None,
        image_size: Size | None = None,
        context_length: int | None = None,
        loss: Loss | None = None,
        optimizer: OptimizerFactory = PaperAdamW,
        lr_scheduler: ScheduleFactory = WarmupCosine,
        decay: Decays = EXCEPT_GAINS_AND_BIASES,
        freeze: Freeze | None = None,
        layer_decay: LayerDecay | float | None = None,
        lora: LoRA | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        require(
            loss is None or isinstance(loss, Loss | Mapping),
            f"model.loss: {loss!r} is no loss; pass an object of a subclass of lit_clip.losses.Loss, as Contrastive()",
        )
        if isinstance(layer_decay, int | float):
            layer_decay = LayerDecay(layer_decay, layer_decay)
        check_settings(
            {"image_size": image_size, "context_length": context_length, "micro_batch_size": micro_batch_size}, "model."
        )
        self.optimization = Optimization(optimizer, lr_scheduler, decay)
        self._layer_decay = given(LayerDecay, layer_decay, "model.layer_decay")
        freeze, lora = given(Freeze, freeze, "model.freeze"), given(LoRA, lora, "model.lora")
        self.model = create_model(architecture, pretrained, image_size, context_length)
        settings = {
            "freeze": freeze,
            "layer_decay": self._layer_decay,
            "lora": lora,
        }
        self.save_hyperparameters(  # plain values only: a checkpoint must load with weights_only=True
            {name: value and _to_dict(value) for name, value in settings.items()}
            | self.optimization.descriptions
            | {
                "architecture": self.model.config.to_dict(),
                "micro_batch_size": micro_batch_size,
                "loss": loss.describe() if isinstance(loss, Loss) else loss,
                # A LoRA's checkpoint needs its base and how the base was resized; any other checkpoint has all weights.
                "pretrained": base_name(whole_name(architecture, pretrained)) if lora and pretrained else None,
                "image_size": image_size if lora else None,
                "context_length": context_length if lora else None,
            }
        )
        if loss is None:
            loss = Contrastive() if self.model.logit_bias is None else Sigmoid()
        # A checkpoint names its loss in a mapping, of which nothing is imported before training starts.
        self.loss: Loss | None = loss if isinstance(loss, Loss) else None
        self.starts_trained = pretrained is not None
        self.base_sha256 = ""
        self._freeze(freeze or Freeze(), lora)
        self.last_step: TrainingStep | None = None
        self.step_skipped = False
        self._metrics: dict[str, Tensor] | None = None  # of this rank's step, until they are averaged
        self.baselines: dict[str, float] = {}
        self.before: dict[str, float] = {}
        self._groups: list[dict[str, Any]] | None = None
        self._validated = RetrievalSet()

    def _freeze(self, freeze: Freeze, lora: LoRA | None) -> None:
        for name in frozen_names(self.model, freeze):
            self.model.get_parameter(name).requires_grad_(False)
        if lora:
            require(self.starts_trained, "model.lora: adds to a trained model; set model.pretrained")
            self.base_sha256 = weights_sha256(self.model)
            add_lora(self.model, lora)
        norms = batch_norms(self.model) if freeze.batch_norm else []
        self._frozen_modules = [*frozen_modules(self.model), *norms]  # names: a strategy may replace the modules
        self.train()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """See Lightning's; arguments that this class does not know, which Lightning drops in silence, are refused."""
        known = inspect.signature(super().load_from_checkpoint).parameters.keys()
        parameters = inspect.signature(cls).parameters
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
            for name in kwargs.keys() - known - parameters.keys():
                raise InputError(f"{cls.__name__} has no argument {name!r}; there are {', '.join(parameters)}")
        check_before_loading(checkpoint_path)
        kwargs.setdefault("weights_only", True)  # Lightning's default would run a program that an address holds
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    # Data modules ask for these, so that nothing has to be written twice in a YAML file.

    @property
    def preprocessing(self) -> Preprocessing:
        """The model's preprocessing of images."""
        return self.model.preprocessing

    @property
    def tokenize(self) -> TextTokenizer:
        """Tokenizer: texts -> int64 ``[N, context_length]``, picklable for data workers."""
        return self.model.tokenizer

    def forward(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        """Return unit features ``[B, D]`` of images and captions, float32."""
        return encode_pairs(self.model, batch)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is trained; frozen modules stay in evaluation mode, statistics and dropout included."""
        super().train(mode)
        for name in self._frozen_modules:
            self.model.get_submodule(name).eval()
        return self

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

    def teardown(self, stage: str) -> None:
        release_folders()

    def setup(self, stage: str) -> None:
        if self._trainer and isinstance(self.trainer.strategy, DDPStrategy):
            # Keep gradients in the buckets that are sent instead of a second copy.
            self.trainer.strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)
        if self._trainer:
            load_the_same_checkpoint(self.trainer)
            remove_after_writing(self.trainer.strategy.checkpoint_io)
        if self._trainer and stage != "predict":
            check_skipped_samples(self._trainer)
        if stage == "fit":
            if self._trainer:
                synchronise_batch_norm(self.trainer.strategy)
            if self.loss is None:
                self.loss = build_loss(self.hparams["loss"])
            self.loss.prepare(self.model)
            self._groups = None
            self._groups = self._parameter_groups()

    def on_fit_start(self) -> None:
        check_run(self)

    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        assert self.loss is not None, "setup builds it"
        shards, negative_shards = self._shards(len(batch.images), hard_negatives(batch, self.loss))
        parts = split_batch(self.model, batch, shards, self.hparams["micro_batch_size"])
        image_BD, text_BD, negative_MD = encode_parts(
            self.model, parts, len(batch.images), negatives=negative_shards.total > 0
        )
        self.last_step, self.step_skipped, self._metrics = None, shards.total == 0, {}
        # DDP and FSDP need a gradient of every parameter, also if the loss does not use it.
        zero = sum((p.sum() * 0 for p in self._logit_parameters()), image_BD[:0].sum() + text_BD[:0].sum())
        if self.step_skipped:  # no rank has a pair
            return zero
        scale, bias = self.model.logit_scale.exp(), self.model.logit_bias
        pad_id = self.model.tokenizer.pad_id
        negatives = None if negative_MD is None else HardNegatives(negative_MD, negative_shards)
        pairs = Pairs(image_BD, text_BD, scale, bias, shards, batch, parts, pad_id, negatives)
        loss, metrics = evaluate_loss(self.loss, pairs)
        if len(image_BD) and torch.is_grad_enabled():
            check_gradient(self.loss, loss)
        loss = loss + zero
        for name, value in {"loss": loss, **metrics}.items():
            if isinstance(value, Tensor) and shards.world > 1:
                self._metrics[f"train/{name}"] = value.detach()
            else:  # a number as a tensor: Lightning would copy it to the device, and wait for it
                self.log(f"train/{name}", torch.as_tensor(value, dtype=torch.float32).detach())
        self.log("train/logit_scale", scale)
        self.last_step = TrainingStep(batch.keys, image_BD.detach(), text_BD.detach(), loss.detach(), shards.total)
        return loss

    def _shards(self, pairs: int, negatives: int) -> tuple[distributed.Shards, distributed.Shards]:
        """Return how many pairs and hard negatives each rank has; without asking, if the data module guarantees that.

        Raises:
            InputError: it guarantees another number than this rank has.
        """
        assert self.loss is not None, "setup builds it"
        even = even_batches(self._trainer, self.loss.uses_negatives) if self._trainer else None
        require(
            even in (None, pairs),
            f"training_step: got {pairs} pairs of a batch of {even}; a hook that changes their number needs "
            "data.on_error: skip",
        )
        rank, world = distributed.rank_and_world()
        if even is None or world == 1:
            both = distributed.shards_of(pairs, negatives)
            return both[0], both[1]
        require(
            not negatives,
            "training_step: got hard negatives of which other ranks do not know; add them in on_after_batch_transfer "
            "of the module",
        )
        return distributed.Shards(rank, (pairs,) * world), distributed.Shards(rank, (0,) * world)

    def sum_over_ranks(self, numbers: Tensor) -> Tensor:
        """Return the sum of numbers over ranks, in a step's one collective; log the step's metrics, averaged in it too.

        The collective also exchanges the ranks' signals. Called in ``on_before_optimizer_step``, at most once a step
        and then by all ranks; if no callback does, the module does.

        Args:
            numbers: float ``[N]``, on the module's device.
        """
        metrics, self._metrics = self._metrics or {}, None
        signals, world = self.trainer._signal_connector, distributed.rank_and_world()[1]
        flags = signals.flags(numbers) if world > 1 and isinstance(signals, Signals) else []
        own = [value.to(numbers.device).reshape(1) for value in metrics.values()]
        total = distributed.sum_over_ranks(torch.cat([numbers, *flags, *own]), numbers.device)
        summed, received, of_metrics = total.split([len(numbers), len(flags), len(own)])
        if isinstance(signals, Signals) and flags:
            signals.note(received)
        for name, mean in zip(metrics, (of_metrics / world).unbind(), strict=True):
            self.log(name, mean)
        return summed

    def _logit_parameters(self) -> list[Tensor]:
        own = [] if self.loss is None else [p for p in self.loss.parameters() if p.requires_grad]
        return [*(p for p in (self.model.logit_scale, self.model.logit_bias) if p is not None), *own]

    def on_after_backward(self) -> None:
        if self.base_sha256 and self.global_step == 0:
            check_lora_gradients(self.model)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._metrics is not None:
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
        if loss is not None and (logged or not host_copy.runs_ahead(self.device)):
            # With prog_bar=True Lightning would read it in every step, twice.
            trainer.progress_bar_metrics["train/loss"] = float(loss)

    def on_validation_epoch_start(self) -> None:
        self._validated = RetrievalSet()
        compute_missing_batches(self.trainer, self.model)
        model = self.trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            # DDP would do this in a rank's first batch, and wait for ranks that have none.
            distributed.same_buffers(self.model)
            model.require_forward_param_sync = False

    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> Features:
        tokenizer = self.model.tokenizer  # hash before encoding: afterwards it would wait for the device
        hashes = token_hashes(batch.tokens, tokenizer.context_length, tokenizer.pad_id)
        features = self.predict_step(batch, batch_idx)
        self._validated.add(features["image"], features["text"], batch.keys, hashes)
        return features

    def on_validation_epoch_end(self) -> None:
        self._log_retrieval("val")

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: CaptionBatch, batch_idx: int) -> Features:
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_retrieval("test")

    def predict_step(self, batch: CaptionBatch, batch_idx: int) -> Features:
        pairs = len(batch.images)
        image_BD, text_BD = (features[:pairs] for features in self(batch if pairs else placeholder(self.model, batch)))
        return Features(image=image_BD, text=text_BD, tokens=batch.tokens, keys=batch.keys)

    def _log_retrieval(self, prefix: str) -> None:
        """Log loss and retrieval over the whole set; the same for any batch size and number of ranks."""
        scale = self.model.logit_scale.exp()
        empty = at_least_float32(scale.new_zeros(0, self.model.config.embed_dim))  # as features are
        evaluation = self._validated.evaluate(empty, scale, self.model.logit_bias)
        for name, value in evaluation.metrics.items():
            # Already over all ranks: Lightning's means would weight uneven ranks and batches wrongly.
            self.log(f"{prefix}/{name}", value, prog_bar=name == "loss" or name.endswith("recall@1"))
        self.baselines |= {f"{prefix}/{name}": value for name, value in evaluation.baselines.items()}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups as they were when ``fit`` began: FSDP's shards are flat, so weights look like biases."""
        if self._groups is not None:
            return [{**group, "params": list(group["params"])} for group in self._groups]
        own = [] if self.loss is None else list(self.loss.parameters())
        layers = [*learning_rate_factors(self.model, self._layer_decay), ("loss", 1.0, own)]
        return self.optimization.groups(self, layers)

    def configure_optimizers(self) -> Any:
        return self.optimization.configure(self._parameter_groups(), self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        base = {"pretrained": self.hparams["pretrained"], "sha256": self.base_sha256} if self.base_sha256 else None
        pack_checkpoint(checkpoint, self.model, base)
        reopen_epoch(checkpoint)
        checkpoint["before"] = dict(self.before)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        name = str((self._trainer and self._trainer.ckpt_path) or "the checkpoint")
        if self._trainer:  # load_from_checkpoint has checked it, and put its caller's arguments into it
            checked(checkpoint, name)
        if self._trainer and self._trainer.state.fn == TrainerFn.FITTING:
            self.trainer.precision_plugin.convert_module(self)  # Lightning's turn comes after 64-bit weights are loaded
            check_resumed_loss(self.hparams["loss"], checkpoint["hyper_parameters"].get("loss"), name)
            if self.trainer.is_global_zero:
                remove_leftovers(Path(name))
        unpack_checkpoint(checkpoint, self, self.base_sha256, name)
        self.before = dict(checkpoint.get("before", {}))  # wise-ft writes none
        if self._trainer and self._trainer.state.fn == TrainerFn.FITTING:
            require(
                "optimizer_states" in checkpoint and "optimizer" in checkpoint["hyper_parameters"],
                f"{name}: holds weights only, so training cannot resume; start from it with model.pretrained",
            )
            groups, steps = self._parameter_groups(), total_steps(self.trainer)
            close_epoch(checkpoint)
            self.optimization.resume(checkpoint, groups, self.hparams["layer_decay"], steps, name)


def _to_dict(value: Any) -> dict[str, Any]:
    """Return settings as plain values."""
    return {name: list(item) if isinstance(item, tuple) else item for name, item in dataclasses.asdict(value).items()}
