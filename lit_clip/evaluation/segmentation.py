"""Zero-shot semantic segmentation: a pixel gets the class of the nearest name (MaskCLIP, Zhou et al. 2022).

Cosines are interpolated to the mask's size before names are compared, as in mmsegmentation. A class with several names,
such as the background, has the highest of their cosines.

Pointing game (Zhang et al. 2016): every class that an image shows is a query; a hit is the centre of its most similar
place inside one of its boxes or its mask.

Shapes: N images, M names, C classes, h x w places, H x W pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clip.errors import require
from lit_clip.evaluation.data import Boxed, ImageSet, Localised, Masked
from lit_clip.evaluation.intervals import DRAWS, Interval, UnitScores
from lit_clip.evaluation.overlap import CONFIDENCE
from lit_clip.evaluation.places import Size
from lit_clip.evaluation.predictions import write_confusions
from lit_clip.evaluation.set_encoding import SetValues
from lit_clip.tools.atomic import make_folder

Region = Tensor  # of a class: its boxes, float64 [n, 4], or its mask, bool [H, W]
Truth = tuple[Size, int, list[tuple[int, Region]]]  # size of the image, tolerance in pixels, classes and their regions
AT_ONCE = 2**24  # interpolated cosines, 64 MiB
DRAWS_AT_ONCE = 250


def mask_of(images: Masked, row: int, size: Size) -> Tensor:
    """Return an image's mask, which must have the image's size: int16 ``[H, W]``, -1 for pixels that do not count."""
    mask_HW = images.mask(row)
    assert isinstance(images, ImageSet)
    (height, width), (wide, high) = mask_HW.shape, size
    require(
        (width, height) == size,
        f"{images.key(row)}: the mask is {width} x {height} pixels and the image {wide} x {high}; get the set again",
    )
    highest = int(mask_HW.max(initial=-1))
    classes = len(images.class_names)
    require(highest < classes, f"{images.key(row)}: the mask has label {highest}, but there are {classes} classes")
    return torch.from_numpy(mask_HW.astype(np.int16))


def nearest_names(cosines_Mhw: Tensor, height: int, width: int) -> Tensor:
    """Return each pixel's nearest name, int64 ``[H, W]``: the first in a tie, -1 where no cosine is a number."""
    best = cosines_Mhw.new_full((height, width), -torch.inf)
    name = torch.full((height, width), -1, device=best.device)
    at_once = max(1, AT_ONCE // best.numel())
    for start in range(0, len(cosines_Mhw), at_once):
        some = cosines_Mhw[None, start : start + at_once]
        value, place = F.interpolate(some, (height, width), mode="bilinear")[0].max(dim=0)
        name = torch.where(value > best, place + start, name)
        best = best.maximum(value)
    return name


def pixel_pairs(cosines_Mhw: Tensor, mask_HW: Tensor, classes_M: Tensor) -> Tensor:
    """Return pairs of true and predicted class, with their numbers of pixels, int64 ``[K, 2]``.

    A pair is ``truth * (C + 1) + prediction``; the prediction C is none. Pixels with the label -1 do not count.
    """
    count = int(classes_M.max()) + 1
    of_name = torch.cat([classes_M, torch.tensor([count])]).to(cosines_Mhw.device)  # the last for the name -1
    prediction_HW = of_name[nearest_names(cosines_Mhw, *mask_HW.shape)]
    truth_HW = mask_HW.to(cosines_Mhw.device, torch.int64)
    counted = truth_HW >= 0
    pixels = (truth_HW * (count + 1) + prediction_HW)[counted].bincount(minlength=count * (count + 1))
    pairs = pixels.nonzero()[:, 0]
    return torch.stack([pairs, pixels[pairs]], dim=1)


class ClassPixels(NamedTuple):
    """Numbers of pixels of each class, int64 ``[..., C]``: rightly predicted, true, predicted."""

    right: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray

    def iou(self) -> np.ndarray:
        """Return intersection over union; NaN for a class that is neither in the masks nor predicted."""
        union = self.truth + self.predicted - self.right
        return np.divide(self.right, union, out=np.full(union.shape, np.nan), where=union > 0)

    def miou(self) -> np.ndarray:
        """Return the mean IoU over classes that have one, as in mmsegmentation and torchmetrics."""
        return np.nanmean(self.iou(), axis=-1)

    def accuracy(self) -> np.ndarray:
        return self.right.sum(axis=-1) / self.truth.sum(axis=-1)


def confusion(records: SetValues, classes: int) -> np.ndarray:
    """Return pixels by true class (rows) and predicted class (columns; the last is none), int64 ``[C, C + 1]``."""
    pixels = np.zeros(classes * (classes + 1), dtype=np.int64)
    np.add.at(pixels, records.values[:, 1], records.values[:, 2])
    return pixels.reshape(classes, classes + 1)


def pixels_by_image(records: SetValues, classes: int) -> ClassPixels:
    """Return the pixel counts of each image, ``[N, C]``."""
    place = np.searchsorted(records.rows, records.values[:, 0])
    (truth, prediction), pixels = np.divmod(records.values[:, 1], classes + 1), records.values[:, 2]
    found = ClassPixels(*(np.zeros((len(records.rows), classes), dtype=np.int64) for _ in range(3)))
    right, known = truth == prediction, prediction < classes
    np.add.at(found.right, (place[right], truth[right]), pixels[right])
    np.add.at(found.truth, (place, truth), pixels)
    np.add.at(found.predicted, (place[known], prediction[known]), pixels[known])
    return found


def bootstrap(pixels: ClassPixels) -> dict[str, Interval]:
    """Return intervals from images drawn with replacement, one fewer than there are: see ``UnitScores.bootstrap``."""
    stacked = np.concatenate(pixels, axis=1)[pixels.truth.any(axis=1)].astype(np.float64)  # [N, 3C]
    random, images, classes = np.random.default_rng(0), len(stacked), pixels.truth.shape[1]
    draws: dict[str, list[np.ndarray]] = {"miou": [], "pixel_accuracy": []}
    for _ in range(0, DRAWS if images > 1 else 0, DRAWS_AT_ONCE):
        times = random.multinomial(images - 1, np.full(images, 1 / images), size=DRAWS_AT_ONCE)
        drawn = ClassPixels(*(times @ stacked).reshape(DRAWS_AT_ONCE, 3, classes).swapaxes(0, 1))
        draws["miou"].append(drawn.miou())
        draws["pixel_accuracy"].append(drawn.accuracy())
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    ends = {name: np.quantile(np.concatenate(values), tails) for name, values in draws.items() if values}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items() if low < high}


