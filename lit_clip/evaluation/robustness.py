"""Effective robustness: how much better than expected a classifier is on data that differ from ImageNet (section 3.3).

Taori et al. (2020) found that the accuracies of classifiers trained on ImageNet on the one and on the other, both as
logits, lie about a line. A classifier's effective robustness is how far it is above that line.

The line is of whatever classifiers are given. Those in ``robustness.yaml`` have 69 to 78 % on ImageNet: above that the
line is extrapolated. There are none for ObjectNet and the sets of videos. The rows of the paper's table 16 are no such
line: two of the four are CLIP's, the other two learnt from far more than ImageNet, and are as accurate as each other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.accuracy import accuracies, classification_counts
from lit_clip.tools.text_files import read_yaml


class TopOnePair(NamedTuple):
    """Top-1 accuracies of a classifier, fractions.

    Attributes:
        imagenet: on ImageNet's validation images of the classes that the other set has, told from these alone.
        shifted: on the other set.
    """

    imagenet: float
    shifted: float


@dataclass(frozen=True)
class RobustnessRow:
    """A line of the table.

    Attributes:
        name: of the set.
        point: the accuracies.
        gap: by how much it is worse on the set.
        effective: effective robustness; None without classifiers to compare with.
    """

    name: str
    point: TopOnePair
    gap: float
    effective: float | None


def robustness_table(
    points: Mapping[str, TopOnePair], baselines: Mapping[str, Sequence[TopOnePair]] | None = None
) -> list[RobustnessRow]:
    """One row a set, in the given order.

    Args:
        points: a classifier's by set, under the paper's name of that.
        baselines: other classifiers' by set, for sets that :func:`imagenet_classifiers` has none of or shall not be
            compared with.
    """
    rows = []
    for name, point in points.items():
        baseline = (baselines or {}).get(name) or imagenet_classifiers(name)
        effective = effective_robustness([point], baseline)[0] if baseline else None
        rows.append(RobustnessRow(name, point, point.imagenet - point.shifted, effective))
    return rows


def effective_robustness(points: Sequence[TopOnePair], baseline: Sequence[TopOnePair]) -> list[float]:
    """Of each point its height above the line through the others, in accuracy.

    Args:
        points: classifiers to be judged.
        baseline: at least two with different accuracies on ImageNet; least squares of logits.

    Raises:
        InputError: a line cannot be drawn, or an accuracy has no logit.
    """
    slope, intercept = logit_line(baseline)
    return [point.shifted - _probability(slope * _logit(point.imagenet) + intercept) for point in points]


def logit_line(baseline: Sequence[TopOnePair]) -> tuple[float, float]:
    """Slope and intercept of ``logit(shifted)`` over ``logit(imagenet)``, by least squares; see above for errors."""
    different = len({point.imagenet for point in baseline})
    require(
        different >= 2, f"robustness: a line through {different} accuracies on ImageNet; give at least two classifiers"
    )
    xs, ys = [_logit(point.imagenet) for point in baseline], [_logit(point.shifted) for point in baseline]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    return slope, mean_y - slope * mean_x


def imagenet_classifiers(name: str) -> list[TopOnePair]:
    """Accuracies of classifiers trained on ImageNet alone; none for sets that ``robustness.yaml`` lacks."""
    return list(_published().get(name, ()))


def subset_top1(scores: Tensor, labels: Tensor, classes: Sequence[int]) -> float:
    """ImageNet accuracy where only some classes are in question, for sets that have not all of them.

    Args:
        scores: ``[N, 1000]``.
        labels: int64 ``[N]``.
        classes: those of the other set, as rows of ImageNet's list.
    """
    columns = torch.tensor(sorted(set(classes)))
    rows = torch.isin(labels, columns).nonzero()[:, 0]
    require(len(rows) > 0, "robustness: ImageNet has no image of these classes")
    among = scores[rows.to(scores.device)][:, columns.to(scores.device)]
    return accuracies(classification_counts(among, torch.searchsorted(columns, labels[rows])))["top1"]


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


def _probability(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
