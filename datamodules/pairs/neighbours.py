"""The nearest neighbours of training pairs by features of their images or captions."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from lit_clip.embedding.feature_files import read_features
from lit_clip.embedding.index import nearest_others
from lit_clip.embedding.pair_scores import pair_hash
from lit_clip.errors import require
from .duplicates import PairNames

NEAREST = 32  # neighbours of each item; batches use those that the epoch has not used yet


class Neighbours(NamedTuple):
    """The nearest items of each item, and the rows of each item; an item is an image, or a caption of one.

    Item i has the rows ``rows[starts[i] : starts[i + 1]]``, int32; ``starts`` is int64 ``[I + 1]``.
    """

    items: np.ndarray  # of each row, int32 [N]; -1: without features
    nearest: np.ndarray  # items, the nearest first, int32 [I, K]
    starts: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, items: np.ndarray, nearest: np.ndarray) -> "Neighbours":
        """Make them of the first two."""
        counts = np.bincount(items[items >= 0], minlength=len(nearest))
        rows = np.argsort(items, kind="stable")[np.count_nonzero(items < 0) :].astype(np.int32)
        return cls(items, nearest, np.concatenate([[0], np.cumsum(counts)]), rows)

    def near(self, rows: np.ndarray, draws: np.ndarray) -> list[list[int]]:
        """Return for each of ``rows`` those of its nearest items that have ``draws``, int ``[N]``."""
        items = self.items[rows]
        others = self.nearest[items]  # [n, K]; of the last item where there is none
        first, counts = self.starts[others], self.starts[others + 1] - self.starts[others]
        counts[items < 0] = 0
        before = np.cumsum(counts).reshape(counts.shape) - counts
        found = self.rows[np.repeat(first - before, counts.reshape(-1)) + np.arange(counts.sum())]
        usable = draws[found] > 0
        of_row = np.repeat(np.arange(len(rows)), counts.sum(axis=1))[usable]
        parts = np.split(found[usable], np.searchsorted(of_row, np.arange(1, len(rows))))
        return [part.tolist() for part in parts]


def stored_neighbours(path: str, names: PairNames) -> Neighbours:
    """Return the neighbours of a source's rows by a file of ``lit-clip embed``; a collective."""
    stored = read_features(Path(path).expanduser())
    captions = stored.captions or [""] * len(stored.keys)
    hashes = np.array([pair_hash(*pair) for pair in zip(stored.keys, captions, strict=True)], dtype=np.int64)
    wanted, order = names.pairs if stored.captions else names.images, np.argsort(hashes)
    found = np.isin(wanted, hashes)
    require(
        bool(found.any()),
        f"data.batches.features: {path} has features of none of the {len(wanted):,} training pairs; write it with "
        "lit-clip embed on the same data",
    )
    place = order[np.searchsorted(hashes, wanted[found], sorter=order)]
    used, numbers = np.unique(place, return_inverse=True)  # validation images are nobody's neighbours
    items = np.full(len(wanted), -1, dtype=np.int32)
    items[found] = numbers
    return Neighbours.of(items, nearest_others(stored.features[used], NEAREST))


def distinct_images(names: PairNames) -> np.ndarray:
    """Return the first row of each image of a source, int64 ``[I]``."""
    return np.unique(names.images, return_index=True)[1]


def neighbours_of_images(names: PairNames, images: np.ndarray, nearest: np.ndarray) -> Neighbours:
    """Return the neighbours of rows by those, ``[n, K]``, of some images: numbers in :func:`distinct_images`."""
    numbers = np.unique(names.images, return_inverse=True)[1]
    places = np.full(len(distinct_images(names)), -1, dtype=np.int32)
    places[images] = np.arange(len(images))
    return Neighbours.of(places[numbers], nearest)