def segmentation(records: SetValues, names: Sequence[str], folder: Path | None, stem: str) -> dict[str, Any]:
    """Return the task's entry in ``results.json``; ``iou`` has each class's IoU, recall and pixels.

    With a ``folder``, write the pixel matrix to ``stem_confusions.csv`` and compute the intervals.
    """
    matrix = confusion(records, len(names))
    require(int(matrix.sum()) > 0, "segmentation: no pixel has a label")
    total = ClassPixels(matrix.diagonal(), matrix.sum(axis=1), matrix[:, :-1].sum(axis=0))
    iou_C, (right, truth, _) = total.iou(), total
    result: dict[str, Any] = {
        "value": float(total.miou()),
        "metrics": {"miou": float(total.miou()), "pixel_accuracy": float(total.accuracy())},
        "baseline": float(truth.max() / truth.sum() / (truth > 0).sum()),  # one class everywhere
        "images": len(records.rows),
        "iou": [
            (name, None if np.isnan(iou) else float(iou), float(hits / of) if of else None, int(of))
            for name, iou, hits, of in zip(names, iou_C, right, truth, strict=True)
        ],
    }
    if folder is None:
        return result
    path = folder / f"{stem}_confusions.csv"
    make_folder(path.parent)
    pairs = np.argwhere(matrix[:, :-1]).tolist()
    counts = [(truth, prediction, int(matrix[truth, prediction])) for truth, prediction in pairs]
    write_confusions(path, counts, names, "pixels")
    files = [path.relative_to(folder).as_posix()]
    return {**result, "intervals": bootstrap(pixels_by_image(records, len(names))), "files": files}


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


def pointing_units(records: SetValues) -> dict[str, UnitScores]:
    """Return the queries' scores by metric, from records of label, hit, and hit of the image's centre."""
    require(len(records.values) > 0, "pointing: no image shows a class")
    label, hit = records.values[:, 1], records.values[:, 2].astype(np.float64)
    return {"accuracy": UnitScores(hit), "mean_per_class": UnitScores(hit, label)}
