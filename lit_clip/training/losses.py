"""Losses that encode more in a step than its pairs: other images of the same things, titles, places of images.

Shapes: B pairs of this rank, N texts of all ranks, P places of an image, D embedding dimension.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as computed_again

from lit_clip.distributed import RankCounts, gather
from lit_clip.errors import InputError, require
from lit_clip.losses.contrastive import unit
from lit_clip.losses.loss import Loss, LossValue, Pairs, evaluate_loss
from lit_clip.losses.tiled import PairLayout, sharded_contrastive_loss
from lit_clip.models.clip import CLIP
from lit_clip.models.running import evaluation_mode
from lit_clip.models.size import height_width
from lit_clip.training.activation_checkpointing import FrozenStatistics, checkpoint

OTHER_IMAGE, TITLE = "other_image", "title"  # of uint8 images and int64 tokens in CaptionBatch.extra
SPEED = 10  # Adam's steps have the size of the learning rate, which suits weights of layers: a logit needs larger ones
SHARPNESS = 20.0  # of the soft maximum; between the mean of the cosines (0) and the highest (infinity)
COSINES = 2**24  # most cosines of places and texts that exist at once


class EncodesAgain:
    """Part of a loss that encodes more than the step's pairs, or their images in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.model: tuple[CLIP] | None = None  # not a part: its parameters are the module's

    def prepare(self, model: CLIP) -> None:
        self.model = (model,)

    def require_trained_images(self, model: CLIP) -> None:
        """Raise :class:`InputError` if the image encoder is frozen."""
        trained = any(parameter.requires_grad for parameter in model.visual.parameters())
        frozen = f"model.loss: {type(self).__name__} trains the image encoder, which is frozen; leave one of them out"
        require(trained, frozen)

    def encode(self, encode: Callable[[CLIP, Tensor], Tensor], parts: Sequence[Tensor]) -> Tensor:
        """Encode micro-batches; BatchNorm's statistics stay, because they already include these images."""
        assert self.model is not None, "call prepare first"
        (model,) = self.model
        norms = [layer for layer in model.visual.modules() if isinstance(layer, _BatchNorm)]
        run = encode if len(parts) == 1 else partial(checkpoint, encode, inside=model.visual)
        found = []
        for part in parts:
            torch.clear_autocast_cache()  # as for micro-batches
            with FrozenStatistics(norms):
                found.append(run(model, part))
        return torch.cat(found)


class OtherImageContrastive(EncodesAgain, Loss):
    """Symmetric softmax loss between each image and its other image (``data.images.per_thing: two``).

    The other image is another photograph of the same thing, or the image augmented a second time (SLIP, Mu et al.
    2022). Duplicates are ignored. Use it beside :class:`lit_clip.losses.Contrastive`, with
    :class:`lit_clip.losses.Sum`.

    Args:
        texts: add the loss between the other images and the captions, for captions that are right for both images.
    """

    reads = (OTHER_IMAGE,)

    def __init__(self, texts: bool = False) -> None:
        super().__init__()
        self.texts = texts

    def prepare(self, model: CLIP) -> None:
        self.require_trained_images(model)
        super().prepare(model)

    def forward(self, pairs: Pairs) -> Tensor:
        B, D = pairs.image.shape  # Matryoshka's have fewer channels
        there = not B or OTHER_IMAGE in pairs.batch.extra
        none = "model.loss: OtherImageContrastive: the data have no other images; set data.images.per_thing to two"
        require(there, none)
        images = [part.extra.get(OTHER_IMAGE, part.images) for part in pairs.parts]  # a placeholder has none
        other_BD = unit(self.encode(_encode_images, images)[:B, :D])
        layout = PairLayout(pairs.ranks, pairs.ids(), "ignored")
        loss = sharded_contrastive_loss(pairs.image, other_BD, pairs.scale, layout).loss
        if self.texts:
            loss = loss + sharded_contrastive_loss(other_BD, pairs.text, pairs.scale, layout).loss
        return loss

    def chance_loss(self, pairs: int) -> float:
        """Return log N for each of the losses."""
        return math.log(pairs) * (1 + self.texts)


def _encode_images(model: CLIP, images: Tensor) -> Tensor:
    return model.encode_image(model.normalize(images))


class WithTitle(EncodesAgain, Loss):
    """Apply a loss with an image and its title as one vector, and captions as queries (``data.columns.title``).

    The vector is the sum of ``1 - w`` times the image's unit features and ``w`` times the title's, scaled to unit
    length, as ``lit-clip embed --fields image,caption --text_weight w`` writes it. ``w`` is learned, and logged as
    ``train/text_weight``. Duplicates are as in the inner loss. Titles are encoded in addition to the captions.

    Args:
        loss: the inner loss.
        text_weight: ``w`` at the start, above 0 and below 1.
    """

    reads = (TITLE,)

    def __init__(self, loss: Loss, text_weight: float = 0.5) -> None:
        super().__init__()
        within = 0 < text_weight < 1
        require(within, f"model.loss: WithTitle.text_weight {text_weight} must be above 0 and below 1")
        self.loss, self.text_weight = loss, text_weight
        self.logit = nn.Parameter(torch.tensor(math.log(text_weight / (1 - text_weight)) / SPEED))
        self.uses_negatives = loss.uses_negatives

    def prepare(self, model: CLIP) -> None:
        self.loss.prepare(model)
        super().prepare(model)

    def forward(self, pairs: Pairs) -> LossValue:
        B, D = pairs.image.shape  # Matryoshka's have fewer channels
        there = not B or TITLE in pairs.batch.extra
        require(there, "model.loss: WithTitle: the data have no titles; set data.columns.title")
        tokens = [part.extra.get(TITLE, part.tokens) for part in pairs.parts]  # a placeholder has none
        title_BD = unit(self.encode(CLIP.encode_text, tokens)[:B, :D])
        weight = torch.sigmoid(SPEED * self.logit)
        mixed_BD = unit(torch.lerp(pairs.image, title_BD, weight))
        value = evaluate_loss(self.loss, replace(pairs, image=mixed_BD))
        return value._replace(metrics={**value.metrics, "text_weight": weight.detach()})

    def chance_loss(self, pairs: int) -> float | None:
        return self.loss.chance_loss(pairs)


def place_similarities(places_BPD: Tensor, text_ND: Tensor) -> Tensor:
    """Return soft maxima over an image's places of their cosines with texts, ``[B, N]``, from unit features.

    Computed for a block of images at a time, and again in the backward pass.
    """
    rows = max(1, COSINES // (places_BPD.shape[1] * len(text_ND)))
    blocks = places_BPD.split(rows)
    return torch.cat([computed_again(_soft_maxima, block, text_ND, use_reentrant=False) for block in blocks])


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
