"""What a search has found of one evaluation set, image by image.

Shapes: N items of the set, Q images (an item may have several, the frames of a video).
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.overlap.search import NearestFound, Queries
from lit_clip.evaluation.data import ImageSet
from lit_clip.evaluation.overlap import Overlap, overlap_of

By = Literal["either", "embedding", "look"]
TRIED = (0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.85, 0.8)  # other thresholds that the report tells of


class OverlapPair(NamedTuple):
    """An image of the evaluation set and one of the training set.

    Attributes:
        item: number in the evaluation set.
        frame: which of its images.
        row: of the training set.
        name: how the user knows that.
        similarity: of the features; None where the look tells.
    """

    item: int
    frame: int
    row: int
    name: str
    similarity: float | None


@dataclass
class SetFindings:
    """One set.

    Attributes:
        images: the set.
        threshold: similarity from which an image is the same.
        overlap: the figures.
        nearest: of each item that could be read, by features, the nearest training image.
        alike: likewise the first training image of the same look, or None.
        seen: whether each counts as overlap, bool ``[N]``.
        tried: figures at other thresholds, the highest first.
        bad: the line of each item that could not be read.
    """

    images: ImageSet
    threshold: float
    overlap: Overlap
    nearest: list[OverlapPair]
    alike: list[OverlapPair | None]
    seen: np.ndarray
    tried: list[tuple[float, Overlap]]
    bad: list[str]

    def pairs(self) -> list[dict[str, Any]]:
        """The overlap as JSON values: what it is called in both sets, and what tells that it is the same."""
        found = []
        for place in np.flatnonzero(self.seen).tolist():
            near, alike = self.nearest[place], self.alike[place]
            by_features = near.similarity is not None and near.similarity >= self.threshold
            pair = near if by_features or alike is None else alike
            said = {"image": self.images.key(pair.item), "train": pair.name, "similarity": near.similarity}
            found.append({**said, "same_look": alike is not None})
        return found


def findings_of(
    images: ImageSet, queries: Queries, found: NearestFound, threshold: float, by: By, correct_N: Tensor | None
) -> SetFindings:
    """Judge a set.

    Args:
        images: the set.
        queries: what could be read of it.
        found: of those alone, on the CPU.
        threshold: see :class:`SetFindings`.
        by: what makes an image the same.
        correct_N: whether the model recognises each, bool ``[N]``.
    """
    items, starts = np.unique(queries.items, return_index=True)
    spans = list(zip(items.tolist(), starts.tolist(), [*starts[1:].tolist(), len(queries.items)], strict=True))
    nearest = [_nearest(found, *span) for span in spans]
    alike = [_alike(found, *span) for span in spans]
    similarity = torch.tensor([pair.similarity for pair in nearest], dtype=torch.float64)
    looks = torch.tensor([pair is not None for pair in alike])

    def seen_from(limit: float) -> Tensor:
        near = similarity >= limit
        return {"either": near | looks, "embedding": near, "look": looks}[by]

    limits = sorted({*TRIED, threshold}, reverse=True) if by != "look" else []
    tried = [(limit, overlap_of(seen_from(limit), correct_N)) for limit in limits]
    seen = seen_from(threshold)
    figures = overlap_of(seen, correct_N)
    return SetFindings(images, threshold, figures, nearest, alike, seen.numpy(), tried, queries.bad)


def _nearest(found: NearestFound, item: int, start: int, stop: int) -> OverlapPair:
    place = start + int(found.nearest.similarity[start:stop].argmax())
    row, similarity = int(found.nearest.row[place]), float(found.nearest.similarity[place])
    return OverlapPair(item, place - start, row, found.names[place], similarity)


def _alike(found: NearestFound, item: int, start: int, stop: int) -> OverlapPair | None:
    place = start + int((found.look_rows[start:stop] >= 0).argmax())
    row = int(found.look_rows[place])
    return OverlapPair(item, place - start, row, found.look_names[place], None) if row >= 0 else None
