"""Micro-batches: encode a step's pairs part by part while the loss sees all of them (GradCache, Gao et al. 2021).

And what the pairs of a batch share: their number on all ranks, if it is guaranteed, and their images.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_clip.batch import CaptionBatch
from lit_clip.distributed import RankCounts
from lit_clip.errors import require
from lit_clip.losses.contrastive import unit
from lit_clip.losses.loss import Loss, Pairs
from lit_clip.losses.tiled import HardNegatives
from lit_clip.models.clip import CLIP
from lit_clip.models.frozen_prefix import image_features_from, text_features_from
from lit_clip.tools.hardware import to_device
from lit_clip.training.activation_checkpointing import FrozenStatistics, checkpoint

# The methods by which a batch may get hard negatives.
MAKE_BATCHES = (
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "training_step"),
    *("sources", "training_pairs", "train_dataloader"),
)
OURS = {"lightning", "lit_clip"}


def even_batches(trainer: Trainer, negatives: bool) -> int | None:
    """Return the number of pairs in every training batch of each rank, if guaranteed; otherwise None.

    It does if bad samples end the run (``on_error: error``), its sampler divides global batches among the ranks, and
    a sample is a pair.
    If hard negatives matter, files must be known to have none, as their number may differ, and no hook may add them.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if getattr(data, "on_error", None) != "error" or captions_together(data):
        return None
    if negatives and not (getattr(data, "negative_column", "unknown") is None and isinstance(data.train, str)):
        return None
    if negatives and _makes_batches(trainer.lightning_module, data):
        return None
    sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
    world = getattr(sampler, "world", None)
    return getattr(sampler, "batch_size", None) if world == trainer.world_size else None


def captions_together(data: Any) -> bool:
    """Return whether a sample of a data module is an image with all its captions."""
    return getattr(getattr(data, "captions", None), "per_image", None) == "together"


def _makes_batches(*owners: Any) -> bool:
    """Return whether a user's method of a module or data module could add hard negatives to a batch."""
    methods = [getattr(owner, name, None) for owner in owners for name in MAKE_BATCHES]
    packages = {str(getattr(method, "__module__", "")).partition(".")[0] for method in methods if method is not None}
    return not packages <= OURS


def images_once(batch: CaptionBatch) -> CaptionBatch:
    """Return an evaluation batch with each image once; pairs with equal keys have the same image."""
    row_of: dict[str, int] = {}
    image_of = [row_of.setdefault(key, len(row_of)) for key in batch.keys]
    if batch.image_of is not None or len(row_of) == len(image_of):
        return batch
    first = [image_of.index(row) for row in range(len(row_of))]
    images, own = (to_device(torch.tensor(rows), batch.images.device) for rows in (first, image_of))
    return batch._replace(images=batch.images[images], image_of=own)


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


def hard_negatives(batch: CaptionBatch, loss: Loss) -> int:
    """Return the number of a batch's hard negatives."""
    number = sum(map(bool, batch.negatives))
    rows = 0 if batch.negative_tokens is None else len(batch.negative_tokens)
    found = f"training_step: a batch has {number} hard negatives and {rows} rows of negative_tokens"
    require(number == rows, f"{found}; give a row to each text of negatives that is not empty")
    unused = f"training_step: {type(loss).__name__} does not use hard negatives"
    require(not number or loss.uses_negatives, f"{unused}; leave them out, or use lit_clip.losses.Contrastive")
    return number


def placeholder(model: CLIP, batch: CaptionBatch) -> CaptionBatch:
    """Return one blank pair for a rank with only skipped samples; its features are discarded."""
    tokens = model.tokenizer.trim(model.tokenizer(["a"])).to(batch.tokens.device)
    images, stored = batch.images, batch.stored_texts
    if stored is not None:
        stored = stored.new_zeros(1, *stored.shape[1:])
    return CaptionBatch(images.new_zeros(1, *images.shape[1:]), tokens, [""], ["a"], [""], stored_texts=stored)


class StepCounts(NamedTuple):
    """Numbers of a step's pairs and of the hard negative captions that the loss reads, on each rank."""

    pairs: RankCounts
    negatives: RankCounts


def encode_step(model: CLIP, batch: CaptionBatch, counts: StepCounts, size: int | None) -> Pairs:
    """Encode a rank's pairs in micro-batches, with hard negatives if any rank has some.

    Features and gradients are those of all pairs at once, and only the activations of the last micro-batch are kept:
    each one but the last is a checkpointed segment of one graph, so DDP synchronises once, after the backward pass of
    the first. The last is the first in the backward pass, so its activations are gone when those of another are
    computed again. Only BatchNorm sees the micro-batches instead of the batch.

    Ranks have equally many micro-batches, as they synchronise in every backward pass, and under FSDP in every forward
    pass too: one with fewer pairs encodes its last pair several times. At most ``size`` pairs are encoded at once.
    An image that several pairs have is encoded once, and divided among the micro-batches by itself.
    """
    pairs, most = batch.pairs, max(1, *counts.pairs.counts)
    number = math.ceil(most / (size or most))
    whole = batch if pairs else placeholder(model, batch)
    parts = whole.stretched(2 * number if batch.skipped else number).split(number)  # BatchNorm may need two pairs
    encoded = sum(len(part.images) for part in parts), sum(len(part.tokens) for part in parts)
    # A repeated pair would count twice: this rank's BatchNorm leaves the whole step out of its statistics.
    repeats = encoded != (len(batch.images), pairs)
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)] if repeats else []
    with FrozenStatistics(norms):
        image_BD, text_BD, negative_MD = _encode_parts(model, parts, counts.negatives.total > 0)
    if repeats or batch.image_of is not None:
        image_BD, text_BD = batch.of_pairs(image_BD), text_BD[:pairs]
    negatives = None if negative_MD is None else HardNegatives(negative_MD, counts.negatives)
    scale, bias, pad_id = model.logit_scale.exp(), model.logit_bias, model.tokenizer.pad_id
    return Pairs(image_BD, text_BD, scale, bias, counts.pairs, batch, parts, pad_id, negatives)


def _encode_parts(model: CLIP, parts: list[CaptionBatch], negatives: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    images, texts, hard = [], [], []
    for part in parts:
        tokens, lengths = _all_texts(model, part) if negatives else (part.tokens, part.lengths)
        # Drop autocast's half-precision weights: all micro-batches would add their gradients in that one copy.
        torch.clear_autocast_cache()
        run = _run if part is parts[-1] else checkpoint
        images.append(run(encode_images, model, part.images, inside=model.visual))
        text = run(encode_texts, model, tokens, lengths, part.stored_texts, inside=model.text_encoder)
        texts.append(text[: len(part.tokens)])
        hard.append(text[len(part.tokens) :])
    return torch.cat(images), torch.cat(texts), torch.cat(hard) if negatives else None


def _run(encode: Callable[..., Tensor], *args: Any, inside: nn.Module) -> Tensor:
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
