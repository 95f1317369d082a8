"""Which rows of a source are duplicates: they have a caption, an image or a group in common."""

from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from lit_clip.distributed import rank_and_world
from lit_clip.embedding.pair_scores import pair_hash
from lit_clip.errors import BadSample
from lit_clip.tools.console import progress
from lit_clip.tools.hashing import hash64
from lit_clip.tools.workers import loader
from .source import PairSource

CHUNK = 4096  # rows that a data worker reads at once


class Shared(NamedTuple):
    """What rows share with others: row r has ``names[starts[r] : starts[r + 1]]``; without any it has no duplicate.

    ``starts`` is int64 ``[N + 1]``; ``names`` are numbers from 0, int32 ``[M]``. Duplicates have a name in common.
    """

    starts: np.ndarray
    names: np.ndarray

    def of(self, row: int) -> list[int]:
        """Return the names of a row."""
        return self.names[self.starts[row] : self.starts[row + 1]].tolist()


def number_of(content: str | bytes) -> int:
    """Hash content to an unsigned 64-bit number."""
    return int.from_bytes(hash64(content), "little")


def caption_hash(caption: str) -> int:
    """Hash a caption so that letter case and white space make no difference."""
    return number_of(" ".join(caption.lower().split()))


class PairNames(NamedTuple):
    """What the rows of a source share, and how features of them are found: 0 for a row that cannot be read."""

    shared: Shared
    images: np.ndarray  # pair_hash of each row's key and no caption, int64 [N]
    pairs: np.ndarray  # of its key and first caption, int64 [N]


class _Chunk(NamedTuple):
    """The hashes of all names of some rows, uint64 ``[M]``, how many each row has, and columns of PairNames."""

    names: np.ndarray
    counts: np.ndarray
    images: np.ndarray
    pairs: np.ndarray


class _Chunks(Dataset[_Chunk]):
    """The rows of a source in chunks of ``CHUNK``."""

    def __init__(self, source: PairSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return -(-len(self.source) // CHUNK)

    def __getitem__(self, number: int) -> _Chunk:
        rows = range(number * CHUNK, min((number + 1) * CHUNK, len(self.source)))
        names, images, pairs = zip(*map(self._read, rows), strict=True)
        counts = np.array([len(each) for each in names], dtype=np.int64)
        every = np.array([name for each in names for name in each], dtype=np.uint64)
        return _Chunk(every, counts, np.array(images, dtype=np.int64), np.array(pairs, dtype=np.int64))

    def _read(self, row: int) -> tuple[set[int], int, int]:
        try:
            pair, captions = self.source.text(row, None), self.source.captions(row)
        except BadSample:  # loading it will raise or skip it
            return set(), 0, 0
        groups = {number_of(f"group\0{text.group}") for text in (pair, *(pair.more or ())) if text.group}
        names = {number_of(f"image\0{pair.key}"), *groups, *map(caption_hash, captions)}
        return names, pair_hash(pair.key, ""), pair_hash(pair.key, captions[0])


def name_pairs(source: PairSource, num_workers: int) -> PairNames:
    """Read key, group and all captions of each row, without its image where the source can.

    Images are the same if their keys are; so are the copies in the table of ``inspect`` that ``data.keep`` names.
    """
    chunks: Any = _Chunks(source)
    parts: list[_Chunk] = []
    with progress("looking for duplicates", len(source), rank_and_world()[0] == 0) as advance:
        for part in loader(chunks, num_workers):
            parts.append(part)
            advance(len(part.counts))
    hashes, counts, images, pairs = (np.concatenate(column) for column in zip(*parts, strict=True))
    _, numbers, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    several = sizes[numbers] > 1
    rows = np.repeat(np.arange(len(source)), counts)[several]
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(source)))])
    names = np.unique(numbers[several], return_inverse=True)[1].astype(np.int32)
    return PairNames(Shared(starts, names), images, pairs)
