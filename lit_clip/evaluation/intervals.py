"""Confidence intervals at the paper's 99.5 %, for metrics that are means over images.

Shapes: N images (or queries, or anchor frames), C classes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lit_clip.evaluation.overlap import CONFIDENCE, clopper_pearson

DRAWS = 10_000  # of the bootstrap: 25 lie beyond each end of a 99.5 % interval
Interval = tuple[float, float]


class UnitScores(NamedTuple):
    """A metric's score of each image, float64 ``[N]``; their mean is the metric.

    With ``classes``, int64 ``[N]``, the metric is the mean over classes of the mean of their images.
    """

    values: np.ndarray
    classes: np.ndarray | None = None

    def mean(self) -> float:
        return float(np.mean([stratum.mean() for stratum in self._strata()]))

    def interval(self) -> Interval:
        """Return the metric's interval: Clopper-Pearson for a proportion, otherwise :meth:`bootstrap`."""
        if self.classes is None and bool(np.isin(self.values, (0, 1)).all()):
            return clopper_pearson(int(self.values.sum()), len(self.values))
        return self.bootstrap()

    def bootstrap(self, confidence: float = CONFIDENCE) -> Interval:
        """Return the percentile interval of means over images drawn with replacement, within classes if given.

        One image less is drawn than there are, so that the variance is unbiased (Rao and Wu 1988): with n draws of n it
        is too small by 1 / n, which is much in a class of few images. The interval has no width if the images of each
        class have equal scores.
        """
        random, strata = np.random.default_rng(0), self._strata()
        means = np.zeros(DRAWS)
        for stratum in strata:
            values, counts = np.unique(stratum, return_counts=True)
            if len(values) == 1:
                means += values[0]
            else:  # only how often each value is drawn matters
                drawn = len(stratum) - 1
                means += random.multinomial(drawn, counts / len(stratum), size=DRAWS) @ values / drawn
        low, high = np.quantile(means / len(strata), [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)

    def _strata(self) -> list[np.ndarray]:
        if self.classes is None:
            return [self.values]
        order = self.classes.argsort(kind="stable")
        return np.split(self.values[order], np.flatnonzero(np.diff(self.classes[order])) + 1)


def intervals(units: Mapping[str, UnitScores]) -> dict[str, Interval]:
    """Return the interval of each metric; omit intervals without width, which would look certain."""
    found = {metric: scores.interval() for metric, scores in units.items()}
    return {metric: ends for metric, ends in found.items() if ends[0] < ends[1]}


def mean_interval(folds: list[Interval]) -> Interval:
    """Return an interval of the mean over folds: the mean of the folds' ends.

    Wide enough however much the folds depend on each other: they may share their images or have none in common.
    """
    low, high = (float(np.mean(ends)) for ends in zip(*folds, strict=True))
    return low, high
