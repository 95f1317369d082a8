"""Images of a source with all of their captions, whether one row or several have them."""

import random
from contextlib import suppress
from functools import cached_property

import numpy as np

from lit_clip.errors import BadSample, require
from ..loading.sampling import permutation
from .mixture import Mixture
from .one_caption import image_numbers
from .source import Pair, PairSource, PairText, Rows

COUNTED = 1000  # rows whose captions are counted for the plan


def captions_together(source: PairSource) -> PairSource:
    """Return a source whose rows are images with all of their captions, as are those of each part of a mixture."""
    together = joined(source)
    name = getattr(source, "path", type(source).__name__)
    require(
        captions_per_image(together) > 1,
        f"data.captions.per_image: together would change nothing: no image of {name} has several captions; leave it "
        "out",
    )
    return together


def joined(source: PairSource) -> PairSource:
    """Return the images of a source, or of each part of a mixture, with their captions, one or several."""
    if isinstance(source, Mixture):
        return Mixture([joined(part) for part in source.sources], source.weights)
    return Together(source)


def captions_per_image(source: PairSource) -> float:
    """Return the mean number of captions of an image in an epoch; 1 for a source that does not have them together."""
    if isinstance(source, Mixture):
        return float(np.average([captions_per_image(part) for part in source.sources], weights=source.rows_per_epoch))
    return source.captions_per_image if isinstance(source, Together) else 1.0


class Together(Rows):
    """The images of a source, in the order of their first rows, each with the distinct captions of all its rows.

    A caption keeps its row's group and extra; a row's hard negative goes with the first of its captions.
    """

    def __init__(self, source: PairSource) -> None:
        images = image_numbers(source)
        self._by_image = np.arange(len(source)) if images is None else np.argsort(images, kind="stable")
        counts = np.ones(len(source), np.int64) if images is None else np.bincount(images)
        self._stops = np.cumsum(counts)
        super().__init__(source, self._by_image[self._stops - counts])
        self._by_image = self._by_image.astype(self.rows.dtype)

    def _rows_of(self, index: int) -> list[int]:
        return self._by_image[self._stops[index - 1] if index else 0 : self._stops[index]].tolist()

    def load(self, index: int, rng: random.Random | None) -> Pair:
        return Pair(super().load(index, None).image, *self.text(index, rng))

    def text(self, index: int, rng: random.Random | None) -> PairText:
        """Return the first caption, and the others as ``more``."""
        found: dict[str, PairText] = {}
        for row in self._rows_of(index):
            text = self.source.text(row, rng)
            for caption in self.source.captions(row):
                if caption not in found:
                    found[caption] = text._replace(caption=caption)
                    text = text._replace(negative="")
        first, *others = found.values()
        return first._replace(more=others)

    def captions(self, index: int) -> list[str]:
        return list(dict.fromkeys(caption for row in self._rows_of(index) for caption in self.source.captions(row)))

    def order(self, epoch: int, seed: int) -> np.ndarray:
        """Return the images in the source's order, or if rows share images, in the order of a source without that."""
        own = len(self) == len(self.source)  # it may keep neighbours together, as shards do
        return super().order(epoch, seed) if own else permutation(len(self), epoch, seed)

    @cached_property
    def captions_per_image(self) -> float:
        """Mean number of captions of an image, by those of the first rows; copies in other rows count."""
        counts = []
        for row in range(min(len(self.source), COUNTED)):
            with suppress(BadSample):
                counts.append(len(set(self.source.captions(row))))
        return float(np.mean(counts or 1)) * len(self.source) / len(self)
