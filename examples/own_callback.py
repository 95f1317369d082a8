"""Train with a callback of your own, which logs a number and an image of every step.

    python own_callback.py captions.csv
    lit-clip fit --data.train captions.csv --trainer.callbacks+=own_callback.WorstPair

Expect the curve `train/pair_similarity`, and the image of each step's least similar pair, in `tensorboard --logdir .`.
"""

import sys

from lightning.pytorch import Callback, Trainer
from torchvision.transforms.v2.functional import to_pil_image

from lit_clip import LitCLIP, callbacks
from lit_clip.callbacks.log_image import log_image
from lit_clip.datamodules import Captions


class WorstPair(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = pl_module.last_step  # this rank's unit features [B, D], detached; None if no rank had a pair
        if step is not None and trainer.is_global_zero and step.keys:
            similarity = (step.image * step.text).sum(dim=1)
            pl_module.log("train/pair_similarity", similarity.mean(), rank_zero_only=True, batch_size=len(similarity))
            log_image(trainer, "train/worst_pair", to_pil_image(batch.images[similarity.argmin()].cpu()))


if __name__ == "__main__":
    added = callbacks.defaults(WorstPair())
    trainer = Trainer(callbacks=added, max_epochs=2, log_every_n_steps=1, use_distributed_sampler=False)
    trainer.fit(LitCLIP("ViT-tiny-16-64"), Captions(sys.argv[1], batch_size=32))
