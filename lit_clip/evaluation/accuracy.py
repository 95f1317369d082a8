"""Top-1, top-5 and mean-per-class accuracy, and what a constant answer reaches in each.

Shapes: N images, C classes. torchmetrics has the same accuracies, but it leaves ties to ``topk`` and counts an image
with NaN scores as any other; here a tie goes to the class with the lowest number and such an image is wrong, so that
the result does not depend on how images are divided among ranks or chunks.
"""

import torch
from torch import Tensor

CHUNK_ENTRIES = 2**24  # scores compared at once


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
    """Return the class with the highest score of each image, int64 ``[N]``; -1 if one of its scores is NaN."""
    return scores.argmax(dim=1).masked_fill(scores.isnan().any(dim=1), -1)


def classification_counts(scores: Tensor, labels: Tensor) -> Tensor:
    """Count images, correct predictions and those among five by class, from scores ``[N, C]`` and labels ``[N]``.

    The counts, float64 ``[3, C]`` on the CPU, of batches and ranks can be summed.
    """
    labels, ranks = labels.cpu(), ranks_of_labels(scores, labels).cpu()
    counts = torch.zeros(3, scores.shape[1], dtype=torch.float64)
    for row, counted in enumerate((ranks >= 0, ranks < 1, ranks < 5)):
        counts[row].index_add_(0, labels, counted.double())
    return counts


def accuracies(counts: Tensor) -> dict[str, float]:
    """Turn summed :func:`classification_counts` into ``top1``, ``top5`` and ``mean_per_class``.

    There is no ``top5`` with 5 classes or fewer. ``mean_per_class`` is the mean over classes that have images.
    """
    images, top1, top5 = counts
    present = images > 0
    found = {"top1": float(top1.sum() / images.sum())}
    if len(images) > 5:
        found["top5"] = float(top5.sum() / images.sum())
    return found | {"mean_per_class": float((top1[present] / images[present]).mean())}


def baseline_accuracies(images: Tensor) -> dict[str, float]:
    """Return the :func:`accuracies` of always predicting the most common classes, from each class's images ``[C]``."""
    shares = (images.double() / images.sum()).sort(descending=True).values
    found = {"top1": float(shares[0])}
    if len(images) > 5:
        found["top5"] = float(shares[:5].sum())
    return found | {"mean_per_class": 1 / int((images > 0).sum())}
