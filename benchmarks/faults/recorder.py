"""Record the samples of each step, so that the runs of ``benchmarks/faults`` can be compared and hit at a step."""

import os
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_clip.batch import CaptionBatch

PREFIX = "LIT_CLIP_FAULTS_RECORD"  # environment variable: path of the record without the rank
BUSY = 30.0  # seconds that a step lasts that finds the file ``.busy`` beside its rank's record, which it removes
PACE = 0.03  # seconds added to each step, so that a fault from outside can hit any part of it


class Recorder(Callback):
    """Append a line for each step: its number, the epoch, the sum of the pixels, and the samples' keys."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.path = Path(f"{os.environ[PREFIX]}_{trainer.global_rank}.txt")
        self.path.with_suffix(".pid").write_text(str(os.getpid()))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: CaptionBatch, batch_idx: int
    ) -> None:
        digest = int(batch.images.long().sum())  # the pixels, and so the augmentation
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{trainer.global_step} {trainer.current_epoch} {digest} {' '.join(batch.keys)}\n")
        busy = self.path.with_suffix(".busy")
        pause = BUSY if busy.exists() else PACE
        busy.unlink(missing_ok=True)
        time.sleep(pause)
