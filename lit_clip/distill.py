"""A teacher: any model that can be loaded, whose choices among the batch a student learns to make too."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from lit_clip.batch import CaptionBatch
from lit_clip.config import height_width
from lit_clip.errors import InputError, require
from lit_clip.weights import load_model


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
