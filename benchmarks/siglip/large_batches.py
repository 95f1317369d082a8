"""SigLIP's loss as in batches of 32,768 pairs, computed from small ones."""

import torch.nn.functional as F
from torch import Tensor

from lit_clip.losses import Loss, WholeBatch

PRETRAINING_BATCH = 32_768  # of the published SigLIPs


class AsInLargeBatches(Loss):
    """Sigmoid loss of N pairs in which each wrong one counts 32,767 / (N - 1) times.

    Its mean over all batches of N among 32,768 pairs is their loss. Equal captions and images are ignored.
    """

    def whole_batch(self, pairs: WholeBatch) -> Tensor:
        assert pairs.bias is not None, "an architecture with logit_bias"
        logits = pairs.scale * pairs.image @ pairs.text.T + pairs.bias
        wrong = F.softplus(logits)[~pairs.same].sum() * (PRETRAINING_BATCH - 1) / (len(logits) - 1)
        return (F.softplus(-logits).diagonal().sum() + wrong) / len(logits)
