"""Images in separate files: base classes of most sets, and functions that list their folders."""

import os
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta
from PIL import Image

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import CaptionedImages, ImageSet, LabelledImages, MissingData, Truth
from lit_clip.tools.hashing import hex_digest, stamp_of_files
from lit_clip.tools.images import SUFFIXES, check_images, image_for_model, image_names
from lit_clip.tools.reading import reading

TEXTS = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)]
TrainTest = Literal["train", "test"]
TrainValTest = Literal["train", "val", "test"]


class KnownLabels(LabelledImages):
    """Images with labels in memory."""

    _labels: list[int]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.image(index), self._labels[index]

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Decode an image."""

    def labels(self) -> list[int]:
        return list(self._labels)


class UnlabelledFiles(ImageSet):
    """Image files below a folder; the set is missing if the first file's folder does not exist.

    Args:
        root: the folder.
        files: each image's path below it, or its whole path; its key is its path below the folder.
        annotations: the files that list them.
    """

    def __init__(self, root: Path, files: Sequence[str | Path], annotations: Sequence[Path] = ()) -> None:
        self.root, self.annotation_paths = root, annotations
        self.files = [file if isinstance(file, Path) else root / file for file in files]
        require(bool(self.files), f"{root}: no images of this split; get the set again")
        refuse_no_folder(self.files[0].parent)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        """Decode an image."""
        return image_for_model(self.files[index], self.where(index))

    def images(self, index: int) -> list[Image.Image]:
        return [self.image(index)]

    def where(self, index: int) -> str:
        """Name an image in error messages."""
        return str(self.files[index])

    def whole_file(self, index: int) -> Path:
        return self.files[index]

    def image_paths(self) -> list[Path]:
        return list(dict.fromkeys(self.files))

    def key(self, index: int) -> str:
        path = self.files[index]
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()

    def stamp(self) -> str:
        # The keys count too: the same files in another order, or with some missing, give other features.
        keys = hex_digest(self.key(index) for index in range(len(self)))
        return f"{keys}-{stamp_of_files(path for path in self.image_paths() if os.path.isfile(path))}"


class ImageFiles(UnlabelledFiles, KnownLabels):
    """Labelled image files.

    Args:
        root: their folder.
        rows: each image's file and class; the class is None if ``truth`` has the classes.
        classes: the classes, in label order.
        annotations: the files that list them.
        names: of the classes; None: the classes themselves.
        truth: further truth.
    """

    def __init__(
        self,
        root: Path,
        rows: Sequence[tuple[str | Path, Hashable]],
        classes: Sequence[Hashable],
        annotations: Sequence[Path] = (),
        names: Sequence[str] | None = None,
        truth: Truth | None = None,
    ) -> None:
        self._labels = labels_of([each for _, each in rows], classes, [*annotations, root][0])
        super().__init__(root, [file for file, _ in rows], annotations)
        self.class_names, self.truth = list(map(str, names or classes)), truth or Truth()

    def check(self) -> None:
        check_images([(file, self.where(index)) for index, file in enumerate(self.files)])


class CaptionedFiles(UnlabelledFiles, CaptionedImages):
    """Image files and all captions of each."""

    def __init__(self, root: Path, names: list[str], captions: list[list[str]], annotations: Sequence[Path]) -> None:
        super().__init__(root, names, annotations)
        self._captions = captions

    def captions(self, index: int) -> list[str]:
        return list(self._captions[index])


def labels_of(names: Sequence[Hashable], classes: Sequence[Hashable], where: Path) -> list[int]:
    """Return the index of each name in ``classes``, -1 for None; ``where`` is the file that lists the names."""
    label_of = {None: -1, **{name: label for label, name in enumerate(classes)}}
    unknown = next((name for name in names if name not in label_of), None)
    if unknown is not None:
        raise InputError(f"{where}: {unknown!r} is none of the {len(classes)} classes; get the file again")
    return [label_of[name] for name in names]


def by_hash(names: Sequence[str], seed: int) -> list[str]:
    """Sort names by the BLAKE2 hash of ``seed/name``: a shuffle that depends only on the seed."""
    return sorted(names, key=lambda name: blake2b(f"{seed}/{name}".encode()).digest())


def images_in(folder: Path) -> list[str]:
    """List the names of the images in a folder, sorted, without hidden files from editors and macOS."""
    return image_names(_entries(folder, "images", lambda entry: Path(entry.name).suffix.lower() in SUFFIXES))


def subfolders(folder: Path) -> list[str]:
    """List the names of a folder's subfolders, sorted by code point."""
    return _entries(folder, "class folders", os.DirEntry.is_dir)


def _entries(folder: Path, description: str, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    refuse_no_folder(folder)
    with reading(folder, "folder"):
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name[0] != "." and wanted(entry))
    require(bool(names), f"{folder}: no {description} in it; get the set again")
    return names


def refuse_no_folder(folder: Path) -> None:
    """Raise :class:`MissingData` unless a folder exists."""
    if not os.path.isdir(folder):  # unlike the method, false for a name that is too long
        raise MissingData(f"{folder}: no such folder")


def in_class_folders(folder: Path, classes: Sequence[str]) -> list[tuple[str, str]]:
    """List the images in ``folder/CLASS`` as paths below ``folder``, each with its class."""
    return [(f"{name}/{image}", name) for name in classes for image in images_in(folder / name)]
