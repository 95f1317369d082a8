"""Micro-batches: encode a step's pairs part by part while the loss sees all of them (GradCache, Gao et al. 2021)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.batch import CaptionBatch
from lit_clip.distributed import RankCounts
from lit_clip.errors import require
from lit_clip.losses.contrastive import unit
from lit_clip.losses.loss import Pairs
from lit_clip.losses.tiled import HardNegatives
from lit_clip.models.clip import CLIP
from lit_clip.models.frozen_prefix import image_features_from, text_features_from
from lit_clip.training.activation_checkpointing import FrozenStatistics, checkpoint
from lit_clip.training.even_batches import images_once, placeholder

HARD_NEGATIVES = (
    "FrozenFeatures: hard negatives are not among the captions that are encoded once; leave out "
    "data.columns.negative or the callback"
)


def encode_pairs(model: CLIP, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
    """Return unit features ``[B, D]`` of images and captions; evaluation encodes an image of several pairs once."""
    batch = batch if model.training else images_once(batch)
    image_BD = batch.of_pairs(encode_images(model, batch.images))
    return image_BD, encode_texts(model, batch.tokens, batch.lengths, batch.stored_texts)


def encode_images(model: CLIP, images: Tensor, normalize: bool = True) -> Tensor:
    """Return features ``[B, D]`` of a batch's images or stored activations, of unit length if ``normalize``."""
    stored = images.is_floating_point()
    features = image_features_from(model, images) if stored else model.encode_image(model.normalize(images))
    return unit(features) if normalize else features


def encode_texts(
    model: CLIP, tokens: Tensor, lengths: Sequence[int], stored: Tensor | None, normalize: bool = True
) -> Tensor:
    """Return features ``[B, D]`` of a batch's captions, of unit length if ``normalize``."""
    if stored is None:
        features = model.encode_text(tokens, lengths=lengths)
    else:
        features = text_features_from(model, stored, tokens, lengths)
    return unit(features) if normalize else features


class StepCounts(NamedTuple):
    """Numbers of a step's pairs and of the hard negative captions that the loss reads, on each rank."""

    pairs: RankCounts
    negatives: RankCounts


def encode_step(model: CLIP, batch: CaptionBatch, counts: StepCounts, size: int | None) -> Pairs:
    """Encode a rank's pairs in micro-batches, with hard negatives if any rank has some.

    Features and gradients are those of all pairs at once, and only the activations of the last micro-batch are kept:
    each one but the last is a checkpointed segment of one graph. Of three, the forward pass encodes 1, 2, 3 and keeps
    the activations of 3; the backward pass frees those, computes those of 2 again, then those of 1, and DDP
    synchronises once, after 1. Only BatchNorm sees the micro-batches instead of the batch.

    Ranks have equally many micro-batches, as they synchronise in every backward pass, and under FSDP in every forward
    pass too: one with fewer pairs encodes its last pair several times. At most ``size`` pairs are encoded at once.
    An image that several pairs have is encoded once, and divided among the micro-batches by itself.
    """
    pairs, most = batch.pairs, max(1, *counts.pairs.counts)
    number = math.ceil(most / (size or most))
    whole = batch if pairs else placeholder(model, batch)
    # A part of one pair has no variance for BatchNorm; without skipped pairs all parts have about ``size``.
    parts = whole.stretched(2 * number if batch.skipped else number).split(number)
    encoded = sum(len(part.images) for part in parts), sum(len(part.tokens) for part in parts)
    # A repeated pair would count twice: this rank's BatchNorm leaves the whole step out of its statistics.
    repeats = encoded != (len(batch.images), pairs)
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)] if repeats else []
    with FrozenStatistics(norms):
        image_BD, text_BD, negative_MD = _encode_parts(model, parts, counts.negatives.total > 0)
    if repeats or batch.image_of is not None:  # leave out the repeated pairs
        image_BD, text_BD = batch.of_pairs(image_BD), text_BD[:pairs]
    negatives = None if negative_MD is None else HardNegatives(negative_MD, counts.negatives)
    scale, bias, pad_id = model.logit_scale.exp(), model.logit_bias, model.tokenizer.pad_id
    return Pairs(image_BD, text_BD, scale, bias, counts.pairs, batch, parts, pad_id, negatives)


def _encode_parts(model: CLIP, parts: list[CaptionBatch], negatives: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    images, texts, hard = [], [], []
    for part in parts:
        tokens, lengths = _all_texts(model, part) if negatives else (part.tokens, part.lengths)
        # Drop autocast's half-precision weights: all micro-batches would add their gradients in that one copy, in half
        # precision, where small ones are lost.
        torch.clear_autocast_cache()
        run = _run if part is parts[-1] else checkpoint
        images.append(run(encode_images, model, part.images, inside=model.visual))
        text = run(encode_texts, model, tokens, lengths, part.stored_texts, inside=model.text_encoder)
        texts.append(text[: len(part.tokens)])
        hard.append(text[len(part.tokens) :])
    return torch.cat(images), torch.cat(texts), torch.cat(hard) if negatives else None


def _run(encode: Callable[..., Tensor], *args: Any, inside: nn.Module) -> Tensor:
    """Encode, and keep the activations; has the arguments of ``checkpoint``."""
    return encode(*args)


def _all_texts(model: CLIP, part: CaptionBatch) -> tuple[Tensor, Sequence[int]]:
    """Return the tokens of captions, then of hard negatives, and their lengths if known."""
    more = part.negative_tokens
    if more is None or not len(more):
        return part.tokens, part.lengths
    require(part.stored_texts is None, HARD_NEGATIVES)
    longest = max(part.tokens.shape[1], more.shape[1])
    padded = [
        F.pad(tokens, (0, longest - tokens.shape[1]), value=model.tokenizer.pad_id) for tokens in (part.tokens, more)
    ]
    lengths = [*part.lengths, *part.negative_lengths] if part.lengths and part.negative_lengths else ()
    return torch.cat(padded), lengths
