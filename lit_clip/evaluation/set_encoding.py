"""Encode the images of an evaluation set: into a feature store, or on all ranks of a training.

Shapes: N images that could be read, W features before the projection, D after it.
"""

import sys
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_clip import distributed
from lit_clip.embedding.encode import EncodingTask
from lit_clip.embedding.reading import (
    Batches,
    Encode,
    ImageBatches,
    UnreadableRow,
    encoded_batches,
    features_of_both_kinds,
    in_batches,
    row_means,
    unreadable_image,
)
from lit_clip.errors import require
from lit_clip.evaluation.data import ImageSet
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import can_draw
from lit_clip.tools.images import OnError, or_skip
from lit_clip.tools.workers import loader, workers_for_images

BATCHES_PER_WORKER = 4  # fewer are read before a worker has started


class SetRows:
    """An evaluation set as :class:`lit_clip.embedding.reading.ImageRows`."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> tuple[str, list[Image.Image]]:
        key = self.images.key(row)
        try:
            return key, self.images.images(row)
        except MemoryError:
            raise
        except Exception as error:  # for a broken file decoders raise anything
            raise unreadable_image(error, key) from error


def set_task(model: CLIP, images: ImageSet) -> EncodingTask:
    """Create the task of encoding a set: features before and after the projection (unit length), ``[N, W + D]``."""

    def read(batches: Batches, stop: Path | None) -> ImageBatches:
        return ImageBatches(SetRows(images), batches, model.preprocessing, stop=stop)

    rows = [(str(row), 0, 0) for row in range(len(images))]
    return EncodingTask(rows, read, features_of_both_kinds(model), images.several, False)


class Encoded(NamedTuple):
    """Rows of the N readable images, ascending, and their features, float32 ``[N, D]`` on the CPU."""

    rows: list[int]
    features: Tensor


class SetEncoder:
    """Encode sets on all ranks of a training run; batches are the same for any number of ranks.

    The options are those of the ``callback``. By default a rank has its share of the cores but one as data workers, up
    to 8, and at most one for four batches, so that a small set starts none.
    """

    def __init__(self, batch_size: int, num_workers: int | None, on_error: OnError, callback: str) -> None:
        require(batch_size >= 1, f"{callback}.batch_size: {batch_size} must be at least 1")
        require(num_workers is None or num_workers >= 0, f"{callback}.num_workers: {num_workers} must be at least 0")
        self.batch_size, self.num_workers, self.callback = batch_size, num_workers, callback
        self.on_error: OnError = on_error
        self.processes = 1  # ranks on this machine
        self._warned: set[str] = set()

    def encode(self, model: CLIP, images: ImageSet, encode: Encode, name: str) -> Encoded:
        """Return the features of all images of a set; ``encode`` maps normalised ``[B, 3, H, W]`` to ``[B, D]``.

        All ranks call this; ``name`` is the set's in messages.
        """
        rank, world = distributed.rank_and_world()
        rows_at_once = 1 if images.several else self.batch_size
        batches = in_batches(range(len(images)), rows_at_once)[rank::world]

        def encode_pixels(pixels: Tensor) -> Tensor:
            return encode(model.normalize(pixels)).float()

        rows: list[int] = []
        features: list[Tensor] = []
        unreadable: list[UnreadableRow] = []
        # A training's bar is on the terminal already.
        title = f"{self.callback} {name}" if rank == 0 and not can_draw(sys.stderr) else None
        data, workers = SetRows(images), self._workers(len(batches))
        for batch, encoded in encoded_batches(
            model, data, self.batch_size, workers, encode=encode_pixels, batches=batches, title=title
        ):
            rows += batch.rows
            unreadable += batch.unreadable
            if batch.rows:
                features.append(row_means(encoded, batch.counts))
        self._check(distributed.gather_objects(unreadable), len(images), name)
        return _gathered(rows, features, model.device)

    def steps(self, model: CLIP, images: ImageSet, task: EncodingTask, name: str) -> list[tuple[int, np.ndarray]]:
        """Return each readable row with a task's output for it; all ranks call this."""
        rank, world = distributed.rank_and_world()
        batches = in_batches(range(len(images)), 1)[rank::world]
        unreadable: list[UnreadableRow] = []
        found: list[tuple[int, np.ndarray]] = []
        data, workers = task.read(batches, None), self._workers(len(batches))
        for batch in loader(data, workers, pin_memory=model.device.type == "cuda"):
            unreadable += batch.unreadable
            found += [(row, task.step(batch, model.device, 1).cpu().numpy()) for row in batch.rows]
        self._check(distributed.gather_objects(unreadable), len(images), name)
        return sorted(distributed.gather_objects(found), key=itemgetter(0))

    def _workers(self, batches: int) -> int:
        if self.num_workers is not None:
            return self.num_workers
        return min(workers_for_images(self.processes), batches // BATCHES_PER_WORKER)

    def _check(self, unreadable: list[UnreadableRow], size: int, name: str) -> None:
        if not unreadable:
            return
        message = min(unreadable).message
        require(self.on_error == "skip", f"{name}: {or_skip(message, f'{self.callback}.on_error to skip')}")
        require(len(unreadable) < size, f"{name}: none of {size} images could be read; {message}")
        if name not in self._warned:
            self._warned.add(name)
            text = f"{len(unreadable)} of {size} images are skipped; the first: {message}"
            from lightning.pytorch.utilities import rank_zero_warn  # takes seconds

            rank_zero_warn(f"{self.callback}: {name}: {text}")


def _gathered(rows: list[int], features: list[Tensor], device: torch.device) -> Encoded:
    """Gather all ranks' rows in order; a rank without rows takes the feature width from the others."""
    width = distributed.maximum(features[0].shape[1] if features else 0)
    mine = torch.cat(features) if features else torch.zeros(0, width, device=device)
    all_rows = distributed.gather_uneven(torch.tensor(rows, dtype=torch.long, device=device)).cpu()
    order = all_rows.argsort()
    return Encoded(all_rows[order].tolist(), distributed.gather_uneven(mine).cpu()[order])
