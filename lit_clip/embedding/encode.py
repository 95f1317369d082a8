"""Encode into feature files, on any number of processes, and resume what an interrupted run has left.

The items are cut into batches, and batches, not items, are dealt to the ranks: batches are the same on any number of
ranks, and so are the bytes of the result.
"""

import os
import signal
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lit_clip import distributed
from lit_clip.embedding.encoding_task import EncodingSettings, EncodingTask, Finished, check_complete, remaining
from lit_clip.embedding.feature_files import FeatureTable, Identity, collect
from lit_clip.embedding.parts import Parts
from lit_clip.embedding.reading import Batches, EncoderBatch, UnreadableRow
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.tools.claims import claimed
from lit_clip.tools.console import progress, stderr
from lit_clip.tools.images import OnError, or_skip
from lit_clip.tools.shares import Share
from lit_clip.tools.workers import loader
from lit_clip.training.kept_memory import keep_freed_memory
from lit_clip.training.lightning.rank_watchdog import watch_started_ranks
from lit_clip.training.lightning.resume_checks import evaluate_as_given
from lit_clip.training.lightning.signals import replace_signals
from lit_clip.version import __version__
from lit_clip.weights.fingerprint import fingerprint
from lit_clip.weights.load import load_model

SECONDS_BETWEEN_PARTS = 10  # of work that a killed run can lose


class UnreadableError(InputError):
    """An image cannot be read and may not be skipped; raised by the first rank after all ranks have ended."""


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


def features_of(
    model: CLIP,
    task: EncodingTask,
    parts: Parts,
    settings: EncodingSettings,
    known: FeatureTable | None = None,
    title: str = "encoding",
) -> FeatureTable | None:
    """Return the features of a task's items, encoded unless they are in ``parts`` or ``known``.

    All ranks call this. The first one alone gets the table, without the items that could not be read, and not for a
    share of the work: the parts are kept then.
    """
    unreadable = encode(model, task, parts, settings, set(known.identities) if known else (), title)
    if unreadable is None or parts.shared():
        return None
    table = collect(task.identities, [*([known] if known else []), *parts.read(FeatureTable.of)])
    check_complete(len(table.identities), len(task.identities), unreadable)
    return replace(table, unreadable=unreadable)


class Work(NamedTuple):
    """A model, the finished parts of an output, and what the output says of its making."""

    model: CLIP
    parts: Parts
    metadata: dict[str, str]


@contextmanager
def work_on(
    output: Path,
    model: str,
    stamp: str,
    settings: EncodingSettings,
    share: Share = Share(),  # noqa: B008
    encoders: Sequence[str] = ("image", "text"),
) -> Iterator[Work]:
    """Load a model, start the other processes and hold the output; ``stamp`` changes with the data.

    Of the ``encoders`` that the output is made by, their fingerprints are in its metadata.
    """
    clip = load_model(model)
    digests = fingerprint(clip)._asdict()
    with claimed_by_first(output, settings, share):
        parts = Parts(output, f"{digests['model']} {stamp} {settings.precision}", share)
        if any(parts.folder.glob("*.npz")) and next(parts.read(dict), None) is None:
            stderr().print(f"{output}: begun with another model, data, precision or version; begun again")
        made_by = {f"{name}_sha256": digests[name] for name in ("model", *encoders)}
        yield Work(clip, parts, {"model": model, **made_by, "precision": settings.precision, "lit_clip": __version__})


def compute(
    model: CLIP, task: EncodingTask, batches: Batches, parts: Parts, settings: EncodingSettings, title: str
) -> list[UnreadableRow] | None:
    """Encode batches into ``parts``; an interruption leaves the finished ones there.

    Returns:
        On rank 0 the rows that could not be read; None on other ranks, which have nothing left to do.
    """
    if not batches:
        trainer = make_trainer([], settings)
        if trainer.world_size > 1 and _others_run(trainer.strategy):
            trainer.strategy.setup_environment()
            trainer.strategy.barrier()  # until they, too, have looked into the parts, which the first one may remove
        return None if trainer.global_rank else []
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


def _others_run(strategy: Any) -> bool:
    """Return whether the other ranks have been started, by torchrun, SLURM or the first one."""
    return distributed.rank_and_world()[1] > 1 or strategy.cluster_environment.creates_processes_externally


def start_processes(settings: EncodingSettings) -> torch.device:
    """Start the other processes, or join them, unless that has been done; return this one's device."""
    trainer = make_trainer([], settings)
    strategy = trainer.strategy
    if strategy.launcher is not None and trainer.world_size > 1:
        strategy.launcher.launch(strategy.setup_environment, trainer=trainer)
    else:
        strategy.setup_environment()
    return strategy.root_device


@contextmanager
def claimed_by_first(output: Path, settings: EncodingSettings, share: Share = Share()) -> Iterator[None]:  # noqa: B008
    """Start the other processes, and have the first one hold the output: :func:`lit_clip.tools.claims.claimed`."""
    start_processes(settings)
    with claimed(None if distributed.rank_and_world()[0] else output, share=share):
        yield


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
    evaluate_as_given(trainer)
    watch_started_ranks(trainer)
    keep_freed_memory(trainer.strategy.root_device)
    replace_signals(trainer)  # Lightning's own would wait for the other ranks in the handler
    return trainer


class Encoder(LightningModule):
    """The module that ``Trainer.predict`` runs; see :func:`compute`, and :class:`Parts` for ``stop``."""

    def __init__(
        self, model: CLIP, task: EncodingTask, batches: Batches, stop: Path, settings: EncodingSettings
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank may have no batch
        self.model = model
        self.task = task
        self.batches = batches
        self.stop = stop
        self.settings = settings

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
        self.task = task
        self.parts = parts
        self.on_error = on_error
        self.title = title
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
