"""A contrastive loss over places of images, for features that show where something is."""

import torch
from torch import Tensor

from lit_clip.distributed import gather
from lit_clip.errors import InputError, require
from lit_clip.losses.contrastive import unit
from lit_clip.losses.loss import Loss, Pairs
from lit_clip.losses.places import place_similarities, similarity_loss
from lit_clip.models.clip import CLIP
from lit_clip.models.evaluation_mode import evaluation_mode
from lit_clip.models.size import height_width
from lit_clip.training.encode_again import encode_again


class PlaceContrastive(Loss):
    """Symmetric softmax loss in which an image is as similar to a text as its most similar places.

    The similarity is the soft maximum of the cosines of the image's places (:meth:`lit_clip.CLIP.encode_patches`) with
    the text, after FILIP (Yao et al. 2021). Duplicates are ignored. Use it beside :class:`lit_clip.losses.Contrastive`,
    with :class:`lit_clip.losses.Sum`. Images are encoded a second time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model: tuple[CLIP] | None = None  # not a part: its parameters are the module's

    def prepare(self, model: CLIP) -> None:
        trained = any(parameter.requires_grad for parameter in model.visual.parameters())
        require(
            trained, "model.loss: PlaceContrastive trains the image encoder, which is frozen; leave one of them out"
        )
        bands, size = model.preprocessing.bands, height_width(model.preprocessing.image_size)
        blank = torch.zeros(1, bands, *size, dtype=torch.uint8)
        try:
            with torch.no_grad(), evaluation_mode(model.visual):
                model.encode_patches(model.normalize(blank.to(model.device)))
        except InputError as error:
            raise InputError(f"model.loss: PlaceContrastive needs features of places; {error}") from error
        self.model = (model,)

    def forward(self, pairs: Pairs) -> Tensor:
        assert self.model is not None, "call prepare first"
        (model,) = self.model
        image_of = pairs.batch.image_of
        several = "model.loss: PlaceContrastive reads one image of a pair; set data.images.per_thing to one or all"
        require(image_of is None or image_of.ndim == 1, several)
        places = pairs.batch.of_pairs(encode_again(model, _places, [part.images for part in pairs.parts]))
        ids_B3 = pairs.ids()
        all_text_ND, all_ids_N3 = gather(pairs.text, pairs.ranks), gather(ids_B3, pairs.ranks)
        same_BN = (ids_B3[:, None] == all_ids_N3).any(dim=-1)
        D = pairs.text.shape[1]  # Matryoshka's have fewer channels
        with torch.autocast(pairs.text.device.type, enabled=False):
            similarities_BN = place_similarities(unit(places[..., :D]), all_text_ND)
            return similarity_loss(pairs.scale * similarities_BN, same_BN, pairs.ranks)


def _places(model: CLIP, images: Tensor) -> Tensor:
    """Encode images of a micro-batch -> features ``[b, P, D]`` of their places."""
    return model.encode_patches(model.normalize(images)).flatten(2).transpose(1, 2)
