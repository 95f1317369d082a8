"""Top-1, top-5 and mean-per-class accuracy, and the value of a constant answer in each.

Shapes: N images, C classes. torchmetrics has the same accuracies, but it leaves ties to ``topk`` and counts an image
with NaN scores as any other; here a tie goes to the class with the lowest number and such an image is wrong, so that
the result does not depend on how images are divided among ranks or chunks.
"""

import torch
from torch import Tensor

CHUNK_ENTRIES = 2**24  # scores compared at once
WITHIN = {"top1": 1, "top5": 5}  # accuracies by name: the class is among so many first ones


def ranks_of_labels(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of each image's class, int64 ``[N]``: 0 is best, C if one of the image's scores is NaN."""
    N, C = scores.shape
    labels, parts = labels.to(scores.device), []
    for rows in torch.arange(N, device=scores.device).split(max(1, CHUNK_ENTRIES // C)):
        score, label = scores[rows], labels[rows, None]
        own = score.gather(1, label)
        before = torch.arange(C, device=scores.device) < label
        rank = ((score > own) | ((score == own) & before)).sum(dim=1)
        parts.append(rank.masked_fill(score.isnan().any(dim=1), C))
    return torch.cat(parts)


def predictions(scores: Tensor) -> Tensor:
    """Return each image's class with the highest score, int64 ``[N]``; -1 if one of its scores is NaN."""
    return scores.argmax(dim=1).masked_fill(scores.isnan().any(dim=1), -1)


def within(classes: int) -> dict[str, int]:
    """Return the accuracies of :data:`WITHIN` that are meaningful for this number of classes."""
    return {name: places for name, places in WITHIN.items() if places == 1 or classes > places}


def classification_counts(scores: Tensor, labels: Tensor) -> Tensor:
    """Count images by class, and the right ones by each accuracy of :data:`WITHIN`, from scores and labels ``[N]``.

    The counts, float64 ``[1 + len(WITHIN), C]`` on the CPU, of batches and ranks can be summed.
    """
    labels, ranks = labels.cpu(), ranks_of_labels(scores, labels).cpu()
    counts = torch.zeros(1 + len(WITHIN), scores.shape[1], dtype=torch.float64)
    for row, counted in enumerate((ranks >= 0, *(ranks < places for places in WITHIN.values()))):
        counts[row].index_add_(0, labels, counted.double())
    return counts


def accuracies(counts: Tensor) -> dict[str, float]:
    """Turn summed :func:`classification_counts` into the accuracies of :data:`WITHIN` and ``mean_per_class``.

    ``mean_per_class`` is the mean over classes that have images.
    """
    images, *right = counts
    present = images > 0
    every = dict(zip(WITHIN, right, strict=True))
    found = {name: float(every[name].sum() / images.sum()) for name in within(len(images))}
    return found | {"mean_per_class": float((every["top1"][present] / images[present]).mean())}


def baseline_accuracies(images: Tensor) -> dict[str, float]:
    """Return the :func:`accuracies` of always predicting the most common classes, from image counts ``[C]``."""
    shares = (images.double() / images.sum()).sort(descending=True).values
    found = {name: float(shares[:places].sum()) for name, places in within(len(images)).items()}
    return found | {"mean_per_class": 1 / int((images > 0).sum())}
