"""One rank of the trainings in ``tests/training/lightning/test_fsdp.py``."""

import json
import os
import sys
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from callbacks import ActivationCheckpointing
from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.losses import Contrastive
from lit_clip.losses.loss import LossValue, Pairs
from lit_clip.models.tokenizer import CLIPTokenizer
from lit_clip.module import LitCLIP
from lit_clip.training.lightning.fsdp import FSDP
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from tests.helpers.ranks import CONFIG, PAIRS, make_batch

STRATEGIES = {"fsdp": FSDP, "hybrid": partial(FSDP, device_mesh=(2, 2))}


class _Batches(Dataset[CaptionBatch]):
    """This rank's rows of one fixed batch, repeated every step."""

    def __init__(self, steps: int, rank: int, world: int) -> None:
        size = PAIRS // world
        self.steps, self.rows = steps, slice(rank * size, (rank + 1) * size)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> CaptionBatch:
        return make_batch(self.rows)


class Tempered(Contrastive):
    """A loss with parameters: a scalar, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))
        self.weights = nn.Parameter(torch.ones(3))

    def forward(self, pairs: Pairs) -> LossValue:
        value = super().forward(pairs)
        return value._replace(loss=value.loss * self.factor * self.weights.mean())


class Data(LightningDataModule):
    """The same eight pairs every step, divided among the ranks."""

    steps_per_epoch = 3

    def train_dataloader(self) -> Any:
        trainer: Any = self.trainer
        batches = _Batches(self.steps_per_epoch, trainer.global_rank, trainer.world_size)
        return DataLoader(batches, batch_size=None)


def train(
    output: str,
    strategy: str,
    resume: str | None = None,
    checkpointed: bool = False,
    own_loss: bool = False,
    **options: Any,
) -> None:
    """Train with ``Trainer.fit``, three steps an epoch, and save a checkpoint."""
    settings = {"max_epochs": 1, "precision": "32-true", **options.pop("trainer", {})}
    torch.manual_seed(int(os.environ["RANK"]) if strategy in STRATEGIES else 0)  # FSDP must broadcast rank 0's weights
    if own_loss:
        options["loss"] = Tempered()
    # With a smaller eps, AdamW would amplify rounding errors of gradients that are zero.
    module = LitCLIP(
        CONFIG, **options, optimizer=partial(PaperAdamW, eps=1e-3), lr_scheduler=partial(WarmupCosine, warmup_steps=1)
    )
    module.model._tokenizer = CLIPTokenizer(16)  # only its padding id is read
    differentiated: list[bool] = []
    module.model.visual.register_forward_hook(lambda _, __, features: differentiated.append(features.requires_grad))
    trainer = Trainer(
        callbacks=[ActivationCheckpointing()] if checkpointed else [],
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=STRATEGIES[strategy]() if strategy in STRATEGIES else strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )
    trainer.fit(module, Data(), ckpt_path=resume)
    assert any(differentiated) != ("image" in options.get("freeze", {})), "a frozen encoder keeps no activations"
    trainer.save_checkpoint(output)


def train_all(jobs: str) -> None:
    """Run several trainings in the same processes; ``jobs`` is JSON of :func:`train`'s arguments."""
    for job in json.loads(jobs):
        train(**job)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.exit_process()
