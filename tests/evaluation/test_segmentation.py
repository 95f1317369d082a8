"""Segmentation and the pointing game equal torchmetrics, plain loops and mmsegmentation's sliding windows."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from lit_clip.errors import InputError
from lit_clip.evaluation import segmentation
from lit_clip.evaluation.classification import TaskOptions
from lit_clip.evaluation.data import ImageSet, Masked
from lit_clip.evaluation.open_set import Fold, OpenSet
from lit_clip.evaluation.places import Window, whole_size, window_cosines, window_of, window_starts
from lit_clip.evaluation.predictions import read_predictions
from lit_clip.evaluation.segmentation import (
    bootstrap,
    confusion,
    is_within,
    mask_of,
    nearest_names,
    pixel_pairs,
    pixels_by_image,
    queries,
    regions_of,
)
from lit_clip.evaluation.set_encoding import SetValues
from lit_clip.evaluation.suite import SuiteEntry
from lit_clip.evaluation.tasks import PARTS
from tests.helpers.small_sets import make_module

CLASSES = 5


class OneMask(ImageSet, Masked):
    class_names = ["a", "b"]

    def __init__(self, mask: list[list[int]]) -> None:
        self._mask = np.array(mask)

    def __len__(self) -> int:
        return 1

    def images(self, index: int) -> Any:
        return []

    def stamp(self) -> str:
        return ""

    def mask(self, index: int) -> np.ndarray:
        return self._mask

    def truth_stamp(self) -> str:
        return ""


class Sized(OneMask):
    def __init__(self, side: int) -> None:
        super().__init__([[0]])
        self.side = side

    def short_side(self, image_size: int) -> int:
        return self.side


def random_set(images: int = 9) -> tuple[SetValues, list[np.ndarray], list[np.ndarray]]:
    """Return records, masks and predicted classes of images whose classes have one or two names; class 4 is absent."""
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    classes = torch.tensor([0, 0, 1, 2, 2, 3, 4])
    rows, masks, predictions = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for row in range(images):
        mask = random.integers(-1, CLASSES - 1, (11 + row, 17)).astype(np.int16)
        cosines = torch.randn(7, 3, 4, generator=generator)
        cosines[6] = -9  # never predicted
        large = F.interpolate(cosines[None], mask.shape, mode="bilinear")[0].double().numpy()
        highest = np.stack([large[[0, 1]].max(axis=0), large[2], large[[3, 4]].max(axis=0), large[5], large[6]])
        masks.append(mask)
        predictions.append(highest.argmax(axis=0))
        pairs = pixel_pairs(cosines, torch.from_numpy(mask), classes).numpy()
        rows.append(np.insert(pairs, 0, 2 * row, axis=1))
    return SetValues(np.concatenate(rows), list(range(0, 2 * images, 2)), []), masks, predictions


def plain_iou(masks: list[np.ndarray], predictions: list[np.ndarray], label: int) -> float:
    both = either = 0
    for mask, prediction in zip(masks, predictions, strict=True):
        for truth, found in zip(mask.ravel().tolist(), prediction.ravel().tolist(), strict=True):
            if truth >= 0:
                both += truth == found == label
                either += label in (truth, found)
    return both / either if either else float("nan")


def metrics_of(records: SetValues) -> dict[str, Any]:
    return segmentation.segmentation(records, list("abcde"), None, "")


def test_miou_equals_torchmetrics_and_a_plain_loop() -> None:
    records, masks, predictions = random_set()
    found = metrics_of(records)
    expected = [plain_iou(masks, predictions, label) for label in range(CLASSES)]
    assert [line[1] for line in found["iou"][:4]] == pytest.approx(expected[:4])
    assert found["iou"][4][1:] == (None, None, 0)
    assert found["value"] == pytest.approx(np.mean(expected[:4]))
    metric = MulticlassJaccardIndex(CLASSES, ignore_index=-1)
    for mask, prediction in zip(masks, predictions, strict=True):
        metric.update(torch.from_numpy(prediction)[None], torch.from_numpy(mask.astype(np.int64))[None])
    assert found["value"] == pytest.approx(float(metric.compute()), abs=1e-6)
    truth, predicted = (np.concatenate([each.ravel() for each in arrays]) for arrays in (masks, predictions))
    right = (truth == predicted)[truth >= 0]
    assert found["metrics"]["pixel_accuracy"] == pytest.approx(right.mean())
    counts = np.bincount(truth[truth >= 0])
    assert found["baseline"] == pytest.approx(counts.max() / counts.sum() / 4)
    assert confusion(records, CLASSES).sum() == len(right)


def test_the_interval_is_that_of_images_drawn_with_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain loop draws the images of each bootstrap sample and evaluates them from the start."""
    monkeypatch.setattr(segmentation, "DRAWS", 2000)
    records, masks, predictions = random_set(6)
    low, high = bootstrap(pixels_by_image(records, CLASSES))["miou"]
    random, values = np.random.default_rng(5), []
    pairs = [np.stack([mask[mask >= 0], found[mask >= 0]]) for mask, found in zip(masks, predictions, strict=True)]
    for _ in range(2000):
        truth, found = np.concatenate([pairs[row] for row in random.integers(6, size=5)], axis=1)
        iou = [((truth == c) & (found == c)).sum() / ((truth == c) | (found == c)).sum() for c in range(4)]
        values.append(np.mean(iou))
    expected = np.quantile(values, [0.0025, 0.9975])
    assert [low, high] == pytest.approx(expected, abs=0.15 * (expected[1] - expected[0]))
    assert low < metrics_of(records)["value"] < high


