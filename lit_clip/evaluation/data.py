"""What an evaluation set is: images by number, and what is known of them.

Adapters (:mod:`datamodules.evaluation`) are subclasses. Besides classes there are kinds of knowledge that a few metrics
need; an adapter that has one inherits from that class too.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lit_clip.errors import InputError, require


class MissingData(InputError):  # noqa: N818 # an InputError, as all that a user can fix
    """A set does not lie where it was looked for; an evaluation lists it and goes on with the others."""


class ImageSet(ABC):
    """Images by number, decoded when they are asked for; an object that can be sent to data workers.

    Attributes:
        several: whether an item may have many images; then one is read at a time.
        absent: items that the set's own list names and that do not lie on the disk; they are none of those here.
    """

    several: bool = False
    absent: int = 0

    @abstractmethod
    def __len__(self) -> int:
        """Number of items."""

    @abstractmethod
    def images(self, index: int) -> list[Image.Image]:
        """The images of an item as they lie in its file, of any mode: one, or the frames of a video.

        The features of several are averaged after each has been brought to unit length, so that the logits are the
        mean of the frames' logits.
        """

    def check(self) -> None:  # noqa: B027 # of most sets there is nothing to be seen so
        """Raise :class:`InputError` for images that can be seen to be broken without decoding any.

        For who would otherwise learn of it after hours of training; an evaluation reads them all anyhow.
        """

    def key(self, index: int) -> str:
        """What an item is called in reports, stable between runs: the path of its file below the root, say."""
        return str(index)

    @abstractmethod
    def stamp(self) -> str:
        """What is equal only if the images and their order are: features are cached by it.

        Labels may be left out. See :func:`stamp_of_files`.
        """


class LabelledImages(ImageSet, Dataset[tuple[Image.Image, int]]):
    """A set of images with a class each.

    Attributes:
        class_names: the classes' names in words, in label order.
    """

    class_names: list[str]

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An image as it lies in its file, of any mode, and its label."""

    @abstractmethod
    def labels(self) -> list[int]:
        """The label of every image, without opening any; -1 where ``MultiLabel`` says more."""

    def images(self, index: int) -> list[Image.Image]:
        return [self[index][0]]

    def stamp(self) -> str:
        raise InputError(f"{type(self).__name__}: does not say what identifies its images, so features are not kept")


def numbered(labels: Sequence[int], where: str) -> list[str]:
    """The numbers from 0 to the highest label, as names of classes without any.

    Raises:
        InputError: that would be far more than there are images: a number that is no class.
    """
    classes = 1 + max(labels, default=0)
    possible = classes <= max(10_000, 100 * len(labels))
    require(
        possible, f"{where}: a label is {classes - 1}, which is hardly a class's number; fix it or give class names"
    )
    return [str(label) for label in range(classes)]


def check_classes(splits: Mapping[str, ImageSet]) -> None:
    """Raise :class:`InputError` if the classes of another split are not those of the test split, in their order.

    Of folders and tables without a list of classes each split has the classes that occur in it.
    """
    names = {split: one.class_names for split, one in splits.items() if isinstance(one, LabelledImages)}
    test = names.get("test", [])
    for split, others in names.items():
        if "test" in names and others != test:
            differ = next((f"{a!r} is {b!r}" for a, b in zip(test, others, strict=False) if a != b), "")
            sizes = f"{len(test)} and {len(others)} classes"
            raise InputError(
                f"test and {split} have {sizes}{f', and {differ} there' if differ else ''}: the same label would be "
                "another class; fix the splits, or give the same class_names as an argument of both"
            )


class CaptionedImages(ImageSet):
    """Images with texts, for retrieval."""

    @abstractmethod
    def captions(self, index: int) -> list[str]:
        """All captions of an image, at least one."""


class MultiLabel(ABC):
    """Any number of classes an image (VOC2007)."""

    @abstractmethod
    def relevance(self) -> Tensor:
        """int8 ``[N, C]``: 1 the class is there, 0 it is not, -1 not to be counted ("difficult")."""


class Neighbours(ABC):
    """Frames of videos around an anchor frame each (ImageNet-Vid-Robust, YTBB-Robust)."""

    @abstractmethod
    def neighbours(self) -> list[tuple[int, list[int]]]:
        """Of each anchor its row and the rows of the frames within ten of it, the anchor's own left out."""

    @abstractmethod
    def accepted(self) -> list[set[int]]:
        """Of each row the classes that are right."""


class Lexicons(ABC):
    """A list of candidates of its own for each image (IIIT5K)."""

    @abstractmethod
    def candidates(self) -> list[list[int]]:
        """Of each image the classes it is to be told from, its own among them."""


class Located(ABC):
    """Where images were taken (IM2GPS)."""

    @abstractmethod
    def coordinates(self) -> Tensor:
        """float64 ``[N, 2]``: latitude and longitude, degrees."""


class Grouped(ABC):
    """People or other groups among which accuracy is compared (FairFace)."""

    @abstractmethod
    def groups(self) -> dict[str, list[str]]:
        """By the name of the attribute, of each image its value."""


class VerbsAndNouns(ABC):
    """Clips of unusual actions (RareAct), a class being a verb and a noun."""

    @abstractmethod
    def annotations(self) -> dict[str, Any]:
        """``verb`` and ``noun`` of each class; of each clip ``video``, its film, and ``annotation``, a code.

        The code is the set's own, about the clip's own class: 1 the action is there, 2 only the verb, 3 only the noun,
        4 both but apart, 0 neither.
        """
