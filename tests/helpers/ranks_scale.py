"""What one rank of the tests of FSDP does; started by the ``ranks`` fixture as a process of its own."""

import json
import os
import sys
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset

from callbacks import ActivationCheckpointing
from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.module import LitCLIP
from lit_clip.training.fsdp import FSDP
from lit_clip.training.optim import AdamWSettings, WarmupCosineSettings
from tests.helpers.ranks import CONFIG, PAIRS, make_batch


class _Batches(Dataset[CaptionBatch]):
    """This rank's share of one fixed batch, step after step."""

    def __init__(self, steps: int, rank: int, world: int) -> None:
        size = PAIRS // world
        self.steps, self.rows = steps, slice(rank * size, (rank + 1) * size)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> CaptionBatch:
        return make_batch(self.rows)


class Data(LightningDataModule):
    """Eight pairs over all ranks, the same every step."""

    steps_per_epoch = 3

    def train_dataloader(self) -> Any:
        trainer: Any = self.trainer
        batches = _Batches(self.steps_per_epoch, trainer.global_rank, trainer.world_size)
        return DataLoader(batches, batch_size=None)


def train(output: str, strategy: str, resume: str | None = None, checkpointed: bool = False, **options: Any) -> None:
    """Three steps an epoch by ``Trainer.fit``; the checkpoint is written by rank 0."""
    settings = {"max_epochs": 1, "precision": "32-true", **options.pop("trainer", {})}
    torch.manual_seed(int(os.environ["RANK"]) if strategy == "fsdp" else 0)  # weights are those of rank 0
    # AdamW divides what is zero but for rounding by itself, unless eps is larger than rounding.
    module = LitCLIP(CONFIG, **options, optimizer=AdamWSettings(eps=1e-3), lr_scheduler=WarmupCosineSettings(1))
    trainer = Trainer(
        callbacks=[ActivationCheckpointing()] if checkpointed else [],
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=FSDP() if strategy == "fsdp" else strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )
    trainer.fit(module, Data(), ckpt_path=resume)
    trainer.save_checkpoint(output)


def train_all(jobs: str) -> None:
    """Several runs in the same processes; JSON of :func:`train`'s arguments."""
    for job in json.loads(jobs):
        train(**job)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.leave()
