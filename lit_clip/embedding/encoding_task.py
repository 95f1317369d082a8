"""Tasks for :mod:`lit_clip.embedding.encode`, and their outcome; importing this module imports no Lightning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_clip.embedding.feature_files import FeatureTable, Identity
from lit_clip.embedding.parts import Arrays
from lit_clip.embedding.precision import Precision
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
from lit_clip.secrets import without_secrets
from lit_clip.tools.atomic import replacing
from lit_clip.tools.console import stderr
from lit_clip.tools.images import FIX_HINT, OnError
from lit_clip.tools.shares import Share
from lit_clip.tools.workers import Mapped, workers_for_images

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

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"--batch_size {self.batch_size} must be at least 1")
        require((self.num_workers or 0) >= 0, f"--num_workers {self.num_workers} must be at least 0")

    @property
    def processes(self) -> int:
        """Number of processes on this machine."""
        return 1

    @property
    def workers(self) -> int:
        """Number of data workers of each process."""
        return workers_for_images(self.processes) if self.num_workers is None else self.num_workers


@dataclass(frozen=True)
class EncodingSettings(Encoding):
    """Settings for computing features on any number of devices.

    Args:
        devices: number of processes on each machine, one per device.
        accelerator: cpu, gpu, mps, ...
    """

    devices: int = 1
    accelerator: str = "auto"

    @property
    def processes(self) -> int:
        return self.devices if self.devices > 0 else max(1, torch.accelerator.device_count())  # -1: all


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
        """Return the arrays that store finished batches."""
        identities = [self.identities[row] for batch, _ in finished for row in batch.rows]
        return FeatureTable(identities, np.concatenate([features for _, features in finished])).arrays()


def image_task(
    model: CLIP, images: ImageRows, identities: Sequence[Identity], features: Callable[[CLIP], Encode] = image_features
) -> EncodingTask:
    """Create the task of encoding images with distinct identities, by default as unit features."""

    def read(batches: Batches, stop: Path | None) -> ImageBatches:
        return ImageBatches(images, batches, model.preprocessing, stop=stop)

    return EncodingTask(identities, read, features(model))


def text_task(model: CLIP, texts: Sequence[str], identities: Sequence[Identity]) -> EncodingTask:
    """Create the task of encoding texts with distinct identities as unit features."""
    return EncodingTask(
        identities,
        lambda batches, _: Mapped(partial(text_batch, texts, model.tokenizer), batches),
        lambda tokens: model.encode_text(tokens, normalize=True).float(),
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
