"""Thresholds fitted on examples: for images that show none of the classes, and for images that show several.

Shapes: N examples, C classes.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_clip.errors import InputError, require

NONE = "none of these"  # what an image may be called that shows none of the classes
FIXED = 0.5  # threshold on a probability that is not fitted
FOLDS = 5


def check_names(names: Sequence[str], where: str) -> None:
    """Raise :class:`InputError` for a class with the name of the answer "none of these"."""
    if NONE in (" ".join(name.casefold().split()) for name in names):
        raise InputError(
            f"{where}: a class may not be called {NONE}, which is the answer for images of no class; give examples of "
            "none in no class's folder, or without a class in a table"
        )


def none_threshold(score_N: Tensor, error: float) -> float:
    """Return the threshold below which the best class's score means "none of these".

    Of new images that do show one of the classes at most ``error`` are below it, on average over draws of the examples:
    the threshold is the k-th lowest of their scores, k = floor(error (N + 1)), as in split-conformal prediction (Vovk
    et al. 2005).

    Args:
        score_N: of the best class of each example, which shows one of the classes.
        error: from 0 to 1, both excluded.
    """
    require(0 < error < 1, f"error: {error} must be above 0 and below 1")
    lowest = math.floor(error * (len(score_N) + 1) + 1e-9)
    needed = math.ceil(1 / error - 1e-9) - 1
    require(lowest >= 1, f"an error of {error:g} needs {needed} examples, not {len(score_N)}; add some, or allow more")
    return float(score_N.sort().values[lowest - 1])


def best_f1_threshold(score_N: Tensor, right_N: Tensor) -> tuple[float, float]:
    """Return the threshold with the highest F1 of ``score >= threshold``, the highest in a tie, and that F1.

    It is one of the scores; without a right example it is infinity, and F1 is 0. Scores are not NaN; ``right_N`` is
    bool.
    """
    if not bool(right_N.any()):
        return math.inf, 0.0
    score, order = score_N.sort(descending=True, stable=True)
    found = torch.arange(1, len(score) + 1, dtype=torch.float64)
    f1 = 2 * right_N[order].double().cumsum(0) / (found + right_N.sum())
    f1[:-1][score[1:] == score[:-1]] = -1  # equal scores are found together
    best = int(f1.argmax())
    return float(score[best]), float(f1[best])


class ClassThreshold(NamedTuple):
    """A class's threshold, its number of examples, and F1: fixed threshold, on examples, on held-out ones."""

    threshold: float
    examples: int
    f1_fixed: float
    f1_fitted: float
    f1_held_out: float


def fit_thresholds(
    score_NC: Tensor, relevance_NC: Tensor, fixed: float = FIXED, folds: int = FOLDS, seed: int = 0
) -> list[ClassThreshold]:
    """Fit the threshold with the highest F1 for each class, and measure it on held-out images.

    Args:
        score_NC: probabilities or similarities.
        relevance_NC: 1 the class is present, 0 absent, -1 not counted.
        fixed: threshold to compare with.
        folds: F1 on held-out examples is over all of them, each judged by a threshold fitted without its fold.
        seed: of the division into folds, which have equal shares of a class's examples.
    """
    require(score_NC.shape == relevance_NC.shape, "thresholds: there must be a score for each image and class")
    require(bool(score_NC.isfinite().all()), "thresholds: there are scores that are not finite")
    found = []
    for score, relevance in zip(score_NC.T, relevance_NC.T, strict=True):
        counted = relevance >= 0
        score_N, right_N = score[counted], relevance[counted] == 1
        threshold, fitted = best_f1_threshold(score_N, right_N)
        held_out = f1(_held_out_answers(score_N, right_N, folds, seed), right_N)
        found.append(ClassThreshold(threshold, int(right_N.sum()), f1(score_N >= fixed, right_N), fitted, held_out))
    return found


def f1(answer_N: Tensor, right_N: Tensor) -> float:
    """Return F1 of bool answers; 0 without a right example or answer, as in scikit-learn."""
    both = int(answer_N.sum()) + int(right_N.sum())
    return 2 * int((answer_N & right_N).sum()) / both if both else 0.0


def _held_out_answers(score_N: Tensor, right_N: Tensor, folds: int, seed: int) -> Tensor:
    fold_N = _folds(right_N, folds, seed)
    answers = torch.zeros_like(right_N)
    for fold in range(folds):
        held = fold_N == fold
        answers[held] = score_N[held] >= best_f1_threshold(score_N[~held], right_N[~held])[0]
    return answers


def _folds(right_N: Tensor, folds: int, seed: int) -> Tensor:
    """Return the fold of each example; positives and negatives are divided separately, in random order."""
    random, fold_N = torch.Generator().manual_seed(seed), torch.zeros(len(right_N), dtype=torch.int64)
    for rows in (right_N.nonzero()[:, 0], (~right_N).nonzero()[:, 0]):
        fold_N[rows[torch.randperm(len(rows), generator=random)]] = torch.arange(len(rows)) % folds
    return fold_N


def macro(found: Sequence[ClassThreshold]) -> dict[str, float]:
    """Return the mean of each F1 over the classes with examples."""
    known = [each for each in found if each.examples]
    require(bool(known), "thresholds: no class has an example")
    return {name: fmean(getattr(each, name) for each in known) for name in ("f1_fixed", "f1_fitted", "f1_held_out")}


def thresholds_entry(score_NC: Tensor, relevance_NC: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Return the thresholds' entry in ``results.json``: means over classes, and a line for each class."""
    found = fit_thresholds(score_NC, relevance_NC)
    lines = [(name, *each) for name, each in zip(names, found, strict=True) if each.examples]
    return {**macro(found), "fixed": FIXED, "folds": FOLDS, "classes": lines}
