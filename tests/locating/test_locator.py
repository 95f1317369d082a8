"""Texts found in images, and texts that are not there."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_clip import CLIP
from lit_clip.errors import InputError
from lit_clip.evaluation.prompts import paper_class_names
from lit_clip.locating import Locator
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
    found = Locator(model, ["red"])(image).regions[0]
    assert found.seen
    assert found == Locator(model, ["red"], [f"a {name}" for name in paper_class_names("CIFAR100")])(image).regions[
        0
    ]._replace(mask=found.mask)


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
