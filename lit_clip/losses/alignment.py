"""A loss on the distance of pairs."""

import torch
from torch import Tensor

from lit_clip.losses.loss import Loss, Pairs


class Alignment(Loss):
    """Squared distance between the unit features of a pair (Wang & Isola 2020); other pairs do not matter.

    It suits features of which one side is given, as with :class:`datamodules.ParallelSentences`; if both are learned,
    all become equal.
    """

    def forward(self, pairs: Pairs) -> Tensor:
        with torch.autocast(pairs.image.device.type, enabled=False):
            distance = (pairs.image - pairs.text).square().sum()
        return distance / max(1, len(pairs.image)) * pairs.ranks.weight
