"""Encode into feature files on any number of processes, and resume an interrupted run.

The items are cut into batches, and batches, not items, are dealt to the ranks: batches are the same on any number of
ranks, and so are the bytes of the result.
"""

import os
import sys
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer

from lit_clip import distributed
from lit_clip.embedding.encoding_task import EncodingSettings, EncodingTask, check_complete, remaining
from lit_clip.embedding.feature_files import FeatureTable, Identity, collect
from lit_clip.embedding.parts import Parts
from lit_clip.embedding.precision import autocast
from lit_clip.embedding.reading import Batches, UnreadableRow
from lit_clip.errors import InputError
from lit_clip.models.clip import CLIP
from lit_clip.tools.claims import claimed
from lit_clip.tools.console import progress, stderr
from lit_clip.tools.images import or_skip
from lit_clip.tools.shares import Share
from lit_clip.tools.workers import loader
from lit_clip.training.kept_memory import keep_freed_memory
from lit_clip.training.lightning.rank_watchdog import watch_started_ranks
from lit_clip.version import __version__
from lit_clip.weights.fingerprint import fingerprint
from lit_clip.weights.load import load_model


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
    """Return the features of a task's items; encode items that are neither in ``parts`` nor ``known``.

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
    """A model, the finished parts of an output, and metadata about how the output is made."""

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


def compute(
    model: CLIP, task: EncodingTask, batches: Batches, parts: Parts, settings: EncodingSettings, title: str
) -> list[UnreadableRow] | None:
    """Encode batches into ``parts``; an interruption keeps the finished ones.

    Returns:
        On rank 0 the rows that could not be read; None on other ranks, which have nothing left to do.
    """
    device = start_processes(settings)
    rank, world = distributed.rank_and_world()
    if batches and not rank:
        parts.start()
    distributed.barrier()  # all have looked into the parts, which the first one may remove if no batch is left
    model.to(device).eval()
    mine = batches[rank::world]
    bar = f"{title} (process 1 of {world})" if world > 1 else title
    unreadable: list[UnreadableRow] = []
    try:
        with parts.written(task.part) as keep, progress(bar, sum(map(len, mine)), enabled=not rank) as advance:
            for batch in loader(task.read(mine, parts.stop), settings.workers, device.type == "cuda"):
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


def start_processes(settings: EncodingSettings) -> torch.device:
    """Start or join the other processes, unless this was done before; return this process's device."""
    trainer = make_trainer(settings)
    strategy = trainer.strategy
    if strategy.launcher is not None and trainer.world_size > 1:
        strategy.launcher.launch(strategy.setup_environment, trainer=trainer)
    else:
        strategy.setup_environment()
    return strategy.root_device


@contextmanager
def claimed_by_first(output: Path, settings: EncodingSettings, share: Share = Share()) -> Iterator[None]:  # noqa: B008
    """Start the other processes, and let the first one claim the output: :func:`lit_clip.tools.claims.claimed`."""
    start_processes(settings)
    with claimed(None if distributed.rank_and_world()[0] else output, share=share):
        yield


def machines() -> int:
    """Return the number of machines on which torchrun or SLURM runs this job; 1 without them."""
    if TorchElasticEnvironment.detect():
        return int(os.environ.get("GROUP_WORLD_SIZE", 1))
    return int(os.environ.get("SLURM_NNODES", 1)) if SLURMEnvironment.detect() else 1


def make_trainer(settings: EncodingSettings) -> Trainer:
    """Return a trainer that only starts processes: no logs, checkpoints or progress bar."""
    nodes = machines()
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
