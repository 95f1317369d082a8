"""Fingerprints of images by how they look, and which of them are alike."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.near_duplicates import BANDS, Look, looks_near


@dataclass
class Looks:
    """Looks in columns: uint64, uint32 and bool ``[N]``, see :class:`datamodules.near_duplicates.Look`."""

    bits: np.ndarray
    colours: np.ndarray
    plain: np.ndarray

    @classmethod
    def of(cls, looks: Sequence[Look]) -> "Looks":
        """The columns of some looks."""
        bits, colours, plain = zip(*looks, strict=True) if looks else ((), (), ())
        return cls(np.array(bits, np.uint64), np.array(colours, np.uint32), np.array(plain, bool))


class LookIndex:
    """Finds images of one look without comparing all pairs: two looks of one image agree in one of three bands.

    Args:
        looks: of the evaluation set; plain ones are like everything, so they are never found.
    """

    def __init__(self, looks: Looks) -> None:
        self.looks = looks
        self.usable = np.flatnonzero(~looks.plain)
        self._bands = []
        for first, width in BANDS:
            band = self._band(looks.bits[self.usable], first, width)
            order = np.argsort(band, kind="stable")
            self._bands.append((first, width, band[order], self.usable[order]))

    @staticmethod
    def _band(bits: np.ndarray, first: int, width: int) -> np.ndarray:
        return (bits >> np.uint64(first)) & np.uint64((1 << width) - 1)

    def like(self, others: Looks) -> tuple[np.ndarray, np.ndarray]:
        """Pairs that look the same: which of the evaluation set, and which of the others, int64 ``[P]`` each."""
        found = [self._in_band(others, *band) for band in self._bands]
        left, right = (np.concatenate(side) for side in zip(*found, strict=True))
        return left, right

    def _in_band(
        self, others: Looks, first: int, width: int, band: np.ndarray, order: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        usable = np.flatnonzero(~others.plain)
        wanted = self._band(others.bits[usable], first, width)
        starts, stops = np.searchsorted(band, wanted, "left"), np.searchsorted(band, wanted, "right")
        counts = stops - starts
        right = np.repeat(usable, counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        left = order[np.repeat(starts, counts) + within]
        ours = self.looks
        near = looks_near(ours.bits[left], ours.colours[left], others.bits[right], others.colours[right])
        return left[near], right[near]
