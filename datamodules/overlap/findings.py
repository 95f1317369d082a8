"""Findings of an overlap search for one evaluation set.

Shapes: N items of the set that could be read; an item has several images if it is a video.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_clip.evaluation.data import ImageSet
from lit_clip.evaluation.overlap import Overlap, overlap_of
from ..pairs.decisions import DROP
from ..pairs.findings import Finding
from ..pairs.source import PairSource
from .search import Searched

By = Literal["either", "embedding", "look"]
TRIED = (0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.85, 0.8)  # other thresholds in the report


class OverlapPair(NamedTuple):
    """An image of the evaluation set and the matching image of the training set."""

    item: int  # index in the evaluation set
    frame: int  # index among the item's images
    row: int  # of the training set; -1: none
    name: str  # of the training image, as the user knows it
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

    def pairs(self) -> list[dict[str, Any]]:
        """Return the overlap as JSON values: names in both sets, and the evidence for each pair."""
        found = []
        for place in np.flatnonzero(self.seen).tolist():
            near, alike = self.nearest[place], self.alike[place]
            by_features = near.similarity is not None and near.similarity >= self.searched.threshold
            pair = near if by_features or alike is None else alike
            names = {"image": self.images.key(pair.item), "train": pair.name}
            found.append({**names, "similarity": near.similarity, "same_look": alike is not None})
        return found


def leaked_rows(sets: Mapping[str, SetFindings], by: By, source: PairSource) -> Iterator[Finding]:
    """Yield a line for each training image that matches any image of a set, not only as its nearest."""
    leaks = [
        (row, number, query, similarity)
        for number, each in enumerate(sets.values())
        for part in each.searched.leaks
        for row, query, similarity in part.tolist()
    ]
    line = None
    for row, number, query, similarity in sorted(leaks, key=lambda leak: leak[:3]):
        by_look = similarity != similarity
        if by == ("embedding" if by_look else "look"):
            continue
        if line is None or line.row != row:
            if line is not None:
                yield line
            line = Finding.of_row(row, source.key(row))
        name, findings = list(sets.items())[number]
        finding = f"image of the evaluation set {name}"
        line.add(
            finding if finding not in line.finding.split("; ") else "",
            DROP,
            "same look" if by_look else f"similarity {similarity:.3f}",
        )
        line.copy_of = line.copy_of or f"{name}: {findings.images.key(int(findings.searched.images.rows[query]))}"
    if line is not None:
        yield line


def findings_of(images: ImageSet, searched: Searched, by: By, correct_N: Tensor | None) -> SetFindings:
    """Decide which items of a set belong to the overlap.

    ``by`` is the evidence that counts; ``correct_N``: whether the model recognises each item, None if unknown.
    """
    items, starts = np.unique(searched.images.rows, return_index=True)
    similarities, rows = searched.nearest.similarity.cpu(), searched.nearest.row.cpu()
    nearest: list[OverlapPair] = []
    alike: list[OverlapPair | None] = []
    for item, start, stop in zip(items.tolist(), starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
        place = start + int(similarities[start:stop].argmax())
        similarity = float(similarities[place])
        nearest.append(OverlapPair(item, place - start, int(rows[place]), searched.names[place], similarity))
        place = start + int((searched.look_rows[start:stop] >= 0).argmax())
        pair = OverlapPair(item, place - start, int(searched.look_rows[place]), searched.look_names[place], None)
        alike.append(pair if pair.row >= 0 else None)
    similarity_N = torch.tensor([pair.similarity for pair in nearest], dtype=torch.float64)
    looks_N = torch.tensor([pair is not None for pair in alike])

    def seen_from(limit: float) -> Tensor:
        near_N = similarity_N >= limit
        return {"either": near_N | looks_N, "embedding": near_N, "look": looks_N}[by]

    limits = sorted({*TRIED, searched.threshold}, reverse=True) if by != "look" else []
    tried = [(limit, overlap_of(seen_from(limit), correct_N)) for limit in limits]
    seen_N = seen_from(searched.threshold)
    return SetFindings(images, searched, overlap_of(seen_N, correct_N), nearest, alike, seen_N.numpy(), tried)
