"""What a batch is: tensors and keys with names."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class CaptionBatch(NamedTuple):
    """Pairs of an image and its caption.

    Attributes:
        images: uint8 ``[B, 3, H, W]``, not normalised: the model does that on its own device.
        tokens: int64 ``[B, L]``, ``L`` at most the context length, zero-padded behind the end-of-text token.
        keys: what identifies each image (rows with one key share one image), stable between runs.
        captions: what ``tokens`` say, for a teacher with another tokenizer; a source may leave them out.
        groups: pairs of one group say the same (a product, an event), empty strings for no group; a source may leave
            them out.
        skipped: where each sample was that had to be left out of this batch, and why; see ``on_error``.
        lengths: tokens of each text, as its tokenizer counts them, so that nobody has to wait for the device that the
            batch is on; a source may leave them out.
    """

    images: Tensor
    tokens: Tensor
    keys: list[str]
    captions: Sequence[str] = ()
    groups: Sequence[str] = ()
    skipped: Sequence[tuple[str, str]] = ()
    lengths: Sequence[int] = ()

    def split(self, parts: int) -> "list[CaptionBatch]":
        """At most so many batches of nearly equal size, none of them empty, in order."""
        pairs = len(self.images)
        bounds = [pairs * part // parts for part in range(parts + 1)]
        rows = [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False) if start < stop]
        return [self._rows(row) for row in rows]

    def _rows(self, rows: slice) -> "CaptionBatch":
        texts = self.keys[rows], self.captions[rows], self.groups[rows]
        return CaptionBatch(self.images[rows], self.tokens[rows], *texts, lengths=self.lengths[rows])

    def stretched(self, pairs: int) -> "CaptionBatch":
        """At least so many pairs: the last one is repeated."""
        more = pairs - len(self.images)
        if more <= 0:
            return self
        rows = [*range(len(self.images)), *[-1] * more]
        keys, captions, groups = (
            [*text, *[text[-1]] * more] if text else [] for text in (self.keys, self.captions, self.groups)
        )
        lengths = [*self.lengths, *[self.lengths[-1]] * more] if self.lengths else []
        return CaptionBatch(self.images[rows], self.tokens[rows], keys, captions, groups, self.skipped, lengths)


class LabelledBatch(NamedTuple):
    """Images with a class each.

    Attributes:
        images: uint8 ``[B, 3, H, W]``.
        labels: int64 ``[B]``, an index into the set's class names.
        keys: what identifies each image.
    """

    images: Tensor
    labels: Tensor
    keys: list[str]


JUDGED_AFTER = 100  # samples: of fewer, a single one is above any sensible limit
