"""Which images are the same, or look it: a 64-bit difference hash, compared without all pairs.

The hash says for 8 x 8 places of an image shrunk to 9 x 8 whether it gets brighter to the right (dHash: N. Krawetz,
"Kind of Like That", 2013). Scaling and compressing an image anew changes few of its bits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 9, 8
STEP = 2  # grey levels: less is no difference, or noise would decide wherever an image is even
PLAIN = 4  # grey levels between the brightest and the darkest place of an image that shows nothing
NEAR_BITS = 2  # that hashes of one image may differ in
NEAR_COLOUR = 8  # levels that the mean of red, green or blue may
BANDS = ((0, 22), (22, 21), (43, 21))  # first bit and width: two differing bits leave one band as it is
SHOWN = 20  # groups that are kept one by one
NEIGHBOURS = 64  # in the order of a band's hashes, that one is compared with: a bound for very many alike


class Look(NamedTuple):
    """What an image looks like, in 12 bytes.

    Attributes:
        bits: the difference hash, unsigned 64 bits.
        colour: the mean colour as ``0xRRGGBB``; the hash knows brightness alone.
        plain: whether the image is one even area; then the hash says nothing.
    """

    bits: int
    colour: int
    plain: bool


def look_of(image: Image.Image) -> Look:
    """The look of an image as a model sees it: transparency is dropped, and nothing is turned."""
    photo = image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB")
    small = photo.resize((WIDTH, HEIGHT), Image.Resampling.BOX).convert("RGB")
    grey = np.asarray(small.convert("L"), dtype=np.int16)  # [8, 9]
    brighter = (grey[:, 1:] - grey[:, :-1]) > STEP
    red, green, blue = np.asarray(small).reshape(-1, 3).mean(axis=0).round().astype(int).tolist()
    plain = int(np.ptp(np.asarray(small, dtype=np.int16), axis=(0, 1)).max()) < PLAIN
    return Look(int.from_bytes(np.packbits(brighter).tobytes(), "big"), red << 16 | green << 8 | blue, plain)


class Groups(NamedTuple):
    """Positions that belong together.

    Attributes:
        number: of groups of two or more.
        surplus: members beyond one a group.
        largest: the positions of the largest groups, rising, int64 ``[n]`` each, ``SHOWN`` groups at most.
    """

    number: int
    surplus: int
    largest: list[np.ndarray]


def same(values: np.ndarray) -> Groups:
    """Groups of equal values."""
    order = np.argsort(values, kind="stable")
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[order][1:] != values[order][:-1]
    starts = np.flatnonzero(new)
    lengths = np.diff(starts, append=len(values))
    several = np.flatnonzero(lengths > 1)
    largest = several[np.argsort(-lengths[several], kind="stable")][:SHOWN]
    groups = [order[starts[group] : starts[group] + lengths[group]] for group in largest]
    return Groups(len(several), int((lengths[several] - 1).sum()), groups)


def look_alikes(bits: np.ndarray, colours: np.ndarray) -> Groups:
    """Groups of images that look the same: they are linked by pairs that differ in few bits and little in colour.

    Args:
        bits: uint64 ``[N]``, see :class:`Look`.
        colours: uint32 ``[N]``, likewise.
    """
    order = np.lexsort((colours, bits))
    bits, colours = bits[order], colours[order]
    new = np.ones(len(bits), dtype=bool)
    new[1:] = (bits[1:] != bits[:-1]) | (colours[1:] != colours[:-1])
    look = np.empty(len(bits), dtype=np.int64)  # of each image, its number among the looks that differ
    look[order] = np.cumsum(new) - 1
    bits, colours = bits[new], colours[new]
    pairs = [pair for first, width in BANDS for pair in _near(bits, colours, first, width)]
    return same(_components(len(bits), pairs)[look])


def _near(bits: np.ndarray, colours: np.ndarray, first: int, width: int) -> Iterator[np.ndarray]:
    """Pairs that agree in a band and nearly in the rest: int64 ``[P, 2]`` at a time."""
    band = (bits >> np.uint64(first)) & np.uint64((1 << width) - 1)
    order = np.lexsort((colours, bits, band))
    band = band[order]
    here = np.arange(len(order))
    for step in range(1, NEIGHBOURS + 1):
        here = here[here + step < len(order)]
        here = here[band[here] == band[here + step]]
        if not len(here):
            return
        left, right = order[here], order[here + step]
        near = looks_near(bits[left], colours[left], bits[right], colours[right])
        yield np.stack([left[near], right[near]], axis=1)


def looks_near(bits: np.ndarray, colours: np.ndarray, other_bits: np.ndarray, other_colours: np.ndarray) -> np.ndarray:
    """Whether two looks are of one image: bool ``[P]``, of uint64 and uint32 ``[P]`` as in :func:`look_alikes`."""
    return _few_bits(bits ^ other_bits) & _near_colours(colours, other_colours)


def _few_bits(values: np.ndarray) -> np.ndarray:
    """Whether at most ``NEAR_BITS`` bits are set."""
    for _ in range(NEAR_BITS):
        values = values & (values - np.uint64(1))  # without the lowest one; zero stays zero
    return values == 0


def _near_colours(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    near = np.ones(len(left), dtype=bool)
    for shift in (0, 8, 16):
        one, other = ((colours >> shift & 0xFF).astype(np.int16) for colours in (left, right))
        near &= np.abs(one - other) <= NEAR_COLOUR
    return near


def _components(size: int, pairs: list[np.ndarray]) -> np.ndarray:
    """The lowest number that each is linked with, over any number of pairs: int64 ``[size]``."""
    lowest = np.arange(size)
    left, right = np.concatenate([np.zeros((0, 2), dtype=np.int64), *pairs]).T
    while True:
        before = lowest.copy()
        ends = lowest[left], lowest[right]
        for end in ends:
            np.minimum.at(lowest, end, np.minimum(*ends))
        lowest = lowest[lowest]
        if np.array_equal(before, lowest):
            return lowest
