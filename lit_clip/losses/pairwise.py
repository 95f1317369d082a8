"""The losses of the paper and of SigLIP."""

import math
from typing import Any

import torch
from torch import Tensor

from lit_clip.distributed import RankCounts, gather
from lit_clip.errors import require
from lit_clip.losses.contrastive import Duplicates
from lit_clip.losses.duplicates import check_duplicates
from lit_clip.losses.loss import Loss, LossValue, Pairs
from lit_clip.losses.tiled import PairLayout, ShardedLoss, sharded_contrastive_loss, sharded_sigmoid_loss


def _layout(pairs: Pairs, duplicates: Duplicates) -> PairLayout:
    return PairLayout(pairs.ranks, None if duplicates == "negatives" else pairs.ids(), duplicates)


def _value(result: ShardedLoss, pairs: Pairs) -> LossValue:
    ranks = pairs.ranks
    accuracy = result.hits * ranks.world / ranks.total
    return LossValue(result.loss, {"in_batch_accuracy": accuracy, "in_batch_chance": 1 / ranks.total})


class Contrastive(Loss):
    """Symmetric softmax loss (InfoNCE; paper, figure 3), :func:`lit_clip.losses.contrastive.contrastive_loss`.

    Hard negative captions (``data.columns.negative``) are further wrong texts for every image of the batch (NegCLIP,
    Yuksekgonul et al. 2023). Logs ``train/in_batch_accuracy``, the share of images that are closest to their own text
    among all pairs' texts, and its chance.

    Args:
        duplicates: how pairs with the same caption, image or group count: as ``negatives`` of each other (the paper),
            as ``positives``, or ``ignored``.
        label_smoothing: share of each target that is spread evenly over the pairs of the batch, without hard negatives
            (Szegedy et al. 2016); at least 0 and below 1, and only with duplicates as ``negatives``.
    """

    uses_negatives = True

    def __init__(self, duplicates: Duplicates = "negatives", label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_duplicates(duplicates)
        require(0 <= label_smoothing < 1, f"label_smoothing: {label_smoothing} must be at least 0 and below 1")
        require(
            not label_smoothing or duplicates == "negatives",
            f"label_smoothing {label_smoothing} needs duplicates: negatives, not {duplicates}; leave one of them out",
        )
        self.duplicates: Duplicates = duplicates
        self.label_smoothing = label_smoothing

    def forward(self, pairs: Pairs) -> LossValue:
        layout = _layout(pairs, self.duplicates)
        result = sharded_contrastive_loss(pairs.image, pairs.text, pairs.scale, layout, pairs.negatives)
        if self.label_smoothing:
            result = result._replace(loss=result.loss + self.label_smoothing * _own_above_mean(pairs))
        return _value(result, pairs)

    def chance_loss(self, pairs: int) -> float:
        """Return log N: each of N captions is equally likely."""
        return math.log(pairs)


def _own_above_mean(pairs: Pairs) -> Tensor:
    """Return the mean logit of a pair minus the mean logit of all images and texts.

    Cross-entropy is linear in its target, so a smoothed one adds this times the smoothing, without any more logits.
    """
    world, total, rank = pairs.ranks.world, pairs.ranks.total, pairs.ranks.rank
    with torch.autocast(pairs.image.device.type, enabled=False):
        own = (pairs.image * pairs.text).sum() * world / total
        sums = torch.cat([pairs.image.sum(dim=0), pairs.text.sum(dim=0)])[None]  # [1, 2D]
        image_D, text_D = gather(sums, RankCounts(rank, (1,) * world)).sum(dim=0).chunk(2)
        return pairs.scale * (own - image_D @ text_D / total**2)


class Sigmoid(Loss):
    """Sigmoid loss of SigLIP (Zhai et al. 2023), :func:`lit_clip.losses.contrastive.sigmoid_loss`.

    It needs a model with a ``logit_bias``. Logs the same as :class:`Contrastive`.

    Args:
        duplicates: as for :class:`Contrastive`.
        pretraining_batch: pairs per step with which the model's ``logit_bias`` was learned, 32,768 for the published
            SigLIPs. The bias contains the logarithm of the share of right pairs, one in N texts; so in a batch of N
            pairs log(pretraining_batch / N) is added to it, and the model's own bias stays as in pretraining. None:
            nothing is added.
    """

    def __init__(self, duplicates: Duplicates = "negatives", pretraining_batch: int | None = None) -> None:
        super().__init__()
        check_duplicates(duplicates)
        known = pretraining_batch is None or pretraining_batch >= 1
        require(known, f"model.loss: Sigmoid.pretraining_batch {pretraining_batch} must be at least 1")
        self.duplicates: Duplicates = duplicates
        self.pretraining_batch = pretraining_batch

    def prepare(self, model: Any) -> None:
        require(
            model.logit_bias is not None,
            "model.loss: Sigmoid needs a model with a logit_bias; set logit_bias: true in model.architecture, or use "
            "lit_clip.losses.Contrastive",
        )

    def forward(self, pairs: Pairs) -> LossValue:
        bias = pairs.bias
        assert bias is not None, "checked by prepare"
        if self.pretraining_batch is not None:
            bias = bias + math.log(self.pretraining_batch / max(1, pairs.ranks.total))
        layout = _layout(pairs, self.duplicates)
        return _value(sharded_sigmoid_loss(pairs.image, pairs.text, pairs.scale, bias, layout), pairs)

    def chance_loss(self, pairs: int) -> float:
        """Return ``log N + (N - 1) log(N / (N - 1))``: the best prediction for each of an image's N captions is 1/N."""
        return math.log(pairs) + ((pairs - 1) * math.log(pairs / (pairs - 1)) if pairs > 1 else 0.0)


def default_loss(model: Any) -> Loss:
    """Return :class:`Sigmoid` for a model with a ``logit_bias`` (SigLIP), otherwise :class:`Contrastive`."""
    return Contrastive() if model.logit_bias is None else Sigmoid()
