"""What most sets are: images in files, and a class each."""

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from datamodules.evaluation.image_folder import LabelledFiles
from lit_clip.errors import InputError
from lit_clip.evaluation.data import MissingData
from lit_clip.tools.images import SUFFIXES


class ImageFiles(LabelledFiles):
    """Images in files below a folder.

    Args:
        root: the folder.
        files: of each image its path below it.
        labels: of each image its class.
        class_names: in label order.

    Raises:
        InputError: no images.
    """

    def __init__(self, root: Path, files: list[str], labels: list[int], class_names: list[str]) -> None:
        if not files:
            raise InputError(f"{root}: no images of this split; get the set again")
        self.root, self.class_names = root, class_names
        self.files = [(root / file, label) for file, label in zip(files, labels, strict=True)]

    def where(self, index: int) -> str:
        return str(self.files[index][0])


def by_hash(names: Sequence[str], seed: int) -> list[str]:
    """The names in an order that depends on the seed and on nothing else: by the BLAKE2 hash of ``seed/name``."""
    return sorted(names, key=lambda name: blake2b(f"{seed}/{name}".encode()).digest())


def images_in(folder: Path) -> list[str]:
    """The names of the images in a folder, sorted.

    Raises:
        MissingData: no such folder.
        InputError: no images in it.
    """
    if not folder.is_dir():
        raise MissingData(f"{folder}: no such folder")
    names = sorted(name for name in os.listdir(folder) if Path(name).suffix.lower() in SUFFIXES and name[0] != ".")
    if not names:
        raise InputError(f"{folder}: no images in it; get the set again")
    return names


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted by their characters' numbers.

    Raises:
        MissingData: no such folder.
        InputError: none in it.
    """
    if not folder.is_dir():
        raise MissingData(f"{folder}: no such folder")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise InputError(f"{folder}: no folders of classes in it; get the set again")
    return names


def in_class_folders(folder: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """The images in ``folder/CLASS``, by paths below ``folder``, and their labels.

    Raises:
        MissingData: a class without a folder.
        InputError: one without images.
    """
    files, labels = [], []
    for label, name in enumerate(classes):
        images = images_in(folder / name)
        files += [f"{name}/{image}" for image in images]
        labels += [label] * len(images)
    return files, labels
