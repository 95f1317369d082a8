"""The LightningModule: what happens in a step, and what a checkpoint holds."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Self, TypedDict, TypeVar

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_clip import collectives
from lit_clip.batch import CaptionBatch
from lit_clip.config import CLIPConfig, Preprocessing, Size
from lit_clip.distill import Distill, Teacher
from lit_clip.errors import InputError, require
from lit_clip.layers import Freeze, LayerDecay, frozen_modules, frozen_names, learning_rate_factors
from lit_clip.lora import LoRA, add_lora, base_name, check_base, is_added
from lit_clip.losses import contrastive_loss, distillation_loss, sigmoid_loss, two_way_logits
from lit_clip.metrics import first_occurrences, guessing_recalls, identities, retrieval_hits, whole_set_loss
from lit_clip.model import CLIP
from lit_clip.optim import parameter_groups, total_steps, warmup_cosine
from lit_clip.sources import EMA_WEIGHTS, checkpoint_tokenizer
from lit_clip.summary import print_parameter_groups
from lit_clip.tokenizer import TextTokenizer
from lit_clip.weights import check_architecture, check_weights, create_model, weights_sha256, whole_name

RECALL_AT = (1, 5, 10)
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

    Attributes:
        baselines: for a logged metric what guessing reaches, filled by whoever logs the metric.
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
    ) -> None:
        super().__init__()
        freeze, lora, distill = _made(Freeze, freeze), _made(LoRA, lora), _made(Distill, distill)
        if isinstance(layer_decay, int | float):
            layer_decay = LayerDecay(layer_decay, layer_decay)
        self._layer_decay = _made(LayerDecay, layer_decay)
        _check_optimizer(learning_rate, weight_decay, warmup_steps, betas, eps)
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
                "lora": lora and dataclasses.asdict(lora),
                # What a LoRA belongs to, and what was made of it; any other checkpoint has it all.
                "pretrained": base_name(whole_name(architecture, pretrained)) if lora and pretrained else None,
                "image_size": image_size if lora else None,
                "context_length": context_length if lora else None,
            }
        )
        for name in frozen_names(self.model, freeze or Freeze()):
            self.model.get_parameter(name).requires_grad_(False)
        self.base_sha256 = ""
        if lora:
            require(pretrained is not None, "model.lora: adds to a trained model; set model.pretrained")
            self.base_sha256 = weights_sha256(self.model)
            add_lora(self.model, lora)
        self._frozen_modules = frozen_modules(self.model)
        self.train()
        self._distill, self._teacher = distill, None
        self.baselines: dict[str, float] = {}
        self.before: dict[str, float] = {}
        self._validated: list[Features] = []

    # What the data modules are told, so that nothing has to be written twice in a YAML file.

    @property
    def preprocessing(self) -> Preprocessing:
        """How the model wants its pictures."""
        return self.model.preprocessing

    @property
    def tokenize(self) -> TextTokenizer:
        """Texts -> int64 ``[N, context_length]``, picklable for data workers."""
        return self.model.tokenizer

    def forward(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        """Unit features ``[B, D]`` of images and captions, float32."""
        image_BD = self.model.encode_image(self.model.normalize(batch.images), normalize=True)
        text_BD = self.model.encode_text(batch.tokens, normalize=True)
        return image_BD, text_BD

    def train(self, mode: bool = True) -> Self:
        """As everywhere, but what is frozen stays in evaluation mode: statistics and dropout too."""
        super().train(mode)
        for module in self._frozen_modules:
            module.eval()
        return self

    def setup(self, stage: str) -> None:
        if stage == "fit" and self._distill and not self._teacher:
            self._teacher = Teacher(self._distill.teacher)

    def on_fit_start(self) -> None:
        batches = self.trainer.accumulate_grad_batches
        require(
            batches == 1,
            f"trainer.accumulate_grad_batches: {batches} adds no negatives, and they are what a "
            "larger batch is for; raise data.init_args.batch_size or the number of devices instead",
        )

    def on_train_start(self) -> None:
        hparams: Any = self.hparams
        if (hparams.freeze or hparams.layer_decay or self.base_sha256) and self.trainer.is_global_zero:
            frozen = sum(p.numel() for p in self.parameters() if not p.requires_grad)
            print_parameter_groups(self.trainer.optimizers[0].param_groups, frozen)

    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        image_BD, text_BD = self(batch)
        everyone = collectives.gather(image_BD), collectives.gather(text_BD)
        scale, bias = self.model.logit_scale.exp(), self.model.logit_bias
        first_row = collectives.rank_and_world()[0] * len(image_BD)
        if bias is None:
            loss = contrastive_loss(image_BD, text_BD, *everyone, scale, first_row)
        else:
            loss = sigmoid_loss(image_BD, everyone[1], scale, bias, first_row)
        if self._distill and self._teacher:
            image, text = self._teacher.features(batch)
            everyones = collectives.gather(image), collectives.gather(text)
            choices = two_way_logits(image, text, *everyones, self._teacher.scale)
            distillation = distillation_loss(two_way_logits(image_BD, text_BD, *everyone, scale), choices)
            self.log("train/distillation_loss", distillation, batch_size=len(batch.images), sync_dist=True)
            loss = loss + self._distill.weight * distillation
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.images), sync_dist=True)
        self.log("train/logit_scale", scale, batch_size=len(batch.images))
        return loss

    def on_after_backward(self) -> None:
        if self.base_sha256 and self.global_step == 0:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and parameter.grad is None:
                    raise InputError(
                        f"model.lora: {name} has no effect, its layer is never called; see model.lora.targets"
                    )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here and not in on_train_batch_end: callbacks' hooks come before that, and one of them saves the checkpoint.
        self.model.clamp_logit_scale()

    def on_validation_epoch_start(self) -> None:
        self._validated = []

    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> Features:
        features = self.predict_step(batch, batch_idx)
        self._validated.append(features)
        return features

    def on_validation_epoch_end(self) -> None:
        self._log_retrieval("val")

    def on_test_epoch_start(self) -> None:
        self._validated = []

    def test_step(self, batch: CaptionBatch, batch_idx: int) -> Features:
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_retrieval("test")

    def predict_step(self, batch: CaptionBatch, batch_idx: int) -> Features:
        image_BD, text_BD = self(batch)
        return Features(image=image_BD, text=text_BD, tokens=batch.tokens, keys=batch.keys)

    def _log_retrieval(self, prefix: str) -> None:
        """Loss and recall over the whole set: the same for any batch size and number of ranks."""
        tokenizer = self.model.tokenizer
        pairs = _join(self._validated, self.model.config.embed_dim, tokenizer, self.device)
        self._validated = []
        N = len(pairs["keys"])
        if N == 0:
            return
        image_ids, text_ids = identities(pairs["keys"]), pairs["tokens"].unique(dim=0, return_inverse=True)[1]
        ids = torch.stack([image_ids.to(self.device), text_ids], dim=1)  # [N, 2]
        first = first_occurrences(image_ids).to(self.device)  # an image with five captions asks once
        image, text, images = pairs["image"], pairs["text"], int(first.sum())
        mine, my_images = _share(N), _share(images)
        to_text = retrieval_hits(image[first][my_images], ids[first][my_images], text, ids, RECALL_AT, distinct=1)
        to_image = retrieval_hits(text[mine], ids[mine], image, ids, RECALL_AT, distinct=0)
        scale, bias = self.model.logit_scale.exp(), self.model.logit_bias
        loss = whole_set_loss(image, text, scale, range(N)[mine], bias)
        loss, *recalls = collectives.sum_over_ranks(torch.cat([loss[None], to_text, to_image]), self.device).tolist()
        self.log(f"{prefix}/loss", loss / N, prog_bar=True)
        guesses = guessing_recalls(ids, RECALL_AT)
        for i, (direction, queries) in enumerate((("image_to_text", images), ("text_to_image", N))):
            hits = recalls[i * len(RECALL_AT) : (i + 1) * len(RECALL_AT)]
            for k, hit, guess in zip(RECALL_AT, hits, guesses[i], strict=True):
                name = f"{prefix}/{direction}_recall@{k}"
                self.log(name, hit / queries, prog_bar=k == 1)
                self.baselines[name] = guess

    def _parameter_groups(self) -> list[dict[str, Any]]:
        hparams: Any = self.hparams
        layers = learning_rate_factors(self.model, self._layer_decay)
        return parameter_groups(layers, hparams.learning_rate, hparams.weight_decay)

    def configure_optimizers(self) -> Any:
        hparams: Any = self.hparams
        scaled = self.trainer.precision == "16-mixed"  # a fused step would leave the gradients scaled for all others
        # Lightning takes every fused step for one that scales, and refuses to clip.
        clipped = self.trainer.precision == "bf16-mixed" and bool(self.trainer.gradient_clip_val)
        optimizer = torch.optim.AdamW(
            self._parameter_groups(),
            betas=tuple(hparams.betas),
            eps=hparams.eps,
            fused=not (scaled or clipped),
        )
        total, warmup = total_steps(self.trainer), hparams.warmup_steps
        if warmup >= total:
            rank_zero_warn(f"the run has {total} steps and warm-up takes {warmup}: set --model.warmup_steps lower")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state: Mapping[str, Any] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key.removeprefix(PREFIX): value for key, value in state.items()}
        checkpoint["before"] = dict(self.before)
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
        self.model._tokenizer = checkpoint_tokenizer(checkpoint, self.model.config) or self.model._tokenizer
        if checkpoint.get("weights") == EMA_WEIGHTS:
            rank_zero_info(f"{name}: these weights are the exponential moving average, not those of the last step")
        if self._trainer and self._trainer.state.fn == TrainerFn.FITTING:
            require(
                "optimizer_states" in checkpoint,
                f"{name}: holds weights alone and cannot be gone on from; start from it with --model.pretrained",
            )
            self._keep_what_was_typed(checkpoint, str(name))

    def _keep_what_was_typed(self, checkpoint: dict[str, Any], name: str) -> None:
        """A resumed optimiser takes its moments from the checkpoint, its settings from this run's hyper-parameters."""
        hparams: Any = self.hparams
        ours = self._parameter_groups()
        rates = [group["lr"] for group in ours]
        for optimizer in checkpoint.get("optimizer_states", []):
            theirs = optimizer["param_groups"]
            if [_shape(group) for group in theirs] != [_shape(group) for group in ours]:
                raise InputError(f"{name}: resuming needs the model.freeze, layer_decay and lora that it was made with")
            for group, mine in zip(theirs, ours, strict=True):
                group["lr"] *= mine["lr"] / (group["initial_lr"] or 1.0)
                group |= {
                    "name": mine["name"],
                    "initial_lr": mine["lr"],
                    "weight_decay": mine["weight_decay"],
                    "betas": tuple(hparams.betas),
                    "eps": hparams.eps,
                }
        for schedule in checkpoint.get("lr_schedulers", []):
            schedule["base_lrs"] = rates


