"""Distillation from a teacher: any model that can be loaded."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from lit_clip.batch import CaptionBatch
from lit_clip.errors import require
from lit_clip.losses.distillation import ModelFeatures, blockwise_distillation, feature_distance
from lit_clip.losses.loss import Loss, Pairs
from lit_clip.models.config import height_width
from lit_clip.weights.load import load_model


class Teacher:
    """A frozen model with its own tokenizer, image size and normalisation; it sees the student's augmented images.

    Not a module, so that it is never part of a student's parameters, checkpoints or copies.
    """

    def __init__(self, name: str) -> None:
        self.model = load_model(name).requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self

    @torch.no_grad()
    def features(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        """Return unit features ``[B, D]`` of images and captions; images are resized to the teacher's size."""
        captioned = len(batch.captions) == len(batch.images)
        require(captioned, "model.loss: the teacher needs captions, and the data module's batches have none")
        model = self.model.to(batch.images.device)
        images, size_HW = batch.images, list(height_width(model.preprocessing.image_size))
        ours = model.preprocessing.patch_size
        if images.ndim == 3 or ours is not None:
            same = images.ndim == 3 and ours is not None and images.shape[2] == 3 * ours**2
            require(same, "model.loss: a teacher and its student must both read NaFlex's patches, or neither")
        elif list(images.shape[-2:]) != size_HW:
            images = TF.resize(images, size_HW, TF.InterpolationMode.BICUBIC, antialias=True)
        tokens = model.tokenizer.trim(model.tokenize(batch.captions)).to(images.device)
        return model.encode_image(model.normalize(images), normalize=True), model.encode_text(tokens, normalize=True)


Kind = Literal["probabilities", "features"]


class Distillation(Loss):
    """Distance to a teacher, which the model learns from or, if that is the model before training, stays close to.

    Use it beside another loss, with :class:`lit_clip.losses.Sum`. The teacher keeps its own preprocessing and
    tokenizer; it is loaded when training starts, and in no checkpoint.

    Args:
        teacher: anything :func:`lit_clip.load_model` opens.
        of: ``probabilities``: cross-entropy between the teacher's and the model's over the batch's images and captions;
            ``features``: squared distance of unit features, which must have the same number of channels.
    """

    def __init__(self, teacher: str, of: Kind = "probabilities") -> None:
        super().__init__()
        require(of in get_args(Kind), f"model.loss: Distillation.of {of!r} must be 'probabilities' or 'features'")
        self.teacher, self.of = str(teacher), of
        self.loaded: Teacher | None = None

    def prepare(self, model: Any) -> None:
        if self.loaded is None:
            self.loaded = Teacher(self.teacher)
        ours, theirs = model.config.embed_dim, self.loaded.model.config.embed_dim
        differ = f"model.loss: Distillation.of features: {self.teacher} has {theirs} channels and the model {ours}"
        require(self.of != "features" or ours == theirs, f"{differ}; leave it at probabilities")

    def forward(self, pairs: Pairs) -> Tensor:
        assert self.loaded is not None, "call prepare first"
        features = [self.loaded.features(part) for part in pairs.parts]
        image, text = (torch.cat(rows)[: len(pairs.image)] for rows in zip(*features, strict=True))
        if self.of == "features":
            return feature_distance((pairs.image, pairs.text), (image, text), pairs.ranks)
        student = ModelFeatures(pairs.image, pairs.text, pairs.scale)
        return blockwise_distillation(
            student, ModelFeatures(image, text, self.loaded.model.logit_scale.exp()), pairs.ranks
        )

    def chance_loss(self, pairs: int) -> float:
        """Return log N, the cross-entropy if all candidates seem equal; distances of features say nothing of pairs."""
        return math.log(pairs) if self.of == "probabilities" else 0.0
