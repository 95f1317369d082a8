"""A training run in its own process that may be killed at a step; ``tests/training/test_resume.py`` starts it."""

import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from callbacks import TrainingMonitor, defaults
from datamodules import Captions
from lit_clip.batch import CaptionBatch
from lit_clip.errors import InputError
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, TimmConfig
from lit_clip.module import LitCLIP
from lit_clip.training.lightning.checkpoint_io import WholeCheckpointIO, newest_checkpoint
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine


class Run(NamedTuple):
    """Options of a run.

    Attributes:
        folder: for everything that the run writes.
        table: of the pairs.
        world: number of ranks.
        workers: data workers of each rank.
        batch_size: pairs per step on each rank.
        epochs: of the whole run.
        every: steps between checkpoints.
        kill: the step during which the run is killed; None: it ends by itself.
        resume: whether it resumes from the newest checkpoint in the folder.
        name: of its logs and of its file of samples.
    """

    folder: str
    table: str
    world: int = 1
    workers: int = 0
    batch_size: int = 4
    epochs: int = 3
    every: int = 1
    kill: int | None = None
    resume: bool = False
    name: str = "run"


class _Recorder(Callback):
    """Record each step's samples before they are trained on, and kill the process at the step to kill."""

    def __init__(self, run: Run, rank: int) -> None:
        self.run, self.path = run, Path(run.folder, f"{run.name}_{rank}.txt")

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: CaptionBatch, batch_idx: int) -> None:
        digest = int(batch.images.long().sum())  # the pixels, and so the augmentation
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{trainer.global_step} {trainer.current_epoch} {digest} {' '.join(batch.keys)}\n")
        if self.run.kill is not None and trainer.global_step == self.run.kill:
            os.kill(os.getpid(), signal.SIGKILL)


def train(run: Run, rank: int, port: int) -> None:
    """Train as one rank of a run; rank 0 saves the final weights as ``<name>.pt``."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in any other process on Linux
    if run.world > 1:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "GROUP_RANK": 0,
            "WORLD_SIZE": run.world,
            "LOCAL_WORLD_SIZE": run.world,
        }
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({key: str(value) for key, value in {**place, **address}.items()})
    seed_everything(1, verbose=False)
    image = TimmConfig(timm="vit_tiny_patch16_224", image_size=32, options={"depth": 1, "proj_drop_rate": 0.3})
    text = TextTransformerConfig(context_length=16, width=16, layers=1, heads=1)  # small checkpoints
    module = LitCLIP(
        CLIPConfig(embed_dim=16, image=image, text=text),
        optimizer=partial(PaperAdamW, lr=1e-3),
        lr_scheduler=partial(WarmupCosine, warmup_steps=2),
    )
    data = Captions(run.table, run.table, batch_size=run.batch_size, num_workers=run.workers)
    saving = ModelCheckpoint(
        f"{run.folder}/checkpoints", "last", every_n_train_steps=run.every, enable_version_counter=False
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=run.world,
        strategy="ddp" if run.world > 1 else "auto",
        max_epochs=run.epochs,
        use_distributed_sampler=False,
        check_val_every_n_epoch=2,
        log_every_n_steps=1,
        callbacks=defaults(_Recorder(run, rank), TrainingMonitor(), saving),
        plugins=[WholeCheckpointIO()],
        logger=CSVLogger(run.folder, run.name, version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    newest = newest_checkpoint([Path(run.folder)]) if run.resume else None
    assert bool(newest) == run.resume
    try:
        trainer.fit(module, data, ckpt_path=newest, weights_only=True)
    except InputError as error:
        Path(run.folder, f"{run.name}.error").write_text(str(error), encoding="utf-8")
        os._exit(1)
    if rank == 0:
        torch.save(module.model.state_dict(), f"{run.folder}/{run.name}.pt")
    os._exit(0)  # gloo's threads may abort a regular exit of the interpreter
