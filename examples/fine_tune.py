"""Fine-tune published weights on a table: all but the last block of each encoder is frozen.

    python fine_tune.py ViT-B-32:openai captions.csv

The first argument is anything that `lit_clip.load_model` opens, a checkpoint of yours too. Expect two tables of
validation metrics, before and after; `fine_tuned.ckpt` is used like the weights it came from.
"""

import sys
from functools import partial

from lightning.pytorch import Trainer

from lit_clip import LitCLIP, callbacks
from lit_clip.datamodules import Captions
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine

if __name__ == "__main__":
    weights, table = sys.argv[1:]
    module = LitCLIP(
        pretrained=weights,
        freeze=Freeze(image=UnlockLast(1), text=UnlockLast(1)),
        optimizer=partial(PaperAdamW, lr=1e-5),
        lr_scheduler=partial(WarmupCosine, warmup_steps=10),
    )
    data = Captions(table, batch_size=32)
    trainer = Trainer(callbacks=callbacks.defaults(), max_epochs=2, log_every_n_steps=1, use_distributed_sampler=False)
    trainer.validate(module, data)
    trainer.fit(module, data)
    trainer.validate(module, data)
    trainer.save_checkpoint("fine_tuned.ckpt", weights_only=True)
