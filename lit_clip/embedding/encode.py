"""Encode into feature files on any number of processes, and resume an interrupted run.

The items are cut into batches, and batches, not items, are dealt to the ranks: batches are the same on any number of
ranks, and so are the bytes of the result. Lightning, whose import takes seconds, is imported when processes start.
"""

import os
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_clip import distributed
from lit_clip.embedding.feature_files import FeatureTable, Identity, collect
from lit_clip.embedding.parts import Arrays, Parts
from lit_clip.embedding.reading import (
    Batches,
    Encode,
    EncoderBatch,
    ImageBatches,
    ImageRows,
    UnreadableRow,
    check_finite,
    encode_batch,
    image_features,
    in_batches,
    row_means,
    text_batch,
)
from lit_clip.errors import InputError, require
from lit_clip.models.clip import CLIP
from lit_clip.models.fingerprint import fingerprint
from lit_clip.secrets import without_secrets
from lit_clip.tools.atomic import Share, claimed, replacing
from lit_clip.tools.console import progress, stderr
from lit_clip.tools.hardware import Precision, autocast, check_precision, keep_freed_memory
from lit_clip.tools.images import FIX_HINT, OnError, or_skip
from lit_clip.tools.imports import __version__
from lit_clip.tools.workers import Mapped, loader, workers_for_images
from lit_clip.weights.load import load_model

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Finished = list[tuple[EncoderBatch, np.ndarray]]  # batches without their inputs, and what was computed of each


@dataclass(frozen=True)
class Encoding:
    """Options for reading and encoding; only ``batch_size`` and ``precision`` affect the result, by rounding.

    Args:
        batch_size: images, or texts, that a process encodes at once.
        num_workers: processes that decode images, for each device; its share of the cores but one, up to 8, if not
            given.
        precision: of the encoders; 32-true is exact, bf16-mixed and on a GPU 16-mixed are faster.
        on_error: error ends the run at an image that cannot be read; skip leaves it out and lists it.
    """

    flat: ClassVar[bool] = True  # its options are typed without its name
    batch_size: int = 64
    num_workers: int | None = None
    precision: Precision = "32-true"
    on_error: OnError = "error"
    devices: ClassVar[int] = 1  # constants here, so that EncodingSettings has these options behind all others
    accelerator: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"--batch_size {self.batch_size} must be at least 1")
        require((self.num_workers or 0) >= 0, f"--num_workers {self.num_workers} must be at least 0")
        check_precision(self.precision, self.accelerator)

    @property
    def workers(self) -> int:
        """Number of data workers of each process."""
        processes = self.devices if self.devices > 0 else max(1, torch.accelerator.device_count())  # -1: all
        return workers_for_images(processes) if self.num_workers is None else self.num_workers


@dataclass(frozen=True)
class EncodingSettings(Encoding):
    """Settings for computing features on any number of devices.

    Args:
        devices: number of processes on each machine, one per device.
        accelerator: cpu, gpu, mps, ...
    """

    # Options, where Encoding has constants: pyright allows no field to replace a class variable.
    devices: int = 1  # pyright: ignore[reportIncompatibleVariableOverride]
    accelerator: str = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclass(frozen=True)
class EncodingTask:
    """Items to encode."""

    identities: Sequence[Identity]  # what finished features are found by
    read: Callable[[Batches, Path | None], Dataset[EncoderBatch]]  # it stops reading once the file given exists
    encode: Encode  # inputs on the device -> features
    several: bool = False  # whether an item may have many images; then it is a batch of its own
    must_be_finite: bool = True  # whether NaN or infinite features end the run; evaluations report them
    of_texts: bool = False  # tokenizing is not worth a process
    title: str = "encoding"

    def finished(self, parts: Parts) -> Callable[[int], bool]:
        """Return a function that says whether an item is in the parts."""
        known = {identity for table in parts.read(FeatureTable.of) for identity in table.identities}
        return lambda row: self.identities[row] in known

    def step(self, batch: EncoderBatch, device: torch.device, batch_size: int) -> Tensor:
        """Return the features of a batch of N rows, ``[N, ...]``."""
        features = row_means(encode_batch(batch, self.encode, device, batch_size), batch.counts)
        if batch.rows and self.must_be_finite:
            check_finite(features, self.identities[batch.rows[0]][0])
        return features

    def part(self, finished: Finished) -> Arrays:
        """Return the arrays that store finished batches."""
        identities = [self.identities[row] for batch, _ in finished for row in batch.rows]
        return FeatureTable(identities, np.concatenate([features for _, features in finished])).arrays()


