"""Callbacks that show the progress of the runs of ``tests/callbacks/test_preemption.py``, or interrupt them."""

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer


class ValidationMark(Callback):
    """Create a file for this rank in the current folder after the second validation batch."""

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            Path(f"validating_{trainer.global_rank}").touch()


class CtrlC(Callback):
    """Send SIGINT to this process after the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)
