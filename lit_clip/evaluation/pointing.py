"""Pointing game (Zhang et al. 2016): a hit is a class's most similar place inside one of its boxes or its mask.

Every class that an image shows is a query. The point is the centre of the place with the highest cosine.

Shapes: M names, h x w places, H x W pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_clip.errors import require
from lit_clip.evaluation.data import Boxed, Localised, Masked
from lit_clip.evaluation.intervals import UnitScores, intervals
from lit_clip.evaluation.places import PlaceRecords, Size
from lit_clip.evaluation.predictions import predictions_entry
from lit_clip.evaluation.segmentation import mask_of

Region = Tensor  # of a class: its boxes, float64 [n, 4], or its mask, bool [H, W]
Truth = tuple[Size, int, list[tuple[int, Region]]]  # size of the image, tolerance in pixels, classes and their regions


def regions_of(images: Localised, row: int, size: Size) -> Truth:
    """Return the regions of each class in an image."""
    if isinstance(images, Boxed):
        boxes: dict[int, list[tuple[float, ...]]] = {}
        for label, box in images.boxes(row):
            boxes.setdefault(label, []).append(box)
        return (
            size,
            images.tolerance,
            [(label, torch.tensor(each, dtype=torch.float64)) for label, each in sorted(boxes.items())],
        )
    assert isinstance(images, Masked)
    mask_HW = mask_of(images, row, size)
    return size, 0, [(int(label), mask_HW == label) for label in mask_HW[mask_HW >= 0].unique()]


def is_within(point: tuple[float, float], region: Region, tolerance: int) -> bool:
    """Return whether a point (x, y) is at most ``tolerance`` pixels from a region; right edges are outside."""
    x, y = point
    if region.dtype == torch.bool:
        rows, columns = region.nonzero().T
        return bool(((columns - int(x)) ** 2 + (rows - int(y)) ** 2 <= tolerance**2).any())
    left, top, right, bottom = region.T
    inside = (left <= x) & (x < right) & (top <= y) & (y < bottom)
    across, down = (
        torch.maximum(low - at, at - high).clamp(min=0) for low, at, high in ((left, x, right), (top, y, bottom))
    )
    return bool((inside | (across**2 + down**2 <= tolerance**2) & (tolerance > 0)).any())


def queries(cosines_Mhw: Tensor, truth: Truth, classes_M: Tensor) -> Tensor:
    """Return, for each class in an image, its label, the hit, and the hit of the image's centre: int64 ``[K, 3]``."""
    (width, height), tolerance, regions = truth
    h, w = cosines_Mhw.shape[1:]
    found = []
    for label, region in regions:
        cosines_hw = cosines_Mhw[classes_M.to(cosines_Mhw.device) == label].amax(dim=0).nan_to_num(-torch.inf)
        highest, place = cosines_hw.flatten().max(dim=0)  # the first of a tie
        point = (int(place) % w + 0.5) * width / w, (int(place) // w + 0.5) * height / h
        hit = bool(highest > -torch.inf) and is_within(point, region, tolerance)
        found.append((label, int(hit), int(is_within((width / 2, height / 2), region, tolerance))))
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 3)


def pointing_metrics(records: PlaceRecords) -> dict[str, Any]:
    """Return the task's entry in ``results.json`` without files; the baseline points at each image's centre."""
    require(len(records.values) > 0, "pointing: no image shows a class")
    label, hit, centre = records.values[:, 1:].T
    units = {
        "accuracy": UnitScores(hit.astype(np.float64)),
        "mean_per_class": UnitScores(hit.astype(np.float64), label),
    }
    return {
        "value": float(hit.mean()),
        "metrics": {name: scores.mean() for name, scores in units.items()},
        "intervals": intervals(units),
        "baseline": float(centre.mean()),
        "images": len(records.rows),
        "queries": len(hit),
    }


def pointing(records: PlaceRecords, keys: Sequence[str], name: str, folder: Path) -> dict[str, Any]:
    """Return the task's entry in ``results.json`` and save the predictions; ``keys`` are the images'."""
    row, label, hit, _ = records.values.T
    key_of = dict(zip(records.rows, keys, strict=True))
    names = [f"{key_of[image]}#{of_class}" for image, of_class in zip(row.tolist(), label.tolist(), strict=True)]
    columns = {"key": names, "truth": label.astype(np.int32), "score": hit.astype(np.float32)}
    judged = zip(names, label.tolist(), strict=True)
    return {**pointing_metrics(records), **predictions_entry(folder, name, "pointing", columns, judged)}
