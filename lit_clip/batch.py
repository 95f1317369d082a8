"""Batches: named tuples of tensors and keys."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

JUDGED_AFTER = 100  # samples: of fewer, a single one is above any sensible limit


class CaptionBatch(NamedTuple):
    """B pairs, each of an image and a caption.

    Attributes:
        images: uint8 ``[B, 3, H, W]``, not normalised: the model does that on its device; or floating point
            ``[B, ...]``, stored activations of the image encoder's frozen layers, or features in the images' place.
            With ``image_of`` each image once, ``[I, ...]``.
        tokens: int64 ``[B, L]``, ``L`` at most the context length, padded after the end-of-text token.
        keys: identify the images (rows with one key share one image), stable between runs.
        captions: the texts of ``tokens``, for a teacher with another tokenizer; optional.
        groups: pairs of one group (a product, an event) are duplicates; empty strings for no group; optional.
        skipped: place and reason of each sample that had to be skipped, see ``on_error``.
        lengths: number of tokens of each text, so that nobody has to wait for the batch's device; optional.
        negatives: a caption that does not fit the image although it is similar (a hard negative), for each pair; empty
            strings for none; optional.
        negative_tokens: int64 ``[M, L]``, those of the M negatives that are not empty, in order.
        negative_lengths: number of tokens of each of them.
        stored_texts: stored activations ``[B, ...]`` of the text encoder's frozen layers; optional.
        extra: tensors ``[B, ...]`` by name, for a loss of one's own; no other part reads them.
        image_of: the row of ``images`` that each pair has, int64 ``[B]`` ascending; or rows of all images of its thing,
            ``[B, K]``, filled up with -1, whose mean of unit features is the pair's; None: pair i has image i.
    """

    images: Tensor
    tokens: Tensor
    keys: list[str]
    captions: Sequence[str] = ()
    groups: Sequence[str] = ()
    skipped: Sequence[tuple[str, str]] = ()
    lengths: Sequence[int] = ()
    negatives: Sequence[str] = ()
    negative_tokens: Tensor | None = None
    negative_lengths: Sequence[int] = ()
    stored_texts: Tensor | None = None
    extra: Mapping[str, Tensor] = {}
    image_of: Tensor | None = None

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return len(self.images if self.image_of is None else self.image_of)

    def of_pairs(self, rows: Tensor) -> Tensor:
        """Return the row of each pair's image, ``[B, ...]``, from one row per image; leave further rows out.

        Of a thing with several images it is the direction of their mean; rows are then unit features ``[I, D]``.
        """
        if self.image_of is None:
            return rows[: len(self.images)]
        if self.image_of.ndim == 1:
            return rows[self.image_of]
        absent_BK1 = (self.image_of < 0).unsqueeze(-1)
        return F.normalize(rows[self.image_of].masked_fill(absent_BK1, 0).sum(dim=1), dim=1)

    def to(self, device: torch.device | str) -> "CaptionBatch":
        """Move the tensors to a device; from pinned memory, this does not wait for a CUDA device's queued work.

        Lightning calls this; without it, it would look for tensors in every key and caption.
        """
        to_cuda = torch.device(device).type == "cuda"  # MPS would read freed memory (pytorch/pytorch#189690)
        return self._of_tensors(lambda tensor: tensor.to(device, non_blocking=to_cuda))

    def pin_memory(self) -> "CaptionBatch":
        """Copy the tensors to pinned memory; data loaders call this."""
        return self._of_tensors(Tensor.pin_memory)

    def _of_tensors(self, function: Callable[[Tensor], Tensor]) -> "CaptionBatch":
        moved = self._make(function(value) if isinstance(value, Tensor) else value for value in self)
        extra = {name: function(value) for name, value in self.extra.items()}
        return moved._replace(extra=extra) if extra else moved

    def split(self, parts: int) -> "list[CaptionBatch]":
        """Split into at most ``parts`` batches of nearly equal size, none of them empty, in order.

        With ``image_of`` images and captions are divided independently, each evenly: a part has no ``image_of``, and
        its captions may be those of another part's images.
        """
        parts = min(parts, len(self.images))
        images, rows = (
            [slice(number * part // parts, number * (part + 1) // parts) for part in range(parts)]
            for number in (len(self.images), self.pairs)
        )
        return [self._rows(*part) for part in zip(rows, images, strict=True)]

    def _rows(self, rows: slice, images: slice | None = None) -> "CaptionBatch":
        hard = slice(*(sum(map(bool, self.negatives[:row])) for row in rows.indices(self.pairs)[:2]))
        extra = {name: value[rows] for name, value in self.extra.items()}
        values: dict[str, Any] = {**self._asdict(), "skipped": (), "images": self.images[images or rows]}
        for name in ("extra", "image_of"):
            values.pop(name)
        for name, value in values.items():
            if value is not None and name != "images":
                values[name] = value[hard if name.startswith("negative_") else rows]
        return CaptionBatch(**values, extra=extra)

    def stretched(self, pairs: int) -> "CaptionBatch":
        """Repeat the last image, and the last pair without its negative, until there are ``pairs`` of each."""
        images, more = (max(0, pairs - number) for number in (len(self.images), self.pairs))
        if not images and not more:
            return self

        def repeated(values: Any, more: int = more) -> Any:
            if isinstance(values, Tensor):
                return values[[*range(len(values)), *[-1] * more]]
            return values and [*values, *[values[-1]] * more]

        names = "tokens", "keys", "captions", "groups", "lengths", "stored_texts", "image_of"
        negatives = [*self.negatives, *[""] * more] if self.negatives else ()
        extra = {name: repeated(value) for name, value in self.extra.items()}
        return self._replace(
            images=repeated(self.images, images),
            **{name: repeated(getattr(self, name)) for name in names},
            negatives=negatives,
            extra=extra,
        )
