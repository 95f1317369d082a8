"""Regions of heat maps: what belongs to which text, and what is not seen."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lit_clip.errors import InputError
from lit_clip.locating.regions import Region, background_level, find_regions, resized_mask


def flooded(own: np.ndarray, row: int, column: int) -> np.ndarray:
    """Return the pixels that can be reached from one in eight directions; a plain loop."""
    found, waiting = np.zeros_like(own), [(row, column)]
    while waiting:
        y, x = waiting.pop()
        if 0 <= y < own.shape[0] and 0 <= x < own.shape[1] and own[y, x] and not found[y, x]:
            found[y, x] = True
            waiting += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_region_is_where_a_text_is_best_and_above_the_level_around_its_best_place(seed: int) -> None:
    places = torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(seed))
    maps = F.interpolate(places[None], (30, 42), mode="bilinear")[0]
    for number, region in enumerate(find_regions(places, maps, 0.6)):
        others = np.delete(places.numpy(), number, axis=0).max(axis=0)
        own = (places[number].numpy() > others) & (places[number].numpy() > 0.6)
        assert region.seen == own.any()
        highest = np.where(own, places[number].numpy(), -1).max() if own.any() else float(places[number].max())
        assert region.cosine == pytest.approx(float(highest))
        assert region.margin == pytest.approx(float(highest) - 0.6, abs=1e-6)
        column, row = region.peak
        assert places[number, row // 6, column // 6] == pytest.approx(region.cosine)
        pixels = maps.numpy()
        belongs = (pixels[number] >= pixels.max(axis=0)) & (pixels[number] > 0.6)
        belongs[row, column] = True
        assert np.array_equal(region.mask, flooded(belongs, row, column) & own.any())


def test_a_texts_single_place_wins_over_its_higher_cosine_where_another_is_better() -> None:
    places = torch.tensor([[[0.8, 0.5]], [[0.9, 0.2]]])
    first, second = find_regions(places, places, 0.3)
    assert (first.cosine, first.peak, second.peak) == (0.5, (1, 0), (0, 0))
    assert (first.box((200, 50)), second.box((200, 50))) == ((100, 0, 200, 50), (0, 0, 100, 50))
    unseen, _ = find_regions(places, places, 0.6)
    assert (unseen.seen, unseen.box((200, 50)), unseen.cosine) == (False, None, pytest.approx(0.8))
    assert unseen.margin == pytest.approx(0.2)  # another text's place


def test_a_map_of_one_pixel_is_the_text_of_the_best_place() -> None:
    places = torch.tensor([[[0.1, 0.2], [0.3, 0.9]], [[0.5, 0.5], [0.5, 0.5]]])
    first, second = find_regions(places, places.mean(dim=(1, 2), keepdim=True), 0.2)
    assert (first.box((1, 1)), second.box((1, 1))) == ((0, 0, 1, 1), (0, 0, 1, 1))


@pytest.mark.parametrize("size", [(7, 5), (100, 33), (3, 2)])
def test_box_and_mask_cover_the_same_pixels_of_the_image(size: tuple[int, int]) -> None:
    mask = np.zeros((5, 7), dtype=bool)
    mask[1:3, 2:6] = True
    region = Region(0.5, 0.1, (2, 1), mask)
    left, top, right, bottom = region.box(size) or (0, 0, 0, 0)
    whole = resized_mask(mask, size)
    assert whole.shape == size[::-1]
    rows, columns = np.nonzero(whole)
    assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    if size >= (7, 5):  # no pixel of a smaller image may show the peak
        assert (left <= region.point(size)[0] < right, top <= region.point(size)[1] < bottom) == (True, True)
    if size == (7, 5):
        assert np.array_equal(whole, mask)


def test_a_region_that_no_pixel_of_a_small_image_shows_has_a_box_of_one_pixel() -> None:
    mask = np.zeros((1, 7), dtype=bool)
    mask[0, 1] = True
    assert not resized_mask(mask, (3, 1)).any()
    assert Region(0.5, 0.1, (1, 0), mask).box((3, 1)) == (0, 0, 1, 1)


@pytest.mark.parametrize(("others", "rate"), [(19, 0.05), (100, 0.05), (100, 0.2)])
def test_texts_like_the_background_exceed_the_level_as_often_as_promised(others: int, rate: float) -> None:
    peaks = torch.randn(20_000, others + 1, generator=torch.Generator().manual_seed(0))
    seen = np.mean([float(row[0]) > background_level(row[1:], rate) for row in peaks[:2000]])
    sorted_ = peaks[:, 1:].sort(dim=1, descending=True).values
    nth = int(np.floor(rate * (others + 1) + 1e-9))
    assert background_level(peaks[0, 1:], rate) == pytest.approx(float(sorted_[0, nth - 1]))
    assert float((peaks[:, 0] > sorted_[:, nth - 1]).float().mean()) == pytest.approx(rate, abs=0.01)
    assert seen == pytest.approx(rate, abs=0.03)


def test_too_few_background_texts_are_refused() -> None:
    with pytest.raises(InputError, match="needs 19 examples, not 18"):
        background_level(torch.zeros(18), 0.05)
