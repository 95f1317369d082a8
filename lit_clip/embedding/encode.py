"""``lit-clip embed``: features of images or texts in a file, on any number of processes.

The items are sorted and cut into batches, and the batches, not the items, are dealt to the ranks: a batch is the same
on any number of them, and so are the bytes of the result.
"""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_clip import distributed
from lit_clip.embedding.batch_size import MOST, NOT_TRIED, BatchSize, automatic_batch_size, image_batch_size
from lit_clip.embedding.feature_files import (
    FeatureParts,
    FeatureTable,
    Identity,
)
from lit_clip.embedding.image_files import ImageBatches, Item, in_batches
from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.tokenizer import TextTokenizer
from lit_clip.tools.console import progress, stderr
from lit_clip.tools.images import FIX_HINT, Bad, Batch, OnError, loader
from lit_clip.training.signals import Signals

SECONDS_BETWEEN_PARTS = 10  # of work that a killed run can lose

Precision = Literal["32-true", "16-mixed", "bf16-mixed"]


class UnreadableError(InputError):
    """Images that cannot be read, and may not be skipped; raised by the first rank when all have come to the end."""


def encode(
    model: CLIP,
    items: Sequence[Item],
    parts: FeatureParts,
    known: Mapping[Identity, np.ndarray],
    *,
    batch_size: BatchSize,
    num_workers: int,
    on_error: OnError = "error",
    devices: int = 1,
    accelerator: str = "auto",
    precision: Precision = "32-true",
    encoder: "Callable[..., Encoder] | None" = None,
    title: str = "encoding",
) -> list[Bad] | None:
    """Encode into ``parts`` all items that are neither there nor known.

    Args:
        model: the encoders.
        items: images or texts.
        parts: where finished features are and go.
        known: features that need no part.
        batch_size: of one process; see :func:`embed`.
        num_workers: of each process.
        on_error: what an item that cannot be read does.
        devices: see :func:`embed`; likewise ``accelerator`` and ``precision``.
        accelerator: see ``devices``.
        precision: see ``devices``.
        encoder: makes what is run, with the arguments of :class:`Encoder`, which is the default.
        title: of the progress bar.

    Returns:
        On rank 0 those that could not be read; on other ranks, which have nothing to do any more, None.

    Raises:
        UnreadableError: an image that cannot be read unless ``on_error`` is ``skip``.
        InputError: impossible settings, or parts that cannot be written.
        KeyboardInterrupt: after the finished features have been kept.
    """
    finished = parts.finished()
    left = [item for item in items if item.identity not in finished and item.identity not in known]
    if batch_size == "auto":
        trainer = start_processes(devices, accelerator, precision)
        batch_size = _fastest(model, left, trainer, num_workers) if left else 1
    batches = [
        [row for row in batch if items[row].identity not in finished and items[row].identity not in known]
        for batch in in_batches(range(len(items)), batch_size)
    ]
    batches = [batch for batch in batches if batch]
    if not batches:
        return []
    writer = PartWriter(items, parts, on_error, title)
    trainer = make_trainer([writer], devices, accelerator, precision)
    try:
        module = (encoder or Encoder)(model, items, batches, parts.stop, num_workers)
        trainer.predict(module, return_predictions=False)
    except SystemExit:
        if not trainer.interrupted:  # Lightning's answer to Ctrl-C is an exit
            raise
        if trainer.global_rank:
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning has disabled it
        raise KeyboardInterrupt("what is finished is kept; the same command goes on from there") from None
    bad = distributed.gather_objects(writer.bad)  # and so every rank has written its last part
    if trainer.global_rank:
        return None
    if bad and on_error == "error":
        parts.end()
        raise UnreadableError(f"{min(bad).reason.removesuffix(FIX_HINT)}{FIX_HINT}, or set --on_error skip")
    return sorted(bad)


