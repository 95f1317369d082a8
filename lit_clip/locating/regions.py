"""Assign places of an image to texts, from heat maps.

Shapes: N texts, K background texts, h x w places, H x W pixels of a map.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_clip.evaluation.thresholds import none_threshold

Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are the first pixels outside


class Region(NamedTuple):
    """Part of an image that shows a text."""

    cosine: float  # at the peak
    margin: float  # of that cosine over the level that background texts reach
    peak: tuple[int, int]  # column and row in the map
    mask: np.ndarray  # bool [H, W], of the map; all False if the text is not seen

    @property
    def seen(self) -> bool:
        """Whether any place belongs to the text."""
        return bool(self.mask.any())

    def box(self, size: tuple[int, int]) -> Box | None:
        """Return the region's box in an image of the given size; None if the text is not seen."""
        if not self.seen:
            return None
        rows, columns = (np.flatnonzero(self.mask.any(axis=axis)) for axis in (1, 0))
        (left, right), (top, bottom) = (
            _pixels(int(found[0]), int(found[-1]) + 1, cells, side)
            for found, side, cells in zip((columns, rows), size, self.mask.shape[::-1], strict=True)
        )
        return left, top, right, bottom

    def point(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the peak's column and row in an image of the given size."""
        x, y = (
            sum(_pixels(at, at + 1, cells, side)) // 2
            for at, side, cells in zip(self.peak, size, self.mask.shape[::-1], strict=True)
        )
        return x, y


def background_level(peak_K: Tensor, false_alarms: float) -> float:
    """Return the cosine above which a text is seen, from each background text's highest cosine in the image.

    A text of something else is one more of their kind, so it exceeds the level in at most this share of images, on
    average (split-conformal prediction, as in :func:`lit_clip.evaluation.thresholds.none_threshold`).
    """
    return -none_threshold(-peak_K, false_alarms)


def find_regions(places_Nhw: Tensor, maps_NHW: Tensor, level: float) -> list[Region]:
    """Return the region of each text, from cosines at the encoder's places and at the pixels between them.

    A place belongs to the text that fits best there, if its cosine is above ``level``. A text without a place is not
    seen; its peak is its highest cosine. The region of another is what hangs together around its best place.
    """
    (_, h, w), (_, H, W) = places_Nhw.shape, maps_NHW.shape
    best_hw, best_HW, regions = places_Nhw.argmax(dim=0), maps_NHW.argmax(dim=0), []
    for number, (places, pixels) in enumerate(zip(places_Nhw, maps_NHW, strict=True)):
        own = (best_hw == number) & (places > level)
        seen = bool(own.any())
        row, column = divmod(int((torch.where(own, places, -torch.inf) if seen else places).argmax()), w)
        y, x = (2 * row + 1) * H // (2 * h), (2 * column + 1) * W // (2 * w)
        mask = ((best_HW == number) & (pixels > level)).numpy()
        mask[y, x] = True  # also where a map has fewer pixels than places
        cosine = float(places[row, column])
        regions.append(Region(cosine, cosine - level, (x, y), _around(mask, y, x) & seen))
    return regions


def _around(own: np.ndarray, row: int, column: int) -> np.ndarray:
    from scipy.ndimage import label  # here, because it takes a tenth of a second

    parts: Any = label(own, structure=np.ones((3, 3)))
    return parts[0] == parts[0][row, column]


def _pixels(start: int, stop: int, cells: int, side: int) -> tuple[int, int]:
    """Return the range of a side's pixels that shows some cells of a map: at least one pixel."""
    end = -(-side * stop // cells)  # as in resized_mask, where pixel p shows the cell p * cells // side
    return min(-(-side * start // cells), end - 1), end


def resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a map's mask, resized to an image's width and height."""
    lines: Sequence[np.ndarray] = [
        np.arange(side) * cells // side for side, cells in zip(size, mask.shape[::-1], strict=True)
    ]
    return mask[np.ix_(lines[1], lines[0])]
