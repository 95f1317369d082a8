"""The truth about an evaluation set's images: tensors and lists in the order of its feature rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet, LabelledImages, Truth
from lit_clip.tools.hashing import hex_digest

BY_ROW = ("labels", "relevance", "coordinates", "accepted", "candidates")
ANNOTATIONS_BY_ROW = ("annotation", "video")  # the other annotations belong to a class


@dataclass
class Targets(Truth):
    """The truth about N images and C ``classes``.

    ``labels`` is int64 ``[N]``; -1 where there is no single class.
    """

    labels: Tensor
    classes: int

    def __post_init__(self) -> None:
        check_labels(self.labels, self.classes, lambda row: f"row {row}")
        if self.relevance is not None and self.relevance.shape != (len(self), self.classes):
            shape = "x".join(map(str, self.relevance.shape))
            raise InputError(
                f"relevance: the shape is {shape}, but there are {len(self)} images and {self.classes} classes"
            )
        for name in ("accepted", "candidates", "coordinates"):
            value = getattr(self, name)
            require(
                value is None or len(value) == len(self), f"{name}: there must be one for each of {len(self)} images"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def single(self) -> bool:
        """Whether every image has one class."""
        return bool((self.labels >= 0).all())

    @classmethod
    def of(cls, data: ImageSet, rows: Sequence[int] | None = None, classes: int | None = None) -> "Targets":
        """Collect the labels and annotations of a set, for some rows or for all.

        ``classes`` is the number of class names in use; None: as many as the set has.
        """
        labelled = isinstance(data, LabelledImages)
        if classes is None:
            classes = len(data.class_names) if labelled else 0
        labels = torch.tensor(data.labels() if labelled else [-1] * len(data), dtype=torch.int64)
        require(len(labels) == len(data), f"{type(data).__name__}: {len(labels)} labels, but {len(data)} images")
        check_labels(labels, classes, data.key)
        everything = cls(labels, classes, **vars(data.truth))
        return everything if rows is None else everything.take(rows)

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


def check_labels(labels: Tensor, classes: int, name_of: Callable[[int], str]) -> None:
    """Raise :class:`InputError` for a label that is neither -1 nor the number of a class."""
    wrong = ((labels < -1) | (labels >= classes)).nonzero()[:, 0]
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"{name_of(row)} has label {int(labels[row])}, but there are {classes} classes, numbered from 0; "
            "give a list of class names that fits the labels"
        )
