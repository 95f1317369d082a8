"""A contrastive loss between images and other images of the same things."""

import math

from torch import Tensor

from lit_clip.errors import require
from lit_clip.losses.contrastive import unit
from lit_clip.losses.loss import Loss, Pairs
from lit_clip.losses.tiled import PairLayout, sharded_contrastive_loss
from lit_clip.models.clip import CLIP
from lit_clip.training.encode_again import EncodesAgain

NAME = "other_image"  # of the uint8 images in CaptionBatch.extra


class OtherImageContrastive(EncodesAgain, Loss):
    """Symmetric softmax loss between each image and its other image (``data.images.per_thing: two``).

    The other image is another photograph of the same thing, or the image augmented a second time (SLIP, Mu et al.
    2022). Duplicates are ignored. Use it beside :class:`lit_clip.losses.Contrastive`, with
    :class:`lit_clip.losses.Sum`.

    Args:
        texts: add the loss between the other images and the captions, for captions that are right for both images.
    """

    reads = (NAME,)

    def __init__(self, texts: bool = False) -> None:
        super().__init__()
        self.texts = texts

    def prepare(self, model: CLIP) -> None:
        self.require_trained_images(model)
        super().prepare(model)

    def forward(self, pairs: Pairs) -> Tensor:
        B, D = pairs.image.shape  # Matryoshka's have fewer channels
        there = not B or NAME in pairs.batch.extra
        none = "model.loss: OtherImageContrastive: the data have no other images; set data.images.per_thing to two"
        require(there, none)
        images = [part.extra.get(NAME, part.images) for part in pairs.parts]  # a placeholder has none
        other_BD = unit(self.encode(_encode, images)[:B, :D])
        layout = PairLayout(pairs.ranks, pairs.ids(), "ignored")
        loss = sharded_contrastive_loss(pairs.image, other_BD, pairs.scale, layout).loss
        if self.texts:
            loss = loss + sharded_contrastive_loss(other_BD, pairs.text, pairs.scale, layout).loss
        return loss

    def chance_loss(self, pairs: int) -> float:
        """Return log N for each of the losses."""
        return math.log(pairs) * (1 + self.texts)


def _encode(model: CLIP, images: Tensor) -> Tensor:
    return model.encode_image(model.normalize(images))
