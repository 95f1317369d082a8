"""Fit a head on examples: compute features once, fit, calibrate, and choose thresholds.

Also whether more labels would pay (accuracy by number of examples), and which images to label next.

Shapes: N examples, W features before the projection, D after it, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.class_head import TOLERANCE, HeadFit, fit_head
from lit_clip.evaluation.intervals import Interval, UnitScores
from lit_clip.evaluation.logistic import Advance, LogisticProblem
from lit_clip.evaluation.probe import HELD_OUT, places_in_classes
from lit_clip.evaluation.thresholds import ClassThreshold, fit_thresholds, none_threshold
from lit_clip.evaluation.zero_shot import zero_shot_classifier
from lit_clip.heads.head import Head, HeadFacts
from lit_clip.losses.contrastive import unit
from lit_clip.models.clip import CLIP
from lit_clip.models.fingerprint import fingerprint
from lit_clip.models.running import evaluation_mode
from lit_clip.tools.images import image_for_model

TEMPLATES = ("a photo of a {}.",)
DRAWS = 5  # of held-out examples


@dataclass
class Examples:
    """Features of examples, before the projection ``[N, W]`` and after it ``[N, D]`` (unit length), and their classes.

    ``labels`` is int64 ``[N]``, or relevance, int8 ``[N, C]``, if images may have several classes.
    """

    before: Tensor
    after: Tensor
    labels: Tensor

    @classmethod
    def of(cls, both: Tensor, embed_dim: int, labels: Tensor) -> Self:
        """Split features of :func:`lit_clip.embedding.reading.features_of_both_kinds`."""
        return cls(both[:, :-embed_dim], both[:, -embed_dim:], labels)

    def take(self, rows: Tensor) -> "Examples":
        """Return some of the rows."""
        return Examples(self.before[rows], self.after[rows], self.labels[rows])


class FittedHead(NamedTuple):
    """A head, the details of its fit, and its errors by class if images may have several classes."""

    head: Head
    fit: HeadFit
    thresholds: list[ClassThreshold]
    none_left_out: str  # why there is no threshold for "none of these"


def fit_on(
    model: CLIP,
    names: Sequence[str],
    templates: Sequence[str],
    text: Tensor,
    examples: Examples,
    none_error: float = 0.05,
    advance: Advance | None = None,
) -> FittedHead:
    """Fit a head for a model; ``text`` has the unit features ``[D, C]`` of the class names."""
    scale, text = float(model.logit_scale.detach().exp()), text.detach().cpu()
    found = fit_head(examples.before, scale * (examples.after @ text), examples.labels, advance=advance)
    held_out = found.sharpness * found.held_out
    several = examples.labels.ndim == 2
    thresholds, none, problem = list[ClassThreshold](), None, ""
    limits = torch.full((len(names),), 0.5)
    seen = held_out.isfinite().all(dim=1)
    if several:
        thresholds = fit_thresholds(held_out[seen].sigmoid(), examples.labels[seen])
        fitted = torch.tensor([each.threshold for each in thresholds])
        limits = torch.where(fitted.isfinite(), fitted, limits)  # a class without examples is its name alone
    else:
        try:
            none = none_threshold(held_out[seen].amax(dim=1) if bool(seen.any()) else held_out[seen][:, 0], none_error)
        except InputError as error:
            problem = str(error)
    facts = HeadFacts(
        model=fingerprint(model).model,
        names=list(names),
        templates=list(templates),
        several=several,
        none=none,
        none_error=none_error,
        examples=len(examples.labels),
    )
    sharp = found.sharpness
    weight, bias = sharp * found.fit.weight, sharp * (found.fit.bias + found.shift)
    return FittedHead(Head(facts, sharp * found.scale * scale * text, weight, bias, limits), found, thresholds, problem)


def head_from_images(
    model: CLIP,
    images: Sequence[str | Path | Image.Image],
    labels: Sequence[int],
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    none_error: float = 0.05,
) -> Head:
    """Fit a head on images or image files with one class each.

    Args:
        model: whose features are used; it is left as it is.
        images: N of them.
        labels: number of each image's class in ``names``.
        names: of the classes; one without an example is recognised by its name alone.
        templates: prompt templates with {} for the name.
        none_error: share of new images of the classes that may be called none of these.
    """
    require(len(images) == len(labels) > 0, f"labels: there are {len(labels)}, for {len(images)} images")
    before, after = list[Tensor](), list[Tensor]()
    with torch.no_grad(), evaluation_mode(model):
        text = zero_shot_classifier(model, names, templates)
        for each in images:
            image = each if isinstance(each, Image.Image) else image_for_model(Path(each))
            features = model.image_features(model.preprocess(image)[None].to(model.device))
            before.append(features[0].float().cpu())
            after.append(unit(features[1].float()).cpu())
    examples = Examples(torch.cat(before), torch.cat(after), torch.tensor(labels))
    return fit_on(model, names, templates, text, examples, none_error).head


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
