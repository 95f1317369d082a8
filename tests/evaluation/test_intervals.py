"""Intervals against beta quantiles and against a bootstrap written out in plain loops."""

import random

import numpy as np
import pytest
from scipy.stats import beta

from lit_clip.evaluation.intervals import UnitScores, intervals, mean_interval


def plain_bootstrap(strata: list[list[float]], draws: int) -> tuple[float, float]:
    """Draw images of each stratum with replacement, one by one, and one less than it has."""
    generator, means = random.Random(0), []
    for _ in range(draws):
        drawn = [generator.choices(stratum, k=len(stratum) - 1) for stratum in strata]
        means.append(sum(sum(stratum) / len(stratum) for stratum in drawn) / len(drawn))
    means.sort()
    return means[int(0.0025 * draws)], means[int(0.9975 * draws)]


def test_a_proportion_has_clopper_and_pearsons_interval() -> None:
    found = UnitScores(np.array([1.0] * 7 + [0.0] * 13)).interval()
    assert found == pytest.approx((beta.ppf(0.0025, 7, 14), beta.ppf(0.9975, 8, 13)))
    assert UnitScores(np.ones(20)).interval() == pytest.approx((beta.ppf(0.0025, 20, 1), 1.0))


@pytest.mark.parametrize(
    "strata",
    [
        [[0.0] * 20 + [0.5] * 25 + [1.0] * 15],
        [[0.0] * 3 + [1.0] * 9, [0.0] * 25 + [1.0] * 5, [1.0] * 4],
        [[-1.0] * 6 + [0.0] * 30 + [1.0] * 14],
    ],
    ids=["halves", "classes", "differences"],
)
def test_other_means_have_the_interval_of_a_plain_bootstrap(strata: list[list[float]]) -> None:
    values = np.array([value for stratum in strata for value in stratum])
    classes = np.repeat(np.arange(len(strata)), [len(stratum) for stratum in strata])
    mixed = np.random.default_rng(1).permutation(len(values))
    scores = UnitScores(values[mixed], classes[mixed] if len(strata) > 1 else None)
    assert scores.mean() == pytest.approx(sum(sum(stratum) / len(stratum) for stratum in strata) / len(strata))
    low, high = scores.interval()
    assert (low, high) == pytest.approx(plain_bootstrap(strata, 8000), abs=0.03)
    assert low < scores.mean() < high
    assert scores.interval() == (low, high)  # the same in every run


def test_the_intervals_width_is_that_of_the_true_distribution() -> None:
    """Classes of three images, right with probability 0.7: drawing three of three would be a fifth too narrow."""
    generator = np.random.default_rng(0)
    classes = np.repeat(np.arange(200), 3)
    runs = [UnitScores((generator.random(600) < 0.7).astype(float), classes) for _ in range(40)]
    width = np.mean([high - low for low, high in (run.bootstrap() for run in runs)])
    true = 2 * 2.807 * np.sqrt(0.7 * 0.3 / 600)  # 2.807 standard deviations hold 99.5 %
    assert width == pytest.approx(true, rel=0.05)


def test_the_mean_per_class_is_bootstrapped_within_classes() -> None:
    """Drawn from all images together, its interval would be that of one large class."""
    values, classes = np.array([1.0] * 50 + [0.0] * 50), np.repeat([0, 1], 50)
    assert UnitScores(values, classes).interval() == (0.5, 0.5)
    assert UnitScores(values).interval() == pytest.approx((0.357, 0.643), abs=0.01)


def test_folds_average_the_ends_of_their_intervals() -> None:
    assert mean_interval([(0.25, 0.5), (0.75, 1.0)]) == (0.5, 0.75)


def test_an_interval_without_width_is_left_out() -> None:
    """A model that always answers the same class gets all images of it right and none of the others."""
    same = np.array([1.0, 1.0, 0.0, 0.0])
    found = intervals({"top1": UnitScores(same), "mean_per_class": UnitScores(same, np.array([0, 0, 1, 1]))})
    assert set(found) == {"top1"}
    assert intervals({"top1": UnitScores(np.zeros(4))})["top1"][0] == 0.0
