"""Select the rows of an epoch: one row of each image or thing, or all captions or images together."""

import random
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property

import numpy as np
import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_info

from lit_clip.errors import BadSample, InputError, require
from ..loading.sampling import permutation
from .mixture import Mixture, in_each_part
from .source import Pair, PairSource, PerImage, PerThing, Row, Rows, arrow_image_names, numbered

MOST = 2_000_000  # rows whose images are counted for the plan: a second


def chosen_pairs(source: PairSource, per_image: PerImage, per_thing: PerThing) -> PairSource:
    """Return a training source; its epochs have the captions per image and images per thing that options set.

    The parts of a mixture are treated separately.
    """
    name = getattr(source, "path", type(source).__name__)
    if per_thing == "together":
        return in_each_part(source, _images_together)
    if per_thing == "two":
        return in_each_part(source, _two_images)
    if per_image == "together":
        source = joined(source)
        require(
            captions_per_image(source) > 1,
            f"data.captions.per_image: together would change nothing: no image of {name} has several captions; leave "
            "it out",
        )
    if per_thing != "all":
        one = _one_of_each(source, lambda part: part.things(rows=per_thing is None))
        if one.pairs_per_epoch < source.pairs_per_epoch:
            of = f"one image of each of {one.pairs_per_epoch:,} things ({source.pairs_per_epoch:,} pairs)"
            rank_zero_info(f"{name}: each epoch trains on {of}, others in the next; see data.images.per_thing")
            return one  # of an image, one row
        require(per_thing is None, _no_things("one", name))
    if per_image == "one":
        one = _one_of_each(source, arrow_image_names)
        require(
            one.pairs_per_epoch < len(source),
            f"data.captions.per_image: one would change nothing: each image of {name} is in one row, of whose captions "
            "training draws one anyway; leave it out",
        )
        return one
    return source


def _no_things(option: str, name: object) -> str:
    nothing = f"{option} would change nothing: {name} has no rows that list several images or have a group in common"
    return f"data.images.per_thing: {nothing}; set data.columns.group, or leave it out"


def _images_together(source: PairSource) -> PairSource:
    names = source.things()
    if names is None:
        raise InputError(_no_things("together", getattr(source, "path", type(source).__name__)))
    return ImagesTogether(source, numbered(names))


def _two_images(source: PairSource) -> PairSource:
    names = source.things()
    return TwoOfEach(source, np.arange(len(source)) if names is None else numbered(names))


def _one_of_each(source: PairSource, names_of: Callable[[PairSource], pa.ChunkedArray | None]) -> PairSource:
    def one(part: PairSource) -> PairSource:
        names = names_of(part)
        return part if names is None else OneOfEach(part, numbered(names))

    return in_each_part(source, one)


class OneOfEach(Rows):
    """All rows of a source; each epoch has one row of each image or thing, in the source's order.

    The rows of an image are shuffled, and epoch after epoch has the next of them; when all were used they are shuffled
    again. The row of an epoch is a pure function of seed, epoch and the rows' images. ``images`` are the numbers of the
    rows' images or things, int32 ``[len(source)]``, from 0 without a gap.
    """

    def __init__(self, source: PairSource, images: np.ndarray) -> None:
        super().__init__(source, np.arange(len(source)))
        self._images = images
        self._by_image = np.argsort(images, kind="stable").astype(self.rows.dtype)
        self._counts = np.bincount(images).astype(np.int32)  # rows of each image
        self._first = np.cumsum(self._counts) - self._counts  # of each image, in _by_image

    @property
    def pairs_per_epoch(self) -> int:
        return len(self._counts)

    def order(self, epoch: int, seed: int) -> np.ndarray:
        order = super().order(epoch, seed)
        return order[self._chosen(epoch, seed)[order]]

    def _chosen(self, epoch: int, seed: int) -> np.ndarray:
        """Return which rows are in an epoch, bool ``[len(self)]``."""
        chosen = np.zeros(len(self), dtype=bool)
        for count in np.unique(self._counts).tolist():  # rows of images with so many
            rows = self._by_image[self._first[self._counts == count, None] + np.arange(count)]
            time, turn = divmod(epoch, count)
            rng = np.random.default_rng((seed, time, count, 1))  # 1: not the generator of an epoch's order
            chosen[rng.permuted(rows, axis=1)[:, turn]] = True
        return chosen


