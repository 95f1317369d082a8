"""Segmentation equals torchmetrics, plain loops and mmsegmentation's sliding windows, and keeps within its memory."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from lit_clip.errors import InputError
from lit_clip.evaluation import segmentation
from lit_clip.evaluation.data import ImageSet, Masked
from lit_clip.evaluation.places import PlaceRecords, Window, whole_size, window_cosines, window_of, window_starts
from lit_clip.evaluation.segmentation import (
    bootstrap,
    confusion,
    mask_of,
    nearest_names,
    pixel_pairs,
    pixels_by_image,
    segmentation_metrics,
)
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


def random_set(images: int = 9) -> tuple[PlaceRecords, list[np.ndarray], list[np.ndarray]]:
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
    return PlaceRecords(np.concatenate(rows), list(range(0, 2 * images, 2)), []), masks, predictions


def plain_iou(masks: list[np.ndarray], predictions: list[np.ndarray], label: int) -> float:
    both = either = 0
    for mask, prediction in zip(masks, predictions, strict=True):
        for truth, found in zip(mask.ravel().tolist(), prediction.ravel().tolist(), strict=True):
            if truth >= 0:
                both += truth == found == label
                either += label in (truth, found)
    return both / either if either else float("nan")


def test_miou_equals_torchmetrics_and_a_plain_loop() -> None:
    records, masks, predictions = random_set()
    found = segmentation_metrics(records, list("abcde"))
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
    assert low < segmentation_metrics(records, list("abcde"))["value"] < high


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
    nothing = PlaceRecords(np.zeros((0, 3), np.int64), [0], [])
    with pytest.raises(InputError, match="segmentation: no pixel has a label"):
        segmentation_metrics(nothing, ["a"])


def test_the_confusions_are_written_with_their_pixels(tmp_path: Path) -> None:
    records, _, _ = random_set()
    found = segmentation.segmentation(records, list("abcde"), tmp_path, "predictions/x/segmentation")
    assert found["files"] == ["predictions/x/segmentation_confusions.csv"]
    lines = (tmp_path / found["files"][0]).read_text().splitlines()
    counts = np.array([[int(cell) for cell in line.split(",")[1:]] for line in lines[1:]])
    assert np.array_equal(counts, confusion(records, CLASSES)[:, :-1])
    assert cast(Any, found["intervals"]).keys() == {"miou", "pixel_accuracy"}
