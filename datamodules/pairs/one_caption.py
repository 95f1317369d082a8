"""One row of each image in an epoch, where several rows are captions of the same image."""

from typing import Any

import numpy as np
import pyarrow.compute

from lit_clip.errors import require
from .mixture import Mixture
from .source import PairSource, Rows, arrow_image_names

compute: Any = pyarrow.compute  # its functions are defined at run time

MOST = 2_000_000  # rows whose images are counted for the plan: a second


def one_caption_each(source: PairSource) -> PairSource:
    """Return a source whose epochs have one row of each image, as has each part of a mixture."""
    one = _one_caption_each(source)
    name = getattr(source, "path", type(source).__name__)
    require(
        one.pairs_per_epoch < len(source),
        f"data.captions.per_image: one would change nothing: each image of {name} is in one row, of whose captions "
        "training draws one anyway; leave it out",
    )
    return one


def _one_caption_each(source: PairSource) -> PairSource:
    if isinstance(source, Mixture):
        return Mixture([_one_caption_each(part) for part in source.sources], source.weights)
    images = image_numbers(source)
    return source if images is None else OneCaption(source, images)


def image_numbers(source: PairSource) -> np.ndarray | None:
    """Return each row's image as a number, int32 ``[len(source)]``; None: every row has another image."""
    names = arrow_image_names(source)
    if names is None:
        return None
    return compute.index_in(names, value_set=compute.unique(names)).to_numpy().astype(np.int32)


def rows_of_each_image(source: PairSource) -> float | None:
    """Return the mean number of rows of an image in an epoch; None if unknown, or where there are too many rows."""
    if len(source) > MOST or source.pairs_per_epoch < len(source):
        return None
    images = image_numbers(source)
    return None if images is None or not len(images) else len(images) / (int(images.max()) + 1)


class OneCaption(Rows):
    """All rows of a source, of which each epoch has one of each image, in the source's order.

    The rows of an image are shuffled, and epoch after epoch has the next of them; when all were used they are shuffled
    again. The row of an epoch is a pure function of seed, epoch and the rows' images. ``images`` are the numbers of the
    rows' images, int32 ``[len(source)]``, from 0 without a gap.
    """

    def __init__(self, source: PairSource, images: np.ndarray) -> None:
        super().__init__(source, np.arange(len(source)))
        self._by_image = np.argsort(images, kind="stable").astype(self.rows.dtype)
        self._counts = np.bincount(images).astype(np.int32)  # rows of each image

    @property
    def pairs_per_epoch(self) -> int:
        return len(self._counts)

    def order(self, epoch: int, seed: int) -> np.ndarray:
        order = super().order(epoch, seed)
        return order[self._chosen(epoch, seed)[order]]

    def _chosen(self, epoch: int, seed: int) -> np.ndarray:
        """Return whether each row is in an epoch, bool ``[len(self)]``."""
        chosen = np.zeros(len(self), dtype=bool)
        first = np.cumsum(self._counts) - self._counts  # of each image, in _by_image
        for count in np.unique(self._counts).tolist():  # rows of images with so many
            rows = self._by_image[first[self._counts == count, None] + np.arange(count)]
            time, turn = divmod(epoch, count)
            rng = np.random.default_rng((seed, time, count, 1))  # 1: not the generator of an epoch's order
            chosen[rng.permuted(rows, axis=1)[:, turn]] = True
        return chosen
