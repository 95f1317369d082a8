"""Distillation from a teacher: cross-entropy between probabilities over a batch, or distances of features."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_clip.distributed import RankCounts, gather
from lit_clip.losses.contrastive import at_least_float32, unit

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