@dataclass(frozen=True)
class RowTask(EncodingTask):
    """Rows to encode, found again by their numbers: a byte of memory each. The parts have the array ``rows``."""

    identities: Sequence[int]  # a range  # pyright: ignore[reportIncompatibleVariableOverride]

    def finished(self, parts: Parts) -> Callable[[int], bool]:
        return parts.rows(len(self.identities)).__getitem__


def image_task(
    model: CLIP,
    images: ImageRows,
    identities: Sequence[Identity],
    features: Callable[[CLIP], Encode] = image_features,
    title: str = "encoding",
) -> EncodingTask:
    """Create the task of encoding images with distinct identities, by default as unit features."""

    def read(batches: Batches, stop: Path | None) -> ImageBatches:
        return ImageBatches(images, batches, model.preprocessing, stop=stop)

    return EncodingTask(identities, read, features(model), title=title)


def text_task(
    model: CLIP, texts: Sequence[str], identities: Sequence[Identity], title: str = "encoding"
) -> EncodingTask:
    """Create the task of encoding texts with distinct identities as unit features."""
    return EncodingTask(
        identities,
        lambda batches, _: Mapped(partial(text_batch, texts, model.tokenizer), batches),
        lambda tokens: model.encode_text(tokens, normalize=True).float(),
        of_texts=True,
        title=title,
    )


def remaining(rows: int, batch_size: int, done: Callable[[int], bool], share: Share = Share()) -> Batches:  # noqa: B008
    """Cut all rows into batches, independent of what is done; leave out finished rows and other jobs' shares."""
    batches: list[Sequence[int]] = []
    for number, batch in enumerate(in_batches(range(rows), batch_size)):
        missing = [row for row in batch if not done(row)] if share.has(number) else []
        if missing:  # a range takes less memory than a list
            batches.append(batch if len(missing) == len(batch) else missing)
    return batches


def check_complete(done: int, total: int, unreadable: Sequence[UnreadableRow], items: str = "images") -> None:
    """Raise :class:`InputError` unless every item is done or known to be unreadable, and at least one is done."""
    lost = total - done - len(unreadable)
    require(
        lost == 0,
        f"the results of {lost} of {total} {items} are gone: another run with the same output has ended meanwhile; "
        "run this one again",
    )
    if not done:
        raise InputError(f"none of {total} {items} could be read; the first: {unreadable[0].message}")


def report_skipped(keys: Sequence[str], unreadable: Sequence[UnreadableRow], path: Path) -> None:
    """Count the unreadable images and list them in a file, which replaces an earlier run's list."""
    if not unreadable:
        path.unlink(missing_ok=True)
    else:
        lines = [f"{keys[bad.row]}\t{bad.message.removesuffix(FIX_HINT)}\n" for bad in unreadable]
        with replacing(path) as draft:
            draft.write_text(without_secrets("".join(lines)), encoding="utf-8", errors="replace")
        stderr().print(f"skipped {len(unreadable)} that could not be read; they are listed in {path}")


class UnreadableError(InputError):
    """An image cannot be read and may not be skipped; raised by the first rank after all ranks have ended."""


