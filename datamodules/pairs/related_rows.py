"""Find related rows of a source: duplicates share a caption, an image or a group; neighbours are similar."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lit_clip.distributed import rank_and_world
from lit_clip.errors import BadSample, require
from lit_clip.tools.console import progress
from lit_clip.tools.hashing import hash64, pair_hash
from lit_clip.tools.workers import Mapped, loader
from .source import PairSource

CHUNK = 4096  # rows that a data worker reads at once


class Shared(NamedTuple):
    """Names that rows share: row r has ``names[starts[r] : starts[r + 1]]``; a row without names has no duplicate.

    ``starts`` is int64 ``[N + 1]``; ``names`` are numbers from 0, int32 ``[M]``. Duplicates have a name in common.
    """

    starts: np.ndarray
    names: np.ndarray

    def of(self, row: int) -> list[int]:
        return self.names[self.starts[row] : self.starts[row + 1]].tolist()


def number_of(content: str | bytes) -> int:
    """Hash content to an unsigned 64-bit number."""
    return int.from_bytes(hash64(content), "little")


def caption_hash(caption: str) -> int:
    """Hash a caption, ignoring letter case and white space."""
    return number_of(" ".join(caption.lower().split()))


class PairNames(NamedTuple):
    """Names that the rows of a source share, and hashes to find their features by: 0 for an unreadable row."""

    shared: Shared
    images: np.ndarray  # pair_hash of each row's key and no caption, int64 [N]
    pairs: np.ndarray  # of its key and first caption, int64 [N]


class _Chunk(NamedTuple):
    """Hashes of all names of some rows, uint64 ``[M]``, the number of names in each, and columns of PairNames."""

    names: np.ndarray
    counts: np.ndarray
    images: np.ndarray
    pairs: np.ndarray


def _read_each(source: PairSource, rows: Sequence[int]) -> _Chunk:
    names, images, pairs = zip(*(_read(source, row) for row in rows), strict=True)
    counts = np.array([len(each) for each in names], dtype=np.int64)
    every = np.array([name for each in names for name in each], dtype=np.uint64)
    return _Chunk(every, counts, np.array(images, dtype=np.int64), np.array(pairs, dtype=np.int64))


def _read(source: PairSource, row: int) -> tuple[set[int], int, int]:
    """Return a row's names, and its values for the other columns of :class:`PairNames`."""
    try:
        pair, captions = source.text(row, None), source.captions(row)
    except BadSample:  # loading it will raise or skip it
        return set(), 0, 0
    groups = {number_of(f"group\0{text.group}") for text in (pair, *(pair.more or ())) if text.group}
    names = {number_of(f"image\0{pair.key}"), *groups, *map(caption_hash, captions)}
    return names, pair_hash(pair.key, ""), pair_hash(pair.key, captions[0])


def name_pairs(source: PairSource, num_workers: int) -> PairNames:
    """Read key, group and all captions of each row, without its image where the source can.

    Images are the same if their keys are; so are the copies in the table of ``inspect`` that ``data.keep`` names.
    """
    from lit_clip.embedding.reading import in_batches

    read: Mapped[_Chunk] = Mapped(partial(_read_each, source), in_batches(range(len(source)), CHUNK))
    parts: list[_Chunk] = []
    with progress("looking for duplicates", len(source), rank_and_world()[0] == 0) as advance:
        for part in loader(read, num_workers):
            parts.append(part)
            advance(len(part.counts))
    hashes, counts, images, pairs = (np.concatenate(column) for column in zip(*parts, strict=True))
    _, numbers, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    several = sizes[numbers] > 1
    rows = np.repeat(np.arange(len(source)), counts)[several]
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(source)))])
    names = np.unique(numbers[several], return_inverse=True)[1].astype(np.int32)
    return PairNames(Shared(starts, names), images, pairs)


NEAREST = 32  # neighbours of each item; batches use those that the epoch has not used yet


class Neighbours(NamedTuple):
    """The nearest items of each item, and the rows of each item; an item is an image or one of its captions.

    Item i has the rows ``rows[starts[i] : starts[i + 1]]``, int32; ``starts`` is int64 ``[I + 1]``.
    """

    items: np.ndarray  # of each row, int32 [N]; -1: without features
    nearest: np.ndarray  # items, the nearest first, int32 [I, K]
    starts: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, items: np.ndarray, nearest: np.ndarray) -> "Neighbours":
        counts = np.bincount(items[items >= 0], minlength=len(nearest))
        rows = np.argsort(items, kind="stable")[np.count_nonzero(items < 0) :].astype(np.int32)
        return cls(items, nearest, np.concatenate([[0], np.cumsum(counts)]), rows)

    def near(self, rows: np.ndarray, draws: np.ndarray) -> list[list[int]]:
        """Return, for each of ``rows``, the rows of its nearest items that still have ``draws``, int ``[N]``."""
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
    """Return the neighbours of a source's rows from a file of ``lit-clip embed``; a collective."""
    from lit_clip.embedding.feature_files import read_features
    from lit_clip.embedding.index import nearest_others

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
    """Return the neighbours of rows from ``nearest`` ``[n, K]`` of images, numbered as in :func:`distinct_images`."""
    numbers = np.unique(names.images, return_inverse=True)[1]
    places = np.full(len(distinct_images(names)), -1, dtype=np.int32)
    places[images] = np.arange(len(images))
    return Neighbours.of(places[numbers], nearest)
