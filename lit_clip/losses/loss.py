"""The contract of a loss: its input, its value, and its description.

Shapes: B pairs of this rank, N pairs of all ranks, M hard negatives of all ranks, D embedding dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.distributed import RankCounts
from lit_clip.errors import InputError, require
from lit_clip.losses.duplicates import pair_ids
from lit_clip.losses.tiled import HardNegatives
from lit_clip.tools.parts import Description, describe_instance, qualified_name


@dataclass(frozen=True)
class Pairs:
    """This rank's pairs of a training step."""

    image: Tensor  # unit features ``[B, D]`` of the images, float32 or wider
    text: Tensor  # unit features ``[B, D]`` of their captions
    scale: Tensor  # inverse temperature, ``exp(logit_scale)``, a scalar
    bias: Tensor | None  # ``logit_bias``, a scalar; None if the model has none
    ranks: RankCounts  # number of pairs of each rank
    batch: CaptionBatch  # the pairs
    # the same images and captions as micro-batches (:meth:`lit_clip.CaptionBatch.split`); a rank with few pairs repeats
    # its last one at the end
    parts: list[CaptionBatch]
    pad_id: int  # the token that ``batch.tokens`` are padded with
    # hard negative captions; None if no rank has one, or the loss does not use them
    negatives: HardNegatives | None = None

    def ids(self) -> Tensor:
        """Return int64 ``[B, 3]``, see :func:`lit_clip.losses.duplicates.pair_ids`."""
        return pair_ids(self.batch.keys, self.batch.tokens, self.pad_id, self.batch.groups)


class WholeBatch:
    """All pairs of a training step, in the same order on every rank; gradients flow back to each rank's features.

    What a loss does not read is not sent between ranks.

    Attributes:
        scale: inverse temperature, ``exp(logit_scale)``, a scalar.
        bias: ``logit_bias``, a scalar; None if the model has none.
    """

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self.scale, self.bias = pairs.scale, pairs.bias

    @cached_property
    def image(self) -> Tensor:
        """Unit features ``[N, D]`` of the images, float32 or wider."""
        return distributed.gather(self._pairs.image, self._pairs.ranks)

    @cached_property
    def text(self) -> Tensor:
        """Unit features ``[N, D]`` of the captions, in the images' order."""
        return distributed.gather(self._pairs.text, self._pairs.ranks)

    @cached_property
    def negative(self) -> Tensor | None:
        """Unit features ``[M, D]`` of hard negative captions; None if there are none."""
        negatives = self._pairs.negatives
        return None if negatives is None else distributed.gather(negatives.features, negatives.ranks)

    @cached_property
    def same(self) -> Tensor:
        """Bool ``[N, N]``: which pairs share a caption, image or group; a pair is a duplicate of itself."""
        ids = distributed.gather(self._pairs.ids(), self._pairs.ranks)
        return (ids[:, None] == ids[None]).any(dim=-1)

    @cached_property
    def keys(self) -> list[str]:
        """Keys of the images."""
        return distributed.gather_objects(list(self._pairs.batch.keys))

    @cached_property
    def captions(self) -> list[str]:
        """Texts of the captions."""
        return distributed.gather_objects(list(self._pairs.batch.captions))

    @cached_property
    def groups(self) -> list[str]:
        """Groups; an empty string for none."""
        return distributed.gather_objects(list(self._pairs.batch.groups or [""] * len(self._pairs.image)))

    def extra(self, name: str) -> Tensor:
        """Return rows ``[N, ...]`` of a tensor of :attr:`lit_clip.CaptionBatch.extra`; all ranks must call this."""
        own = [rows for key, rows in self._pairs.batch.extra.items() if key == name]
        found = own if self._pairs.ranks.world == 1 else distributed.gather_objects([x.cpu().clone() for x in own])
        same = sum(map(len, found)) == len(self.image)
        require(same and bool(found), f"model.loss: the data have no {name}; see CustomPairs.extra")
        return torch.cat(found).to(self.image.device)


class LossValue(NamedTuple):
    """A loss and the values to log."""

    loss: Tensor  # a scalar whose mean over ranks is the loss of the whole batch
    # logged as ``train/<name>``: scalar tensors, of which the mean over ranks is logged, or numbers that are the same
    # on all ranks
    metrics: Mapping[str, Tensor | float] = {}


class Loss(nn.Module):
    """A training loss; override :meth:`whole_batch`, or :meth:`forward` for a faster form.

    A loss may have parameters of its own: they are trained at the learning rate of the model's head and kept in
    checkpoints. Trained with any number of processes and micro-batches, a loss that overrides :meth:`whole_batch` has
    the value and the gradients of one process with the whole batch.
    """

    uses_negatives = False
    """Whether the loss reads hard negative captions; otherwise a data module must not have them."""
    reads: tuple[str, ...] = ()
    """Names of tensors of :attr:`lit_clip.CaptionBatch.extra` that the loss reads; ``fit`` refuses a setting for
    one of them (``data.columns.weight``, ``data.images.per_thing: two``) that no loss reads."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Initialise the module here, so that a class without ``super().__init__()`` works too."""
        loss = super().__new__(cls)
        nn.Module.__init__(loss)
        return loss

    def whole_batch(self, pairs: WholeBatch) -> Tensor | LossValue:
        """Return the loss of the whole batch, a scalar; every rank computes all of it, without autocast."""
        raise InputError(f"model.loss: {qualified_name(type(self))} must override whole_batch, or forward")

    def forward(self, pairs: Pairs) -> Tensor | LossValue:
        """Return a scalar; its mean over ranks is the loss of the whole batch, and the same holds for its gradient.

        A rank may have no pairs.
        """
        with torch.autocast(pairs.image.device.type, enabled=False):
            return self.whole_batch(WholeBatch(pairs))

    def prepare(self, model: Any) -> None:
        """Check that the loss fits a :class:`lit_clip.CLIP`, and load its data; called when training starts."""

    def chance_loss(self, pairs: int) -> float | None:
        """Return the lowest loss of a model that cannot tell which of the pairs belong together; None: unknown."""
        return None

    def describe(self) -> Description:
        """Return the class, and attributes with the names of its arguments, as plain values."""
        return describe_instance(self)


def evaluate_loss(loss: Loss, pairs: Pairs) -> LossValue:
    """Call a loss and check its value."""
    result = loss(pairs)
    value = result if isinstance(result, LossValue) else LossValue(result)
    name = f"model.loss: {qualified_name(type(loss))}"
    scalar = isinstance(value.loss, Tensor) and value.loss.ndim == 0
    found = f"a tensor of shape {list(value.loss.shape)}" if isinstance(value.loss, Tensor) else repr(value.loss)
    require(scalar, f"{name} returned {found}; return a scalar tensor, such as the mean")
    differentiable = value.loss.requires_grad or not len(pairs.image) or not torch.is_grad_enabled()
    mend = "compute it from pairs.image and pairs.text, without detach, item or no_grad"
    require(differentiable, f"{name} returned a loss without gradient; {mend}")
    for metric, number in value.metrics.items():
        scalar = isinstance(number, int | float) or (isinstance(number, Tensor) and number.ndim == 0)
        require(scalar, f"{name}: its metric {metric} is not a number; return a scalar, such as its mean")
    return value
