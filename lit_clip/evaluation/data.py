"""Interface of an evaluation set: images by index, and the annotations that metrics need.

The adapters in :mod:`datamodules.evaluation` are subclasses. What only a few metrics compare with is an attribute,
``truth``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lit_clip.errors import InputError, require, unreadable_image

Box = tuple[float, float, float, float]  # left, top, right and bottom edge, in pixels


class MissingData(InputError):  # noqa: N818 # an InputError, like everything that a user can fix
    """A set's files are missing; an evaluation lists the set as missing and continues with the others."""


@dataclass(kw_only=True)
class Truth:
    """Further truth about a set's N images and C classes, which some metrics need; None: the set has none.

    Attributes:
        relevance: int8 ``[N, C]``: 1 the class is present, 0 absent, -1 not counted ("difficult").
        neighbours: each anchor's row, and the rows of the frames within ten of it in its video.
        accepted: the correct classes of each row.
        candidates: each image's candidate classes, its own among them.
        coordinates: float64 ``[N, 2]``: latitude and longitude in degrees.
        groups: each image's value of each attribute, by whose values accuracies are compared.
        annotations: ``verb`` and ``noun`` of each class, ``video`` (its film) and ``annotation`` of each clip, which is
            RareAct's code for how it relates to its class: 1 the action occurs, 2 only the verb, 3 only the noun, 4
            both but apart, 0 neither.
    """

    relevance: Tensor | None = None
    neighbours: list[tuple[int, list[int]]] | None = None
    accepted: list[set[int]] | None = None
    candidates: list[list[int]] | None = None
    coordinates: Tensor | None = None
    groups: dict[str, list[str]] | None = None
    annotations: dict[str, Any] | None = None


class ImageSet(ABC):
    """Images by index, decoded on access; picklable, so that data workers can read them."""

    several: bool = False  # whether an item may have many images; items are then read one at a time
    absent: int = 0  # number of items that the set lists but that are not on disk, and so not here
    annotation_paths: Sequence[Path] = ()  # files that say which items there are and what they show
    truth: Truth = Truth()

    @abstractmethod
    def __len__(self) -> int:
        """Number of items."""

    @abstractmethod
    def images(self, index: int) -> list[Image.Image]:
        """Return an item's images as stored, of any mode: one image, or the frames of a video.

        The unit-length features of several images are averaged, so the logits are the mean of the frames' logits.
        """

    def key_and_images(self, row: int) -> tuple[str, list[Image.Image]]:
        """Return an item's key and images, as :class:`lit_clip.embedding.reading.ImageRows`; errors name the key."""
        key = self.key(row)
        try:
            return key, self.images(row)
        except MemoryError:
            raise
        except Exception as error:  # for a broken file decoders raise anything
            raise unreadable_image(error, key) from error

    def image_paths(self) -> Sequence[Path]:
        """Return the files of the images, each once; empty if they are not in files."""
        return ()

    def whole_file(self, index: int) -> Path | None:
        """Return the file that holds exactly the item's image as stored; None if there is none."""
        return None

    def check(self) -> None:  # noqa: B027 # optional
        """Raise :class:`InputError`, before training, for visibly broken images; decode none."""

    def key(self, index: int) -> str:
        """Return an item's name in reports, the same in every run, such as its path below the root."""
        return str(index)

    @abstractmethod
    def stamp(self) -> str:
        """Return the cache key of the features; it changes with the images or their order, not with the labels."""


