"""Losses of pairs with unequal weights, of their distance, and of a teacher's features.

Shapes: B pairs of this rank, N pairs of all ranks, D embedding dimension; b rows of a block.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_clip.distributed import RankCounts, gather, gather_rows
from lit_clip.errors import require
from lit_clip.losses.contrastive import Duplicates, at_least_float32, unit
from lit_clip.losses.duplicates import check_duplicates
from lit_clip.losses.loss import Loss, Pairs
from lit_clip.losses.tiled import PairLayout

LOGITS = 2**22  # most logits of one model that exist at once


def distillation_loss(student_QN: Tensor, teacher_QN: Tensor) -> Tensor:
    """Mean cross-entropy between probabilities over N candidates, a scalar, from the logits of Q queries.

    As in open_clip; the mean over ranks is the loss of the whole batch.
    """
    return F.cross_entropy(student_QN, teacher_QN.softmax(dim=1).to(student_QN.dtype))


class ModelFeatures(NamedTuple):
    """A model's unit features ``[B, D]`` of this rank's pairs, and its inverse temperature."""

    image: Tensor
    text: Tensor
    scale: Tensor

    def logits(self, rows: slice, all_image_ND: Tensor, all_text_ND: Tensor) -> Tensor:
        """Return the logits of some of this rank's pairs over all ranks' pairs, float32 or wider.

        ``[2b, N]``: the images' over all texts, then the texts' over all images.
        """
        features = self.image[rows], self.text[rows], all_image_ND, all_text_ND
        with torch.autocast(self.image.device.type, enabled=False):
            image_bD, text_bD, all_image_ND, all_text_ND = map(at_least_float32, features)
            return self.scale * torch.cat([image_bD @ all_text_ND.T, text_bD @ all_image_ND.T])


def blockwise_distillation(student: ModelFeatures, teacher: ModelFeatures, ranks: RankCounts) -> Tensor:
    """Compute :func:`distillation_loss` over all ranks' pairs, one block of rows at a time.

    The logits of a block are computed again in the backward pass. The mean over ranks is the loss of all pairs, and so
    is its gradient. The teacher's features have no gradients.
    """
    pairs = len(student.image)
    candidates = [gather(features, ranks) for features in (student.image, student.text, teacher.image, teacher.text)]

    def block_sum(rows: slice, *features_ND: Tensor) -> Tensor:
        student_QN, teacher_QN = student.logits(rows, *features_ND[:2]), teacher.logits(rows, *features_ND[2:])
        return distillation_loss(student_QN, teacher_QN) * (len(student_QN) / 2)

    total = student.logits(slice(0), *candidates[:2]).sum()  # 0, so that a rank without pairs takes part in backward
    height = max(1, LOGITS // (2 * ranks.total))
    for start in range(0, pairs, height):
        rows = slice(start, min(start + height, pairs))
        total = total + checkpoint(block_sum, rows, *candidates, use_reentrant=False, preserve_rng_state=False)
    return total / max(1, pairs) * ranks.weight


def feature_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], ranks: RankCounts) -> Tensor:
    """Squared distance between a student's and a teacher's unit features ``[B, D]``, images plus texts, a scalar.

    A teacher may have one of both. The mean over ranks is the mean of all pairs. A student may have only the teacher's
    first channels.
    """
    with torch.autocast(student[0].device.type, enabled=False):
        pairs = [(unit(a), unit(b[:, : a.shape[1]])) for a, b in zip(student, teacher, strict=True)]
        distance = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    return distance / max(1, len(student[0])) * ranks.weight


class Alignment(Loss):
    """Squared distance between the unit features of a pair (Wang & Isola 2020); other pairs do not matter.

    It suits features of which one side is given, as with :class:`datamodules.ParallelSentences`; if both are learned,
    all become equal.
    """

    def forward(self, pairs: Pairs) -> Tensor:
        with torch.autocast(pairs.image.device.type, enabled=False):
            distance = (pairs.image - pairs.text).square().sum()
        return distance / max(1, len(pairs.image)) * pairs.ranks.weight


class WeightedContrastive(Loss):
    """:class:`lit_clip.losses.Contrastive` with a weighted mean over pairs (``data.columns.weight``).

    With scores of relevance as weights this is GCL's loss (Zhu et al. 2024, arXiv:2404.08535). Equal weights give
    the value and gradient of :class:`lit_clip.losses.Contrastive`. A pair of weight 0 is only a wrong one for others.

    Args:
        duplicates: as for :class:`lit_clip.losses.Contrastive`; as ``positives`` they share a query's target in
            proportion to their weights, so that the best of a query's results ranks first.
    """

    reads = ("weight",)

    def __init__(self, duplicates: Duplicates = "negatives") -> None:
        super().__init__()
        check_duplicates(duplicates)
        self.duplicates: Duplicates = duplicates

    def forward(self, pairs: Pairs) -> Tensor:
        weight_B = pairs.batch.extra.get("weight", pairs.image.new_zeros(0))
        complete = weight_B.shape == (len(pairs.image),)
        none = "the data have no weights; set data.columns.weight"
        require(complete, f"model.loss: WeightedContrastive: {none}, or return one number for a pair in extra()")
        ids_B3 = None if self.duplicates == "negatives" else pairs.ids()
        layout = PairLayout(pairs.ranks, ids_B3, self.duplicates)
        with torch.autocast(pairs.image.device.type, enabled=False):
            return weighted_contrastive_loss(pairs.image, pairs.text, weight_B, pairs.scale, layout)

    def chance_loss(self, pairs: int) -> float:
        """Return log N: each of N captions is equally likely, for any target."""
        return math.log(pairs)


def weighted_contrastive_loss(
    image_BD: Tensor, text_BD: Tensor, weight_B: Tensor, scale: Tensor, layout: PairLayout
) -> Tensor:
    """Weighted mean of all pairs' cross-entropies in both directions, computed one block of rows at a time.

    The logits of a block are computed again in the backward pass. The mean over ranks is the loss of all pairs, and so
    is its gradient. The loss is 0 if all weights are.
    """
    ranks, (image_BD, text_BD) = layout.ranks, map(at_least_float32, (image_BD, text_BD))
    weight_B = weight_B.to(image_BD)
    weight_N = gather_rows(weight_B, ranks)
    ids_NK = None if layout.ids is None else gather_rows(layout.ids, ranks)
    smallest = torch.finfo(weight_N.dtype).tiny

    def block_sum(rows: slice, all_image_ND: Tensor, all_text_ND: Tensor) -> Tensor:
        own_bN = torch.zeros(len(weight_B[rows]), ranks.total, dtype=torch.bool, device=image_BD.device)
        own_bN.diagonal(ranks.mine.start + rows.start).fill_(True)
        target_bN, ignored_bN = own_bN.to(image_BD.dtype), None
        if layout.ids is not None and ids_NK is not None:
            same_bN = (layout.ids[rows, None] == ids_NK).any(dim=-1)
            ignored_bN = same_bN & ~own_bN
            if layout.duplicates == "positives":
                target_bN, ignored_bN = same_bN * weight_N, None
                target_bN = target_bN / target_bN.sum(dim=1, keepdim=True).clamp(min=smallest)
        total_b = torch.zeros_like(weight_B[rows])
        for query_bD, candidate_ND in ((image_BD[rows], all_text_ND), (text_BD[rows], all_image_ND)):
            logits_bN = scale * query_bD @ candidate_ND.T
            positive_b = (target_bN * logits_bN).sum(dim=1)
            if ignored_bN is not None:
                logits_bN = logits_bN.masked_fill(ignored_bN, -torch.inf)
            total_b = total_b + logits_bN.logsumexp(dim=1) - positive_b
        return (weight_B[rows] * total_b).sum() / 2

    candidates = gather(image_BD, ranks), gather(text_BD, ranks)
    total = block_sum(slice(0, 0), *candidates)  # 0, so that a rank without pairs takes part in backward
    height = max(1, LOGITS // (2 * ranks.total))
    for start in range(0, len(weight_B), height):
        rows = slice(start, min(start + height, len(weight_B)))
        total = total + checkpoint(block_sum, rows, *candidates, use_reentrant=False, preserve_rng_state=False)
    return total * ranks.world / weight_N.sum().clamp(min=smallest)
