"""A class head from few examples: scaled zero-shot logits plus a penalised linear correction on the features.

The penalty takes it from pure zero-shot to a linear probe. It is chosen by cross-validation within the examples, and
probabilities are calibrated on the same folds: both are about images that a fit has not seen. Examples say nothing of
classes that have none, which keep the logits of their names.

Shapes: N examples, W features before the projection, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clip.evaluation.logistic import Advance, Fit, LogisticProblem
from lit_clip.evaluation.probe import places_in_classes

FOLDS = 5
PENALTIES = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)  # times the features' spread; measured accuracy is flat between them
PENALTY, PENALTY_ALONE = 0.03, 0.3  # where no class has two examples: with names, and where these say nothing
SURE = 2.0  # nats by which names must fit the examples better than none; chance alone does in 2 % of cases
MOST_FITS = FOLDS * len(PENALTIES) + 1
TOLERANCE = 1e-4  # of the objective, while penalties are compared
BISECTIONS = 40
SHRUNK = 100  # examples by which the sharpness is drawn to 1, as a fit of 80 held-out examples is worse than none


@dataclass
class HeadFit:
    """Logits ``scale * zero_shot + shift + features @ weight.T + bias``; probabilities use ``sharpness * logits``.

    ``held_out`` are logits ``[N, C]`` of the examples by fits that have not seen them, NaN where there are none.
    """

    fit: Fit
    scale: float
    shift: float
    sharpness: float
    penalty: float
    held_out: Tensor

    def logits(self, features: Tensor, zero_shot: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of features ``[B, W]`` and zero-shot logits ``[B, C]``."""
        return self.scale * zero_shot + self.shift + self.fit.scores(features)


def fit_head(
    features: Tensor, zero_shot: Tensor, labels: Tensor, seed: int = 0, advance: Advance | None = None
) -> HeadFit:
    """Fit a head by solving up to ``MOST_FITS`` convex problems on the device of the features, float ``[N, W]``.

    ``zero_shot`` are the model's logits ``[N, C]``, ``labels`` int64 ``[N]``; or relevance, int8 ``[N, C]``, for images
    with several classes.
    """
    classes, zero_shot, labels = zero_shot.shape[1], zero_shot.to(features), labels.to(features.device)
    judged = _judged(labels, classes)
    scale, shift = _zero_shot_scale(zero_shot, labels, judged)
    offset = scale * zero_shot + shift
    fold = _folds(labels, seed)
    penalty, held_out = PENALTY if scale else PENALTY_ALONE, torch.full_like(offset, torch.nan)
    if bool((fold >= 0).any()):
        penalty, held_out = _cross_validated(features, offset, labels, fold, judged, advance)
    problem = LogisticProblem(features, labels, classes, advance, offset)
    seen = fold >= 0
    sharpness = _best_scale(held_out[seen], labels[seen], judged, most=10.0) if bool(seen.any()) else 1.0
    sharpness = max(sharpness, 0.1) ** (int(seen.sum()) / (int(seen.sum()) + SHRUNK))
    return HeadFit(problem.fit(penalty * problem.spread), scale, shift, sharpness, penalty, held_out)


def _judged(labels: Tensor, classes: int) -> Tensor:
    """Return which classes have examples, bool ``[C]``."""
    if labels.ndim == 2:
        return (labels == 1).any(dim=0)
    return labels.bincount(minlength=classes) > 0


def _folds(labels: Tensor, seed: int) -> Tensor:
    """Return the fold of each example; -1 for a class's only example, which every fit needs."""
    if labels.ndim == 2:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        return (order % FOLDS).to(labels.device)
    place, count = places_in_classes(labels.cpu(), seed)
    return torch.where(count > 1, place % FOLDS, -1).to(labels.device)


def _cross_validated(
    features: Tensor, offset: Tensor, labels: Tensor, fold: Tensor, judged: Tensor, advance: Advance | None
) -> tuple[float, Tensor]:
    """Return the penalty with the lowest log loss on held-out examples, and their logits ``[N, C]``."""
    parts = [(fold == number).nonzero()[:, 0] for number in range(FOLDS)]
    parts = [held for held in parts if len(held)]
    rest = [(fold != fold[held[0]]).nonzero()[:, 0] for held in parts]
    problems = [LogisticProblem(features[rows], labels[rows], offset.shape[1], advance, offset[rows]) for rows in rest]
    fits: list[Fit | None] = [None] * len(problems)
    seen = torch.cat(parts)
    best, lowest, worse = (PENALTIES[0], offset), torch.inf, 0
    for penalty in PENALTIES:
        held_out = torch.full_like(offset, torch.nan)
        for number, (problem, held) in enumerate(zip(problems, parts, strict=True)):
            fits[number] = fit = problem.fit(penalty * problem.spread, fits[number], tolerance=TOLERANCE)
            held_out[held] = offset[held] + fit.scores(features[held])
        loss = log_loss(held_out[seen], labels[seen], judged)
        worse = worse + 1 if loss >= lowest else 0
        if loss < lowest:
            best, lowest = (penalty, held_out), loss
        if worse == 2:
            break
    return best


def log_loss(logits: Tensor, labels: Tensor, judged: Tensor) -> float:
    """Return the summed loss of logits ``[B, C]``, over the classes with examples."""
    logits, labels = _among(logits, labels, judged)
    if labels.ndim == 1:
        return float(F.cross_entropy(logits.double(), labels, reduction="sum"))
    losses = F.binary_cross_entropy_with_logits(logits.double(), labels.double().clamp(min=0), reduction="none")
    return float(losses[labels >= 0].sum())


def _among(logits: Tensor, labels: Tensor, judged: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and labels of the classes with examples, renumbered."""
    return logits[:, judged], labels[:, judged] if labels.ndim == 2 else (judged.cumsum(0) - 1)[labels]


def _zero_shot_scale(zero_shot: Tensor, labels: Tensor, judged: Tensor) -> tuple[float, float]:
    """Return the factor and the constant with which zero-shot logits fit the examples best.

    One class an image: the constant is 0, and the factor at most 1, the model's own temperature. It is 0 if the names
    hardly fit better than none, unless a class has nothing but its name.
    """
    if labels.ndim == 1:
        scale = _best_scale(zero_shot, labels, judged, most=1.0)
        gain = log_loss(0 * zero_shot, labels, judged) - log_loss(scale * zero_shot, labels, judged)
        return (scale if gain >= SURE or not bool(judged.all()) else 0.0), 0.0
    logits, relevance = _among(zero_shot, labels, judged)
    fit = LogisticProblem(logits.reshape(-1, 1), relevance.reshape(-1, 1), 1).fit(TOLERANCE)
    return max(float(fit.weight), 0.0), float(fit.bias)


def _best_scale(logits: Tensor, labels: Tensor, judged: Tensor, most: float) -> float:
    """Return the factor from 0 to ``most`` with the lowest log loss; the loss is convex in it."""
    logits, labels = _among(logits, labels, judged)
    logits = logits.double()

    def slope(factor: float) -> float:
        if labels.ndim == 1:
            expected = ((factor * logits).softmax(dim=1) * logits).sum(dim=1)
            return float((expected - logits.gather(1, labels[:, None])[:, 0]).sum())
        return float((((factor * logits).sigmoid() - (labels == 1).double()) * logits)[labels >= 0].sum())

    low, high = 0.0, most
    if slope(high) <= 0:
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return low
