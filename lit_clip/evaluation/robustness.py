"""Effective robustness: how much better than expected a classifier is on data that differ from ImageNet (section 3.3).

Taori et al. (2020) found that, for classifiers trained on ImageNet, the logits of the accuracies on ImageNet and on the
other data lie near a line. A classifier's effective robustness is its height above that line.

The line is fitted to given classifiers. Those in ``robustness.yaml`` reach 69 to 78 % on ImageNet; above that the line
is extrapolated. There are none for ObjectNet and the video sets. The rows of the paper's table 16 do not define such a
line: two of the four are CLIP models, the other two were trained on far more than ImageNet and have equal accuracy.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.accuracy import accuracies, classification_counts
from lit_clip.tools.text_files import read_yaml


class TopOnePair(NamedTuple):
    """Top-1 accuracies of a classifier: on ImageNet's images of the other set's classes, and on the other set."""

    imagenet: float
    shifted: float


class RobustnessRow(NamedTuple):
    """A set's accuracies, the accuracy lost on it, and its effective robustness if there are classifiers to compare."""

    name: str
    point: TopOnePair
    gap: float
    effective: float | None


def robustness_table(points: Mapping[str, TopOnePair]) -> list[RobustnessRow]:
    """Return a row for each set, by its name in the paper, compared with :func:`imagenet_classifiers`."""
    rows = []
    for name, point in points.items():
        reference = imagenet_classifiers(name)
        effective = effective_robustness([point], reference)[0] if reference else None
        rows.append(RobustnessRow(name, point, point.imagenet - point.shifted, effective))
    return rows


def effective_robustness(points: Sequence[TopOnePair], references: Sequence[TopOnePair]) -> list[float]:
    """Return each point's height above the line through the references, in accuracy."""
    slope, intercept = logit_line(references)
    return [point.shifted - 1 / (1 + math.exp(-slope * _logit(point.imagenet) - intercept)) for point in points]


def logit_line(references: Sequence[TopOnePair]) -> tuple[float, float]:
    """Fit ``logit(shifted)`` over ``logit(imagenet)`` by least squares: return slope and intercept."""
    different = len({point.imagenet for point in references})
    require(
        different >= 2, f"robustness: {different} different accuracies on ImageNet define no line; give at least two"
    )
    xs, ys = [_logit(point.imagenet) for point in references], [_logit(point.shifted) for point in references]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    return slope, mean_y - slope * mean_x


def imagenet_classifiers(name: str) -> list[TopOnePair]:
    """Return accuracies of classifiers trained on ImageNet alone; empty for a set that ``robustness.yaml`` lacks."""
    return list(_published().get(name, ()))


def subset_top1(scores: Tensor, labels: Tensor, classes: Sequence[int]) -> tuple[float, int]:
    """Return ImageNet's accuracy among some of its classes, from scores ``[N, 1000]``, and their number of images."""
    columns = torch.tensor(sorted(set(classes)))
    rows = torch.isin(labels, columns).nonzero()[:, 0]
    require(len(rows) > 0, "robustness: there is no ImageNet image of these classes")
    subset = scores[rows.to(scores.device)][:, columns.to(scores.device)]
    return accuracies(classification_counts(subset, torch.searchsorted(columns, labels[rows])))["top1"], len(rows)


@lru_cache(maxsize=1)
def _published() -> dict[str, list[TopOnePair]]:
    classifiers = read_yaml(Path(__file__).with_suffix(".yaml"))
    points: dict[str, list[TopOnePair]] = {}
    for sets in classifiers.values():
        for name, (imagenet, shifted) in sets.items():
            points.setdefault(name, []).append(TopOnePair(imagenet / 100, shifted / 100))
    return points


def _logit(accuracy: float) -> float:
    if not 0 < accuracy < 1:
        raise InputError(f"robustness: an accuracy of {accuracy} has no logit; leave this classifier out")
    return math.log(accuracy / (1 - accuracy))
