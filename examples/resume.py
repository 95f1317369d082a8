"""Stop a run at any time and resume it: the same samples, random numbers and weights follow.

    python resume.py captions.csv 1   # an epoch
    python resume.py captions.csv 2   # another one: the weights of an uninterrupted run, bit for bit on CPU

SIGTERM, as from a cluster, saves a checkpoint in the middle of an epoch, and the same command goes on from there.
Ctrl-C saves nothing: the same command then goes on from the end of the last epoch.
"""

import sys
from functools import partial
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_clip import LitCLIP, callbacks
from lit_clip.datamodules import Captions
from lit_clip.training.schedules import WarmupConstant

if __name__ == "__main__":
    table, epochs = sys.argv[1], int(sys.argv[2])
    seed_everything(0)
    module = LitCLIP("ViT-tiny-16-64", lr_scheduler=partial(WarmupConstant, warmup_steps=10))
    folder = Path("runs/resumed")
    added = callbacks.defaults(ModelCheckpoint(folder, save_last=True))
    trainer = Trainer(callbacks=added, max_epochs=epochs, log_every_n_steps=1, use_distributed_sampler=False)
    last = folder / "last.ckpt"
    trainer.fit(module, Captions(table, batch_size=32), ckpt_path=last if last.exists() else None)
