"""Contrastive loss of places: an image is as similar to a text as its most similar places.

Shapes: B images of this rank, N texts of all ranks, P places of an image, D embedding dimension.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_clip.distributed import RankCounts, gather

SHARPNESS = 20.0  # of the soft maximum; between the mean of the cosines (0) and the highest (infinity)
COSINES = 2**24  # most cosines of places and texts that exist at once


def place_similarities(places_BPD: Tensor, text_ND: Tensor) -> Tensor:
    """Return soft maxima over an image's places of their cosines with texts, ``[B, N]``, from unit features.

    Computed for a block of images at a time, and again in the backward pass.
    """
    rows = max(1, COSINES // (places_BPD.shape[1] * len(text_ND)))
    blocks = places_BPD.split(rows)
    return torch.cat([checkpoint(_soft_maxima, block, text_ND, use_reentrant=False) for block in blocks])


def _soft_maxima(places_BPD: Tensor, text_ND: Tensor) -> Tensor:
    cosines_BPN = places_BPD @ text_ND.T
    return ((SHARPNESS * cosines_BPN).logsumexp(dim=1) - math.log(places_BPD.shape[1])) / SHARPNESS


def similarity_loss(logits_BN: Tensor, same_BN: Tensor, ranks: RankCounts) -> Tensor:
    """Symmetric softmax loss of any logits of this rank's images with all ranks' texts; duplicates are ignored.

    The mean over ranks is the loss of all pairs, and so is its gradient.

    Args:
        logits_BN: in the order of the pairs.
        same_BN: bool, True where two pairs are duplicates, the pair itself included.
        ranks: number of pairs of each rank.
    """
    columns = torch.arange(ranks.total, device=logits_BN.device)
    own_BN = columns == columns[ranks.mine, None]
    logits_BN = logits_BN.masked_fill(same_BN & ~own_BN, -math.inf)
    own_B = logits_BN[:, ranks.mine].diagonal()
    images = logits_BN.logsumexp(dim=1) - own_B
    of_ranks = gather(logits_BN.logsumexp(dim=0)[None], RankCounts(ranks.rank, (1,) * ranks.world))  # [ranks, N]
    texts = of_ranks.logsumexp(dim=0)[ranks.mine] - own_B
    return (images + texts).sum() * ranks.world / (2 * ranks.total)
