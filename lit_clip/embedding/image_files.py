"""Finding and reading a user's images, a batch at a time."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from lit_clip.errors import InputError, require
from lit_clip.models.config import Preprocessing
from lit_clip.models.preprocess import image_transform
from lit_clip.tools.images import SUFFIXES, Bad, Batch, read_image


@dataclass(frozen=True)
class Item:
    """An image (or, without a path, a text: then the key is the text).

    Attributes:
        key: its name in results, unique and stable.
        path: the file.
        size: of the file, bytes.
        modified: when the file was last written, nanoseconds.
    """

    key: str
    path: Path | None = None
    size: int = 0
    modified: int = 0

    @property
    def identity(self) -> tuple[str, int, int]:
        """What is equal only if the content is (as ``make`` and ``rsync`` judge it)."""
        return self.key, self.size, self.modified


def _item(key: str, path: Path) -> Item:
    try:
        status = path.stat()
    except OSError:  # a dangling link: reading it will say so
        return Item(key, path)
    return Item(key, path, status.st_size, status.st_mtime_ns)


def images_in(folder: Path) -> list[Item]:
    """The images in a folder and all folders below, hidden ones left out, keyed by their path in it and sorted by it.

    Raises:
        InputError: no such folder, or none that has an image.
    """
    require(folder.is_dir(), f"{folder}: no such folder")
    items = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:  # editors and macOS leave hidden copies
            path = Path(parent, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                items.append(_item(path.relative_to(folder).as_posix(), path))
    require(bool(items), f"{folder}: no images in this folder or below ({', '.join(sorted(SUFFIXES))})")
    return sorted(items, key=lambda item: item.key)


def find_images(paths: Sequence[str]) -> list[Item]:
    """Files as they are and folders with all below, each file once, keyed by its path as typed and sorted by it.

    Raises:
        InputError: nothing given, no such file or folder, or a folder without images.
    """
    require(len(paths) > 0, "no images: name files or folders of images, before the options")
    found: dict[str, Item] = {}  # by absolute path: a file may be named twice
    for path in map(Path, paths):
        if path.is_dir():
            items = [_item((path / item.key).as_posix(), path / item.key) for item in images_in(path)]
        else:
            require(path.exists(), f"{path}: no such file or folder")
            require(path.is_file(), f"{path}: neither a file nor a folder")  # a pipe would be waited for
            items = [_item(path.as_posix(), path)]
        for item in items:
            found.setdefault(os.path.abspath(item.key), item)
    return sorted(found.values(), key=lambda item: item.key)


class ImageBatches(Dataset[Batch]):
    """One item is one batch, decoded and preprocessed.

    Args:
        items: the images.
        batches: the rows of each batch.
        preprocessing: the model's.
        stop: once this file exists, what is left is not read any more.
    """

    def __init__(
        self,
        items: Sequence[Item],
        batches: Sequence[list[int]],
        preprocessing: Preprocessing,
        stop: Path | None = None,
    ) -> None:
        self.items, self.batches, self.stop = items, batches, stop
        self.transform: v2.Compose = image_transform(preprocessing)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        images, rows, bad = [], [], []
        stopped = self.stop is not None and self.stop.exists()
        for row in self.batches[index] if not stopped else ():
            item = self.items[row]
            assert item.path is not None
            try:
                images.append(self.transform(read_image(item.path)))
                rows.append(row)
            except InputError as error:
                bad.append(Bad(item.key, str(error)))
        return Batch(torch.stack(images) if images else None, rows, bad)


def in_batches(rows: Iterable[int], batch_size: int) -> list[list[int]]:
    """Rows in their order, cut into batches."""
    require(batch_size >= 1, f"--batch_size {batch_size} must be at least 1")
    rows = list(rows)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
