"""Definitions of the losses as pure functions.

:mod:`lit_clip.losses.tiled` computes the same values and gradients without a matrix of similarities.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Duplicates = Literal["negatives", "positives", "ignored"]


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; leave other types unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(features: Tensor) -> Tensor:
    """Normalise ``[..., D]`` to unit length, in float32 or wider: in bfloat16 the length is off by up to 0.4 %."""
    return F.normalize(at_least_float32(features), dim=-1)


def contrastive_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    all_image_ND: Tensor,
    all_text_ND: Tensor,
    scale: Tensor,
    first_row: int = 0,
    same_BN: Tensor | None = None,
    duplicates: Duplicates = "negatives",
    negative_MD: Tensor | None = None,
) -> Tensor:
    """Symmetric softmax loss (InfoNCE; paper, figure 3) of one rank's pairs among all ranks' pairs.

    If all ranks hold the same number of pairs, the mean over ranks is the loss of the whole batch, and so is its
    gradient if ``all_image_ND`` and ``all_text_ND`` carry gradients back to their ranks
    (:func:`lit_clip.distributed.gather`). With one rank, pass the local features twice.

    Args:
        image_BD: this rank's image features, unit length.
        text_BD: their captions' features, unit length.
        all_image_ND: all ranks' image features in rank order.
        all_text_ND: all ranks' text features in the same order.
        scale: inverse temperature, ``exp(logit_scale)``.
        first_row: index of this rank's first pair among all; ``rank * B`` if all ranks hold B.
        same_BN: bool, True where two pairs are duplicates, the pair itself included; None: there are no duplicates.
        duplicates: how they count. ``negatives``: like any other pair (the paper). ``positives``: as positives, each
            with an equal share of the target (the "out" form of Khosla et al. 2020, equation 2). ``ignored``: not at
            all. An image with K captions in a batch is K pairs: as ``positives`` its target is 1/K for each of them, a
            term that counts K times, and it is K times a candidate for every caption.
        negative_MD: all ranks' features of hard negative captions, unit length: further wrong texts for every image
            (NegCLIP, Yuksekgonul et al. 2023).

    Returns:
        A scalar: half the sum of the cross-entropies image -> text and text -> image, float32 or wider.
    """
    with torch.autocast(image_BD.device.type, enabled=False):  # the exponentials need more than 8 or 11 bits
        image_BD, text_BD, all_image_ND, all_text_ND = map(
            at_least_float32, (image_BD, text_BD, all_image_ND, all_text_ND)
        )
        target_BN = torch.zeros(len(image_BD), len(all_text_ND), dtype=torch.bool, device=image_BD.device)
        target_BN.diagonal(first_row).fill_(True)
        total = image_BD.new_zeros(())
        for query_BD, candidate_ND in ((image_BD, all_text_ND), (text_BD, all_image_ND)):
            logits_BN = scale * query_BD @ candidate_ND.T
            if same_BN is not None and duplicates == "ignored":
                logits_BN = logits_BN.masked_fill(same_BN & ~target_BN, -torch.inf)
            lse_B = logits_BN.logsumexp(dim=1)
            if negative_MD is not None and query_BD is image_BD:
                lse_B = torch.logaddexp(lse_B, (scale * image_BD @ at_least_float32(negative_MD).T).logsumexp(dim=1))
            positive_BN = same_BN if same_BN is not None and duplicates == "positives" else target_BN
            positive_B = logits_BN.masked_fill(~positive_BN, 0).sum(dim=1) / positive_BN.sum(dim=1)
            total = total + (lse_B - positive_B).mean()
        return total / 2


def sigmoid_loss(
    image_BD: Tensor,
    all_text_ND: Tensor,
    scale: Tensor,
    bias: Tensor,
    first_row: int = 0,
    same_BN: Tensor | None = None,
    duplicates: Duplicates = "negatives",
) -> Tensor:
    """Sigmoid loss of SigLIP (Zhai et al. 2023, equation 1) of one rank's images with all ranks' texts.

    Each image with each text is a binary classification. As with :func:`contrastive_loss` the mean over ranks is the
    loss of the whole batch, and so is its gradient.

    Args:
        image_BD: as for :func:`contrastive_loss`, like the others.
        all_text_ND: all ranks' text features.
        scale: inverse temperature, ``exp(logit_scale)``.
        bias: ``logit_bias``.
        first_row: index of this rank's first pair among all.
        same_BN: duplicates.
        duplicates: how they count.

    Returns:
        A scalar: the sum of the B x N binary cross-entropies divided by B, float32 or wider.
    """
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, all_text_ND = at_least_float32(image_BD), at_least_float32(all_text_ND)
        logits_BN = scale * image_BD @ all_text_ND.T + bias
        target_BN, weight_BN = torch.zeros_like(logits_BN), None
        target_BN.diagonal(first_row).fill_(1)
        if same_BN is not None and duplicates == "positives":
            target_BN = same_BN.to(logits_BN.dtype)
        elif same_BN is not None and duplicates == "ignored":
            weight_BN = torch.where(same_BN, target_BN, 1)
        total = F.binary_cross_entropy_with_logits(logits_BN, target_BN, weight_BN, reduction="sum")
        return total / len(image_BD)
