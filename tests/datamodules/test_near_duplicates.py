"""Difference hash against its plain definition, and groups against comparing all pairs."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from datamodules.near_duplicates import LOOK, NEAR_BITS, NEAR_COLOUR, Groups, equal_groups, look_labels, look_of


def landscape(seed: int, width: int = 640, height: int = 480) -> Image.Image:
    """Image of smooth patches of colour, like a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(io.BytesIO(data.getvalue()))


def groups_of(*images: Image.Image) -> list[list[int]]:
    looks = np.array([look_of(image) for image in images], LOOK)
    return [group.tolist() for group in equal_groups(look_labels(looks)).largest]


def look_alikes(bits: np.ndarray, colours: np.ndarray) -> Groups:
    looks = np.zeros(len(bits), LOOK)
    looks["bits"], looks["colour"] = bits, colours
    return equal_groups(look_labels(looks))


def test_difference_hash_matches_its_definition() -> None:
    image = landscape(0)
    look = look_of(image)
    small = image.resize((9, 8), Image.Resampling.BOX)
    grey = [[small.convert("L").getpixel((x, y)) for x in range(9)] for y in range(8)]
    bits = "".join("1" if row[x + 1] - row[x] > 2 else "0" for row in grey for x in range(8))  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]  # grey levels are numbers
    assert f"{look.bits:064b}" == bits
    assert 10 < bits.count("1") < 54
    means = np.asarray(small).reshape(-1, 3).mean(axis=0).round()
    assert [look.colour >> 16, look.colour >> 8 & 255, look.colour & 255] == means.tolist()
    assert not look.plain


def test_resized_and_recompressed_copies_are_grouped() -> None:
    images = [landscape(seed) for seed in range(6)]
    small = as_jpeg(images[2].resize((320, 240)), 60)
    grey_copy = as_jpeg(images[4], 30)
    assert groups_of(*images, small, grey_copy, small.convert("CMYK")) == [[2, 6, 8], [4, 7]]


def test_images_that_differ_only_in_colour_are_not_grouped() -> None:
    shapes = np.random.default_rng(0).integers(0, 2, (8, 9), dtype=np.uint8)
    red, blue = (np.zeros((8, 9, 3), dtype=np.uint8) for _ in range(2))
    red[..., 0], blue[..., 2] = 255 * shapes, 255 * shapes
    assert look_of(Image.fromarray(red)).bits == look_of(Image.fromarray(blue)).bits
    assert groups_of(Image.fromarray(red), Image.fromarray(blue)) == []


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1", "P", "LA", "RGBA", "I;16", "I", "F"])
def test_image_of_one_colour_is_plain_in_every_mode(mode: str) -> None:
    assert look_of(Image.new(mode, (50, 40), 1)).plain
    halves = Image.new("L", (90, 40))
    halves.paste(255, (0, 0, 45, 40))
    if mode not in ("I;16", "I", "F"):  # Pillow cannot convert an 8-bit image to these
        assert not look_of(halves.convert(mode)).plain


def all_pairs(bits: list[int], colours: list[int]) -> list[list[int]]:
    """Groups found by comparing each with each, largest first."""
    group = list(range(len(bits)))
    for i, j in itertools.combinations(range(len(bits)), 2):
        difference = max(abs((colours[i] >> shift & 255) - (colours[j] >> shift & 255)) for shift in (0, 8, 16))
        if (bits[i] ^ bits[j]).bit_count() <= NEAR_BITS and difference <= NEAR_COLOUR:
            old, new = group[i], group[j]
            group = [new if name == old else name for name in group]
    found = [[i for i, name in enumerate(group) if name == wanted] for wanted in dict.fromkeys(group)]
    return sorted((each for each in found if len(each) > 1), key=lambda each: -len(each))


def test_groups_match_comparing_all_pairs() -> None:
    random = np.random.default_rng(1)
    seeds = random.integers(0, 2**64, 12, dtype=np.uint64)
    bits, colours = [], []
    for i in range(150):  # copies of a few images with up to three bits and some colour changed
        value = int(seeds[random.integers(12)])
        for bit in random.integers(0, 64, random.integers(4)):
            value ^= 1 << int(bit)
        bits.append(value)
        colours.append(int(sum(int(random.integers(100, 112)) << shift for shift in (0, 8, 16))) if i % 3 else 0)
    found = look_alikes(np.array(bits, np.uint64), np.array(colours, np.uint32))
    expected = all_pairs(bits, colours)
    assert found.number == len(expected) > 5
    assert found.surplus == sum(len(group) - 1 for group in expected)
    assert {tuple(group.tolist()) for group in found.largest} <= {tuple(group) for group in expected}
    assert [len(group) for group in found.largest] == [len(group) for group in expected[: len(found.largest)]]


def test_thousands_of_equal_looks_are_one_group() -> None:
    bits = np.full(5000, 12345, dtype=np.uint64)
    bits[::2] ^= np.uint64(1)
    found = look_alikes(bits, np.zeros(5000, np.uint32))
    assert (found.number, found.surplus, len(found.largest[0])) == (1, 4999, 5000)


def test_equal_values_are_grouped_largest_first() -> None:
    number, surplus, largest = equal_groups(np.array([7, 3, 7, 9, 3, 3, 1]))
    assert (number, surplus) == (2, 3)
    assert [group.tolist() for group in largest] == [[1, 4, 5], [0, 2]]


@pytest.mark.parametrize("size", [0, 1])
def test_fewer_than_two_values_have_no_group(size: int) -> None:
    assert equal_groups(np.zeros(size)) == Groups(0, 0, [])
    assert look_alikes(np.zeros(size, np.uint64), np.zeros(size, np.uint32)) == Groups(0, 0, [])
