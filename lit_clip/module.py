"""The LightningModule: what happens in a step, and what a checkpoint holds."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypedDict, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.compiling import compile_blocks
from lit_clip.errors import InputError, require
from lit_clip.evaluation.retrieval import RetrievalSet, token_hashes
from lit_clip.losses.contrastive import Duplicates, at_least_float32
from lit_clip.losses.duplicates import pair_ids
from lit_clip.losses.tiled import PairLayout, ShardedLoss, sharded_contrastive_loss, sharded_sigmoid_loss
from lit_clip.models.config import CLIPConfig, Preprocessing, Size
from lit_clip.models.finetuning import Freeze, LayerDecay, frozen_modules, frozen_names, learning_rate_factors
from lit_clip.models.layers import TOWERS, tower_blocks
from lit_clip.models.lora import LoRA, add_lora, is_added
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.models.transformer import VisionTransformer
from lit_clip.random_states import random_states, restore_random_states
from lit_clip.skipped import SkippedSamples
from lit_clip.stability import NonFinite, NonFiniteSteps, check_master_weights
from lit_clip.training.activation_checkpointing import StatisticsKept, checkpoint, checkpoint_blocks
from lit_clip.training.optim import adamw, parameter_groups, total_steps, warmup_cosine
from lit_clip.training.optimizer_settings import check_settings, keep_what_was_typed
from lit_clip.training.plan import measure_run, print_plan
from lit_clip.training.summary import print_parameter_groups
from lit_clip.training.teacher import Distill, Teacher
from lit_clip.weights.checkpoints import EMA_WEIGHTS, base_name, check_base, checkpoint_tokenizer, saved_tokenizer
from lit_clip.weights.fingerprint import weights_sha256
from lit_clip.weights.load import check_architecture, check_weights, create_model, whole_name

PREFIX = "model."
STATES = {"state_dict", "current_model_state"}  # the second is the weights of the last step, if the first is an average
Made = TypeVar("Made", Freeze, LayerDecay, LoRA, Distill)


class Features(TypedDict):
    """What a validation step returns: unit features ``[B, D]`` of both modalities, tokens and keys of the pairs."""

    image: Tensor
    text: Tensor
    tokens: Tensor
    keys: list[str]


class LitCLIP(LightningModule):
    """Trains a :class:`lit_clip.CLIP` on pairs of images and captions.

    A checkpoint holds the model under OpenAI's own key names and the architecture as plain values, so
    ``LitCLIP.load_from_checkpoint(path)`` and open_clip both read it as it is.

    The loss is the contrastive one, or the sigmoid one for a model with a ``logit_bias`` (SigLIP).

    Args:
        architecture: a name from :func:`lit_clip.list_models`, or the sizes themselves; None: that of ``pretrained``,
            or without it ViT-B-32.
        pretrained: weights to start from: whatever :func:`lit_clip.load_model` opens, of this architecture.
        image_size: other than the architecture's; the position embedding of ``pretrained`` is interpolated.
        context_length: other than the architecture's, see :func:`lit_clip.load_model`.
        learning_rate: at the end of the warm-up (paper, table 20: 5e-4 for ViT-B at 32,768 pairs a step).
        weight_decay: on weights, not on gains and biases (table 18).
        betas: of AdamW (table 18, ViT).
        eps: of AdamW (table 18, ViT).
        warmup_steps: optimiser steps of linear warm-up before the cosine (table 18: 2,000).
        freeze: towers, or all but their last blocks, that keep what they know: not in the optimiser, always in
            evaluation mode.
        layer_decay: the learning rate of each layer relative to the one behind it, of both towers or of each.
        lora: additions of low rank to the blocks that are not frozen; they alone learn then, and a checkpoint holds
            them alone and names ``pretrained``, which they belong to.
        distill: a teacher whose choices among the batch's images and captions are learnt too.
        non_finite: what all ranks do when a loss or a gradient is nan or infinite on any of them: stop, or skip that
            step; see :class:`lit_clip.stability.NonFiniteSteps`.
        gradient_checkpointing: keep what enters each block and compute the rest again in the backward pass: far less
            memory for a third more arithmetic, and the same numbers. A fraction: for that share of each tower's blocks.
        micro_batch_size: pairs of this process that are encoded at a time, while the loss sees all pairs of all
            processes (GradCache, Gao et al. 2021). Their activations are computed again in the backward pass, so memory
            is that of one part; loss and gradients are those of the whole batch. BatchNorm alone sees the parts.
        duplicates: what pairs with the same caption, the same image or the same group are to each other, see
            :func:`lit_clip.losses.contrastive.contrastive_loss`.
        ring_loss: whether processes pass their texts' features on from one to the next (memory of two processes'
            pairs) instead of gathering those of all.
        patch_dropout: the share of each image's patches that a training step leaves out (FLIP, Li et al. 2023): as
            much less work for the image tower, at a cost in accuracy (docs/performance.md). The paper's ViTs only;
            timm's have ``options: {patch_drop_rate: ...}`` of their own.
        compile: let ``torch.compile`` make the blocks of both towers faster, in place: names in checkpoints stay. The
            first steps take minutes then, and texts are padded to a few lengths. A ``lora`` on attention's inputs
            interrupts the graphs.

    Attributes:
        baselines: for a logged metric the baseline, filled by whoever logs the metric.
        starts_trained: whether the weights to start from are somebody's.
        base_sha256: of the weights that the ``lora`` belongs to; empty without one.
        before: what the validation before the first step logged, if there was one; kept in checkpoints.
    """

    def __init__(
        self,
        architecture: str | CLIPConfig | None = None,
        pretrained: str | os.PathLike[str] | None = None,
        image_size: Size | None = None,
        context_length: int | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.2,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        warmup_steps: int = 2000,
        freeze: Freeze | None = None,
        layer_decay: LayerDecay | float | None = None,
        lora: LoRA | None = None,
        distill: Distill | None = None,
        non_finite: NonFinite = "stop",
        gradient_checkpointing: bool | float = False,
        micro_batch_size: int | None = None,
        duplicates: Duplicates = "negatives",
        ring_loss: bool = False,
        patch_dropout: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        freeze, lora, distill = _made(Freeze, freeze), _made(LoRA, lora), _made(Distill, distill)
        if isinstance(layer_decay, int | float):
            layer_decay = LayerDecay(layer_decay, layer_decay)
        self._layer_decay = _made(LayerDecay, layer_decay)
        check_settings(learning_rate, weight_decay, warmup_steps, betas, eps)
        if micro_batch_size is not None:
            require(micro_batch_size >= 1, f"model.micro_batch_size: {micro_batch_size} must be at least 1")
        share = gradient_checkpointing
        require(0 <= share <= 1, f"model.gradient_checkpointing: {share} is neither true, false nor between 0 and 1")
        self.model = create_model(architecture, pretrained, image_size, context_length)
        self.save_hyperparameters(  # plain values only: a checkpoint must load with weights_only=True
            {
                "architecture": self.model.config.to_dict(),
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "betas": list(betas),
                "eps": eps,
                "warmup_steps": warmup_steps,
                "freeze": freeze and dataclasses.asdict(freeze),
                "layer_decay": self._layer_decay and dataclasses.asdict(self._layer_decay),
                "distill": distill and dataclasses.asdict(distill),
                "non_finite": non_finite,
                "lora": lora and dataclasses.asdict(lora),
                "gradient_checkpointing": gradient_checkpointing,
                "micro_batch_size": micro_batch_size,
                "duplicates": duplicates,
                "ring_loss": ring_loss,
                "patch_dropout": patch_dropout,
                "compile": compile,
                # What a LoRA belongs to, and what was made of it; any other checkpoint has it all.
                "pretrained": base_name(whole_name(architecture, pretrained)) if lora and pretrained else None,
                "image_size": image_size if lora else None,
                "context_length": context_length if lora else None,
            }
        )
        self.starts_trained = pretrained is not None
        self.base_sha256 = ""
        self._choose_what_learns(freeze or Freeze(), lora)
        self._drop_patches(patch_dropout)
        for tower in TOWERS if gradient_checkpointing else ():
            blocks = tower_blocks(self.model, tower)
            norms = any(isinstance(layer, _BatchNorm) for block in blocks for layer in block.modules())
            require(
                not (compile and norms),
                "model.compile: not together with model.gradient_checkpointing where blocks have BatchNorm, whose "
                "statistics it could not keep; leave one of the two out",
            )
            checkpoint_blocks(blocks[: math.ceil(gradient_checkpointing * len(blocks) - 1e-9)])  # 0.28 of 25 are 7
        self._distill, self._teacher = distill, None
        self._groups: list[dict[str, Any]] | None = None
        self._finite = NonFiniteSteps(non_finite)
        self.baselines: dict[str, float] = {}
        self.before: dict[str, float] = {}
        self._validated = RetrievalSet()
        self._no_pairs = False
        self._random_states: list[dict[str, Any]] = []  # of every rank, of the checkpoint that training goes on from

    def _choose_what_learns(self, freeze: Freeze, lora: LoRA | None) -> None:
        for name in frozen_names(self.model, freeze):
            self.model.get_parameter(name).requires_grad_(False)
        if lora:
            require(self.starts_trained, "model.lora: adds to a trained model; set model.pretrained")
            self.base_sha256 = weights_sha256(self.model)
            add_lora(self.model, lora)
        self._frozen_modules = frozen_modules(self.model)
        self.train()

    def _drop_patches(self, share: float) -> None:
        if not share:
            return
        require(0 <= share < 1, f"model.patch_dropout: {share} must be at least 0 and below 1")
        tower = self.model.visual
        if not isinstance(tower, VisionTransformer):
            raise InputError(f"model.patch_dropout: {type(tower).__name__} has no patches to leave out; leave it at 0")
        tower.patch_dropout = share

    # What the data modules are told, so that nothing has to be written twice in a YAML file.

    @property
    def preprocessing(self) -> Preprocessing:
        """How the model wants its images."""
        return self.model.preprocessing

    @property
    def tokenize(self) -> TextTokenizer:
        """Texts -> int64 ``[N, context_length]``, picklable for data workers."""
        return self.model.tokenizer

    def forward(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        """Unit features ``[B, D]`` of images and captions, float32."""
        return self._encode_images(batch.images), self._encode_tokens(batch.tokens, batch.lengths)

    def _encode_images(self, images: Tensor) -> Tensor:
        return self.model.encode_image(self.model.normalize(images), normalize=True)

    def _encode_tokens(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        return self.model.encode_text(tokens, normalize=True, lengths=lengths)

    def train(self, mode: bool = True) -> Self:
        """As everywhere, but what is frozen stays in evaluation mode: statistics and dropout too."""
        super().train(mode)
        for module in self._frozen_modules:
            module.eval()
        return self

    def configure_callbacks(self) -> list[Callback]:
        """What no run goes without."""
        trainer: Any = self.trainer
        return [] if any(isinstance(one, SkippedSamples) for one in trainer.callbacks) else [SkippedSamples()]

    def setup(self, stage: str) -> None:
        if self._trainer and isinstance(self.trainer.strategy, DDPStrategy):
            # Gradients in the buckets that are sent, and not a second time beside them.
            self.trainer.strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)
        if stage == "fit" and self._distill and not self._teacher:
            self._teacher = Teacher(self._distill.teacher)
        if stage == "fit":
            self._groups = None
            self._groups = self._parameter_groups()
            self._print_plan()
        hparams: Any = self.hparams
        if hparams.compile:
            compile_blocks(self.model)

    def _print_plan(self) -> None:
        """Here and not when training starts: a strategy may have cut the weights in shards by then."""
        if self._trainer and self._trainer.is_global_zero:
            print_plan(measure_run(self, self._trainer))

    def on_fit_start(self) -> None:
        check_master_weights(self)
        trainer: Any = self.trainer  # its callbacks are set by a connector
        planned = [one for one in trainer.callbacks if isinstance(one, GradientAccumulationScheduler)]
        batches = max([self.trainer.accumulate_grad_batches, *(n for one in planned for n in one.scheduling.values())])
        require(
            batches == 1,
            f"trainer.accumulate_grad_batches: {batches} adds no negatives, and they are what a larger batch is for; "
            f"raise data.init_args.batch_size {batches} times and set model.micro_batch_size to what it is now",
        )

    def on_train_start(self) -> None:
        self._finite.watch(self)
        rank, world = distributed.rank_and_world()
        if len(self._random_states) == world:  # here, behind all that draws numbers before the first step
            restore_random_states(self._random_states[rank])
        self._random_states = []
        hparams: Any = self.hparams
        if (hparams.freeze or hparams.layer_decay or self.base_sha256) and self.trainer.is_global_zero:
            frozen = sum(p.numel() for p in self.parameters() if not p.requires_grad)
            print_parameter_groups(self.trainer.optimizers[0].param_groups, frozen)

    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        shards = distributed.shards(len(batch.images))
        image_BD, text_BD = self._encode(batch, shards)
        self._no_pairs = shards.total == 0
        if self._no_pairs:
            return self._zero(image_BD, text_BD)
        loss, hits = self._loss(batch, image_BD, text_BD, shards)
        self._log_step("train/in_batch_accuracy", hits * shards.world / shards.total, batch)
        self.log("train/in_batch_chance", 1 / shards.total, batch_size=len(batch.images))
        if self._distill and self._teacher:
            parts, scale = self._parts(batch, shards), self.model.logit_scale.exp()
            distillation = self._teacher.loss(parts, image_BD, text_BD, scale, shards)
            self._log_step("train/distillation_loss", distillation, batch)
            loss = loss + self._distill.weight * distillation
        self._log_step("train/loss", loss, batch, prog_bar=True)
        self.log("train/logit_scale", self.model.logit_scale.exp(), batch_size=len(batch.images))
        self._finite.observe(batch.keys, image_BD, text_BD, loss)
        return loss

    def _zero(self, image_BD: Tensor, text_BD: Tensor) -> Tensor:
        """The loss of a batch of which all samples on all ranks were skipped: DDP and FSDP want a backward pass."""
        zero = (image_BD.sum() + text_BD.sum()) * self.model.logit_scale
        return zero if self.model.logit_bias is None else zero * self.model.logit_bias

    def _log_step(self, name: str, value: Tensor, batch: CaptionBatch, prog_bar: bool = False) -> None:
        """Log the mean over ranks."""
        self.log(name, value, prog_bar=prog_bar, batch_size=len(batch.images), sync_dist=True)

    def _parts(self, batch: CaptionBatch, shards: distributed.Shards) -> list[CaptionBatch]:
        """What is encoded at a time; on every rank as many parts as on that with the most pairs."""
        hparams: Any = self.hparams
        most = max(1, *shards.counts)
        parts = math.ceil(most / (hparams.micro_batch_size or most))
        whole = batch if len(batch.images) else self._blank(batch)
        return whole.stretched(2 * parts if batch.skipped else parts).split(parts)  # BatchNorm may want two pairs

    def _blank(self, batch: CaptionBatch) -> CaptionBatch:
        """What a rank encodes whose samples were all skipped; nobody looks at the features.

        Ranks work together in the backward pass, and with FSDP in the forward pass too.
        """
        tokens = self.model.tokenizer.trim(self.model.tokenizer(["a"])).to(batch.tokens.device)
        images = batch.images.new_zeros(1, *batch.images.shape[1:])
        return CaptionBatch(images, tokens, [""], ["a"], [""])

    def _encode(self, batch: CaptionBatch, shards: distributed.Shards) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, part by part if there are several, without keeping a part's activations.

        Each part is one checkpointed segment of one graph: DDP synchronises once, after the last of them.
        """
        parts, pairs = self._parts(batch, shards), len(batch.images)
        if sum(len(part.images) for part in parts) == pairs:
            return self._encode_parts(parts)
        with StatisticsKept([layer for layer in self.modules() if isinstance(layer, _BatchNorm)]):
            image_BD, text_BD = self._encode_parts(parts)
        return image_BD[:pairs], text_BD[:pairs]

    def _encode_parts(self, parts: list[CaptionBatch]) -> tuple[Tensor, Tensor]:
        if len(parts) == 1:
            return self(parts[0])
        features = []
        for part in parts:
            # Else all parts share one copy of the weights in half precision, and add up their gradients in it.
            torch.clear_autocast_cache()
            image_BD = checkpoint(self._encode_images, part.images, inside=self.model.visual)
            text_BD = checkpoint(self._encode_tokens, part.tokens, part.lengths, inside=self.model.text_encoder)
            features.append((image_BD, text_BD))
        images, texts = zip(*features, strict=True)
        return torch.cat(images), torch.cat(texts)

    def _loss(self, batch: CaptionBatch, image_BD: Tensor, text_BD: Tensor, shards: distributed.Shards) -> ShardedLoss:
        hparams: Any = self.hparams
        ids_BK = None
        if hparams.duplicates != "negatives":
            ids_BK = pair_ids(batch.keys, batch.tokens, self.model.tokenizer.pad_id, batch.groups)
        plan = PairLayout(shards, ids_BK, hparams.duplicates, hparams.ring_loss)
        scale, bias = self.model.logit_scale.exp(), self.model.logit_bias
        if bias is None:
            return sharded_contrastive_loss(image_BD, text_BD, scale, plan)
        return sharded_sigmoid_loss(image_BD, text_BD, scale, bias, plan)

    def on_train_batch_start(self, batch: CaptionBatch, batch_idx: int) -> None:
        self._finite.before_step()

    def on_after_backward(self) -> None:
        if self.base_sha256 and self.global_step == 0:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and parameter.grad is None and parameter.numel():  # a shard may be empty
                    raise InputError(
                        f"model.lora: {name} has no effect, its layer is never called; see model.lora.targets"
                    )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._finite.check(self)
        if self._no_pairs:  # AdamW would move the weights by what it remembers
            self._finite.leave_out(self)
        if self._finite.policy == "skip":
            self.log("train/non_finite_steps", float(self._finite.steps))

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if not self._finite.left_out:  # nothing to clip, and clipping by value wants something
            super().configure_gradient_clipping(*args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here and not in on_train_batch_end: callbacks' hooks come before that, and one of them saves the checkpoint.
        self.model.clamp_logit_scale()

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation()

    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> Features:
        tokenizer = self.model.tokenizer  # hashed first: afterwards it would wait for the encoders
        hashes = token_hashes(batch.tokens, tokenizer.context_length, tokenizer.pad_id)
        features = self.predict_step(batch, batch_idx)
        self._validated.add(features["image"], features["text"], batch.keys, hashes)
        return features

    def on_validation_epoch_end(self) -> None:
        self._log_retrieval("val")

    def on_test_epoch_start(self) -> None:
        self._start_evaluation()

    def _start_evaluation(self) -> None:
        self._validated = RetrievalSet()
        model = self.trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            # DDP would do this in a rank's first batch, and wait for ranks that have none.
            distributed.same_buffers(self.model)
            model.require_forward_param_sync = False

    def test_step(self, batch: CaptionBatch, batch_idx: int) -> Features:
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_retrieval("test")

    def predict_step(self, batch: CaptionBatch, batch_idx: int) -> Features:
        if len(batch.images):
            image_BD, text_BD = self(batch)
        else:
            image_BD, text_BD = (features[:0] for features in self(self._blank(batch)))
        return Features(image=image_BD, text=text_BD, tokens=batch.tokens, keys=batch.keys)

    def _log_retrieval(self, prefix: str) -> None:
        """Loss and retrieval over the whole set: the same for any batch size and number of ranks."""
        scale = self.model.logit_scale.exp()
        empty = at_least_float32(scale.new_zeros(0, self.model.config.embed_dim))  # as features are
        evaluation = self._validated.evaluate(empty, scale, self.model.logit_bias)
        for name, value in evaluation.metrics.items():
            # Already over all ranks: Lightning's own means would weigh ranks and batches of unequal size wrongly.
            self.log(f"{prefix}/{name}", value, prog_bar=name == "loss" or name.endswith("recall@1"))
        self.baselines |= {f"{prefix}/{name}": value for name, value in evaluation.baselines.items()}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """As they were when ``fit`` began: in FSDP's shards a weight has one dimension, as gains and biases have."""
        if self._groups is not None:
            return [{**group, "params": list(group["params"])} for group in self._groups]
        hparams: Any = self.hparams
        layers = learning_rate_factors(self.model, self._layer_decay)
        return parameter_groups(layers, hparams.learning_rate, hparams.weight_decay)

    def configure_optimizers(self) -> Any:
        hparams: Any = self.hparams
        optimizer = adamw(self._parameter_groups(), hparams.betas, hparams.eps, self.trainer)
        total, warmup = total_steps(self.trainer), hparams.warmup_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state: Mapping[str, Any] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key.removeprefix(PREFIX): value for key, value in state.items()}
        checkpoint["before"] = dict(self.before)
        checkpoint["non_finite_steps"] = self._finite.steps
        checkpoint["random_states"] = distributed.gather_objects([random_states()])
        checkpoint |= saved_tokenizer(self.model)
        if self.base_sha256:
            hparams: Any = self.hparams
            checkpoint["base"] = {"pretrained": hparams.pretrained, "sha256": self.base_sha256}
            for states in STATES & checkpoint.keys():
                checkpoint[states] = {key: value for key, value in checkpoint[states].items() if is_added(key)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        name = (self._trainer and self._trainer.ckpt_path) or "the checkpoint"
        check_architecture(checkpoint, self.model.config, name)
        if self.base_sha256:
            check_base(checkpoint, self.base_sha256, name)
            for states, ours in (("state_dict", self.model.state_dict()), ("current_model_state", self.state_dict())):
                if states in checkpoint:
                    checkpoint[states] = {**ours, **checkpoint[states]}
        state: Mapping[str, Any] = checkpoint["state_dict"]
        check_weights(self.model, state, name)
        checkpoint["state_dict"] = {PREFIX + key: value for key, value in state.items()}
        self.before = dict(checkpoint.get("before", {}))
        self._finite.steps = checkpoint.get("non_finite_steps", 0)
        self.model._tokenizer = checkpoint_tokenizer(checkpoint, self.model.config) or self.model._tokenizer
        if checkpoint.get("weights") == EMA_WEIGHTS:
            rank_zero_info(f"{name}: these weights are the exponential moving average, not those of the last step")
        if self._trainer and self._trainer.state.fn == TrainerFn.FITTING:
            require(
                "optimizer_states" in checkpoint,
                f"{name}: holds weights alone and cannot be gone on from; start from it with --model.pretrained",
            )
            hparams: Any = self.hparams
            keep_what_was_typed(checkpoint, self._parameter_groups(), hparams.betas, hparams.eps, str(name))
            self._random_states = checkpoint.get("random_states", [])


def _made(kind: type[Made], value: Made | Mapping[str, Any] | None) -> Made | None:
    """Options as an object: a checkpoint holds them as plain values."""
    return kind(**value) if isinstance(value, Mapping) else value
