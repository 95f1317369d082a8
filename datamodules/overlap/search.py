"""Search a training set for images of evaluation sets, and judge what was found.

Shapes: F images of a table, Q images of an evaluation set and N items (an item may have several: the frames of a
video) that could be read, D embedding dimension.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_clip.embedding.encode import Encoding, Finished, RowTask, check_complete, encode
from lit_clip.embedding.parts import Arrays, Parts
from lit_clip.embedding.reading import (
    Batches,
    EncoderBatch,
    ImageBatches,
    ImageRows,
    UnreadableRow,
    check_finite,
    encode_batch,
    image_features,
)
from lit_clip.evaluation.data import ImageSet
from lit_clip.evaluation.overlap import Overlap, nearer, nearest_of_set, nowhere, overlap_of
from lit_clip.models.clip import CLIP
from lit_clip.tools.images import image_for_model
from ..near_duplicates import LOOK, Look, LookIndex, look_of
from ..pairs.batches import SourcePairs
from ..pairs.decisions import DROP
from ..pairs.findings import Finding
from ..pairs.source import PairSource

LEAK = np.dtype([("row", "i8"), ("query", "i4"), ("similarity", "f4")])  # NaN: the same look
TRIED = (0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.85, 0.8)  # other thresholds in the report


class EncodedImages(NamedTuple):
    """Features and looks of images."""

    rows: np.ndarray  # int64 [F], the row, or the item of a set, that each image belongs to; ascending
    features: np.ndarray  # float32 [F, D], of unit length
    looks: np.ndarray  # LOOK [F]

    @classmethod
    def of(cls, arrays: Arrays) -> "EncodedImages":
        """Return the images of a finished part."""
        return cls(arrays["rows"], arrays["features"], arrays["looks"])

    @classmethod
    def joined(cls, parts: Parts) -> "EncodedImages":
        """Return the images of all parts by row: one that was mended meanwhile is in a later part."""
        rows, features, looks = (np.concatenate(columns) for columns in zip(*parts.read(cls.of), strict=True))
        order = np.argsort(rows, kind="stable")
        return cls(rows[order], features[order], looks[order])

    def batches(self, batch_size: int) -> "Iterator[EncodedImages]":
        """Yield the images by batch, as they were encoded: resumed and whole runs multiply the same matrices."""
        ends = np.flatnonzero(np.diff(self.rows // batch_size)) + 1
        for start, stop in zip([0, *ends.tolist()], [*ends.tolist(), len(self.rows)], strict=True):
            here = slice(start, stop)
            yield EncodedImages(self.rows[here], self.features[here], self.looks[here])


class SourceRows(SourcePairs):
    """The images of a source of pairs, without captions."""

    def key_and_images(self, row: int) -> tuple[str, list[Image.Image]]:
        stored = self.source.read(row)
        return stored.where, [image_for_model(io.BytesIO(stored.image), stored.where)]


def _note(row: int, name: str, image: Image.Image) -> tuple[int, str, Look]:
    return row, name, look_of(image)


class _ImageTask(RowTask):
    def step(self, batch: EncoderBatch, device: torch.device, batch_size: int) -> Tensor:
        features = encode_batch(batch, self.encode, device, batch_size)
        if batch.rows:  # the largest similarity of a batch with NaN is NaN, which would hide its other images
            check_finite(features, batch.notes[0][1])
        return features

    def part(self, finished: Finished) -> Arrays:
        rows, _, looks = zip(*(note for batch, _ in finished for note in batch.notes), strict=True)
        features = np.concatenate([each for _, each in finished])
        return {"rows": np.array(rows), "features": features, "looks": np.array(list(looks), LOOK)}


def encode_images(
    model: CLIP, images: ImageRows, parts: Parts, settings: Encoding, title: str, several: bool = False
) -> list[UnreadableRow]:
    """Encode the images that ``parts`` lack, one row at a time if it may have ``several``; return the unreadable."""

    def read(batches: Batches, stop: Path | None) -> ImageBatches:
        return ImageBatches(images, batches, model.preprocessing, _note, stop)

    task = _ImageTask(range(len(images)), read, image_features(model), several, title=title)
    bad = encode(model, task, parts, settings) or []
    check_complete(len(images) - len(bad), len(images), bad, title)
    return bad


@dataclass
class Searched:
    """An evaluation set's images, and the training images that were found for them so far."""

    images: EncodedImages
    bad: list[str]  # the line of each item that could not be read
    threshold: float  # least similarity of images that count as the same
    device: torch.device
    leaks: list[np.ndarray] = field(default_factory=list)  # LEAK; an image with both kinds of evidence is there twice

    def __post_init__(self) -> None:
        size = len(self.images.rows)
        self.features = torch.from_numpy(self.images.features).to(self.device)
        self.index = LookIndex(self.images.looks)
        self.nearest = nowhere(size, self.device)  # by features
        self.look_rows = np.full(size, -1)  # the first training image with the same look, int64 [Q]; -1: none

    def add(self, training: EncodedImages) -> None:
        """Compare a batch of training images; batches come in the order of their rows."""
        features, rows = torch.from_numpy(training.features).to(self.device), training.rows.tolist()
        self.nearest = nearer(self.nearest, self.features, features, torch.tensor(rows, device=self.device))
        near = nearest_of_set(self.features, features)
        seen = (near.similarity.double() >= self.threshold).nonzero()[:, 0].tolist()
        leaks = [(rows[at], int(near.row[at]), float(near.similarity[at])) for at in seen]
        first: dict[int, int] = {}  # query that each image looks like
        queries, images = self.index.like(training.looks)
        for query, image in sorted(zip(queries.tolist(), images.tolist(), strict=True)):
            first.setdefault(image, query)
            if self.look_rows[query] < 0:
                self.look_rows[query] = rows[image]
        leaks += [(rows[image], query, np.nan) for image, query in first.items()]
        self.leaks.append(np.array(leaks, LEAK))


