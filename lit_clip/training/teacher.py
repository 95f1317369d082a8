"""A teacher: any model that can be loaded, whose choices among the batch a student learns to make too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2 import functional as TF

from lit_clip.batch import CaptionBatch
from lit_clip.distributed import Shards, gather
from lit_clip.errors import InputError, require
from lit_clip.losses.contrastive import distillation_loss, two_way_logits
from lit_clip.models.config import height_width
from lit_clip.weights.load import load_model

LOGITS = 2**22  # of a model that exist at one time


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


class Choices(NamedTuple):
    """What a model's logits come from: unit features ``[B, D]`` of this rank's pairs and the inverse temperature."""

    image: Tensor
    text: Tensor
    scale: Tensor

    def logits(self, rows: slice, all_image_ND: Tensor, all_text_ND: Tensor) -> Tensor:
        """``[2b, N]``: of some pairs among those of all ranks."""
        return two_way_logits(self.image[rows], self.text[rows], all_image_ND, all_text_ND, self.scale)


def blockwise_distillation(ours: Choices, theirs: Choices, shards: Shards) -> Tensor:
    """:func:`lit_clip.losses.contrastive.distillation_loss` among all ranks' pairs, without all logits at one time.

    The logits of some rows at a time are computed, and once more in the backward pass. The mean over ranks is the loss
    of all pairs, and so is its gradient.

    Args:
        ours: the student's.
        theirs: the teacher's, without gradients.
        shards: the pairs of each rank.
    """
    pairs = len(ours.image)
    candidates = [gather(features, shards) for features in (ours.image, ours.text, theirs.image, theirs.text)]

    def summed(rows: slice, *features_ND: Tensor) -> Tensor:
        student_QN, teacher_QN = ours.logits(rows, *features_ND[:2]), theirs.logits(rows, *features_ND[2:])
        return distillation_loss(student_QN, teacher_QN) * (len(student_QN) / 2)

    total = ours.logits(slice(0), *candidates[:2]).sum()  # 0: a rank without pairs takes part in the backward pass
    height = max(1, LOGITS // (2 * shards.total))
    for start in range(0, pairs, height):
        rows = slice(start, min(start + height, pairs))
        total = total + checkpoint(summed, rows, *candidates, use_reentrant=False, preserve_rng_state=False)
    return total / max(1, pairs) * shards.weight
