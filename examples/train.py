"""Train a small CLIP on a table of images and captions, and use it.

    python train.py captions.csv photo.png "a photo of a dog" "a photo of the sea"

The table has the columns `image` (paths) and `caption`. A tenth of the images is not trained on: every epoch ends with
their loss and retrieval metrics. The last lines are the similarities of `photo.png` and the captions, from -1 to 1.
"""

import sys
from functools import partial

from lightning.pytorch import Trainer

import lit_clip
from lit_clip import LitCLIP, callbacks
from lit_clip.datamodules import Captions
from lit_clip.training.schedules import WarmupCosine

if __name__ == "__main__":
    table, image, *captions = sys.argv[1:]
    module = LitCLIP("ViT-tiny-16-64", lr_scheduler=partial(WarmupCosine, warmup_steps=10))
    trainer = Trainer(callbacks=callbacks.defaults(), max_epochs=3, log_every_n_steps=1, use_distributed_sampler=False)
    trainer.fit(module, Captions(table, batch_size=32))
    trainer.save_checkpoint("trained.ckpt", weights_only=True)

    model = lit_clip.load_model("trained.ckpt")
    for caption, similarity in zip(captions, model.similarity(image, captions)[0], strict=True):
        print(f"{similarity:.3f} {caption}")
