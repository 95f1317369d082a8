"""Texts found in images, and texts that are not there."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lit_clip import CLIP
from lit_clip.errors import InputError
from lit_clip.evaluation.prompts import paper_class_names
from lit_clip.locating import Locator
from lit_clip.locating.overlay import Scale, overlay
from lit_clip.locating.regions import Region, background_level, find_regions, resized_mask
from tests.helpers.colours import BLACK, BLUE, GREEN, RED, beside, colour_model

OTHERS = [f"{letter} other" for letter in "acdefhijklmnopqstuvwxyz"]  # 23 that name no colour


@pytest.fixture(scope="module")
def model() -> CLIP:
    return colour_model()


def test_each_text_has_its_box_and_an_absent_one_is_not_seen(model: CLIP) -> None:
    image = beside(RED, BLACK, GREEN, size=(64, 64))
    located = Locator(model, ["red", "green", "blue"], OTHERS)(image)
    red, green, blue = located.regions
    assert (red.seen, green.seen, blue.seen) == (True, True, False)
    left, top, right, bottom = red.box(image.size) or (1, 1, 1, 1)
    assert (left, top, bottom) == (0, 0, 64)
    assert 56 <= right <= 80  # half a place around the edge
    assert 112 <= (green.box(image.size) or (0,))[0] <= 136
    assert located.maps.shape == (3, 64, 192)
    torch.testing.assert_close(located.maps, model.locate(image, ["red", "green", "blue"]))
    places = torch.tensor([[1, 0, 0, 0.01], [0, 1, 0, 0.01], [0, 0, 0, 0.01]])  # red, green, black
    reached = model.encode(OTHERS) @ (places / places.norm(dim=1, keepdim=True)).T
    assert located.level == pytest.approx(float(reached.max()), abs=1e-4)  # of 23 texts the highest


def test_the_default_background_has_100_names(model: CLIP) -> None:
    assert len(set(paper_class_names("CIFAR100"))) == 100
    image = beside(RED, BLUE)
    names = [f"a {name}" for name in paper_class_names("CIFAR100")]
    found, same = (Locator(model, ["red"], background)(image).regions[0] for background in (None, names))
    assert found.seen
    assert found == same._replace(mask=found.mask)


def test_a_large_image_has_a_map_of_at_most_256_pixels_and_a_box_of_its_own(model: CLIP) -> None:
    image = beside(BLACK, RED, size=(1000, 500))
    located = Locator(model, ["red"], OTHERS)(image)
    assert located.maps.shape == (1, 64, 256)
    left, top, right, bottom = located.regions[0].box(image.size) or (0, 0, 0, 0)
    assert abs(left - 1000) <= 2000 / 16  # a place
    assert (top, right, bottom) == (0, 2000, 500)


def test_a_text_is_never_opened_as_a_file(model: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), BLUE).save("red.png")
    assert Locator(model, ["red.png"], OTHERS)(beside(RED, RED)).regions[0].seen


def test_mistakes_are_one_line(model: CLIP) -> None:
    with pytest.raises(InputError, match="^texts: none given"):
        Locator(model, [])
    with pytest.raises(InputError, match="^background: 3 texts, and false alarms of 0.05 need at least 19; add some"):
        Locator(model, ["red"], ["a", "b", "c"])
    with pytest.raises(InputError, match="^false_alarms: 0 must be above 0 and below 1"):
        Locator(model, ["red"], OTHERS, false_alarms=0)
    with torch.no_grad():
        broken = colour_model()
        broken.text.encoder.table[ord("r")] = torch.nan  # pyright: ignore
    with pytest.raises(InputError, match="not finite"):
        Locator(broken, ["red"], OTHERS)(beside(RED))


# Regions of heat maps: what belongs to which text, and what is not seen.


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


# Heat maps drawn over images.


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
