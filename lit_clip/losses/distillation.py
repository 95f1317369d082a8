"""Distillation: cross-entropy between a teacher's and a student's probabilities over a batch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_clip.distributed import RankCounts, gather
from lit_clip.losses.contrastive import at_least_float32


def two_way_logits(
    image_BD: Tensor, text_BD: Tensor, all_image_ND: Tensor, all_text_ND: Tensor, scale: Tensor
) -> Tensor:
    """Return ``[2B, N]``: the images' logits over all texts, then the texts' over all images, float32 or wider."""
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, text_BD, all_image_ND, all_text_ND = map(
            at_least_float32, (image_BD, text_BD, all_image_ND, all_text_ND)
        )
        return scale * torch.cat([image_BD @ all_text_ND.T, text_BD @ all_image_ND.T])


def distillation_loss(student_QN: Tensor, teacher_QN: Tensor) -> Tensor:
    """Mean cross-entropy between the teacher's and the student's probabilities over N candidates, a scalar.

    As in open_clip; the mean over ranks is the loss of the whole batch.

    Args:
        student_QN: the student's logits of Q queries, see :func:`two_way_logits`.
        teacher_QN: the teacher's logits of the same queries.
    """
    return F.cross_entropy(student_QN, teacher_QN.softmax(dim=1).to(student_QN.dtype))


LOGITS = 2**22  # most logits of one model that exist at once


class ModelFeatures(NamedTuple):
    """A model's unit features ``[B, D]`` of this rank's pairs, and its inverse temperature."""

    image: Tensor
    text: Tensor
    scale: Tensor

    def logits(self, rows: slice, all_image_ND: Tensor, all_text_ND: Tensor) -> Tensor:
        """Return the logits ``[2b, N]`` of some of this rank's pairs over all ranks' pairs."""
        return two_way_logits(self.image[rows], self.text[rows], all_image_ND, all_text_ND, self.scale)


def blockwise_distillation(student: ModelFeatures, teacher: ModelFeatures, shards: RankCounts) -> Tensor:
    """:func:`distillation_loss` over all ranks' pairs, computed for a block of rows at a time.

    The logits of a block are computed again in the backward pass. The mean over ranks is the loss of all pairs, and so
    is its gradient.

    Args:
        student: the student's features.
        teacher: the teacher's features, without gradients.
        shards: number of pairs of each rank.
    """
    pairs = len(student.image)
    candidates = [gather(features, shards) for features in (student.image, student.text, teacher.image, teacher.text)]

    def block_sum(rows: slice, *features_ND: Tensor) -> Tensor:
        student_QN, teacher_QN = student.logits(rows, *features_ND[:2]), teacher.logits(rows, *features_ND[2:])
        return distillation_loss(student_QN, teacher_QN) * (len(student_QN) / 2)

    total = student.logits(slice(0), *candidates[:2]).sum()  # 0, so that a rank without pairs takes part in backward
    height = max(1, LOGITS // (2 * shards.total))
    for start in range(0, pairs, height):
        rows = slice(start, min(start + height, pairs))
        total = total + checkpoint(block_sum, rows, *candidates, use_reentrant=False, preserve_rng_state=False)
    return total / max(1, pairs) * shards.weight
