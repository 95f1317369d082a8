"""The LightningModule: what happens in a step, and what a checkpoint holds."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_clip import collectives
from lit_clip.batch import CaptionBatch
from lit_clip.config import CLIPConfig, Preprocessing, resolve_architecture
from lit_clip.errors import require
from lit_clip.losses import contrastive_loss
from lit_clip.metrics import first_occurrences, guessing_recalls, identities, retrieval_hits, whole_set_loss
from lit_clip.optim import decay_groups, total_steps, warmup_cosine
from lit_clip.tokenizer import Tokenize
from lit_clip.weights import check_architecture, check_weights, create_model

RECALL_AT = (1, 5, 10)
PREFIX = "model."


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

    Args:
        architecture: a name from :func:`lit_clip.list_models`, or the sizes themselves.
        pretrained: a checkpoint to start from; it must be of this architecture.
        learning_rate: at the end of the warm-up (paper, table 20: 5e-4 for ViT-B at 32,768 pairs a step).
        weight_decay: on weights, not on gains and biases (table 18).
        betas: of AdamW (table 18, ViT).
        eps: of AdamW (table 18, ViT).
        warmup_steps: optimiser steps of linear warm-up before the cosine (table 18: 2,000).

    Attributes:
        baselines: for a logged metric what guessing reaches, filled by whoever logs the metric.
    """

    def __init__(
        self,
        architecture: str | CLIPConfig = "ViT-B-32",
        pretrained: str | os.PathLike[str] | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.2,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        warmup_steps: int = 2000,
    ) -> None:
        super().__init__()
        config = resolve_architecture(architecture)
        for name, value in (
            ("learning_rate", learning_rate),
            ("weight_decay", weight_decay),
            ("warmup_steps", warmup_steps),
        ):
            require(value >= 0, f"model.{name}: {value} must be at least 0")
        require(all(0 <= beta < 1 for beta in betas), f"model.betas: {list(betas)} must be at least 0 and below 1")
        require(eps > 0, f"model.eps: {eps} must be above 0")
        self.save_hyperparameters(  # plain values only: a checkpoint must load with weights_only=True
            {
                "architecture": dataclasses.asdict(config),
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "betas": list(betas),
                "eps": eps,
                "warmup_steps": warmup_steps,
            }
        )
        self.model = create_model(config, pretrained)
        self.baselines: dict[str, float] = {}
        self._validated: list[Features] = []

    # What the data modules are told, so that nothing has to be written twice in a YAML file.

    @property
    def preprocessing(self) -> Preprocessing:
        """How the model wants its pictures."""
        return self.model.preprocessing

    @property
    def tokenize(self) -> Tokenize:
        """Texts -> int64 ``[N, context_length]``, picklable for data workers."""
        return self.model.tokenizer

    def forward(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        """Unit features ``[B, D]`` of images and captions, float32."""
        image_BD = self.model.encode_image(self.model.normalize(batch.images), normalize=True)
        text_BD = self.model.encode_text(batch.tokens, normalize=True)
        return image_BD, text_BD

    def on_fit_start(self) -> None:
        batches = self.trainer.accumulate_grad_batches
        require(
            batches == 1,
            f"trainer.accumulate_grad_batches: {batches} adds no negatives, and they are what a "
            "larger batch is for; raise data.init_args.batch_size or the number of devices instead",
        )

    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        image_BD, text_BD = self(batch)
        all_image_ND, all_text_ND = collectives.gather(image_BD), collectives.gather(text_BD)
        scale = self.model.logit_scale.exp()
        first_row = collectives.rank_and_world()[0] * len(image_BD)
        loss = contrastive_loss(image_BD, text_BD, all_image_ND, all_text_ND, scale, first_row)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.images), sync_dist=True)
        self.log("train/logit_scale", scale, batch_size=len(batch.images))
        return loss

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
        pairs = _join(self._validated, self.model.config.embed_dim, self.model.context_length, self.device)
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
        loss = whole_set_loss(image, text, self.model.logit_scale.exp(), range(N)[mine])
        loss, *recalls = collectives.sum_over_ranks(torch.cat([loss[None], to_text, to_image]), self.device).tolist()
        self.log(f"{prefix}/loss", loss / N, prog_bar=True)
        guesses = guessing_recalls(ids, RECALL_AT)
        for i, (direction, queries) in enumerate((("image_to_text", images), ("text_to_image", N))):
            hits = recalls[i * len(RECALL_AT) : (i + 1) * len(RECALL_AT)]
            for k, hit, guess in zip(RECALL_AT, hits, guesses[i], strict=True):
                name = f"{prefix}/{direction}_recall@{k}"
                self.log(name, hit / queries, prog_bar=k == 1)
                self.baselines[name] = guess

    def configure_optimizers(self) -> Any:
        hparams: Any = self.hparams
        optimizer = torch.optim.AdamW(
            decay_groups(self.model, hparams.weight_decay),
            lr=hparams.learning_rate,
            betas=tuple(hparams.betas),
            eps=hparams.eps,
            fused=self.trainer.precision != "16-mixed",  # a fused step would leave the gradients scaled for all others
        )
        total, warmup = total_steps(self.trainer), hparams.warmup_steps
        if warmup >= total:
            rank_zero_warn(f"the run has {total} steps and warm-up takes {warmup}: set --model.warmup_steps lower")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state: Mapping[str, Any] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key.removeprefix(PREFIX): value for key, value in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        name = (self._trainer and self._trainer.ckpt_path) or "the checkpoint"
        check_architecture(checkpoint, self.model.config, name)
        state: Mapping[str, Any] = checkpoint["state_dict"]
        check_weights(self.model, state, name)
        checkpoint["state_dict"] = {PREFIX + key: value for key, value in state.items()}
        self._keep_what_was_typed(checkpoint)

    def _keep_what_was_typed(self, checkpoint: dict[str, Any]) -> None:
        """A resumed optimiser takes its moments from the checkpoint, its settings from this run's hyper-parameters."""
        hparams: Any = self.hparams
        settings = {"initial_lr": hparams.learning_rate, "betas": tuple(hparams.betas), "eps": hparams.eps}
        for optimizer in checkpoint.get("optimizer_states", []):
            for group, decay in zip(optimizer["param_groups"], (hparams.weight_decay, 0.0), strict=True):
                group["lr"] *= hparams.learning_rate / (group["initial_lr"] or 1.0)
                group.update(settings, weight_decay=decay)
        for schedule in checkpoint.get("lr_schedulers", []):
            schedule["base_lrs"] = [hparams.learning_rate] * len(schedule["base_lrs"])


def _share(size: int) -> slice:
    """This rank's part of ``size`` rows; over all ranks each row once."""
    rank, world = collectives.rank_and_world()
    return slice(size * rank // world, size * (rank + 1) // world)


def _join(batches: list[Features], embed_dim: int, context_length: int, device: torch.device) -> Features:
    """All batches of all ranks as one; a rank may have none."""

    def rows(parts: list[Tensor], like: Tensor) -> Tensor:
        return collectives.gather_uneven(torch.cat([like, *parts]))

    no_features = torch.zeros(0, embed_dim, device=device)
    no_tokens = torch.zeros(0, context_length, dtype=torch.long, device=device)
    tokens = [F.pad(batch["tokens"], (0, context_length - batch["tokens"].shape[1])) for batch in batches]
    return Features(
        image=rows([batch["image"] for batch in batches], no_features),
        text=rows([batch["text"] for batch in batches], no_features),
        tokens=rows(tokens, no_tokens),
        keys=collectives.gather_objects([key for batch in batches for key in batch["keys"]]),
    )
