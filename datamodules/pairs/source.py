"""What a source of (image, caption) pairs is, and which of them a path is."""

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from datamodules.loading.sampling import permutation
from lit_clip.errors import InputError, require
from lit_clip.tools.images import OnError

NO_CAPTION = "no caption"  # the reason, as for samples that turn out bad when they are loaded
LISTED = 1000  # rows left out that are remembered one by one
DELIMITED = (".csv", ".tsv", ".txt")
JSON_LINES = (".jsonl", ".ndjson")


class Pair(NamedTuple):
    """An image, a caption, what identifies the image, and the group of pairs that say the same, if there is one."""

    image: Image.Image
    caption: str
    key: str
    group: str = ""


class EncodedPair(NamedTuple):
    """A pair as it is stored, nothing of it decoded.

    Attributes:
        image: the image's file.
        captions: all that the image has, none of them blank.
        key: what identifies the image.
        group: of pairs that say the same; empty for none.
        where: how the user knows the pair, such as ``captions.csv row 7``.
    """

    image: bytes
    captions: list[str]
    key: str
    group: str
    where: str


class LeftOut:
    """Rows that opening a source found to be no pairs: how many for which reason, and the first of them.

    Attributes:
        counts: rows by reason.
        listed: (where, reason) of at most ``LISTED`` rows.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.listed: list[tuple[str, str]] = []

    def add(self, where: str, reason: str) -> None:
        """Count a row that ``where`` names."""
        self.counts[reason] += 1
        if len(self.listed) < LISTED:
            self.listed.append((where, reason))

    def update(self, other: "LeftOut") -> None:
        """Add another source's."""
        self.counts.update(other.counts)
        self.listed = [*self.listed, *other.listed][:LISTED]

    def __str__(self) -> str:
        """Such as ``3 rows without a caption``; empty if nothing was left out."""
        said = {NO_CAPTION: "without a caption"}
        return ", ".join(f"{count} rows {said.get(reason, f'({reason})')}" for reason, count in self.counts.items())


class PairSource(ABC):
    """Numbered pairs.

    Opening one reads no image; data workers are sent it, so it holds no Python object a row.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of pairs."""

    @abstractmethod
    def load(self, index: int, rng: random.Random | None) -> Pair:
        """One pair; where an image has several captions ``rng`` draws one, and None asks for the first.

        Raises:
            BadSample: the image or the caption cannot be read.
        """

    def read(self, index: int) -> EncodedPair:
        """One pair as it is stored.

        Raises:
            BadSample: the file is not there, or the caption cannot be read.
            InputError: this source has no image files.
        """
        raise InputError(f"{type(self).__name__}: its images are no files")

    def captions(self, index: int) -> list[str]:
        """Every caption of one pair; sources that have them apart from the image do not touch that.

        Raises:
            BadSample: likewise.
        """
        return [self.load(index, None).caption]

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """All rows in the order of an epoch, a pure function: int ``[epoch_size]``."""
        return permutation(len(self), epoch, seed)

    @property
    def epoch_size(self) -> int:
        """Rows in an epoch's order; sources that draw with replacement have their own."""
        return len(self)

    def prepare(self) -> None:  # noqa: B027  # most need none
        """Make the files that reading at random needs, unless they are there; for one process of a machine to call."""

    def check(self) -> None:  # noqa: B027  # images in the source itself are there
        """Look at the headers of some of the images, evenly spread, before anything is trained.

        Raises:
            BadSample: no such file, or no image.
        """

    @property
    def left_out(self) -> LeftOut:
        """Rows that are no pairs; none by default."""
        return LeftOut()

    def divide(self, share: float, seed: int) -> "tuple[PairSource, PairSource]":
        """All pairs in two: the second has about ``share`` of the images, and no image is in both.

        Raises:
            InputError: there are fewer than two images.
        """
        return divide_rows(self, share, seed)


def divide_rows(source: PairSource, share: float, seed: int) -> tuple[PairSource, PairSource]:
    """:meth:`PairSource.divide` for an image a row."""
    size = len(source)
    require(size > 1, "one image cannot be divided; give data.init_args.val")
    chosen = np.zeros(size, dtype=bool)
    chosen[random.Random(seed).sample(range(size), max(1, int(share * size)))] = True
    return Rows(source, np.flatnonzero(~chosen)), Rows(source, np.flatnonzero(chosen))


class Rows(PairSource):
    """Some pairs of a source.

    Args:
        source: of all pairs.
        rows: which of them, int ``[N]``, rising.
    """

    def __init__(self, source: PairSource, rows: np.ndarray) -> None:
        self.source = source
        self.rows = rows.astype(np.int32 if len(source) < 2**31 else np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, rng: random.Random | None) -> Pair:
        return self.source.load(int(self.rows[index]), rng)

    def read(self, index: int) -> EncodedPair:
        return self.source.read(int(self.rows[index]))

    def captions(self, index: int) -> list[str]:
        return self.source.captions(int(self.rows[index]))

    def order(self, epoch: int, seed: int) -> np.ndarray:
        position = np.full(len(self.source), -1, dtype=self.rows.dtype)  # of each row of the whole among ours
        position[self.rows] = np.arange(len(self.rows), dtype=self.rows.dtype)
        ours = position[self.source.order(epoch, seed)]
        return ours[ours >= 0]

    def prepare(self) -> None:
        self.source.prepare()

    def check(self) -> None:
        self.source.check()

    @property
    def left_out(self) -> LeftOut:
        return self.source.left_out


class SourceOptions(NamedTuple):
    """What a user may say of a source; None: found out.

    Attributes:
        root: where relative image paths start.
        image_column: of a text_table.
        caption_column: of a table; its values are texts or lists of texts.
        group_column: of a table: names the group of pairs that say the same.
        split: of sources that come in splits.
        default_split: which to take where a source has splits and ``split`` is None.
        on_error: whether a row that cannot be read ends the run or is left out and counted.
        shards: how tar shards are read, a :class:`datamodules.shards.pairs.ShardOptions`.
        typed: what stands before these names on the command line, for messages.
    """

    root: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    group_column: str | None = None
    split: str | None = None
    default_split: str | None = None
    on_error: OnError = "error"
    shards: Any = None
    typed: str = ""

    def no_split(self, path: object) -> None:
        """Raise :class:`InputError` if a split is wanted of a source that has none."""
        require(self.split is None, f"{path}: has no splits, but split is {self.split!r}")

    def no_columns(self, path: object) -> None:
        """Raise :class:`InputError` if a column is named of a source that has none."""
        for name in ("image_column", "caption_column", "group_column"):
            require(getattr(self, name) is None, f"{path}: is no text_table, but {name} is {getattr(self, name)!r}")


SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation"}


def find_split(path: object, found: Sequence[str], options: SourceOptions) -> str:
    """Which of a source's splits is wanted; ``val``, ``valid``, ``dev`` and ``validation`` are one name.

    Raises:
        InputError: none of that name, or none is named and there are several.
    """
    wanted = options.split or options.default_split
    if options.split is None and len(found) == 1:
        return found[0]
    for name in found:
        if wanted is not None and SPLIT_NAMES.get(name, name) == SPLIT_NAMES.get(wanted, wanted):
            return name
    problem = "it has several splits" if wanted is None else f"no split {wanted!r}"
    raise InputError(f"{path}: {problem}; its splits are {', '.join(found)}; set split")
