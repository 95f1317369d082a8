"""Train with a loss of your own, one that learns its own temperature and logs it.

    python own_loss.py captions.csv
    lit-clip fit --data.train captions.csv --model.loss own_loss.Tempered --model.loss.initial 3

Expect the curves `train/loss` and `train/own_scale` beside the usual ones.
"""

import sys

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn

from lit_clip import LitCLIP, callbacks
from lit_clip.datamodules import Captions
from lit_clip.losses import Loss, LossValue


class Tempered(Loss):
    def __init__(self, initial: float = 2.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(initial))

    def whole_batch(self, pairs):
        scale = self.log_scale.exp()
        logits = scale * pairs.image @ pairs.text.T
        loss = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
        return LossValue(loss, {"own_scale": scale})


if __name__ == "__main__":
    module = LitCLIP("ViT-tiny-16-64", loss=Tempered(initial=3.0))
    trainer = Trainer(callbacks=callbacks.defaults(), max_epochs=2, log_every_n_steps=1, use_distributed_sampler=False)
    trainer.fit(module, Captions(sys.argv[1], batch_size=32))
