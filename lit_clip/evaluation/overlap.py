"""Data overlap (section 5 and appendix C of the paper): the share of an evaluation set in the training data.

Images of the set whose nearest training image is similar enough are the overlap; the others are clean. The question is
whether the model is right more often on the overlap than on the clean images, beyond chance.

Shapes: N images of the evaluation set, M of the training set, D embedding dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_clip.errors import require

CONFIDENCE = 0.995  # confidence level of the paper's intervals
QUERIES, REFERENCES = 4096, 4096  # a tile of similarities, 64 MiB in float32


class NearestImages(NamedTuple):
    """Nearest training image of each image of the evaluation set."""

    similarity: Tensor  # cosine, float32 [N]; -infinity if there is none
    row: Tensor  # of the training image, int64 [N], the first of a tie; -1 if there is none


def nowhere(size: int, device: torch.device | str = "cpu") -> NearestImages:
    """Return the state before the first training image."""
    return NearestImages(torch.full((size,), -torch.inf, device=device), torch.full((size,), -1, device=device))


@torch.no_grad()
def nearer(found: NearestImages, query_ND: Tensor, reference_BD: Tensor, row_B: Tensor) -> NearestImages:
    """Update the nearest images with a batch of training images; exact, in ``O(N D + B D)`` memory and a tile.

    Features are of unit length; the training images' rows are above the rows of earlier batches.
    """
    similarity, row = found.similarity.clone(), found.row.clone()
    for start in range(0, len(query_ND), QUERIES):
        here = slice(start, start + QUERIES)
        for references, rows in zip(reference_BD.split(REFERENCES), row_B.split(REFERENCES), strict=True):
            best = (query_ND[here] @ references.T).max(dim=1)
            better = best.values > similarity[here]
            similarity[here] = torch.where(better, best.values, similarity[here])
            row[here] = torch.where(better, rows[best.indices], row[here])
    return NearestImages(similarity, row)


@torch.no_grad()
def nearest_of_set(query_ND: Tensor, reference_BD: Tensor) -> NearestImages:
    """Return the nearest image of an evaluation set to each image of a training batch, as in :func:`nearer`."""
    found = nowhere(len(reference_BD), reference_BD.device)
    for start in range(0, len(query_ND), QUERIES):
        best = (query_ND[start : start + QUERIES] @ reference_BD.T).max(dim=0)
        better = best.values > found.similarity
        similarity = torch.where(better, best.values, found.similarity)
        found = NearestImages(similarity, torch.where(better, best.indices + start, found.row))
    return found


@dataclass(frozen=True)
class Overlap:
    """Figures of a set divided into overlap and clean images. A fraction is None if there are no images.

    ``p_value`` is of a one-sided binomial test: the probability of at least as many right answers on the overlap if the
    model were right there as often as on the clean images.
    """

    images: int
    overlap: int
    clean: int
    contamination: float | None  # overlap / images
    accuracy_all: float | None = None
    accuracy_overlap: float | None = None
    accuracy_clean: float | None = None
    difference: float | None = None  # accuracy_all - accuracy_clean = contamination (accuracy_overlap - accuracy_clean)
    p_value: float | None = None
    interval: tuple[float, float] | None = None  # of accuracy_overlap, see clopper_pearson


def overlap_of(seen_N: Tensor, correct_N: Tensor | None = None) -> Overlap:
    """Compute the figures from whether each image overlaps and is recognised (None: no accuracies)."""
    images, overlap = len(seen_N), int(seen_N.sum())
    sizes = (images, overlap, images - overlap)
    contamination = _share(overlap, images)
    if correct_N is None:
        return Overlap(*sizes, contamination)
    require(len(correct_N) == images, f"overlap: {len(correct_N)} predictions for {images} images")
    right, right_overlap = int(correct_N.sum()), int((correct_N & seen_N).sum())
    whole, clean = _share(right, images), _share(right - right_overlap, images - overlap)
    accuracies = (whole, _share(right_overlap, overlap), clean)
    difference = whole - clean if whole is not None and clean is not None else None
    p_value = binomial_p_value(right_overlap, overlap, clean) if overlap and clean is not None else None
    interval = clopper_pearson(right_overlap, overlap) if overlap else None
    return Overlap(*sizes, contamination, *accuracies, difference, p_value, interval)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def binomial_p_value(successes: int, trials: int, null: float) -> float:
    """Return the probability of at least this many successes if each has the probability ``null``."""
    from scipy.stats import binomtest

    return float(binomtest(successes, trials, null, alternative="greater").pvalue)


def clopper_pearson(successes: int, trials: int) -> tuple[float, float]:
    """Return the exact two-sided 99.5 % interval of a proportion (Clopper and Pearson 1934); (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


def bonferroni(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct the p-values that are not None for their number."""
    tests = sum(value is not None for value in p_values)
    return [None if value is None else min(1.0, tests * value) for value in p_values]
