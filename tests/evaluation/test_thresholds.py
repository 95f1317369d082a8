"""Thresholds are the best that scikit-learn finds, and hold on new images what they promise."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_recall_curve

from lit_clip.errors import InputError
from lit_clip.evaluation.thresholds import best_f1_threshold, fit_thresholds, macro, none_threshold


def labelled(images: int, classes: int = 1, seed: int = 0, distinct: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores ``[N, C]``, with ties if ``distinct`` is not 0, and relevance."""
    random = np.random.default_rng(seed)
    relevance = (random.random((images, classes)) < random.uniform(0.1, 0.5, classes)).astype(np.int8)
    scores = random.normal(size=relevance.shape) + 1.3 * relevance
    scores = np.round(scores * distinct) / distinct if distinct else scores
    return torch.from_numpy(scores), torch.from_numpy(relevance)


@pytest.mark.parametrize("distinct", [0, 1, 3])
@pytest.mark.parametrize("images", [1, 2, 17, 300])
def test_no_threshold_of_scikit_learn_has_a_higher_f1(images: int, distinct: int) -> None:
    for seed in range(20):
        scores, relevance = labelled(images, seed=seed, distinct=distinct)
        score, right = scores[:, 0], relevance[:, 0] == 1
        threshold, f1 = best_f1_threshold(score, right)
        if not right.any():
            assert (threshold, f1) == (math.inf, 0.0)
            continue
        precision, recall, thresholds = precision_recall_curve(right.numpy(), score.numpy())
        curve = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
        assert f1 == pytest.approx(curve.max(), abs=1e-12)
        assert f1 == pytest.approx(f1_score(right.numpy(), (score >= threshold).numpy()), abs=1e-12)
        best = thresholds[np.isclose(curve[:-1], curve.max(), rtol=0, atol=1e-12)]
        assert threshold == best.max()  # fewest images are given the class


def test_f1_on_held_out_images_is_that_of_thresholds_fitted_without_them() -> None:
    scores, relevance = labelled(60, 4)
    relevance[::7, 1] = -1  # not counted
    relevance[:, 3] = 0  # a class without examples
    found = fit_thresholds(scores, relevance, fixed=0.5, folds=5, seed=3)
    for c, each in enumerate(found):
        counted = relevance[:, c] >= 0
        score, right = scores[counted, c].numpy(), relevance[counted, c].numpy() == 1
        assert each.examples == right.sum()
        assert each.f1_fixed == pytest.approx(f1_score(right, score >= 0.5, zero_division=0))
        assert each.f1_fitted == pytest.approx(f1_score(right, score >= each.threshold, zero_division=0))
        random, fold = torch.Generator().manual_seed(3), np.zeros(len(right), dtype=int)
        for rows in (np.flatnonzero(right), np.flatnonzero(~right)):
            fold[rows[torch.randperm(len(rows), generator=random)]] = np.arange(len(rows)) % 5
        answers = np.zeros(len(right), dtype=bool)
        for held in range(5):
            train = fold != held
            precision, recall, thresholds = precision_recall_curve(right[train], score[train])
            curve = (2 * precision * recall / np.maximum(precision + recall, 1e-300))[:-1]
            best = thresholds[np.isclose(curve, curve.max(), rtol=0, atol=1e-12)].max() if right.any() else math.inf
            answers[~train] = score[~train] >= best
        assert each.f1_held_out == pytest.approx(f1_score(right, answers, zero_division=0))
    means = macro(found)
    assert means["f1_fitted"] == pytest.approx(np.mean([each.f1_fitted for each in found[:3]]))


def test_what_thresholds_cost_is_seen_on_scores_that_mean_nothing() -> None:
    """Fitted to noise they look better than on images that they have not seen, and the report says so."""
    random = torch.Generator().manual_seed(0)
    scores, relevance = torch.rand(40, 200, generator=random), torch.zeros(40, 200, dtype=torch.int8)
    relevance[:4] = 1
    means = macro(fit_thresholds(scores, relevance))
    assert means["f1_fitted"] > means["f1_held_out"] + 0.1


@pytest.mark.parametrize("error", [0.01, 0.05, 0.3])
def test_new_images_of_the_classes_are_called_none_at_most_as_often_as_stated(error: float) -> None:
    random, shares = np.random.default_rng(0), []
    for _ in range(400):
        examples, new = random.gumbel(size=120), random.gumbel(size=500)
        shares.append((new < none_threshold(torch.from_numpy(examples), error)).mean())
    assert error - 1.5 / 121 < np.mean(shares) <= error + 3 * np.std(shares) / 20


def test_too_few_examples_for_an_error_are_one_line() -> None:
    with pytest.raises(InputError, match=r"an error of 0.05 needs 19 examples, not 18; add some, or allow more"):
        none_threshold(torch.rand(18), 0.05)
    assert none_threshold(torch.arange(19.0), 0.05) == 0.0
    with pytest.raises(InputError, match="error: 1.0 must be above 0 and below 1"):
        none_threshold(torch.rand(18), 1.0)
    with pytest.raises(InputError, match="scores that are not finite"):
        fit_thresholds(torch.full((3, 1), torch.nan), torch.ones(3, 1))
