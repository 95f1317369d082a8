"""The contrastive loss, as a pure function."""

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions widened, others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(features: Tensor) -> Tensor:
    """``[..., D]`` at unit length, float32 or wider: in bfloat16 a length is off by up to 0.4%."""
    return F.normalize(at_least_float32(features), dim=-1)


def contrastive_loss(
    image_BD: Tensor, text_BD: Tensor, all_image_ND: Tensor, all_text_ND: Tensor, scale: Tensor, first_row: int = 0
) -> Tensor:
    """The symmetric softmax loss (InfoNCE; paper, figure 3) of one rank's pairs among all ranks' pairs.

    The mean over ranks that hold equally many pairs is the loss of the whole batch, and so is its gradient if
    ``all_image_ND`` and ``all_text_ND`` carry gradients back to their ranks (:func:`lit_clip.collectives.gather`).
    With one rank, pass the local features twice.

    Args:
        image_BD: this rank's image features, unit length.
        text_BD: their captions' features, unit length.
        all_image_ND: every rank's image features in rank order.
        all_text_ND: every rank's text features in the same order.
        scale: inverse temperature, ``exp(logit_scale)``.
        first_row: where this rank's pairs begin among all; ``rank * B`` for equal ranks.

    Returns:
        A scalar: half the sum of the cross-entropies image -> text and text -> image, float32 or wider.
    """
    with torch.autocast(image_BD.device.type, enabled=False):  # the exponentials need more than 8 or 11 bits
        image_BD, text_BD, all_image_ND, all_text_ND = map(
            at_least_float32, (image_BD, text_BD, all_image_ND, all_text_ND)
        )
        target_B = torch.arange(first_row, first_row + len(image_BD), device=image_BD.device)
        image_logits_BN = scale * image_BD @ all_text_ND.T
        text_logits_BN = scale * text_BD @ all_image_ND.T
        return (F.cross_entropy(image_logits_BN, target_B) + F.cross_entropy(text_logits_BN, target_B)) / 2


def sigmoid_loss(image_BD: Tensor, all_text_ND: Tensor, scale: Tensor, bias: Tensor, first_row: int = 0) -> Tensor:
    """The sigmoid loss of SigLIP (Zhai et al. 2023, equation 1) of one rank's images with all ranks' texts.

    Each image with each text is a question of its own: do they belong together? As with :func:`contrastive_loss` the
    mean over ranks is the loss of the whole batch, and so is its gradient.

    Args:
        image_BD: this rank's image features, unit length.
        all_text_ND: every rank's text features in rank order, unit length.
        scale: inverse temperature, ``exp(logit_scale)``.
        bias: ``logit_bias``.
        first_row: where this rank's pairs begin among all.

    Returns:
        A scalar: the cross-entropies of B x N questions, summed and divided by B, float32 or wider.
    """
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, all_text_ND = at_least_float32(image_BD), at_least_float32(all_text_ND)
        logits_BN = scale * image_BD @ all_text_ND.T + bias
        target_BN = torch.zeros_like(logits_BN)
        target_BN.diagonal(first_row).fill_(1)
        return F.binary_cross_entropy_with_logits(logits_BN, target_BN, reduction="sum") / len(image_BD)


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
