"""What a run of ``tests/callbacks/test_preemption.py`` has on board to tell the test how far it is."""

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer


class ValidationMark(Callback):
    """Leaves a file of this rank in the current folder when the second validation batch is done."""

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            Path(f"validating_{trainer.global_rank}").touch()


class CtrlC(Callback):
    """Interrupts this process behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)