def saved_tokenizer(model: CLIP) -> dict[str, Any]:
    """What a checkpoint holds of a tokenizer that is not the paper's: its source may be gone later."""
    if model.config.text.tokenizer is None:
        return {}
    tokenizer: Any = model.tokenizer
    return {"tokenizer": {"definition": tokenizer.definition, "pad_id": tokenizer.pad_id}}


def _check_optimizer(
    learning_rate: float, weight_decay: float, warmup_steps: int, betas: tuple[float, float], eps: float
) -> None:
    settings = {"learning_rate": learning_rate, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
    for name, value in settings.items():
        require(value >= 0, f"model.{name}: {value} must be at least 0")
    require(all(0 <= beta < 1 for beta in betas), f"model.betas: {list(betas)} must be at least 0 and below 1")
    require(eps > 0, f"model.eps: {eps} must be above 0")


def _made(kind: type[Made], value: Made | Mapping[str, Any] | None) -> Made | None:
    """Options as an object: a checkpoint holds them as plain values."""
    return kind(**value) if isinstance(value, Mapping) else value


def _shape(group: dict[str, Any]) -> tuple[str, int]:
    """What tells an optimiser's parameter groups apart; those of older checkpoints have no name."""
    return group.get("name", "").partition(",")[0] or "all", len(group["params"])


def _share(size: int) -> slice:
    """This rank's part of ``size`` rows; over all ranks each row once."""
    rank, world = collectives.rank_and_world()
    return slice(size * rank // world, size * (rank + 1) // world)


def _join(batches: list[Features], embed_dim: int, tokenizer: TextTokenizer, device: torch.device) -> Features:
    """All batches of all ranks as one; a rank may have none."""

    def rows(parts: list[Tensor], like: Tensor) -> Tensor:
        return collectives.gather_uneven(torch.cat([like, *parts]))

    no_features = torch.zeros(0, embed_dim, device=device)
    length, pad = tokenizer.context_length, tokenizer.pad_id
    no_tokens = torch.zeros(0, length, dtype=torch.long, device=device)
    tokens = [F.pad(batch["tokens"], (0, length - batch["tokens"].shape[1]), value=pad) for batch in batches]
    return Features(
        image=rows([batch["image"] for batch in batches], no_features),
        text=rows([batch["text"] for batch in batches], no_features),
        tokens=rows(tokens, no_tokens),
        keys=collectives.gather_objects([key for batch in batches for key in batch["keys"]]),
    )
