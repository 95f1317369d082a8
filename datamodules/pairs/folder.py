"""A folder of images with a text file beside each."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_info

from datamodules.pairs.columns import Cells, ColumnPairs
from datamodules.pairs.source import DELIMITED, JSON_LINES, NO_CAPTION
from lit_clip.errors import BadSample, InputError
from lit_clip.tools.images import SUFFIXES

BATCH_ROWS = 16_384
TABLES = (*DELIMITED[:2], *JSON_LINES, ".json")


def walk_images(folder: Path, below: str = "") -> Iterator[tuple[str, bool]]:
    """Yield the images at any depth, sorted, without hidden ones, and whether each has a text file."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    texts = {entry.name.removesuffix(".txt") for entry in entries if entry.name.endswith(".txt")}
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from walk_images(folder / entry.name, f"{below}{entry.name}/")
            continue
        stem, suffix = os.path.splitext(entry.name)
        if suffix.lower() in SUFFIXES:
            yield below + entry.name, stem in texts


class FolderPairs(ColumnPairs):
    """Images at any depth of a folder, each with a ``.txt`` of the same name beside it that holds a caption per line.

    Opening a folder only reads file names; a text is read with its image.

    Args:
        folder: to search.
        option_prefix: see :class:`SourceOptions`.

    Raises:
        InputError: no image in it has a text file.
    """

    def __init__(self, folder: Path, option_prefix: str = "") -> None:
        super().__init__(folder, folder)
        without, chunks, names = 0, [], []
        for name, has_text in walk_images(folder):
            without += not has_text
            if has_text:
                names.append(name)
            if len(names) == BATCH_ROWS:
                chunks.append(pa.array(names, pa.string()))
                names = []
        self._names = pa.chunked_array([*chunks, pa.array(names, pa.string())])
        if not len(self._names):
            problem = f"its {without} images have no .txt beside them" if without else "no images in it"
            tables = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in TABLES)
            hint = f"give the table itself ({', '.join(tables[:3])})" if tables else "a.jpg needs its caption in a.txt"
            if without and not tables and any(entry.is_dir() for entry in folder.iterdir()):
                hint += f", or set {option_prefix}templates (such as imagenet) if each subfolder is a class"
            raise InputError(f"{folder}: {problem}; {hint}")
        if without:
            rank_zero_info(f"{folder}: left out {without} images without a .txt beside them")
            self._left_out.counts[NO_CAPTION] += without

    def __len__(self) -> int:
        return len(self._names)

    def image_paths(self) -> pa.ChunkedArray | None:
        return self._names

    def cells(self, index: int) -> Cells:
        name = self._names[index].as_py()
        file = (self.root / name).with_suffix(".txt")
        where = f"{self.path}: {name}"
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            detail = f"{file.name} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
            raise BadSample(where, "not UTF-8", detail) from error
        except OSError as error:
            raise BadSample(where, NO_CAPTION, f"cannot read {file.name} ({error.strerror})") from error
        return Cells(name, [line.strip() for line in lines], "", where, "")
