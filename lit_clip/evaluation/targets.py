"""The truth about a set's images, in the order of its feature rows; and the accuracies that follow from it.

Shapes: N images, C classes. torchmetrics has the same accuracies, but it leaves ties to ``topk`` and counts an image
with NaN scores as any other; here a tie goes to the class with the lowest number and such an image is wrong, so that
the result does not depend on how images are divided among ranks or chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet, LabelledImages, Truth
from lit_clip.tools.hashing import hex_digest

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


BY_ROW = ("labels", "relevance", "coordinates", "accepted", "candidates")
ANNOTATIONS_BY_ROW = ("annotation", "video")  # the other annotations belong to a class


@dataclass
class Targets(Truth):
    """The truth about N images and C ``classes``.

    ``labels`` is int64 ``[N]``; -1 where there is no single class.
    """

    labels: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def single(self) -> bool:
        """Whether every image has one class."""
        return bool((self.labels >= 0).all())

    @classmethod
    def of(cls, data: ImageSet, classes: int | None = None) -> "Targets":
        """Collect and check the labels and annotations of a set.

        ``classes`` is the number of class names in use; None: as many as the set has.
        """
        images = len(data)
        numbers, own = [-1] * images, 0
        if isinstance(data, LabelledImages):
            numbers, own = data.labels(), len(data.class_names)
        classes = own if classes is None else classes
        labels = torch.tensor(numbers, dtype=torch.int64)
        require(len(labels) == images, f"{type(data).__name__}: {len(labels)} labels, but {images} images")
        wrong = ((labels < -1) | (labels >= classes)).nonzero()[:, 0]
        if len(wrong):
            row = int(wrong[0])
            raise InputError(
                f"{data.key(row)} has label {int(labels[row])}, but there are {classes} classes, numbered from 0; "
                "give a list of class names that fits the labels"
            )
        relevance = data.truth.relevance
        if relevance is not None and relevance.shape != (images, classes):
            shape = "x".join(map(str, relevance.shape))
            raise InputError(f"relevance: the shape is {shape}, but there are {images} images and {classes} classes")
        for name in ("accepted", "candidates", "coordinates"):
            value = getattr(data.truth, name)
            require(value is None or len(value) == images, f"{name}: there must be one for each of {images} images")
        return cls(labels, classes, **vars(data.truth))

    def digest(self) -> str:
        """Return a hash of all values, the same in every process; it is part of the results' cache key."""
        values = vars(self) | {"accepted": self.accepted and [sorted(classes) for classes in self.accepted]}
        return hex_digest(
            (name, value.dtype, value.shape, value.tolist()) if isinstance(value, Tensor) else (name, value)
            for name, value in values.items()
        )

    def take(self, rows: Sequence[int] | Tensor) -> "Targets":
        """Return the targets of some rows, renumbered.

        Other rows are removed from the neighbours; an anchor that is not among the rows is removed with its neighbours.
        """
        index = torch.as_tensor(rows, dtype=torch.int64)
        kept = index.tolist()
        place = {row: new for new, row in enumerate(kept)}

        def taken(values: Any) -> Any:
            return values[index] if isinstance(values, Tensor) else values and [values[row] for row in kept]

        values = {name: taken(getattr(self, name)) for name in BY_ROW}
        values["groups"] = self.groups and {name: taken(group) for name, group in self.groups.items()}
        values["annotations"] = self.annotations and {
            name: taken(column) if name in ANNOTATIONS_BY_ROW else column for name, column in self.annotations.items()
        }
        values["neighbours"] = self.neighbours and [
            (place[anchor], [place[row] for row in around if row in place])
            for anchor, around in self.neighbours
            if anchor in place
        ]
        return replace(self, **values)
