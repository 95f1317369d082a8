"""A contrastive loss over places of images, for features that show where something is.

Shapes: B images of this rank, N texts of all ranks, P places of an image, D embedding dimension.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_clip.distributed import RankCounts, gather
from lit_clip.errors import InputError, require
from lit_clip.losses.contrastive import unit
from lit_clip.losses.loss import Loss, Pairs
from lit_clip.models.clip import CLIP
from lit_clip.models.running import evaluation_mode
from lit_clip.models.size import height_width
from lit_clip.training.encode_again import EncodesAgain

SHARPNESS = 20.0  # of the soft maximum; between the mean of the cosines (0) and the highest (infinity)
COSINES = 2**24  # most cosines of places and texts that exist at once


def place_similarities(places_BPD: Tensor, text_ND: Tensor) -> Tensor:
    """Return soft maxima over an image's places of their cosines with texts, ``[B, N]``, from unit features.

    Computed for a block of images at a time, and again in the backward pass.
    """
    rows = max(1, COSINES // (places_BPD.shape[1] * len(text_ND)))
    blocks = places_BPD.split(rows)
    return torch.cat([checkpoint(_soft_maxima, block, text_ND, use_reentrant=False) for block in blocks])


def _soft_maxima(places_BPD: Tensor, text_ND: Tensor) -> Tensor:
    cosines_BPN = places_BPD @ text_ND.T
    return ((SHARPNESS * cosines_BPN).logsumexp(dim=1) - math.log(places_BPD.shape[1])) / SHARPNESS


def similarity_loss(logits_BN: Tensor, same_BN: Tensor, ranks: RankCounts) -> Tensor:
    """Symmetric softmax loss of any logits of this rank's images with all ranks' texts; duplicates are ignored.

    The mean over ranks is the loss of all pairs, and so is its gradient.

    Args:
        logits_BN: in the order of the pairs.
        same_BN: bool, True where two pairs are duplicates, the pair itself included.
        ranks: number of pairs of each rank.
    """
    columns = torch.arange(ranks.total, device=logits_BN.device)
    own_BN = columns == columns[ranks.mine, None]
    logits_BN = logits_BN.masked_fill(same_BN & ~own_BN, -math.inf)
    own_B = logits_BN[:, ranks.mine].diagonal()
    images = logits_BN.logsumexp(dim=1) - own_B
    of_ranks = gather(logits_BN.logsumexp(dim=0)[None], RankCounts(ranks.rank, (1,) * ranks.world))  # [ranks, N]
    texts = of_ranks.logsumexp(dim=0)[ranks.mine] - own_B
    return (images + texts).sum() * ranks.world / (2 * ranks.total)


class PlaceContrastive(EncodesAgain, Loss):
    """Symmetric softmax loss in which an image is as similar to a text as its most similar places.

    The similarity is the soft maximum of the cosines of the image's places (:meth:`lit_clip.CLIP.encode_patches`) with
    the text, after FILIP (Yao et al. 2021). Duplicates are ignored. Use it beside :class:`lit_clip.losses.Contrastive`,
    with :class:`lit_clip.losses.Sum`. Images are encoded a second time.
    """

    def prepare(self, model: CLIP) -> None:
        self.require_trained_images(model)
        bands, size = model.preprocessing.bands, height_width(model.preprocessing.image_size)
        blank = torch.zeros(1, bands, *size, dtype=torch.uint8)
        try:
            with torch.no_grad(), evaluation_mode(model.visual):
                model.encode_patches(model.normalize(blank.to(model.device)))
        except InputError as error:
            raise InputError(f"model.loss: PlaceContrastive needs features of places; {error}") from error
        super().prepare(model)

    def forward(self, pairs: Pairs) -> Tensor:
        image_of = pairs.batch.image_of
        several = "model.loss: PlaceContrastive reads one image of a pair; set data.images.per_thing to one or all"
        require(image_of is None or image_of.ndim == 1, several)
        places = pairs.batch.of_pairs(self.encode(_places, [part.images for part in pairs.parts]))
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
