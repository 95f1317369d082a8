"""Encode into feature files, on any number of processes, and resume what an interrupted run has left.

The items are cut into batches, and batches, not items, are dealt to the ranks: batches are the same on any number of
ranks, and so are the bytes of the result.
"""

import os
import signal
import time
from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_clip import distributed
from lit_clip.embedding.feature_files import FeatureTable, Identity
from lit_clip.embedding.parts import Arrays, Parts
from lit_clip.embedding.precision import Precision
from lit_clip.embedding.reading import (
    Batches,
    Encode,
    EncoderBatch,
    ImageBatches,
    ImageRows,
    TextBatches,
    UnreadableRow,
    check_finite,
    encode_batch,
    image_features,
    in_batches,
    row_means,
)
from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.secrets import without_secrets
from lit_clip.tools.atomic import replacing
from lit_clip.tools.console import progress, stderr
from lit_clip.tools.images import FIX_HINT, OnError, or_skip
from lit_clip.tools.shares import Share
from lit_clip.tools.workers import loader
from lit_clip.training.kept_memory import keep_freed_memory
from lit_clip.training.lightning.rank_watchdog import watch_started_ranks
from lit_clip.training.lightning.signals import replace_signals

SECONDS_BETWEEN_PARTS = 10  # of work that a killed run can lose


Finished = list[tuple[EncoderBatch, np.ndarray]]  # batches without their inputs, and what was computed of each


class UnreadableError(InputError):
    """An image cannot be read and may not be skipped; raised by the first rank after all ranks have ended."""


@dataclass(frozen=True)
class EncodingSettings:
    """How features are computed; only ``batch_size`` and ``precision`` affect the result, by rounding.

    Args:
        batch_size: images, and then captions, that each process encodes at once.
        num_workers: processes that decode images, for each process.
        devices: number of processes on each machine, one per device.
        accelerator: cpu, gpu, mps, ...
        precision: of the encoders; 32-true is exact, bf16-mixed and on a GPU 16-mixed are faster.
        on_error: error ends the run at an image that cannot be read; skip leaves it out and lists it.
    """

    flat: ClassVar[bool] = True  # its options are typed without its name
    batch_size: int = 64
    num_workers: int = 4
    devices: int = 1
    accelerator: str = "auto"
    precision: Precision = "32-true"
    on_error: OnError = "error"


@dataclass(frozen=True)
class EncodingTask:
    """Items to encode."""

    identities: Sequence[Identity]  # what finished features are found by
    read: Callable[[Batches, Path | None], Dataset[EncoderBatch]]  # it stops reading once the file given exists
    encode: Encode  # inputs on the device -> features
    several: bool = False  # whether an item may have many images; then it is a batch of its own
    must_be_finite: bool = True  # whether NaN or infinite features end the run; evaluations report them

    def step(self, batch: EncoderBatch, device: torch.device, batch_size: int) -> Tensor:
        """Return the features of a batch of N rows, ``[N, ...]``."""
        features = row_means(encode_batch(batch, self.encode, device, batch_size), batch.counts)
        if batch.rows and self.must_be_finite:
            check_finite(features, self.identities[batch.rows[0]][0])
        return features

    def part(self, finished: Finished) -> Arrays:
        """Return the arrays in which finished batches are kept."""
        identities = [self.identities[row] for batch, _ in finished for row in batch.rows]
        return FeatureTable(identities, np.concatenate([features for _, features in finished])).arrays()


def image_task(
    model: CLIP, images: ImageRows, identities: Sequence[Identity], features: Callable[[CLIP], Encode] = image_features
) -> EncodingTask:
    """Unit features of images, which have distinct identities, or others."""

    def read(batches: Batches, stop: Path | None) -> ImageBatches:
        return ImageBatches(images, batches, model.preprocessing, stop=stop)

    return EncodingTask(identities, read, features(model))


def text_task(model: CLIP, texts: Sequence[str], identities: Sequence[Identity]) -> EncodingTask:
    """Unit features of texts, which have distinct identities."""
    return EncodingTask(
        identities,
        lambda batches, _: TextBatches(texts, batches, model.tokenizer),
        lambda tokens: model.encode_text(tokens, normalize=True).float(),
    )


def encode(
    model: CLIP,
    task: EncodingTask,
    parts: Parts,
    settings: EncodingSettings,
    known: Container[Identity] = (),
    title: str = "encoding",
) -> list[UnreadableRow] | None:
    """Encode into ``parts`` all items that are neither there nor ``known``; see :func:`compute`."""
    identities = task.identities
    finished = {identity for table in parts.read(FeatureTable.of) for identity in table.identities}
    batches = remaining(
        len(identities),
        1 if task.several else settings.batch_size,
        lambda row: identities[row] in finished or identities[row] in known,
        parts.share,
    )
    return compute(model, task, batches, parts, settings, title)


def remaining(rows: int, batch_size: int, done: Callable[[int], bool], share: Share = Share()) -> Batches:  # noqa: B008
    """Cut all rows into batches, the same however many are done, and leave those and other jobs' shares out."""
    batches: list[Sequence[int]] = []
    for number, batch in enumerate(in_batches(range(rows), batch_size)):
        missing = [row for row in batch if not done(row)] if share.has(number) else []
        if missing:  # a range takes less memory than a list
            batches.append(batch if len(missing) == len(batch) else missing)
    return batches


