"""Whether more labels would pay (accuracy by number of examples), and which images to label next."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_clip.evaluation.class_head import TOLERANCE, HeadFit
from lit_clip.evaluation.intervals import Interval, UnitScores
from lit_clip.evaluation.logistic import LogisticProblem
from lit_clip.evaluation.probe import HELD_OUT, places_in_classes

DRAWS = 5


class CurvePoint(NamedTuple):
    """Mean accuracy with at most ``shots`` examples a class, on held-out examples, and its 99.5 % interval."""

    shots: int
    accuracy: float
    interval: Interval


def accuracy_by_examples(features: Tensor, zero_shot: Tensor, labels: Tensor, fit: HeadFit) -> list[CurvePoint]:
    """Return the accuracy with 1, 2, 4, ... of a head's own examples; empty if no class has three.

    ``DRAWS`` times a fifth of each class is held out, as in the probes, and heads with the penalty and the scale of
    ``fit`` are fitted on some of the rest. A class has all its examples where there are fewer.

    Args:
        features: ``[N, W]``.
        zero_shot: logits ``[N, C]``.
        labels: int64 ``[N]``.
        fit: the head of all examples.
    """
    offset = fit.scale * zero_shot
    right: dict[int, list[Tensor]] = {}
    for draw in range(DRAWS):
        place, count = places_in_classes(labels, draw)
        out = (count // HELD_OUT).clamp(min=1).minimum(count - 1)  # of each image's class
        held, left, most = place < out, place - out, int((count - out).max())
        for shots in [2**power for power in range(20) if 2**power < most] + [most]:
            rows = ((left >= 0) & (left < shots)).nonzero()[:, 0]
            problem = LogisticProblem(features[rows], labels[rows], zero_shot.shape[1], None, offset[rows])
            found = problem.fit(fit.penalty * problem.spread, tolerance=TOLERANCE)
            scores = found.scores(features[held])
            right_N = torch.full((len(labels),), torch.nan, dtype=torch.float64)
            right_N[held] = ((offset[held] + scores).argmax(dim=1) == labels[held]).double()
            right.setdefault(shots, []).append(right_N)
    return [_point(shots, torch.stack(found).numpy()) for shots, found in right.items()] if len(right) > 1 else []


def _point(shots: int, right_draws: np.ndarray) -> CurvePoint:
    """Return the curve point of images that are right (1), wrong (0) or not held out (NaN) in each draw."""
    judged = right_draws[:, ~np.isnan(right_draws).all(axis=0)]
    scores = UnitScores(np.nanmean(judged, axis=0))
    return CurvePoint(shots, scores.mean(), scores.interval())


def label_next(probability_NC: Tensor, unit_ND: Tensor, labelled_MD: Tensor, count: int, several: bool) -> list[int]:
    """Return up to ``count`` images, the most useful first.

    One after the other, it is the image of the highest uncertainty times distance to the nearest image that is labelled
    or chosen (greedy k-centre). The uncertainty is 1 less the margin between the two best classes, or with ``several``
    classes an image the highest of 1 - |2 p - 1|; the distance is 1 less the cosine.
    """
    if several:
        uncertainty = (1 - (2 * probability_NC - 1).abs()).amax(dim=1)
    else:
        best = probability_NC.topk(2, dim=1).values
        uncertainty = 1 - (best[:, 0] - best[:, 1])
    nearest = (unit_ND @ labelled_MD.T).amax(dim=1)
    chosen: list[int] = []
    for _ in range(min(count, len(unit_ND))):
        score = uncertainty * (1 - nearest)
        score[chosen] = -torch.inf
        chosen.append(int(score.argmax()))
        nearest = torch.maximum(nearest, unit_ND @ unit_ND[chosen[-1]])
    return chosen