def encode(
    model: CLIP,
    task: EncodingTask,
    parts: Parts,
    settings: Encoding,
    known: Container[Identity] = (),
) -> list[UnreadableRow] | None:
    """Encode into ``parts`` all items that are neither there nor ``known``; an interruption keeps the finished ones.

    Returns:
        On rank 0 the rows that could not be read; None on other ranks, which have nothing left to do.
    """
    identities, finished = task.identities, task.finished(parts)
    batches = remaining(
        len(identities),
        1 if task.several else settings.batch_size,
        lambda row: finished(row) or identities[row] in known,
        parts.share,
    )
    device = start_processes(settings)
    rank, world = distributed.rank_and_world()
    if batches and not rank:
        parts.start()
    distributed.barrier()  # all have looked into the parts, which the first one may remove if no batch is left
    model.to(device).eval()
    mine = batches[rank::world]
    bar = f"{task.title} (process 1 of {world})" if world > 1 else task.title
    workers = 0 if task.of_texts else settings.workers
    unreadable: list[UnreadableRow] = []
    try:
        with parts.written(task.part) as keep, progress(bar, sum(map(len, mine)), enabled=not rank) as advance:
            for batch in loader(task.read(mine, parts.stop), workers, device.type == "cuda"):
                with torch.inference_mode(), autocast(device, settings.precision):
                    outputs = task.step(batch, device, settings.batch_size)
                if batch.rows:  # the width of an empty batch's features is unknown
                    keep((batch._replace(inputs=None, texts=None), outputs.cpu().numpy()), batch.rows[0])
                unreadable += batch.unreadable
                if batch.unreadable and settings.on_error == "error":
                    parts.stop.touch()
                advance(len(batch.rows) + len(batch.unreadable))
    except KeyboardInterrupt:
        if rank:
            sys.exit(1)
        raise KeyboardInterrupt("what is finished is kept; run the same command again to resume") from None
    finally:
        model.cpu()
    unreadable = sorted(distributed.gather_objects(unreadable))  # every rank has written its last part
    if rank:
        return None
    if unreadable and settings.on_error == "error":
        parts.end()
        raise UnreadableError(or_skip(unreadable[0].message, "--on_error skip"))
    return unreadable


def features_of(
    model: CLIP,
    tasks: Sequence[EncodingTask],
    parts: Parts,
    settings: Encoding,
    known: FeatureTable | None = None,
) -> list[FeatureTable]:
    """Return the features of each task's items; encode items that are neither in ``parts`` nor ``known``.

    All ranks call this. The first one alone gets tables, without the items that could not be read, and not for a
    share of the work: the parts are kept then. Otherwise the list is empty.
    """
    found = [encode(model, task, parts, settings, set(known.identities) if known else ()) for task in tasks]
    if None in found or parts.shared():
        return []
    tables = []
    for task, unreadable in zip(tasks, found, strict=True):
        table = collect(task.identities, [*([known] if known else []), *parts.read(FeatureTable.of)])
        check_complete(
            len(table.identities), len(task.identities), unreadable or (), "texts" if task.of_texts else "images"
        )
        tables.append(replace(table, unreadable=unreadable or ()))
    return tables


class Work(NamedTuple):
    """A model, the finished parts of an output, and metadata about how the output is made."""

    model: CLIP
    parts: Parts
    metadata: dict[str, str]


@contextmanager
def work_on(
    output: Path,
    model: str,
    stamp: str,
    settings: Encoding,
    share: Share = Share(),  # noqa: B008
    encoders: Sequence[str] = ("image", "text"),
) -> Iterator[Work]:
    """Load a model, start the other processes and claim the output; ``stamp`` changes with the data.

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


def start_processes(settings: Encoding) -> torch.device:
    """Start or join the other processes, unless this was done before; return this process's device."""
    trainer = make_trainer(settings)
    strategy = trainer.strategy
    if strategy.launcher is not None and trainer.world_size > 1:
        strategy.launcher.launch(strategy.setup_environment, trainer=trainer)
    else:
        strategy.setup_environment()
    return strategy.root_device


@contextmanager
def claimed_by_first(output: Path, settings: Encoding, share: Share = Share()) -> Iterator[None]:  # noqa: B008
    """Start the other processes, and let the first one claim the output: :func:`lit_clip.tools.atomic.claimed`."""
    start_processes(settings)
    with claimed(None if distributed.rank_and_world()[0] else output, share=share):
        yield


def make_trainer(settings: Encoding) -> "Trainer":
    """Return a trainer that only starts processes: no logs, checkpoints or progress bar."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning.pytorch import Trainer

    from lit_clip.training.lightning.strategies import watch_started_ranks

    nodes = 1  # machines on which torchrun or SLURM runs this job
    if TorchElasticEnvironment.detect():
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    elif SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", 1))
    try:
        trainer = Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=nodes,
            strategy="ddp" if settings.devices * nodes != 1 else "auto",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # of SLURM's variables the last
        raise InputError(f"devices or accelerator: {error}") from error
    watch_started_ranks(trainer)
    keep_freed_memory(trainer.strategy.root_device)
    return trainer