def _fastest(model: CLIP, items: Sequence[Item], trainer: Trainer, num_workers: int) -> int:
    """The batch size for these items, at which every process has some."""
    if items[0].path is not None:
        return image_batch_size(model, trainer, num_workers, len(items))
    texts = [item.key for item in items[:MOST]]

    def inputs(size: int) -> Tensor:
        return model.tokenizer.trim(model.tokenizer(texts[:size]))

    most, why = min((MOST, NOT_TRIED), (len(items) // trainer.world_size, f"there are {len(items)} texts"))
    return automatic_batch_size(model, trainer, model.encode_text, inputs, max(1, most), why)


def start_processes(devices: int, accelerator: str, precision: Precision) -> Trainer:
    """Start the other processes, or join them, unless that has been done; the trainer knows this one's device.

    Raises:
        InputError: no such device.
    """
    trainer = make_trainer([], devices, accelerator, precision)
    strategy = trainer.strategy
    if strategy.launcher is not None and trainer.world_size > 1:
        strategy.launcher.launch(strategy.setup_environment, trainer=trainer)
    else:
        strategy.setup_environment()
    return trainer


def make_trainer(callbacks: list[Callback], devices: int, accelerator: str, precision: Precision) -> Trainer:
    """A trainer that computes and leaves nothing behind.

    Raises:
        InputError: no such device.
    """
    try:
        trainer = Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy="ddp" if devices != 1 else "auto",
            precision=precision,
            use_distributed_sampler=False,  # the encoder deals the batches, each once
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"devices or accelerator: {error}") from error
    trainer._signal_connector = Signals(trainer)  # Lightning's own would wait for the other ranks in the handler
    return trainer


class Encoder(LightningModule):
    """What ``Trainer.predict`` runs.

    Args:
        model: the encoders.
        items: images, or texts.
        batches: the rows of each batch, for all ranks together.
        stop: a file that ends the run early, see :class:`lit_clip.embedding.feature_files.FeatureParts`.
        num_workers: of the loader.
    """

    def __init__(
        self, model: CLIP, items: Sequence[Item], batches: Sequence[list[int]], stop: Path, num_workers: int
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank may have no batch
        self.model, self.items, self.batches, self.stop = model, items, batches, stop
        self.num_workers = num_workers
        self.are_texts = items[0].path is None

    @property
    def my_batches(self) -> Sequence[list[int]]:
        """This rank's share."""
        return self.batches[self.trainer.global_rank :: self.trainer.world_size]

    def predict_dataloader(self) -> DataLoader[Any]:
        if self.are_texts:
            return loader(TextBatches(self.items, self.my_batches, self.model.tokenizer), 0)
        images = ImageBatches(self.items, self.my_batches, self.model.preprocessing, self.stop)
        return loader(images, self.num_workers, pin_memory=self.device.type == "cuda")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch.inputs is None:
            return torch.empty(0, self.model.config.embed_dim)
        encode = self.model.encode_text if self.are_texts else self.model.encode_image
        return encode(batch.inputs, normalize=True).float()


class TextBatches(Dataset[Batch]):
    """One item is one batch of tokens ``[b, L]``."""

    def __init__(self, items: Sequence[Item], batches: Sequence[list[int]], tokenizer: TextTokenizer) -> None:
        self.items, self.batches, self.tokenizer = items, batches, tokenizer

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        rows = list(self.batches[index])
        tokens = self.tokenizer([self.items[row].key for row in rows])
        return Batch(self.tokenizer.trim(tokens), rows, [])


class PartWriter(Callback):
    """Keeps what is finished, every few seconds and when the run is interrupted.

    Attributes:
        bad: this rank's items that could not be read.
    """

    def __init__(self, items: Sequence[Item], parts: FeatureParts, on_error: OnError, title: str = "encoding") -> None:
        self.items, self.parts, self.on_error, self.title = items, parts, on_error, title
        self.bad: list[Bad] = []
        self._rows: list[int] = []
        self._features: list[np.ndarray] = []
        self._written = time.monotonic()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.parts.start()
        trainer.strategy.barrier()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Encoder)
        self._written = time.monotonic()
        total = sum(len(batch) for batch in pl_module.my_batches)
        share = f" (process 1 of {trainer.world_size})" if trainer.world_size > 1 else ""
        self._bar = progress(f"{self.title}{share}", total, enabled=trainer.is_global_zero)
        self._advance = self._bar.__enter__()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch.rows:  # of a batch without any nobody knows how wide its features are
            self._rows += batch.rows
            self._features.append(outputs.cpu().numpy())
        self.bad += batch.bad
        if batch.bad and self.on_error == "error":
            self.parts.stop.touch()
        self._advance(len(batch.rows) + len(batch.bad))
        if time.monotonic() - self._written > SECONDS_BETWEEN_PARTS:
            self._write()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.__exit__(None, None, None)
        self._write()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_bar"):
            self._bar.__exit__(None, None, None)
        self._write()

    def _write(self) -> None:
        if self._rows:
            identities = [self.items[row].identity for row in self._rows]
            self.parts.add(FeatureTable(identities, np.concatenate(self._features)))
        self._rows, self._features, self._written = [], [], time.monotonic()


def check_complete(items: Sequence[Item], table: FeatureTable, bad: Sequence[Bad]) -> None:
    """Raise :class:`InputError` unless every item has a feature or is known to be bad, and one has a feature."""
    require(
        len(table.identities) + len(bad) == len(items),
        f"{len(items) - len(table.identities) - len(bad)} of {len(items)} features are gone: "
        "another run with the same output has ended meanwhile; run this one again",
    )
    if not table.identities:
        raise InputError(f"none of {len(items)} images could be read; the first: {bad[0].reason}")


def report_skipped(bad: Sequence[Bad], path: Path) -> None:
    """Count what could not be read and list it in a file (which an earlier run may have left)."""
    path.unlink(missing_ok=True)
    if bad:
        path.write_text("".join(f"{item.key}\t{item.reason}\n" for item in bad), encoding="utf-8", errors="replace")
        stderr().print(f"skipped {len(bad)} that could not be read; they are listed in {path}", markup=False)
