"""Heat maps drawn over images."""

import numpy as np
import pytest
import torch
from PIL import Image

from lit_clip.locating.overlay import Scale, overlay

WHITE = Image.new("RGB", (300, 200), "white")
SCALE = Scale.around(0.2, 0.4)


def drawn(image: Image.Image, cosine: float) -> np.ndarray:
    maps = torch.full((4, 6), cosine)
    return np.asarray(overlay(image, maps, SCALE, cosine))


def test_a_cosine_has_one_colour_whatever_the_texts_own_peak_is() -> None:
    low, high = torch.full((1, 3), 0.1), torch.full((1, 3), 0.1)
    high[0, 2] = 0.4
    pictures = [np.asarray(overlay(WHITE, maps, SCALE, float(maps.max()))) for maps in (low, high)]
    assert np.array_equal(pictures[0][100, 10], pictures[1][100, 10])
    assert np.abs(pictures[0][100, 290].astype(int) - pictures[1][100, 290]).max() > 50


def test_what_no_text_exceeds_does_not_glow() -> None:
    assert Scale.around(0.2, 0.2) == pytest.approx((0.18, 0.22, 0.2))
    assert Scale.around(0.2, 0.1) == Scale.around(0.2, 0.2)
    weak = drawn(WHITE, 0.0)[50, 50].astype(int)
    strong = drawn(WHITE, 0.4)[50, 50].astype(int)
    assert weak.min() > 230  # the image itself, nearly
    assert strong.max() - strong.min() > 80


def test_the_box_is_drawn_in_pixels_of_the_image() -> None:
    large = Image.new("RGB", (1024, 512), "white")
    maps = torch.zeros(2, 4)
    plain, boxed = (
        np.asarray(overlay(large, maps, SCALE, 0.0, box)).astype(int) for box in (None, (200, 100, 400, 300))
    )
    rows, columns = np.nonzero(np.abs(plain - boxed).sum(axis=2))
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == pytest.approx((100, 200, 50, 150), abs=3)


@pytest.mark.parametrize(
    ("size", "shown"), [((1, 1), (256, 256)), ((2000, 1000), (512, 256)), ((4000, 8), (512, 1)), ((9, 900), (256, 512))]
)
def test_any_image_is_shown_within_limits_above_its_colour_bar(size: tuple[int, int], shown: tuple[int, int]) -> None:
    picture = overlay(Image.new("L", size), torch.zeros(1, 1), SCALE, 0.3, (0, 0, *size))
    assert picture.width == max(shown[0], 256)
    assert picture.height - shown[1] == 38
