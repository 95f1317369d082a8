"""What the pairs of a batch share: their number on all ranks, their images, hard negatives, or no pair at all."""

from typing import Any

import torch
from lightning.pytorch import Trainer

from lit_clip.batch import CaptionBatch
from lit_clip.errors import require
from lit_clip.losses.loss import Loss
from lit_clip.models.clip import CLIP
from lit_clip.tools.hardware import to_device

# Methods by which a batch may get hard negatives: of a class that overrides one, ranks do not know their number.
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
