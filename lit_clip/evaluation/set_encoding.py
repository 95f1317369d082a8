"""Encode the images of an evaluation set: into a feature store, or on all ranks of a training.

Shapes: N images that could be read, W features before the projection, D after it.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_clip import distributed
from lit_clip.embedding.encode import EncodingTask
from lit_clip.embedding.reading import (
    Batches,
    Encode,
    ImageBatches,
    UnreadableRow,
    features_of_both_kinds,
    in_batches,
)
from lit_clip.errors import require
from lit_clip.evaluation.data import ImageSet
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import can_draw, progress
from lit_clip.tools.images import OnError, or_skip
from lit_clip.tools.workers import loader, workers_for_images

BATCHES_PER_WORKER = 4  # fewer are read before a worker has started


def set_task(model: CLIP, images: ImageSet, title: str = "encoding") -> EncodingTask:
    """Create the task of encoding a set: features before and after the projection (unit length), ``[N, W + D]``."""

    def read(batches: Batches, stop: Path | None) -> ImageBatches:
        return ImageBatches(images, batches, model.preprocessing, stop=stop)

    rows = [(str(row), 0, 0) for row in range(len(images))]
    return EncodingTask(rows, read, features_of_both_kinds(model), images.several, False, title=title)


class SetFeatures(NamedTuple):
    """Features of a set, read from disk as they are needed."""

    before: np.ndarray  # float32 [N, W], before the projection
    after: np.ndarray  # float32 [N, D], unit length; for rows of several images, the mean of their unit features
    rows: list[int]  # the images that could be read, ascending
    skipped: list[tuple[str, str]]  # key and message of the others


class SetValues(NamedTuple):
    """What was computed of a set's images: features, or a task's records of places."""

    values: np.ndarray  # float32 [N, W + D]; or int64 [K, 1 + m], records: the image's row, then the task's numbers
    rows: list[int]  # the images that could be read, ascending
    skipped: list[tuple[str, str]]  # key and message of the others


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

    @torch.no_grad()
    def encode(self, model: CLIP, images: ImageSet, encode: Encode, name: str) -> SetFeatures:
        """Return features of one kind for all images of a set; ``encode`` maps normalised ``[B, 3, H, W]`` to them.

        All ranks call this; ``name`` is the set's in messages.
        """
        task = replace(set_task(model, images), encode=lambda pixels: encode(model.normalize(pixels)).float())
        found = list(self._outputs(model, images, task, name))
        width = distributed.maximum(found[0][1].shape[1] if found else 0)  # a rank without rows does not know it
        mine = torch.cat([torch.zeros(0, width, device=model.device), *(features for _, features in found)])
        rows = torch.tensor([row for rows, _ in found for row in rows], dtype=torch.long, device=model.device)
        all_rows = distributed.gather_uneven(rows).cpu()
        order = all_rows.argsort()
        features = distributed.gather_uneven(mine).cpu()[order].numpy()
        return SetFeatures(features, features, all_rows[order].tolist(), [])

    def steps(self, model: CLIP, images: ImageSet, task: EncodingTask, name: str) -> list[tuple[int, np.ndarray]]:
        """Return each readable row with the output for it of a task of single rows; all ranks call this."""
        found = [(row, output.cpu().numpy()) for (row,), output in self._outputs(model, images, task, name)]
        return sorted(distributed.gather_objects(found), key=itemgetter(0))

    def _outputs(
        self, model: CLIP, images: ImageSet, task: EncodingTask, name: str
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield readable rows of this rank with a task's output for them, ``[B, ...]``."""
        rank, world = distributed.rank_and_world()
        batches = in_batches(range(len(images)), 1 if task.several else self.batch_size)[rank::world]
        workers = self.num_workers
        if workers is None:
            workers = min(workers_for_images(self.processes), len(batches) // BATCHES_PER_WORKER)
        bar = rank == 0 and not can_draw(sys.stderr)  # a training's bar is on the terminal already
        unreadable: list[UnreadableRow] = []
        with progress(f"{self.callback} {name}", sum(map(len, batches)), enabled=bar) as advance:
            for batch in loader(task.read(batches, None), workers, pin_memory=model.device.type == "cuda"):
                unreadable += batch.unreadable
                if batch.rows:
                    yield batch.rows, task.step(batch, model.device, self.batch_size)
                advance(len(batch.rows) + len(batch.unreadable))
        self._check(distributed.gather_objects(unreadable), len(images), name)

    def _check(self, unreadable: list[UnreadableRow], size: int, name: str) -> None:
        if not unreadable:
            return
        message = min(unreadable).message
        require(self.on_error == "skip", or_skip(message, f"{self.callback}.on_error to skip"))
        require(len(unreadable) < size, f"none of {size} images could be read; {message}")
        if name not in self._warned:
            self._warned.add(name)
            from lightning.pytorch.utilities import rank_zero_warn  # takes seconds

            text = f"{len(unreadable)} of {size} images are skipped; the first: {message}"
            rank_zero_warn(f"{self.callback}: {name}: {text}")
