"""Images that are files of their own: the bases of most sets, and how their folders are listed."""

import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from PIL import Image

from datamodules.pairs.folder import walk_images
from lit_clip.errors import InputError
from lit_clip.evaluation.data import ImageSet, LabelledImages, MissingData
from lit_clip.tools.hashing import hash64, hex_digest, stamp_of_files
from lit_clip.tools.images import SUFFIXES, check_images, open_image
from lit_clip.tools.reading import reading

TrainTest = Literal["train", "test"]
TrainValTest = Literal["train", "val", "test"]


class LabelledFiles(LabelledImages):
    """Images that are files of their own, in the order of ``files``.

    Attributes:
        root: the folder that contains them; keys are paths below it.
        files: each image's path and label.
    """

    root: Path
    files: list[tuple[Path, int]]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        return open_image(path, self.where(index)), label

    def where(self, index: int) -> str:
        """Name an image in error messages."""
        return f"class folder {self.files[index][0].parent.name}"

    def image_paths(self) -> list[Path]:
        return list(dict.fromkeys(path for path, _ in self.files))

    def check(self) -> None:
        check_images([(file, self.where(index)) for index, (file, _) in enumerate(self.files)])

    def labels(self) -> list[int]:
        return [label for _, label in self.files]

    def key(self, index: int) -> str:
        path = self.files[index][0]
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()

    def stamp(self) -> str:
        # The keys count too: the same files in another order, or with some missing, give other features.
        keys = hex_digest(self.key(index) for index in range(len(self)))
        return f"{keys}-{stamp_of_files(path for path, _ in self.files if os.path.isfile(path))}"


class ImageFiles(LabelledFiles):
    """Images in files below a folder.

    Args:
        root: the folder.
        files: each image's path below it.
        labels: each image's class.
        class_names: in label order.
        annotations: the files that list them.
    """

    def __init__(
        self,
        root: Path,
        files: list[str],
        labels: list[int],
        class_names: list[str],
        annotations: Sequence[Path] = (),
    ) -> None:
        if not files:
            raise InputError(f"{root}: no images of this split; get the set again")
        self.root, self.class_names, self.annotation_paths = root, class_names, annotations
        self.files = [(root / file, label) for file, label in zip(files, labels, strict=True)]

    def where(self, index: int) -> str:
        return str(self.files[index][0])


class UnlabelledFiles(ImageSet):
    """Images without a class that are files below a folder.

    Attributes:
        root: the folder.
        names: each image's path below it, which is its key.
    """

    root: Path
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def images(self, index: int) -> list[Image.Image]:
        path = self.root / self.names[index]
        return [open_image(path)]

    def image_paths(self) -> list[Path]:
        return [self.root / name for name in dict.fromkeys(self.names)]

    def key(self, index: int) -> str:
        return self.names[index]

    def stamp(self) -> str:
        files = stamp_of_files(path for path in (self.root / name for name in self.names) if os.path.isfile(path))
        return f"{files}-{hash64(repr(self.names)).hex()}"


class ListedImages(ImageFiles):
    """Images that a list names.

    Raises:
        MissingData: the folder of the first image does not exist: only the lists were downloaded.
    """

    def __init__(
        self, root: Path, files: list[str], labels: list[int], class_names: list[str], annotations: Sequence[Path]
    ) -> None:
        super().__init__(root, files, labels, class_names, annotations)
        folder = (root / files[0]).parent
        if not os.path.isdir(folder):
            raise MissingData(f"{folder}: no such folder")


class ByLayout(LabelledImages):
    """A set whose layout on disk decides which class reads it.

    Attributes:
        reader: reads the set; assigned by the subclass's constructor.
    """

    reader: LabelledImages

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.reader[index]

    def labels(self) -> list[int]:
        return self.reader.labels()

    def key(self, index: int) -> str:
        return self.reader.key(index)

    def check(self) -> None:
        self.reader.check()

    def image_paths(self) -> Sequence[Path]:
        return self.reader.image_paths()

    def stamp(self) -> str:
        return self.reader.stamp()

    def read_by(self, reader: LabelledImages) -> None:
        """Read the set by ``reader``."""
        self.reader, self.class_names, self.annotation_paths = reader, reader.class_names, reader.annotation_paths


def labels_of(names: Sequence[str], classes: Sequence[str], where: Path) -> list[int]:
    """Return the index of each name in ``classes``.

    Args:
        names: of the classes of some images.
        classes: all class names, in label order.
        where: the file that lists the names, for the error message.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    unknown = next((name for name in names if name not in label_of), None)
    if unknown is not None:
        raise InputError(f"{where}: {unknown!r} is none of the {len(classes)} classes; get the file again")
    return [label_of[name] for name in names]


def by_hash(names: Sequence[str], seed: int) -> list[str]:
    """Sort names by the BLAKE2 hash of ``seed/name``: a shuffle that depends on nothing but the seed."""
    return sorted(names, key=lambda name: blake2b(f"{seed}/{name}".encode()).digest())


def images_below(folder: Path) -> list[Path]:
    """List all images in a folder and its subfolders, sorted by path."""
    return sorted(folder / name for name, _ in walk_images(folder))


def _is_image(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)  # editors and macOS leave hidden copies
    return path.suffix.lower() in SUFFIXES and not hidden


def images_in(folder: Path) -> list[str]:
    """List the names of the images in a folder, sorted.

    Raises:
        MissingData: no such folder.
    """
    if not folder.is_dir():
        raise MissingData(f"{folder}: no such folder")
    with reading(folder, "folder"):
        names = sorted(name for name in os.listdir(folder) if _is_image(Path(name)))
    if not names:
        raise InputError(f"{folder}: no images in it; get the set again")
    return names


def subfolders(folder: Path) -> list[str]:
    """List the names of a folder's subfolders, sorted by code point.

    Raises:
        MissingData: no such folder.
    """
    if not folder.is_dir():
        raise MissingData(f"{folder}: no such folder")
    with reading(folder, "folder"):
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise InputError(f"{folder}: no class folders in it; get the set again")
    return names


def in_class_folders(
    folder: Path, classes: Sequence[str], choose: Callable[[list[str]], list[str]] | None = None
) -> tuple[list[str], list[int]]:
    """List the images in ``folder/CLASS``, as paths below ``folder``, and their labels.

    Args:
        folder: the parent of the class folders.
        classes: their names, in label order.
        choose: picks some of the paths of a class; None: all.

    Raises:
        MissingData: a class has no folder.
    """
    files, labels = [], []
    for label, name in enumerate(classes):
        images = [f"{name}/{image}" for image in images_in(folder / name)]
        chosen = choose(images) if choose else images
        files += chosen
        labels += [label] * len(chosen)
    return files, labels
