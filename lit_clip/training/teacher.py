"""A teacher: any model that can be loaded, whose choices among the batch a student learns to make too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from lit_clip.batch import CaptionBatch
from lit_clip.distributed import Shards
from lit_clip.errors import InputError, require
from lit_clip.losses.distillation import Choices, blockwise_distillation
from lit_clip.models.config import height_width
from lit_clip.weights.load import load_model


@dataclass
class Distill:
    """What else is learnt beside which caption goes with which image.

    Attributes:
        teacher: whatever :func:`lit_clip.load_model` opens.
        weight: of the distillation loss; the contrastive one has weight 1.
    """

    teacher: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"model.distill: weight {self.weight} must be at least 0")


class Teacher:
    """A frozen model with its own tokenizer and preprocessing.

    Not a module, so that it is never among a student's parameters, in its checkpoints or in a copy of it.

    Args:
        name: whatever :func:`lit_clip.load_model` opens.
    """

    def __init__(self, name: str) -> None:
        self.model = load_model(name).requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self

    @torch.no_grad()
    def features(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        """Unit features ``[B, D]`` of images and captions.

        The student's pixels are resized to the teacher's size.

        Raises:
            InputError: the batch has no captions.
        """
        if len(batch.captions) != len(batch.images):
            raise InputError("model.distill: the data module's batches hold no captions for the teacher to read")
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
        """How far a student's choices are from the teacher's: a scalar whose mean over ranks is that of all pairs.

        Args:
            parts: this rank's pairs, as many of them read at a time.
            image_BD: the student's unit features of their images; what ``parts`` have more is left out.
            text_BD: likewise of their captions.
            scale: the student's inverse temperature.
            shards: the pairs of each rank.
        """
        theirs = [self.features(part) for part in parts]
        image, text = (torch.cat(features)[: len(image_BD)] for features in zip(*theirs, strict=True))
        return blockwise_distillation(Choices(image_BD, text_BD, scale), Choices(image, text, self.scale), shards)
