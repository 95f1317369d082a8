"""Findings of an overlap search for one evaluation set.

Shapes: N items of the set that could be read; an item has several images if it is a video.
"""

from collections.abc import Iterator, Mapping, Sequence
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
from .search import LEAK, NearestFound, Queries

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
    threshold: float  # least similarity of images that count as the same
    overlap: Overlap
    nearest: list[OverlapPair]  # nearest training image of each item, by features
    alike: list[OverlapPair | None]  # first training image that looks the same as each item, or None
    seen: np.ndarray  # whether each item belongs to the overlap, bool [N]
    tried: list[tuple[float, Overlap]]  # figures at other thresholds, the highest first
    bad: list[str]  # message for each item that could not be read

    def pairs(self) -> list[dict[str, Any]]:
        """Return the overlap as JSON values: names in both sets, and the evidence for each pair."""
        found = []
        for place in np.flatnonzero(self.seen).tolist():
            near, alike = self.nearest[place], self.alike[place]
            by_features = near.similarity is not None and near.similarity >= self.threshold
            pair = near if by_features or alike is None else alike
            names = {"image": self.images.key(pair.item), "train": pair.name}
            found.append({**names, "similarity": near.similarity, "same_look": alike is not None})
        return found


def leaked_rows(
    found: NearestFound, queries: Sequence[Queries], findings: Mapping[str, SetFindings], by: By, source: PairSource
) -> Iterator[Finding]:
    """Yield a line for each training image that matches any query of a set, not only as its nearest.

    ``queries`` and ``findings`` are those of the sets, in the order that the search was made in.
    """
    leaks = np.concatenate([np.zeros(0, LEAK), *found.leaks])
    leaks = leaks[np.lexsort((leaks["query"], leaks["set"], leaks["row"]))]
    starts = [0, *np.cumsum([len(each.items) for each in queries]).tolist()]
    line = None
    for row, number, query, similarity in leaks.tolist():
        name, judged = list(findings.items())[number]
        by_look = similarity != similarity
        if by == ("embedding" if by_look else "look") or similarity < judged.threshold:
            continue
        if line is None or line.row != row:
            if line is not None:
                yield line
            line = Finding.of_row(row, source.key(row))
        item = judged.images.key(int(queries[number].items[query - starts[number]]))
        finding = f"image of the evaluation set {name}"
        line.add(
            finding if finding not in line.finding.split("; ") else "",
            DROP,
            "same look" if by_look else f"similarity {similarity:.3f}",
        )
        line.copy_of = line.copy_of or f"{name}: {item}"
    if line is not None:
        yield line


def findings_of(
    images: ImageSet, queries: Queries, found: NearestFound, threshold: float, by: By, correct_N: Tensor | None
) -> SetFindings:
    """Decide which items of a set belong to the overlap, from its search results on the CPU.

    ``by`` is the evidence that counts; ``correct_N``: whether the model recognises each item, None if unknown.
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
