"""The linear probe with a few examples of each class (section 3.1.5).

How often the paper draws examples, and how it chooses the penalty then, is not known. Here each number of shots has
one penalty, that with the best mean over the draws on validation images, which no draw has seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lit_clip.errors import InputError, require
from lit_clip.evaluation.logistic import MAX_ITERATIONS, Fit, LogisticProblem
from lit_clip.evaluation.probe import Split, best_l2, held_out, places_in_classes, search_l2
from lit_clip.evaluation.scores import evaluate_scores
from lit_clip.evaluation.suite import Metric

SHOTS = (1, 2, 4, 8, 16)


@dataclass
class FewShotResult:
    """What few examples are enough for.

    Attributes:
        values: the metric on the test split, of each draw, by the number of examples a class.
        l2: the penalty, likewise.
        left_out: numbers of examples that a class does not have, and why.
    """

    values: dict[int, list[float]]
    l2: dict[int, float]
    left_out: dict[int, str]


def few_shot(
    train: Split,
    val: Split | None,
    test: Split,
    metric: Metric,
    shots: Sequence[int] = SHOTS,
    draws: int = 3,
    seed: int = 0,
    max_iterations: int = MAX_ITERATIONS,
) -> FewShotResult:
    """Train on k examples of each class, drawn several times.

    A draw of k is part of the same draw of more. Validation images choose the penalty and are not learnt from.

    Args:
        train: to draw from.
        val: None: a fifth of each class of ``train``, which is not drawn from then.
        test: used once a draw, at the end.
        metric: by which the penalty is chosen, and the result.
        shots: the numbers of examples; those that a class does not have are left out.
        draws: how often to draw.
        seed: of the draws.
        max_iterations: of L-BFGS.

    Raises:
        InputError: images of several classes, or too few for any number of examples.
    """
    require(train.targets.relevance is None, "few_shot: examples of a class are not defined where images have several")
    require(bool((train.targets.labels >= 0).all()), "few_shot: there are images without a class")
    require(draws >= 1 and bool(shots) and min(shots) >= 1, "few_shot: shots and draws are at least 1")
    pool, judged = held_out(train, seed) if val is None else (train, val)
    counts = pool.targets.labels.bincount(minlength=train.targets.classes)
    fewest = int(counts.argmin())
    result = FewShotResult({}, {}, {})
    for k in sorted(set(shots)):
        if k > counts[fewest]:
            result.left_out[k] = f"class {fewest} has {int(counts[fewest])} examples to draw from"
            continue
        problems = [_drawn(pool, k, seed + draw) for draw in range(draws)]
        fits: dict[float, list[Fit]] = {}
        result.l2[k] = _choose(problems, fits, judged, metric, max_iterations)
        chosen = fits[result.l2[k]]
        result.values[k] = [evaluate_scores(metric, fit.scores(test.features), test.targets)[metric] for fit in chosen]
    if not result.values:
        raise InputError(f"few_shot: {result.left_out[min(shots)]}; leave few_shot out of this set's tasks")
    return result


def _drawn(pool: Split, k: int, seed: int) -> LogisticProblem:
    """What is to be learnt from k images of each class."""
    place, _ = places_in_classes(pool.targets.labels, seed)
    some = pool.take((place < k).nonzero()[:, 0])
    return LogisticProblem(some.features, some.labels, some.targets.classes)


def _choose(
    problems: list[LogisticProblem],
    fits: dict[float, list[Fit]],
    judged: Split,
    metric: Metric,
    max_iterations: int,
) -> float:
    """The penalty with the best mean on validation images; fills ``fits``."""

    def value_of(l2: float) -> float:
        fits[l2] = [problem.fit(l2, None, max_iterations) for problem in problems]
        values = [evaluate_scores(metric, fit.scores(judged.features), judged.targets)[metric] for fit in fits[l2]]
        return float(torch.tensor(values, dtype=torch.float64).mean())

    return best_l2(search_l2(value_of))
