"""Distillation from a teacher: any model that can be loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from lit_clip.batch import CaptionBatch
from lit_clip.distributed import Shards
from lit_clip.errors import InputError, require
from lit_clip.losses.distillation import ModelFeatures, blockwise_distillation
from lit_clip.models.config import height_width
from lit_clip.weights.load import load_model


@dataclass
class Distill:
    """Settings of distillation.

    Attributes:
        teacher: anything :func:`lit_clip.load_model` opens.
        weight: of the distillation loss; the contrastive loss has weight 1.
    """

    teacher: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"model.distill.weight: {self.weight} must be at least 0")


class Teacher:
    """A frozen model with its own tokenizer, image size and normalisation; it sees the student's augmented images.

    Not a module, so that it is never part of a student's parameters, checkpoints or copies.

    Args:
        name: anything :func:`lit_clip.load_model` opens.
    """

    def __init__(self, name: str) -> None:
        self.model = load_model(name).requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self

    @torch.no_grad()
    def features(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        """Return unit features ``[B, D]`` of images and captions; images are resized to the teacher's size.

        Raises:
            InputError: the batch has no captions.
        """
        if len(batch.captions) != len(batch.images):
            raise InputError("model.distill: the teacher needs captions, and the data module's batches have none")
        model = self.model.to(batch.images.device)
        images, size_HW = batch.images, list(height_width(model.preprocessing.image_size))
        if list(images.shape[-2:]) != size_HW:
            images = TF.resize(images, size_HW, TF.InterpolationMode.BICUBIC, antialias=True)
        tokens = model.tokenizer.trim(model.tokenize(batch.captions)).to(images.device)
        return (
            model.encode_image(model.normalize(images), normalize=True),
            model.encode_text(tokens, normalize=True),
        )

    @property
    def scale(self) -> Tensor:
        """The teacher's inverse temperature."""
        return self.model.logit_scale.exp()

    def loss(
        self, parts: Sequence[CaptionBatch], image_BD: Tensor, text_BD: Tensor, scale: Tensor, shards: Shards
    ) -> Tensor:
        """Return the distillation loss, a scalar whose mean over ranks is the loss of all pairs.

        Args:
            parts: this rank's micro-batches; pairs beyond the student's B are ignored.
            image_BD: the student's unit features of the images.
            text_BD: the student's unit features of the captions.
            scale: the student's inverse temperature.
            shards: number of pairs of each rank.
        """
        features = [self.features(part) for part in parts]
        image, text = (torch.cat(rows)[: len(image_BD)] for rows in zip(*features, strict=True))
        return blockwise_distillation(
            ModelFeatures(image_BD, text_BD, scale), ModelFeatures(image, text, self.scale), shards
        )