class LabelledImages(ImageSet, Dataset[tuple[Image.Image, int]]):
    """Images with one class each; class names are in label order."""

    class_names: list[str]
    # Returns, for each class, the labels in ImageNet that mean it, so that a probe trained on ImageNet can be tested on
    # the set; None: the classes are not of ImageNet, nor unions of some.
    in_imagenet: Callable[[], list[list[int]]] | None = None

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image as stored, of any mode, and its label."""

    @abstractmethod
    def labels(self) -> list[int]:
        """Return the label of every image without opening any; -1 if ``truth`` has the classes."""

    def images(self, index: int) -> list[Image.Image]:
        return [self[index][0]]

    def stamp(self) -> str:
        raise InputError(f"{type(self).__name__}: has no stamp(), so its features cannot be cached; define it")


def numbered(labels: Sequence[int], where: str) -> list[str]:
    """Return the numbers from 0 to the highest label, as class names for a set without names."""
    classes = 1 + max(labels, default=0)
    possible = classes <= max(10_000, 100 * len(labels))
    require(possible, f"{where}: label {classes - 1} is too high to be a class's number; fix it or give class names")
    return [str(label) for label in range(classes)]


def check_classes(splits: Mapping[str, ImageSet]) -> None:
    """Raise :class:`InputError` if a split's classes or their order differ from the test split's."""
    names = {split: images.class_names for split, images in splits.items() if isinstance(images, LabelledImages)}
    test = names.get("test", [])
    for split, others in names.items():
        if "test" in names and others != test:
            differ = next((f"{a!r} is {b!r}" for a, b in zip(test, others, strict=False) if a != b), "")
            sizes = f"{len(test)} and {len(others)} classes"
            raise InputError(
                f"test and {split} have {sizes}{f', and {differ} there' if differ else ''}: the same label would mean "
                "different classes; fix the splits, or give both the same class_names"
            )


class CaptionedImages(ImageSet):
    """Images with captions, for retrieval."""

    @abstractmethod
    def captions(self, index: int) -> list[str]:
        """Return all captions of an image; there is at least one."""


class Choice(NamedTuple):
    """A question about which captions and images, given by their rows, belong together.

    Image i and caption i do, for as many as there are of both; the others are wrong. If ``right`` is not 0, the only
    caption is right for the first ``right`` images. ``group`` is a kind of question, such as a relation.
    """

    images: tuple[int, ...]
    captions: tuple[str, ...]
    right: int = 0
    group: str = ""


class CaptionChoices(ABC):
    """Images with right and wrong captions (SugarCrepe, ARO, Winoground, MMVP, WinoGAViL)."""

    @abstractmethod
    def choices(self) -> list[Choice]:
        """Return all questions; there is at least one."""


class Items(NamedTuple):
    """Queries or documents in columns of the same length; each has a text, an image or both."""

    keys: list[str]  # ids, each once
    texts: list[str]  # empty: none
    images: list[int]  # row of its image in the set, -1: none


class JudgedDocuments(ImageSet):
    """Queries, documents to search, and graded relevance (mteb, BEIR); the images belong to both."""

    queries: Items
    documents: Items
    relevance: list[tuple[int, int, int]]  # query, document, and grade: above 0 it is relevant; each pair once


class PartOf(ABC):
    """Some images of a ``whole`` set, by ascending row, with other labels or names; they share its features."""

    whole: ImageSet
    rows: list[int]


class Localised(ABC):
    """Images with the place of each class: :class:`Masked` or :class:`Boxed`."""

    class_names: list[str]  # in label order
    synonyms: list[list[str]] | None = None  # names of each class, which is where one of them is nearest; None: one
    resized: int | None = None  # pixels of an image's short side; None: twice the model's image size

    def short_side(self, image_size: int) -> int:
        """Return the pixels to resize an image's short side to, for a model's image size."""
        return 2 * image_size if self.resized is None else self.resized

    @abstractmethod
    def truth_stamp(self) -> str:
        """Return a stamp that changes with the masks or boxes."""


class Masked(Localised):
    """Images with a class at each pixel (ADE20K)."""

    @abstractmethod
    def mask(self, index: int) -> np.ndarray:
        """Return the label of each pixel of an image, an integer array ``[H, W]``; -1 where it does not count."""


class Boxed(Localised):
    """Images with boxes around objects (Pascal VOC)."""

    tolerance: int = 0  # pixels that a point may be outside of a box, or a mask

    @abstractmethod
    def boxes(self, index: int) -> list[tuple[int, Box]]:
        """Return the boxes of an image, each with its label."""
