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
    """

    images: Tensor
    tokens: Tensor
    keys: list[str]
    captions: Sequence[str] = ()


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