def compute(
    model: CLIP, task: EncodingTask, batches: Batches, parts: Parts, settings: EncodingSettings, title: str
) -> list[UnreadableRow] | None:
    """Encode batches into ``parts``; an interruption leaves the finished ones there.

    Returns:
        On rank 0 the rows that could not be read; None on other ranks, which have nothing left to do.
    """
    if not batches:
        return None if make_trainer([], settings).global_rank else []
    writer = PartWriter(task, parts, settings.on_error, title)
    trainer = make_trainer([writer], settings)
    try:
        trainer.predict(Encoder(model, task, batches, parts.stop, settings), return_predictions=False)
    except SystemExit:  # Lightning exits on Ctrl-C
        if not trainer.interrupted or trainer.global_rank:
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning has disabled it
        raise KeyboardInterrupt("what is finished is kept; run the same command again to resume") from None
    unreadable = sorted(distributed.gather_objects(writer.unreadable))  # every rank has written its last part
    if trainer.global_rank:
        return None
    if unreadable and settings.on_error == "error":
        parts.end()
        raise UnreadableError(or_skip(unreadable[0].message, "--on_error skip"))
    return unreadable


def start_processes(settings: EncodingSettings) -> torch.device:
    """Start the other processes, or join them, unless that has been done; return this one's device."""
    trainer = make_trainer([], settings)
    strategy = trainer.strategy
    if strategy.launcher is not None and trainer.world_size > 1:
        strategy.launcher.launch(strategy.setup_environment, trainer=trainer)
    else:
        strategy.setup_environment()
    return strategy.root_device


def machines() -> int:
    """Return on how many machines torchrun or SLURM has started this run's processes; 1 without them."""
    if TorchElasticEnvironment.detect():
        return int(os.environ.get("GROUP_WORLD_SIZE", 1))
    return int(os.environ.get("SLURM_NNODES", 1)) if SLURMEnvironment.detect() else 1


def make_trainer(callbacks: list[Callback], settings: EncodingSettings) -> Trainer:
    """Return a trainer that only computes: no logs, checkpoints or progress bar."""
    nodes = machines()
    try:
        trainer = Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=nodes,
            strategy="ddp" if settings.devices * nodes != 1 else "auto",
            precision=settings.precision,
            use_distributed_sampler=False,  # the encoder deals the batches, each once
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # of SLURM's variables the last
        raise InputError(f"devices or accelerator: {error}") from error
    watch_started_ranks(trainer)
    keep_freed_memory(trainer)
    replace_signals(trainer)  # Lightning's own would wait for the other ranks in the handler
    return trainer


class Encoder(LightningModule):
    """The module that ``Trainer.predict`` runs; see :func:`compute`, and :class:`Parts` for ``stop``."""

    def __init__(
        self, model: CLIP, task: EncodingTask, batches: Batches, stop: Path, settings: EncodingSettings
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank may have no batch
        self.model, self.task, self.batches, self.stop, self.settings = model, task, batches, stop, settings

    @property
    def my_batches(self) -> Batches:
        """This rank's share."""
        return self.batches[self.trainer.global_rank :: self.trainer.world_size]

    def predict_dataloader(self) -> DataLoader[Any]:
        batches = self.task.read(self.my_batches, self.stop)
        return loader(batches, self.settings.num_workers, pin_memory=self.device.type == "cuda")

    def predict_step(self, batch: EncoderBatch, batch_idx: int) -> Tensor:
        return self.task.step(batch, self.device, self.settings.batch_size)


class PartWriter(Callback):
    """Writes finished batches every few seconds, at the end and when the run is interrupted."""

    def __init__(self, task: EncodingTask, parts: Parts, on_error: OnError, title: str) -> None:
        self.task, self.parts, self.on_error, self.title = task, parts, on_error, title
        self.unreadable: list[UnreadableRow] = []  # this rank's
        self._finished: Finished = []
        self._written = time.monotonic()
        self._bar = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.parts.start()
        trainer.strategy.barrier()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Encoder)
        self._written = time.monotonic()
        total = sum(len(batch) for batch in pl_module.my_batches)
        share = f" (process 1 of {trainer.world_size})" if trainer.world_size > 1 else ""
        bar = progress(f"{self.title}{share}", total, enabled=trainer.is_global_zero)
        self._advance = self._bar.enter_context(bar)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor,
        batch: EncoderBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch.rows:  # the width of an empty batch's features is unknown
            self._finished.append((batch._replace(inputs=None, texts=None), outputs.cpu().numpy()))
        self.unreadable += batch.unreadable
        if batch.unreadable and self.on_error == "error":
            self.parts.stop.touch()
        self._advance(len(batch.rows) + len(batch.unreadable))
        if time.monotonic() - self._written > SECONDS_BETWEEN_PARTS:
            self._write()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.close()
        self._write()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_predict_end(trainer, pl_module)

    def _write(self) -> None:
        if self._finished:
            self.parts.add(self.task.part(self._finished), self._finished[0][0].rows[0])
        self._finished, self._written = [], time.monotonic()


def check_complete(done: int, total: int, unreadable: Sequence[UnreadableRow], items: str = "images") -> None:
    """Raise :class:`InputError` unless every item is done or known to be unreadable, and one is done."""
    lost = total - done - len(unreadable)
    require(
        lost == 0,
        f"the results of {lost} of {total} {items} are gone: another run with the same output has ended meanwhile; "
        "run this one again",
    )
    if not done:
        raise InputError(f"none of {total} {items} could be read; the first: {unreadable[0].message}")


def report_skipped(keys: Sequence[str], unreadable: Sequence[UnreadableRow], path: Path) -> None:
    """Count the images that could not be read and list them in a file, in place of an earlier run's list."""
    if not unreadable:
        path.unlink(missing_ok=True)
    else:
        lines = [f"{keys[bad.row]}\t{bad.message.removesuffix(FIX_HINT)}\n" for bad in unreadable]
        with replacing(path) as draft:
            draft.write_text(without_secrets("".join(lines)), encoding="utf-8", errors="replace")
        stderr().print(f"skipped {len(unreadable)} that could not be read; they are listed in {path}")
