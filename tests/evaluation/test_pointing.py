"""The pointing game equals plain loops over pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lit_clip.errors import InputError
from lit_clip.evaluation.places import PlaceRecords
from lit_clip.evaluation.pointing import is_within, pointing, pointing_metrics, queries, regions_of
from lit_clip.evaluation.predictions import read_predictions
from tests.evaluation.test_segmentation import OneMask


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
    records = PlaceRecords(values, [0, 1, 3, 4], [])
    found = pointing(records, ["a", "b", "d", "e"], "pets", tmp_path)
    assert found["metrics"] == pytest.approx({"accuracy": 3 / 5, "mean_per_class": (2 / 3 + 0 + 1) / 3})
    assert (found["value"], found["baseline"], found["images"], found["queries"]) == (0.6, 0.4, 4, 5)
    low, high = found["intervals"]["accuracy"]
    assert low < 0.6 < high
    table = read_predictions(tmp_path, "pets", "pointing")
    assert table["key"].tolist() == ["a#2", "a#5", "d#2", "d#4", "e#2"]
    assert table["score"].tolist() == [1, 0, 1, 1, 0]
    with pytest.raises(InputError, match="pointing: no image shows a class"):
        pointing_metrics(PlaceRecords(values[:0], [0], []))