def test_names_are_compared_a_few_at_a_time_and_nan_is_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    cosines = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(1))
    cosines[5] = cosines[2]  # a tie
    whole = nearest_names(cosines, 13, 9)
    monkeypatch.setattr(segmentation, "AT_ONCE", 2 * 13 * 9)
    assert torch.equal(nearest_names(cosines, 13, 9), whole)
    assert 5 not in whole
    mask = torch.zeros(13, 9, dtype=torch.int16)
    lost = pixel_pairs(cosines * torch.nan, mask, torch.arange(7))
    assert lost.tolist() == [[7, 13 * 9]]  # truth 0, no prediction
    assert pixel_pairs(cosines, mask - 1, torch.arange(7)).shape == (0, 2)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 160), (176, 64)])
def test_windows_equal_mmsegmentations(height: int, width: int) -> None:
    """Its loop on whole pixels: windows of the short side at half their side, the last at the edge, and the mean."""
    model = make_module().model.eval()
    pixels = torch.randint(256, (1, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = F.normalize(torch.randn(16, 3, generator=torch.Generator().manual_seed(1)), dim=0)
    window = window_of(model, OneMask([[0]]))
    assert window == (64, 4)  # twice the model's 32 pixels, in patches of 16
    total, count = torch.zeros(3, height, width), torch.zeros(height, width)
    for row in range(max(height - 64 + 31, 0) // 32 + 1):
        for column in range(max(width - 64 + 31, 0) // 32 + 1):
            top, left = min(row * 32, height - 64), min(column * 32, width - 64)
            crop = model.normalize(pixels[..., top : top + 64, left : left + 64])
            with torch.no_grad():
                features = model.encode_patches(crop, normalize=True)[0]
            logits = torch.einsum("dhw,dm->mhw", features, texts).repeat_interleave(16, 1).repeat_interleave(16, 2)
            total[:, top : top + 64, left : left + 64] += logits
            count[top : top + 64, left : left + 64] += 1
    found = window_cosines(model, pixels, texts, window).repeat_interleave(16, 1).repeat_interleave(16, 2)
    assert torch.allclose(found, total / count, atol=1e-6)


def test_images_keep_their_aspect_ratio_in_whole_places() -> None:
    window = Window(64, 4)
    sizes = {
        (100, 100): [64, 64],
        (200, 100): [64, 128],
        (100, 149): [96, 64],
        (500, 333): [64, 96],
        (1, 30): [1920, 64],
    }
    assert {size: whole_size(size, window) for size in sizes} == sizes
    assert [window_starts(length, 4) for length in (4, 5, 6, 7, 8)] == [[0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 4]]


@pytest.mark.parametrize(
    ("side", "words"), [(50, "multiples of 16"), (0, "between 1 and"), (-5, "between 1 and"), (10**6, "between 1 and")]
)
def test_a_short_side_without_places_is_refused_by_its_name(side: int, words: str) -> None:
    with pytest.raises(InputError, match=f"^short_side: {side} .*{words}"):
        window_of(make_module().model, Sized(side))


def test_masks_of_another_size_or_with_unknown_labels_are_refused() -> None:
    assert mask_of(OneMask([[0, 1, -1]]), 0, (3, 1)).tolist() == [[0, 1, -1]]
    with pytest.raises(InputError, match="0: the mask is 3 x 1 pixels and the image 1 x 3; get the set again"):
        mask_of(OneMask([[0, 1, -1]]), 0, (1, 3))
    with pytest.raises(InputError, match="0: the mask has label 2, but there are 2 classes"):
        mask_of(OneMask([[2]]), 0, (1, 1))
    nothing = SetValues(np.zeros((0, 3), np.int64), [0], [])
    with pytest.raises(InputError, match="segmentation: no pixel has a label"):
        metrics_of(nothing)


def test_the_confusions_are_written_with_their_pixels(tmp_path: Path) -> None:
    records, _, _ = random_set()
    found = segmentation.segmentation(records, list("abcde"), tmp_path, "predictions/x/segmentation")
    assert found["files"] == ["predictions/x/segmentation_confusions.csv"]
    lines = (tmp_path / found["files"][0]).read_text().splitlines()
    counts = np.array([[int(cell) for cell in line.split(",")[1:]] for line in lines[1:]])
    assert np.array_equal(counts, confusion(records, CLASSES)[:, :-1])
    assert cast(Any, found["intervals"]).keys() == {"miou", "pixel_accuracy"}


def test_a_point_is_in_a_box_or_a_mask_or_near_enough() -> None:
    """Boxes drawn as masks, and distances to every pixel, agree."""
    boxes = torch.tensor([[2.0, 3.0, 6.0, 5.0], [8.0, 0.0, 9.0, 2.0]], dtype=torch.float64)
    mask = torch.zeros(8, 10, dtype=torch.bool)
    mask[3:5, 2:6] = mask[0:2, 8:9] = True
    pixels = mask.nonzero().tolist()
    for tolerance in (0, 1, 2):
        for y in range(8):
            for x in range(10):
                near = min((row - y) ** 2 + (column - x) ** 2 for row, column in pixels) <= tolerance**2
                assert is_within((x + 0.5, y + 0.5), mask, tolerance) == near
                if tolerance == 0:
                    assert is_within((x + 0.5, y + 0.5), boxes, 0) == near
    assert not is_within((6.0, 4.0), boxes, 0)  # the right edge is the next pixel's
    assert is_within((6.0, 4.0), boxes, 1)
    assert not is_within((7.0, 6.0), boxes, 1)  # diagonally 1.4 away
    assert is_within((7.0, 6.0), boxes, 2)


def test_the_point_is_the_centre_of_the_place_with_the_highest_cosine_of_any_name() -> None:
    cosines = torch.zeros(3, 2, 4)
    cosines[0, 1, 3], cosines[1, 0, 0], cosines[2, 0, 1] = 0.5, 0.7, 0.9
    classes = torch.tensor([0, 0, 1])  # class 0 has two names
    size = (80, 40)  # places of 20 x 20 pixels
    corner = torch.tensor([[0.0, 0.0, 20.0, 20.0]], dtype=torch.float64)
    other = torch.tensor([[60.0, 20.0, 80.0, 40.0], [20.0, 0.0, 40.0, 20.0]], dtype=torch.float64)
    found = queries(cosines, (size, 0, [(0, corner), (1, corner), (0, other), (1, other)]), classes)
    assert found.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]]
    middle = torch.tensor([[30.0, 10.0, 50.0, 30.0]], dtype=torch.float64)
    assert queries(cosines * torch.nan, (size, 0, [(1, middle)]), classes).tolist() == [[1, 0, 1]]
    assert queries(cosines, (size, 0, []), classes).shape == (0, 3)


def test_each_class_of_a_mask_is_a_query() -> None:
    size, tolerance, regions = regions_of(OneMask([[0, 0, -1], [-1, 1, 1]]), 0, (3, 2))
    assert (size, tolerance) == ((3, 2), 0)
    assert [(label, region.tolist()) for label, region in regions] == [
        (0, [[True, True, False], [False, False, False]]),
        (1, [[False, False, False], [False, True, True]]),
    ]


def test_accuracies_and_predictions(tmp_path: Path) -> None:
    values = np.array([[0, 2, 1, 0], [0, 5, 0, 0], [3, 2, 1, 1], [3, 4, 1, 0], [4, 2, 0, 1]])
    entry, records = SuiteEntry({"class_path": "x.Y"}, metric="accuracy"), SetValues(values, [0, 1, 3, 4], [])
    opened = OpenSet("pets", entry, [Fold({"test": OneMask([[0]])})], records={"pointing": records})
    found = PARTS["pointing"].run(opened, TaskOptions(), tmp_path)
    assert found["metrics"] == pytest.approx({"accuracy": 3 / 5, "mean_per_class": (2 / 3 + 0 + 1) / 3})
    assert (found["value"], found["baseline"], found["images"], found["queries"]) == (0.6, 0.4, 4, 5)
    low, high = found["intervals"]["accuracy"]
    assert low < 0.6 < high
    table = read_predictions(tmp_path, "pets", "pointing")
    assert table["key"].tolist() == ["0#2", "0#5", "3#2", "3#4", "4#2"]
    assert table["score"].tolist() == [1, 0, 1, 1, 0]
    with pytest.raises(InputError, match="pointing: no image shows a class"):
        segmentation.pointing_units(SetValues(values[:0], [0], []))
