"""The paper's linear probe: logistic regression with a penalty chosen on validation images (appendix A.3).

The paper states scikit-learn's L-BFGS, 1,000 iterations, a grid of 97 lambdas from 1e-6 to 1e6, and the search of
:func:`search_l2`. That lambda is scikit-learn's 1 / C is inferred: the README of openai/CLIP has C = 0.316, which is
1 / 10^0.5, a point of that grid. As there, features are not normalised.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_clip.errors import require
from lit_clip.evaluation.logistic import Advance, Fit, LogisticProblem
from lit_clip.evaluation.scores import evaluate_scores
from lit_clip.evaluation.targets import Targets

STEPS_PER_DECADE = 8
L2_GRID = tuple(10 ** (step / STEPS_PER_DECADE - 6) for step in range(12 * STEPS_PER_DECADE + 1))
FIRST_SPAN = 2 * STEPS_PER_DECADE  # 1e-6, 1e-4, ... 1e6
MOST_PENALTIES = 15  # that search_l2 tries: 7, and then up to 2 for each of 4 spans
Classes = list[list[int]]  # for each class of a tested set, those of another set, which a probe is trained on
HELD_OUT = 5  # without a validation split one image in 5 of each class is held out to choose the penalty


@dataclass
class Split:
    """Float32 features ``[N, W]`` of images, the truth about them, and zero-shot logits ``[N, C]`` if needed."""

    features: Tensor
    targets: Targets
    zero_shot: Tensor | None = None

    def __post_init__(self) -> None:
        rows, known = len(self.features), len(self.targets)
        require(rows == known, f"split: features of {rows} images, but targets of {known}")

    def take(self, rows: Tensor) -> "Split":
        """Return some of the rows."""
        zero_shot = None if self.zero_shot is None else self.zero_shot[rows.to(self.zero_shot.device)]
        return Split(self.features[rows.to(self.features.device)], self.targets.take(rows), zero_shot)

    @property
    def labels(self) -> Tensor:
        """Labels for a ``LogisticProblem``: relevance if images have several classes."""
        return self.targets.labels if self.targets.relevance is None else self.targets.relevance


@dataclass
class Probe:
    """A trained probe: penalty, validation metric by penalty in the order tried, and classifier."""

    l2: float
    search: dict[float, float]
    fit: Fit = field(repr=False)


def train_probe(
    train: Split, val: Split | None, metric: str, seed: int = 0, advance: Advance | None = None, l2: float | None = None
) -> Probe:
    """Train a classifier on features by up to ``MOST_PENALTIES + 1`` fits.

    The penalty is chosen by ``metric`` on ``val``, or without it on a fifth of each class of ``train`` (see
    :func:`held_out`), unless ``l2`` is given; the final classifier is trained on ``train`` and ``val``. If images have
    several classes, there is one binary classifier per class, all with the same penalty. For ``advance`` see
    :class:`lit_clip.evaluation.logistic.LogisticProblem`.
    """
    splits = [train] if val is None else [train, val]
    one_class = all(split.labels.ndim == 2 or split.targets.single for split in splits)
    require(one_class, "linear probe: a split has images without a class")
    search, start = {}, None
    if l2 is None:
        search_train, search_val = held_out(train, seed) if val is None else (train, val)
        problem = LogisticProblem(search_train.features, search_train.labels, train.targets.classes, advance)
        search, (start,) = searched([problem], search_val, metric, warm=True)
        l2 = best_l2(search)
    features, labels = torch.cat([each.features for each in splits]), torch.cat([each.labels for each in splits])
    problem = LogisticProblem(features, labels, train.targets.classes, advance)
    return Probe(l2, search, problem.fit(l2, start))


def searched(
    problems: Sequence[LogisticProblem], val: Split, metric: str, warm: bool = False
) -> tuple[dict[float, float], list[Fit]]:
    """Return the metric by penalty, averaged over the problems, and their classifiers at the best penalty.

    If ``warm``, a fit starts from the one whose penalty is the closest in logarithm.
    """
    fits: dict[float, list[Fit]] = {}

    def value_of(l2: float) -> float:
        nearest = min(fits, key=lambda other: abs(math.log(other / l2)), default=l2)
        starts = fits[nearest] if warm and fits else [None] * len(problems)
        fits[l2] = [problem.fit(l2, start) for problem, start in zip(problems, starts, strict=True)]
        scores = [fit.scores(val.features) for fit in fits[l2]]
        values = [evaluate_scores(metric, of_fit, val.targets)[metric] for of_fit in scores]
        return float(torch.tensor(values, dtype=torch.float64).mean())

    search = search_l2(value_of)
    return search, fits[best_l2(search)]


def search_l2(value_of: Callable[[float], float]) -> dict[float, float]:
    """Search the 97 penalties as in the paper: every 16th, strongest first, then ever smaller steps near the peak.

    Return the values of the maximised function by penalty, in the order tried; they include a single peak's maximum.
    """
    values: dict[float, float] = {}
    span, tried = FIRST_SPAN, range(len(L2_GRID) - 1, -1, -FIRST_SPAN)
    while True:
        for step in tried:
            if L2_GRID[step] not in values:
                values[L2_GRID[step]] = value_of(L2_GRID[step])
        span //= 2
        if not span:
            return values
        peak = L2_GRID.index(best_l2(values))
        tried = [step for step in (peak + span, peak - span) if 0 <= step < len(L2_GRID)]


def best_l2(values: dict[float, float]) -> float:
    """Return the penalty with the highest value; the strongest one in a tie."""
    return max(values, key=lambda l2: (values[l2], l2))


def held_out(train: Split, seed: int) -> tuple[Split, Split]:
    """Split off a random fifth of each class: return the rest and the fifth; a single image stays in the rest.

    If images have several classes, it is a fifth of all images.
    """
    N = len(train.targets)
    if train.targets.relevance is None:
        place, count = places_in_classes(train.targets.labels, seed)
        held = place < (count // HELD_OUT).clamp(min=1).minimum(count - 1)
    else:
        held = torch.randperm(N, generator=torch.Generator().manual_seed(seed)) < max(1, N // HELD_OUT)
    require(
        bool(held.any()),
        "train: each class has one image, so none is left to choose the penalty; give a split called val",
    )
    return train.take((~held).nonzero()[:, 0]), train.take(held.nonzero()[:, 0])


def places_in_classes(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return each image's place in a random order of its class, and the size of its class; both int64 ``[N]``."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = shuffled[labels[shuffled].argsort(stable=True)]
    count = labels.bincount()
    first = count.cumsum(0) - count
    place = torch.empty_like(labels)
    place[order] = torch.arange(len(labels)) - first[labels[order]]
    return place, count[labels]


def among(scores: Tensor, classes: Sequence[Sequence[int]] | None) -> Tensor:
    """Return the scores of the tested set's classes ``[N, C]``, from scores of the training set's classes.

    A class that several trained classes mean has the highest of their scores, as in the paper (section 3.3); one that
    none means has minus infinity and is never predicted.
    """
    if classes is None:
        return scores
    never = scores.new_full((len(scores), 1), -torch.inf)
    return torch.cat([scores[:, list(labels)].amax(dim=1, keepdim=True) if labels else never for labels in classes], 1)
