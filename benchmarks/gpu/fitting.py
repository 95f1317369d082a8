"""``Trainer.fit`` on batches in memory, timed without waits between logged steps."""

import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

from device_speed import mark, seconds_between
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, Dataset
from train_step import Pairs

import callbacks
from gpu.setting import Setting
from lit_clip import LitCLIP
from lit_clip.batch import CaptionBatch


class Repeated(Dataset[CaptionBatch]):
    """A few batches, again and again."""

    def __init__(self, batches: Sequence[CaptionBatch], steps: int) -> None:
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> CaptionBatch:
        return self.batches[index % len(self.batches)]


def _unchanged(batch: Any) -> Any:
    return batch


def as_batch(pairs: Pairs, pin: bool) -> CaptionBatch:
    """Return a batch as a data module's loader does, in pinned memory if ``pin``."""
    images, tokens = pairs.images.cpu(), pairs.trimmed.cpu()
    if pin:
        images, tokens = images.pin_memory(), tokens.pin_memory()
    keys = [str(number) for number in range(len(images))]
    return CaptionBatch(images, tokens, keys, lengths=pairs.lengths)


def fit(setting: Setting, module: LitCLIP, data: Any, steps: int, *own: Callback, **options: Any) -> Trainer:
    """Train for some steps on a sequence of batches or a data module, with the callbacks of every run but the plan.

    Args:
        setting: how to measure.
        module: is trained.
        data: batches in memory, or a data module.
        steps: optimiser steps.
        own: further callbacks.
        options: of the trainer.
    """
    if isinstance(data, Sequence):
        data = DataLoader(Repeated(data, steps), batch_size=None, collate_fn=_unchanged)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            **{
                "accelerator": setting.device,
                "devices": 1,
                "max_steps": steps,
                "precision": "bf16-mixed",
                "callbacks": [one for one in callbacks.defaults(*own) if not isinstance(one, callbacks.PrintPlan)],
                "log_every_n_steps": 20,
                "limit_val_batches": 0,
                "num_sanity_val_steps": 0,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
                "default_root_dir": folder,
                **options,
            }
        )
        trainer.fit(module, data)
    return trainer


class Timed(Callback):
    """Measure the seconds of a step: the median over blocks of steps, with events between them and no waits.

    Args:
        block: steps of a block; the first block warms up.
    """

    def __init__(self, block: int) -> None:
        self.block, self.marks = block, []

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step % self.block == 0:
            self.marks.append(mark(trainer.strategy.root_device))

    def seconds(self) -> float:
        """Return the seconds of a step; to be called after training."""
        return statistics.median(
            seconds_between(one, other) / self.block for one, other in zip(self.marks, self.marks[1:], strict=False)
        )
