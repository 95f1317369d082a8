"""The paper's linear probe: logistic regression on features, its penalty found on validation images (appendix A.3).

What is known of the paper's: scikit-learn's L-BFGS, 1,000 iterations, a grid of 97 lambdas from 1e-6 to 1e6, and the
search of :func:`search_l2`. That lambda is 1 / C of scikit-learn is inferred: the README of openai/CLIP has C = 0.316,
which is 1 / 10^0.5, a point of that grid. Features are used as they are, as there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_clip.errors import require
from lit_clip.evaluation.logistic import MAX_ITERATIONS, Fit, LogisticProblem, fit_logistic
from lit_clip.evaluation.scores import evaluate_scores
from lit_clip.evaluation.suite import Metric
from lit_clip.evaluation.targets import Targets
from lit_clip.losses.contrastive import unit

__all__ = ["Fit", "ProbeResult", "Split", "fit_logistic", "linear_probe", "search_l2"]

STEPS_PER_DECADE = 8
L2_GRID = tuple(10 ** (step / STEPS_PER_DECADE - 6) for step in range(12 * STEPS_PER_DECADE + 1))
FIRST_SPAN = 2 * STEPS_PER_DECADE  # 1e-6, 1e-4, ... 1e6
HELD_OUT = 5  # one image in so many of each class chooses the penalty where there is no validation split


@dataclass
class Split:
    """Features and what is known of their images.

    Attributes:
        features: float32 ``[N, W]``.
        targets: of the N images.
    """

    features: Tensor
    targets: Targets

    def __post_init__(self) -> None:
        rows, known = len(self.features), len(self.targets)
        require(rows == known, f"split: features of {rows} images, but {known} are known")

    def take(self, rows: Tensor) -> "Split":
        """Some of the images."""
        return Split(self.features[rows.to(self.features.device)], self.targets.take(rows))

    @property
    def labels(self) -> Tensor:
        """What :func:`lit_clip.evaluation.logistic.fit_logistic` learns: relevance where images have many classes."""
        return self.targets.labels if self.targets.relevance is None else self.targets.relevance


@dataclass
class ProbeResult:
    """A probe, and how good it is.

    Attributes:
        metrics: of the test split, see :func:`lit_clip.evaluation.scores.evaluate_scores`.
        l2: the penalty that was chosen.
        search: the metric on the validation images by penalty, in the order in which they were tried.
        scores: float32 ``[N, C]`` logits of the test split.
        fit: the classifier, of training and validation images.
    """

    metrics: dict[str, float]
    l2: float
    search: dict[float, float]
    scores: Tensor
    fit: Fit = field(repr=False)


def linear_probe(
    train: Split,
    val: Split | None,
    test: Split,
    metric: Metric,
    *,
    normalize: bool = False,
    max_iterations: int = MAX_ITERATIONS,
    seed: int = 0,
) -> ProbeResult:
    """Train a classifier on features and evaluate it.

    The penalty is chosen on ``val``; the final classifier is trained on ``train`` and ``val``. Where images have
    several classes, each class is told from the rest by itself, all with the same penalty.

    Args:
        train: to learn from.
        val: None: a fifth of each class of ``train`` is held out (of all images, where they have several classes).
        test: used once, at the end.
        metric: by which the penalty is chosen, and the result.
        normalize: bring features to unit length first, as CLIP_benchmark does and the paper does not.
        max_iterations: of L-BFGS.
        seed: of what is held out.

    Raises:
        InputError: splits that do not go together, or that cannot be learnt from.
    """
    splits = [train, test] if val is None else [train, val, test]
    _check(splits)
    if normalize:
        splits = [Split(unit(split.features), split.targets) for split in splits]
    train, test = splits[0], splits[-1]
    learnt, judged = held_out(train, seed) if val is None else (train, splits[1])
    search, start = _search(learnt, judged, metric, max_iterations)
    l2 = best_l2(search)
    features, labels = (train.features, train.labels) if val is None else _joined(learnt, judged)
    fit = LogisticProblem(features, labels, train.targets.classes).fit(l2, start, max_iterations)
    scores = fit.scores(test.features)
    return ProbeResult(evaluate_scores(metric, scores, test.targets), l2, search, scores, fit)


def _search(learnt: Split, judged: Split, metric: Metric, max_iterations: int) -> tuple[dict[float, float], Fit]:
    """The metric by penalty, and the best penalty's classifier."""
    problem = LogisticProblem(learnt.features, learnt.labels, learnt.targets.classes)
    fits: dict[float, Fit] = {}

    def value_of(l2: float) -> float:
        fits[l2] = problem.fit(l2, _nearest(fits, l2), max_iterations)
        return evaluate_scores(metric, fits[l2].scores(judged.features), judged.targets)[metric]

    search = search_l2(value_of)
    return search, fits[best_l2(search)]


def search_l2(value_of: Callable[[float], float]) -> dict[float, float]:
    """The paper's search of 97 penalties: every 16th first, strongest first, then closer and closer about the peak.

    Args:
        value_of: of a penalty, what to maximise.

    Returns:
        values by penalty, in the order of trying. Where values have a single peak it is among them.
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
    """The penalty of the highest value, the strongest of a tie."""
    return max(values, key=lambda l2: (values[l2], l2))


def held_out(train: Split, seed: int) -> tuple[Split, Split]:
    """A training split without, and with only, a seeded fifth of each class; a class of one image gives none.

    Where images have several classes it is a fifth of all.
    """
    N = len(train.targets)
    if train.targets.relevance is None:
        place, count = places_in_classes(train.targets.labels, seed)
        held = place < (count // HELD_OUT).clamp(min=1).minimum(count - 1)
    else:
        held = torch.randperm(N, generator=torch.Generator().manual_seed(seed)) < max(1, N // HELD_OUT)
    require(bool(held.any()), "train: one image of each class, and none to choose the penalty by; give a split val")
    return train.take((~held).nonzero()[:, 0]), train.take(held.nonzero()[:, 0])


def places_in_classes(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Each image's place in a seeded order of its class's, and the number of these; int64 ``[N]`` both."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = shuffled[labels[shuffled].argsort(stable=True)]
    count = labels.bincount()
    first = count.cumsum(0) - count
    place = torch.empty_like(labels)
    place[order] = torch.arange(len(labels)) - first[labels[order]]
    return place, count[labels]


def _joined(*splits: Split) -> tuple[Tensor, Tensor]:
    """Features ``[N, W]`` and labels of several splits."""
    return torch.cat([split.features for split in splits]), torch.cat([split.labels for split in splits])


def _nearest(fits: dict[float, Fit], l2: float) -> Fit | None:
    """The fit to start from: that of the penalty whose logarithm is closest."""
    return fits[min(fits, key=lambda other: abs(math.log(other / l2)))] if fits else None


def _check(splits: list[Split]) -> None:
    for split in splits:
        require(len(split.targets) > 0, "linear probe: a split has no images")
        one_class = bool((split.targets.labels >= 0).all())
        require(split.labels.ndim == 2 or one_class, "linear probe: a split has images without a class")
        for name, ours, first in (
            ("features", split.features.shape[1], splits[0].features.shape[1]),
            ("classes", split.targets.classes, splits[0].targets.classes),
            ("kinds of labels", split.labels.ndim, splits[0].labels.ndim),
        ):
            require(ours == first, f"linear probe: splits of {first} and of {ours} {name} do not go together")
