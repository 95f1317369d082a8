"""One rank of the trainings with batches whose pairs were all or partly skipped."""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset

from callbacks import ActivationCheckpointing
from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.losses import Contrastive
from lit_clip.losses.contrastive import Duplicates
from lit_clip.models.config import ResNetConfig
from lit_clip.module import LitCLIP
from lit_clip.training.lightning.fsdp import FSDP
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.helpers.ranks import CONFIG, PAIRS, make_batch

# Row ranges of the first and the second rank in each step; missing rows count as skipped.
STEPS = (((0, 4), (0, 0)), ((0, 0), (0, 0)), ((0, 0), (2, 8)), ((0, 7), (7, 8)), ((0, 4), (4, 8)))
TEXT = dataclasses.replace(CONFIG.text, vocab_size=49408)  # the real tokenizer's, which a placeholder caption needs
PLAIN = dataclasses.replace(CONFIG, text=TEXT)
BATCH_NORM = dataclasses.replace(PLAIN, image=ResNetConfig(layers=(1, 1, 1, 1), width=8, image_size=32))


def batch_of(rows: tuple[int, int]) -> CaptionBatch:
    """Return some of the pairs; the others are listed as skipped."""
    batch = make_batch(slice(*rows))
    if rows[0] == rows[1]:
        batch = CaptionBatch(batch.images, torch.zeros(0, 1, dtype=torch.long), [])
    skipped = [(f"row {row}", "broken image") for row in range(PAIRS) if not rows[0] <= row < rows[1]]
    return batch._replace(skipped=skipped)


class _Steps(Dataset[CaptionBatch]):
    def __init__(self, rank: int, world: int, steps: tuple[Any, ...] = STEPS) -> None:
        self.rank, self.world, self.steps = rank, world, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> CaptionBatch:
        ranks = self.steps[step]
        if self.world > 1:
            return batch_of(ranks[self.rank])
        # A single rank has the pairs of both ranks, which are adjacent rows.
        filled = [rows for rows in ranks if rows[0] < rows[1]] or [(0, 0)]
        return batch_of((filled[0][0], filled[-1][1]))


class Data(LightningDataModule):
    """Training batches of ``STEPS`` and two validation batches."""

    def _loader(self, *steps: Any) -> Any:
        trainer: Any = self.trainer
        return DataLoader(_Steps(trainer.global_rank, trainer.world_size, *steps), batch_size=None)

    def train_dataloader(self) -> Any:
        return self._loader()

    def val_dataloader(self) -> Any:
        return self._loader((((0, 3), (0, 0)), ((0, 0), (3, 8))))


def train(
    output: str,
    world: int,
    strategy: str,
    batch_norm: bool = False,
    checkpointed: bool = False,
    duplicates: Duplicates = "negatives",
    **options: Any,
) -> None:
    """Train one epoch, validate, and write the checkpoint and the metrics."""
    torch.manual_seed(0)
    # With a smaller eps, AdamW would amplify rounding errors of gradients that are zero.
    module = LitCLIP(
        BATCH_NORM if batch_norm else PLAIN,
        **options,
        loss=Contrastive(duplicates),
        optimizer=partial(PaperAdamW, eps=1e-3),
        lr_scheduler=partial(WarmupCosine, warmup_steps=1),
    )
    trainer = Trainer(
        callbacks=[ActivationCheckpointing()] if checkpointed else [],
        accelerator="cpu",
        devices=world,
        strategy=FSDP() if strategy == "fsdp" else strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, Data())
    trainer.save_checkpoint(output)
    if trainer.is_global_zero:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        Path(output).with_suffix(".json").write_text(json.dumps({"steps": trainer.global_step, **metrics}))


def train_all(jobs: str) -> None:
    """Run several trainings in the same processes; ``jobs`` is JSON of :func:`train`'s arguments."""
    for job in json.loads(jobs):
        train(**job)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.exit_process()