class TwoOfEach(OneOfEach):
    """One row of each thing in an epoch, with a second image of the thing, or the same image if it has only one."""

    def draw(self, index: int, rng: random.Random | None, decoded: bool) -> Pair:
        pair = super().draw(index, rng, decoded)
        if rng is None or not decoded:
            return pair
        thing = self._images[index]
        rows = self._by_image[self._first[thing] :][: self._counts[thing]].tolist()
        others = [row for row in rows if self.source.key(row) != pair.key]
        other = self.source.load(rng.choice(others), rng).image if others else pair.image
        return pair._replace(extra={**pair.extra, "other_image": other})


COUNTED = 1000  # rows whose captions are counted for the plan


def joined(source: PairSource) -> PairSource:
    """Return the images of a source with all their captions; a mixture's parts are treated separately."""
    return in_each_part(source, Together)


def captions_per_image(source: PairSource) -> float:
    """Return an image's mean number of captions in an epoch; 1 for a source that does not join captions."""
    if isinstance(source, Mixture):
        return float(np.average([captions_per_image(part) for part in source.sources], weights=source.rows_per_epoch))
    source = source.source if isinstance(source, OneOfEach) else source
    return source.captions_per_image if isinstance(source, Together) else 1.0


class Together(Rows):
    """The images of a source, in the order of their first rows, each with the distinct captions of all its rows.

    A caption keeps its row's group and extra; a row's hard negative goes with the first of its captions.
    """

    def __init__(self, source: PairSource, images: np.ndarray | None = None) -> None:
        if images is None and (names := arrow_image_names(source)) is not None:
            images = numbered(names)
        self._by_image = np.arange(len(source)) if images is None else np.argsort(images, kind="stable")
        counts = np.ones(len(source), np.int64) if images is None else np.bincount(images)
        self._stops = np.cumsum(counts)
        super().__init__(source, self._by_image[self._stops - counts])
        self._by_image = self._by_image.astype(self.rows.dtype)

    def _rows_of(self, index: int) -> list[int]:
        return self._by_image[self._stops[index - 1] if index else 0 : self._stops[index]].tolist()

    def row(self, index: int) -> Row:
        rows = [self.source.row(row) for row in self._rows_of(index)]
        return rows[0]._replace(captions=list(dict.fromkeys(each for row in rows for each in row.captions)))

    def draw(self, index: int, rng: random.Random | None, decoded: bool) -> Pair:
        """Return the image with its first caption, and the other captions as ``more``."""
        rows, found = self._rows_of(index), dict[str, Pair]()
        image = self.source.load(rows[0], None).image if decoded else None
        for row in rows:
            text = self.source.text(row, rng)
            for caption in self.source.captions(row):
                if caption not in found:
                    found[caption] = text._replace(caption=caption)
                    text = text._replace(negative="")
        first, *others = found.values()
        return first._replace(image=image, more=others)

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """Return the images in the source's order; if rows share images, in a shuffled order."""
        own = len(self) == len(self.source)  # it may keep neighbours together, as shards do
        return super().order(epoch, seed) if own else permutation(len(self), epoch, seed)

    @cached_property
    def captions_per_image(self) -> float:
        """Mean number of captions of an image, from its first row's; copies in other rows count."""
        counts = []
        for row in range(min(len(self.source), COUNTED)):
            with suppress(BadSample):
                counts.append(len(set(self.source.captions(row))))
        return float(np.mean(counts or 1)) * len(self.source) / len(self)


class ImagesTogether(Together):
    """The things of a source, each with all its images and one caption; ``images`` are the things' numbers."""

    @cached_property
    def captions_per_image(self) -> float:
        return 1.0

    def draw(self, index: int, rng: random.Random | None, decoded: bool) -> Pair:
        """Load each image of a thing once, with a caption from any row; without ``rng``, only the first image."""
        rows = self._rows_of(index)
        if rng is None or not decoded:
            return self.source.draw(rows[0], rng, decoded)
        drawn = rng.choice(rows)
        row_of = {self.source.key(row): row for row in [*rows, drawn]}  # an image may have a row for each caption
        chosen = self.source.load(drawn, rng)
        return chosen._replace(
            more_images=[self.source.load(row, rng).image for row in row_of.values() if row != drawn]
        )
