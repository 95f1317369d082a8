"""Distillation: the cross-entropy between a teacher's and a student's choice, and its blockwise form."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_clip.distributed import Shards, gather
from lit_clip.losses.contrastive import at_least_float32


def two_way_logits(
    image_BD: Tensor, text_BD: Tensor, all_image_ND: Tensor, all_text_ND: Tensor, scale: Tensor
) -> Tensor:
    """``[2B, N]``: the images' logits among all texts, then the texts' among all images, float32 or wider."""
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, text_BD, all_image_ND, all_text_ND = map(
            at_least_float32, (image_BD, text_BD, all_image_ND, all_text_ND)
        )
        return scale * torch.cat([image_BD @ all_text_ND.T, text_BD @ all_image_ND.T])


def distillation_loss(student_QN: Tensor, teacher_QN: Tensor) -> Tensor:
    """The mean cross-entropy between the teacher's and the student's choice among N candidates: a scalar.

    As in open_clip; the mean over ranks is again the loss of the whole batch.

    Args:
        student_QN: logits of Q queries, :func:`two_way_logits`.
        teacher_QN: the teacher's logits of the same.
    """
    return F.cross_entropy(student_QN, teacher_QN.softmax(dim=1).to(student_QN.dtype))


LOGITS = 2**22  # of a model that exist at one time


class Choices(NamedTuple):
    """What a model's logits come from: unit features ``[B, D]`` of this rank's pairs and the inverse temperature."""

    image: Tensor
    text: Tensor
    scale: Tensor

    def logits(self, rows: slice, all_image_ND: Tensor, all_text_ND: Tensor) -> Tensor:
        """``[2b, N]``: of some pairs among those of all ranks."""
        return two_way_logits(self.image[rows], self.text[rows], all_image_ND, all_text_ND, self.scale)


def blockwise_distillation(ours: Choices, theirs: Choices, shards: Shards) -> Tensor:
    """:func:`lit_clip.losses.distillation.distillation_loss` among all ranks' pairs, without all logits at one time.

    The logits of some rows at a time are computed, and once more in the backward pass. The mean over ranks is the loss
    of all pairs, and so is its gradient.

    Args:
        ours: the student's.
        theirs: the teacher's, without gradients.
        shards: the pairs of each rank.
    """
    pairs = len(ours.image)
    candidates = [gather(features, shards) for features in (ours.image, ours.text, theirs.image, theirs.text)]

    def summed(rows: slice, *features_ND: Tensor) -> Tensor:
        student_QN, teacher_QN = ours.logits(rows, *features_ND[:2]), theirs.logits(rows, *features_ND[2:])
        return distillation_loss(student_QN, teacher_QN) * (len(student_QN) / 2)

    total = ours.logits(slice(0), *candidates[:2]).sum()  # 0: a rank without pairs takes part in the backward pass
    height = max(1, LOGITS // (2 * shards.total))
    for start in range(0, pairs, height):
        rows = slice(start, min(start + height, pairs))
        total = total + checkpoint(summed, rows, *candidates, use_reentrant=False, preserve_rng_state=False)
    return total / max(1, pairs) * shards.weight