class OverlapPair(NamedTuple):
    """An image of the evaluation set and the matching image of the training set."""

    item: int  # index in the evaluation set
    frame: int  # index among the item's images
    row: int  # of the training set; -1: none
    similarity: float | None  # of the features; None if the pair was found by its look


@dataclass
class SetFindings:
    """Findings for one evaluation set."""

    images: ImageSet
    searched: Searched
    overlap: Overlap
    nearest: list[OverlapPair]  # nearest training image of each item, by features
    alike: list[OverlapPair | None]  # first training image that looks the same as each item, or None
    seen: np.ndarray  # whether each item belongs to the overlap, bool [N]
    tried: list[tuple[float, Overlap]]  # figures at other thresholds, the highest first

    def pairs(self, source: PairSource) -> list[dict[str, Any]]:
        """Return the overlap as JSON values: names in both sets, and the evidence for each pair."""
        found = []
        for place in np.flatnonzero(self.seen).tolist():
            near, alike = self.nearest[place], self.alike[place]
            by_features = near.similarity is not None and near.similarity >= self.searched.threshold
            pair = near if by_features or alike is None else alike
            names = {"image": self.images.key(pair.item), "train": source.row(pair.row).where}
            found.append({**names, "similarity": near.similarity, "same_look": alike is not None})
        return found


def leaked_rows(sets: Mapping[str, SetFindings], source: PairSource) -> Iterator[Finding]:
    """Yield a line for each training image that matches any image of a set, not only as its nearest."""
    leaks = [
        (row, number, query, similarity)
        for number, each in enumerate(sets.values())
        for part in each.searched.leaks
        for row, query, similarity in part.tolist()
    ]
    for row, found in groupby(sorted(leaks, key=itemgetter(0, 1, 2)), key=itemgetter(0)):
        line = Finding.of_row(row, source.key(row))
        for _, number, query, similarity in found:
            name, findings = list(sets.items())[number]
            finding = f"image of the evaluation set {name}"
            detail = f"similarity {similarity:.3f}" if similarity == similarity else "same look"
            line.add("" if finding in line.finding.split("; ") else finding, DROP, detail)
            line.copy_of = line.copy_of or f"{name}: {findings.images.key(int(findings.searched.images.rows[query]))}"
        yield line


def findings_of(images: ImageSet, searched: Searched, correct_N: Tensor | None) -> SetFindings:
    """Decide which items of a set belong to the overlap.

    ``correct_N``: whether the model recognises each item, None if unknown.
    """
    items, starts = np.unique(searched.images.rows, return_index=True)
    similarities, rows = searched.nearest.similarity.cpu(), searched.nearest.row.cpu()
    nearest: list[OverlapPair] = []
    alike: list[OverlapPair | None] = []
    for item, start, stop in zip(items.tolist(), starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
        place = start + int(similarities[start:stop].argmax())
        similarity = float(similarities[place])
        nearest.append(OverlapPair(item, place - start, int(rows[place]), similarity))
        place = start + int((searched.look_rows[start:stop] >= 0).argmax())
        pair = OverlapPair(item, place - start, int(searched.look_rows[place]), None)
        alike.append(pair if pair.row >= 0 else None)
    similarity_N = torch.tensor([pair.similarity for pair in nearest], dtype=torch.float64)
    looks_N = torch.tensor([pair is not None for pair in alike])

    def seen_from(limit: float) -> Tensor:
        return (similarity_N >= limit) | looks_N

    limits = sorted({*TRIED, searched.threshold}, reverse=True)
    tried = [(limit, overlap_of(seen_from(limit), correct_N)) for limit in limits]
    seen_N = seen_from(searched.threshold)
    return SetFindings(images, searched, overlap_of(seen_N, correct_N), nearest, alike, seen_N.numpy(), tried)
