"""Data overlap (section 5 and appendix C of the paper): what of an evaluation set has been trained on, and what of it.

Images of the set whose nearest training image is near enough are the overlap, the others are clean. Is the model
more often right on the overlap than on the clean ones, more than chance would have it?

Shapes: N images of the evaluation set, M of the training set, D embedding dimension.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_clip.errors import require

CONFIDENCE = 0.995  # of the paper's intervals
QUERIES, REFERENCES = 4096, 4096  # a tile of similarities, 64 MiB in float32


class NearestImages(NamedTuple):
    """Of each image of the evaluation set the nearest training image.

    Attributes:
        similarity: cosine, float32 ``[N]``; -infinity where there is none.
        row: int64 ``[N]``, of several equally near the first; -1 where there is none.
    """

    similarity: Tensor
    row: Tensor


def nowhere(size: int, device: torch.device | str = "cpu") -> NearestImages:
    """What is known before the first training image."""
    return NearestImages(torch.full((size,), -torch.inf, device=device), torch.full((size,), -1, device=device))


@torch.no_grad()
def nearer(found: NearestImages, query_ND: Tensor, reference_BD: Tensor, row_B: Tensor) -> NearestImages:
    """What is known after some more training images; exact, in ``O(N D + B D)`` memory beside a tile.

    Args:
        found: before them.
        query_ND: unit features of the evaluation set.
        reference_BD: unit features of the training images.
        row_B: their rows, int64, above those of earlier ones.
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


def nearest(query_ND: Tensor, reference_MD: Tensor) -> NearestImages:
    """The nearest of all training images, where their features fit into memory."""
    rows = torch.arange(len(reference_MD), device=query_ND.device)
    return nearer(nowhere(len(query_ND), query_ND.device), query_ND, reference_MD, rows)


@dataclass(frozen=True)
class Overlap:
    """What a division of a set into overlap and clean says. Fractions; None: there is nothing to divide by.

    Attributes:
        images: of the whole set.
        overlap: of them, seen in training.
        clean: the others.
        contamination: ``overlap / images``.
        accuracy_all: on the whole set.
        accuracy_overlap: on the overlap.
        accuracy_clean: on the others.
        difference: ``accuracy_all - accuracy_clean``, what the overlap adds; it is ``contamination`` times
            ``accuracy_overlap - accuracy_clean``.
        p_value: of the one-sided binomial test: how probable as many right answers on the overlap, or more, would be
            if the model were right there as often as on the clean images.
        interval: of ``accuracy_overlap``, see :func:`clopper_pearson`.
    """

    images: int
    overlap: int
    clean: int
    contamination: float | None
    accuracy_all: float | None = None
    accuracy_overlap: float | None = None
    accuracy_clean: float | None = None
    difference: float | None = None
    p_value: float | None = None
    interval: tuple[float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """By the attributes' names."""
        return asdict(self)


def overlap_of(seen_N: Tensor, correct_N: Tensor | None = None) -> Overlap:
    """The figures of a division.

    Args:
        seen_N: bool ``[N]``, whether an image belongs to the overlap.
        correct_N: bool ``[N]``, whether the model recognises it; None: not known, then nothing is said of accuracy.

    Raises:
        InputError: lengths that differ.
    """
    images, overlap = len(seen_N), int(seen_N.sum())
    sizes = (images, overlap, images - overlap)
    contamination = _share(overlap, images)
    if correct_N is None:
        return Overlap(*sizes, contamination)
    require(len(correct_N) == images, f"overlap: {len(correct_N)} answers of the model for {images} images")
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
    """How probable at least so many successes are where each has the probability ``null``."""
    from scipy.stats import binomtest

    return float(binomtest(successes, trials, null, alternative="greater").pvalue)


def clopper_pearson(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact two-sided interval of a proportion (C. Clopper and E. Pearson, 1934); without a trial (0, 1)."""
    if not trials:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def bonferroni(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values that allow for as many tests having been made as are not None."""
    tests = sum(value is not None for value in p_values)
    return [None if value is None else min(1.0, tests * value) for value in p_values]
