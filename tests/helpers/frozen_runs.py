"""Short trainings of partly frozen towers, with and without stored features; also one rank of several, as a program."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from callbacks import FrozenFeatures, HardBatches, PrintPlan, defaults
from datamodules import BatchOptions, Captions
from lit_clip import distributed
from lit_clip.batch import CaptionBatch
from lit_clip.losses import Contrastive, Sum
from lit_clip.models.config import (
    CLIPConfig,
    HuggingFaceTextConfig,
    ResNetConfig,
    TextTransformerConfig,
    TimmConfig,
    VisionTransformerConfig,
)
from lit_clip.models.finetuning import Freeze, UnlockLast
from lit_clip.module import LitCLIP
from lit_clip.tools import stored_rows
from lit_clip.tools.stored_rows import StoredRows
from lit_clip.training.optimizers import PaperAdamW
from lit_clip.training.schedules import WarmupCosine
from lit_clip.training.teacher import Distillation
from tests.helpers.towers import shaken

OURS = TextTransformerConfig(context_length=16, width=16, layers=2, heads=1)
FREEZES: dict[str, Freeze] = {
    "all": Freeze("all", "all"),
    "unlock_last 0": Freeze(UnlockLast(0), UnlockLast(0)),
    "unlock_last 1": Freeze(UnlockLast(1), UnlockLast(1)),
    "image": Freeze("all", None),
    "text": Freeze(None, UnlockLast(0)),
    "nothing": Freeze(),
}


def config_of(towers: str) -> CLIPConfig:
    """Return a tiny architecture: ``vit``, ``coca``, ``resnet``, or timm's with a folder's Hugging Face encoder."""
    if towers in ("vit", "coca"):
        text = replace(OURS, pool="class") if towers == "coca" else OURS
        return CLIPConfig(16, VisionTransformerConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1), text)
    if towers == "resnet":
        return CLIPConfig(16, ResNetConfig(layers=(1, 1, 1, 1), width=8, image_size=32), OURS)
    return CLIPConfig(16, TimmConfig("test_efficientnet"), HuggingFaceTextConfig(towers, context_length=16))


class Run(NamedTuple):
    """Options of a run.

    Attributes:
        folder: for everything that the run writes.
        table: of the pairs.
        towers: see :func:`config_of`.
        freeze: of ``FREEZES``.
        cache: folder of the stored features; empty: train plainly.
        epochs: of the run.
        model: further options of ``LitCLIP``.
        data: further options of ``Captions``.
        trainer: further options of the trainer.
        augmentations: fixed versions of each image.
        teachers: checkpoints and what is distilled of them, beside the contrastive loss.
        stop_at: the step at which the run stops itself after a checkpoint.
        resume: whether to resume from that checkpoint.
    """

    folder: str
    table: str
    towers: str = "vit"
    freeze: str = "unlock_last 0"
    cache: str = ""
    epochs: int = 2
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    augmentations: int = 0
    teachers: Sequence[tuple[str, Any]] = ()
    stop_at: int | None = None
    resume: bool = False


class Recorder(Callback):
    """Record each step's loss, samples and kind of images."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.losses: list[float] = []
        self.samples: list[tuple[list[str], list[str]]] = []
        self.decoded = False
        self.validations: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: CaptionBatch, batch_idx: int
    ) -> None:
        step: Any = pl_module.last_step
        shards = distributed.shards_of(len(batch.images))[0]
        self.losses.append(float(distributed.sum_over_ranks(step.loss.clone(), pl_module.device)) / shards.world)
        self.samples.append((batch.keys, list(batch.captions)))
        self.decoded |= batch.images.dtype == torch.uint8
        if trainer.global_step == self.run.stop_at:
            trainer.save_checkpoint(Path(self.run.folder, "stopped.ckpt"))
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validations.append(float(trainer.callback_metrics["val/loss"]))


def fit(run: Run, *callbacks: Callback) -> tuple[Recorder, LitCLIP]:
    """Train."""
    seed_everything(1, verbose=False)
    # With a smaller eps, AdamW would amplify rounding errors of gradients that are nearly zero.
    rate = {"optimizer": partial(PaperAdamW, lr=3e-3, eps=1e-4), "lr_scheduler": partial(WarmupCosine, warmup_steps=1)}
    loss = Sum([Contrastive(), *(Distillation(*each) for each in run.teachers)]) if run.teachers else None
    module = LitCLIP(config_of(run.towers), freeze=FREEZES[run.freeze], **{"loss": loss, **rate, **run.model})
    shaken(module.model)
    data = Captions(run.table, run.table, **{"batch_size": 8, "num_workers": 0, "augmentation": [], **run.data})
    recorder = Recorder(run)
    storing = [FrozenFeatures(run.cache, run.augmentations)] if run.cache else []
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "max_epochs": run.epochs,
        **run.trainer,
    }
    used = [each for each in defaults(*storing, *callbacks, recorder) if not isinstance(each, PrintPlan)]
    trainer = Trainer(default_root_dir=run.folder, callbacks=used, **options)
    trainer.fit(module, data, ckpt_path=f"{run.folder}/stopped.ckpt" if run.resume else None, weights_only=True)
    return recorder, module


def killed_at_second_batch(run: Run, sent: signal.Signals) -> None:
    """Train, and get a signal before the second batch of images is stored."""
    write = StoredRows.write
    stored_rows.SECONDS_BETWEEN_MARKS = 0.0

    def killing(self: StoredRows, rows: Any, values: Any) -> None:
        if self.state().any():
            os.kill(os.getpid(), sent)
        write(self, rows, values)

    StoredRows.write = killing
    fit(run)


def some(output: str, runs: str) -> None:
    """Run one rank of some runs, one after the other, and write what the first rank recorded."""
    found = []
    for options in json.loads(runs):
        recorder, _ = fit(Run(**options))
        found.append({"losses": recorder.losses, "validations": recorder.validations, "decoded": recorder.decoded})
    if distributed.rank_and_world()[0] == 0:
        Path(output).write_text(json.dumps(found), encoding="utf-8")


def hard_batches(folder: str, ranks: str, table: str) -> None:
    """Train with hard batches, four pairs a step on all ranks, and write the samples of each rank's steps."""
    world = int(ranks)
    trainer = {"devices": world, "strategy": "ddp" if world > 1 else "auto"}
    data = {"batches": BatchOptions(hard=0.5), "batch_size": 4 // world}
    recorder, _ = fit(Run(folder, table, freeze="nothing", data=data, trainer=trainer), HardBatches())
    name = f"{world}-{distributed.rank_and_world()[0]}.json"
    Path(folder, name).write_text(json.dumps(recorder.samples), encoding="utf-8")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    distributed.exit_process()
