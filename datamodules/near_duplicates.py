"""Find images that are the same or look the same by a 64-bit difference hash, without comparing all pairs.

The hash holds, for 8 x 8 cells of the image shrunk to 9 x 8, whether the next cell to the right is brighter (dHash:
N. Krawetz, "Kind of Like That", 2013). Resizing or recompressing an image changes few of its bits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 9, 8
STEP = 2  # grey levels; a smaller difference counts as none, or noise would decide in even areas
PLAIN = 4  # grey levels between the brightest and darkest cell of an image that shows nothing
NEAR_BITS = 2  # by which two hashes of one image may differ
NEAR_COLOUR = 8  # levels by which the mean red, green or blue may differ
BANDS = ((0, 22), (22, 21), (43, 21))  # first bit and width; two differing bits leave at least one band equal
SHOWN = 20  # groups whose members are kept
NEIGHBOURS = 64  # hashes that each is compared with in a band's order; bounds the work if many are alike
LOOK = np.dtype([("bits", "u8"), ("colour", "u4"), ("plain", "?")])  # the fields of Look


class Look(NamedTuple):
    """An image's look in 12 bytes."""

    bits: int  # the difference hash, unsigned 64 bits
    colour: int  # mean colour as 0xRRGGBB; the hash itself only knows brightness
    plain: bool  # whether the image is one even area, so that its hash means nothing


def look_of(image: Image.Image) -> Look:
    """Return an image's look as a model sees it: without transparency and EXIF rotation."""
    opaque = image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB")
    small = opaque.resize((WIDTH, HEIGHT), Image.Resampling.BOX).convert("RGB")
    grey = np.asarray(small.convert("L"), dtype=np.int16)  # [8, 9]
    brighter = (grey[:, 1:] - grey[:, :-1]) > STEP
    red, green, blue = np.asarray(small).reshape(-1, 3).mean(axis=0).round().astype(int).tolist()
    plain = int(np.ptp(np.asarray(small, dtype=np.int16), axis=(0, 1)).max()) < PLAIN
    return Look(int.from_bytes(np.packbits(brighter).tobytes(), "big"), red << 16 | green << 8 | blue, plain)


class LookIndex:
    """Find a set's look-alikes among other images by looks (``LOOK``) that agree in a band; skip plain images."""

    def __init__(self, looks: np.ndarray) -> None:
        self.looks = looks
        usable = np.flatnonzero(~looks["plain"])
        self._bands = []
        for first, width in BANDS:
            band = _band(looks["bits"][usable], first, width)
            order = np.argsort(band, kind="stable")
            self._bands.append((first, width, band[order], usable[order]))

    def like(self, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the look-alikes: positions in the set and in ``others``, int64 ``[P]`` each; a pair may repeat."""
        found = [self._in_band(others, *band) for band in self._bands]
        left, right = (np.concatenate(side) for side in zip(*found, strict=True))
        return left, right

    def _in_band(
        self, others: np.ndarray, first: int, width: int, band: np.ndarray, order: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        usable = np.flatnonzero(~others["plain"])
        wanted = _band(others["bits"][usable], first, width)
        starts, stops = np.searchsorted(band, wanted, "left"), np.searchsorted(band, wanted, "right")
        counts = stops - starts
        right = np.repeat(usable, counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        left = order[np.repeat(starts, counts) + within]
        near = _near(self.looks[left], others[right])
        return left[near], right[near]


class Groups(NamedTuple):
    """Groups of positions."""

    number: int  # of groups of two or more
    surplus: int  # members beyond the first of each group
    largest: list[np.ndarray]  # positions of the largest groups, ascending, int64 [n] each; at most SHOWN groups


def equal_groups(values: np.ndarray) -> Groups:
    """Group positions with equal values."""
    order = np.argsort(values, kind="stable")
    _, starts, lengths = np.unique(values[order], return_index=True, return_counts=True)
    several = np.flatnonzero(lengths > 1)
    largest = several[np.argsort(-lengths[several], kind="stable")][:SHOWN]
    groups = [order[starts[group] : starts[group] + lengths[group]] for group in largest]
    return Groups(len(several), int((lengths[several] - 1).sum()), groups)


def look_labels(looks: np.ndarray, most: int = NEAR_BITS) -> np.ndarray:
    """Number images from 0, so that images that look the same share a number, int ``[N]``.

    Looks have the fields ``bits`` and ``colour`` of ``LOOK``, and may differ in ``most`` bits; of pairs that differ in
    more than 2, those that agree in a band are found. The ends of a chain of look-alikes may differ more.
    """
    order = np.lexsort((looks["colour"], looks["bits"]))
    bits, colours = looks["bits"][order], looks["colour"][order]
    new = np.ones(len(looks), dtype=bool)
    new[1:] = (bits[1:] != bits[:-1]) | (colours[1:] != colours[:-1])
    look = np.empty(len(looks), dtype=np.int64)  # number of each image's look among the distinct ones
    look[order] = np.cumsum(new) - 1
    distinct = np.zeros(int(new.sum()), LOOK)
    distinct["bits"], distinct["colour"] = bits[new], colours[new]
    pairs = [pair for first, width in BANDS for pair in _near_pairs(distinct, first, width, most)]
    return components(np.concatenate([np.zeros((0, 2), dtype=np.int64), *pairs]).T, len(distinct))[look]


def components(links: np.ndarray, number: int) -> np.ndarray:
    """Return the component of each of ``number`` items, int ``[number]``; links are ``[2, L]``."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    left, right = links.astype(np.int32)  # of int64 scipy 1.11 makes one component in silence
    graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(number, number))
    return connected_components(graph, directed=False)[1]


def _band(bits: np.ndarray, first: int, width: int) -> np.ndarray:
    return (bits >> np.uint64(first)) & np.uint64((1 << width) - 1)


def _near_pairs(looks: np.ndarray, first: int, width: int, most: int) -> Iterator[np.ndarray]:
    """Yield near pairs of images that agree in a band, int64 ``[P, 2]`` each time."""
    band = _band(looks["bits"], first, width)
    order = np.lexsort((looks["colour"], looks["bits"], band))
    band = band[order]
    here = np.arange(len(order))
    for step in range(1, NEIGHBOURS + 1):
        here = here[here + step < len(order)]
        here = here[band[here] == band[here + step]]
        if not len(here):
            return
        left, right = order[here], order[here + step]
        near = _near(looks[left], looks[right], most)
        yield np.stack([left[near], right[near]], axis=1)


def _near(looks: np.ndarray, others: np.ndarray, most: int = NEAR_BITS) -> np.ndarray:
    """Return whether pairs of looks differ in few bits and little in colour, bool ``[P]``."""
    differing = looks["bits"] ^ others["bits"]
    for _ in range(most):
        differing = differing & (differing - np.uint64(1))  # clears the lowest set bit; zero stays zero
    near = differing == 0
    for shift in (0, 8, 16):
        level, other = ((each["colour"] >> shift & 0xFF).astype(np.int16) for each in (looks, others))
        near &= np.abs(level - other) <= NEAR_COLOUR
    return near
