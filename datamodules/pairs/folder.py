"""A folder of images: with a text file beside each, or with a subfolder for each class (FLYP, Goyal et al. 2023)."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_info

from lit_clip.errors import BadSample, InputError, require
from lit_clip.tools.images import SUFFIXES, image_names
from lit_clip.tools.reading import reading
from ..loading.bad_samples import as_unicode, is_unicode
from .columns import TablePairs
from .source import DELIMITED, JSON_LINES, NO_CAPTION, Row, SkippedRows, SourceOptions

BATCH_ROWS = 16_384
LARGEST_TEXT = 1 << 20  # bytes
TABLES = (*DELIMITED[:2], *JSON_LINES, ".json", "captions.txt")


def walk_images(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield the images at any depth, sorted, without hidden ones, and whether each has a text file.

    Links to folders are followed, except to a folder that the link itself is in.
    """
    # A stack, the innermost folder last: folders may be nested more deeply than Python's calls.
    stack = [(_identity(folder), _listed(folder, ""))]
    outside = {_identity(parent) for parent in folder.resolve().parents}
    while stack:
        name, is_folder, has_text = next(stack[-1][1], ("", False, False))
        if not name:
            stack.pop()
        elif not is_folder:
            yield name, has_text
        elif (identity := _identity(folder / name)) not in outside and identity not in [above for above, _ in stack]:
            stack.append((identity, _listed(folder / name, f"{name}/")))


def _listed(folder: Path, below: str) -> Iterator[tuple[str, bool, bool]]:
    """Yield each subfolder and image of a folder: name, whether it is a folder, and whether it has a text file."""
    with reading(folder, "folder"):
        entries = sorted((each for each in os.scandir(folder) if each.name[0] != "."), key=lambda entry: entry.name)
    images = set(image_names(entry.name for entry in entries))
    texts = {entry.name.removesuffix(".txt") for entry in entries if entry.name.endswith(".txt")}
    for entry in entries:
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link to nothing that could be read
            is_folder = False
        if is_folder or entry.name in images:
            yield below + entry.name, is_folder, os.path.splitext(entry.name)[0] in texts


def _identity(folder: Path) -> tuple[int, int]:
    """Return an identity that a folder and links to it share."""
    with reading(folder, "folder"):
        status = folder.stat()
    return status.st_dev, status.st_ino


class FolderPairs(TablePairs):
    """Images at any depth of a folder; a ``.txt`` file of the same name has one caption per line.

    Opening a folder only reads file names; a text is read with its image.
    """

    def __init__(self, folder: Path, option_prefix: str = "") -> None:
        without, chunks, names, left_out = 0, [], [], SkippedRows()
        for name, has_text in walk_images(folder):
            without += not has_text
            if has_text and not is_unicode(name):
                left_out.add(f"{folder}: {as_unicode(name)}", "its name is not UTF-8")
            elif has_text:
                names.append(name)
            if len(names) == BATCH_ROWS:
                chunks.append(pa.array(names, pa.string()))
                names = []
        table = pa.table({"image": pa.chunked_array([*chunks, pa.array(names, pa.string())])})
        if not len(table):
            problem = f"its {without} images have no .txt beside them" if without else "no images in it"
            if left_out.counts:
                problem = f"no image that can be used ({left_out})"
            tables = sorted(entry.name for entry in folder.iterdir() if entry.name.lower().endswith(TABLES))
            hint = f"give the table itself ({', '.join(tables[:3])})" if tables else "a.jpg needs its caption in a.txt"
            if without and not tables and any(entry.is_dir() for entry in folder.iterdir()):
                hint += f", or set {option_prefix}classes.templates (such as imagenet) if each subfolder is a class"
            raise InputError(f"{folder}: {problem}; {hint}")
        if without:
            rank_zero_info(f"{folder}: left out {without} images without a .txt beside them")
            left_out.counts[NO_CAPTION] += without
        super().__init__(table, folder, folder, left_out=left_out)

    def cells(self, index: int) -> Row:
        name = self._table["image"][index].as_py()
        file = (self.root / name).with_suffix(".txt")
        where = f"{self.path}: {name}"
        try:
            lines = _text_of(file).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            detail = f"{file.name} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
            raise BadSample(where, "not UTF-8", detail) from error
        except OSError as error:
            raise BadSample(where, NO_CAPTION, f"cannot read {file.name} ({error.strerror or error})") from error
        return Row(name, [line.strip() for line in lines], "", "", where)


def _text_of(file: Path) -> bytes:
    """Return the content of a text file; raise ``OSError`` if it is not a regular file, or too large for captions."""
    if not file.is_file() and file.exists():
        raise OSError("it is not a file")
    with file.open("rb") as stream:
        content = stream.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise OSError(f"it has more than {LARGEST_TEXT >> 20} MB")
    return content


def open_class_folders(folder: Path, options: SourceOptions) -> "ClassPairs":
    """Open a folder of classes; :func:`prompts_of` makes the templates and class names."""
    options.refuse_split(folder)
    options.refuse_columns(folder)
    with reading(folder, "folder"):
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    require(bool(classes), f"{folder}: no subfolders; put each class's images into a subfolder of its own")
    class_names: Any = options.classes.names  # lists are invariant
    from lit_clip.evaluation.prompts import prompts_of  # imported for such a folder alone

    prompts = prompts_of(class_names, options.classes.templates, [name.replace("_", " ") for name in classes])
    return ClassPairs(folder, classes, prompts.texts)


class ClassPairs(TablePairs):
    """Images in one subfolder per class; captions are the class's prompts, and the class is the pair's group."""

    def __init__(self, folder: Path, classes: list[str], prompts: list[list[str]]) -> None:
        self.classes, self.texts = classes, prompts
        names, left_out = [], SkippedRows()
        for name in classes:
            require(
                is_unicode(name), f"{folder}: the name of {as_unicode(name)}, its class, is not UTF-8 text; rename it"
            )
            below = []
            for image, _ in walk_images(folder / name):
                if is_unicode(image):
                    below.append(f"{name}/{image}")
                else:
                    left_out.add(f"{folder / name}: {as_unicode(image)}", "its name is not UTF-8")
            if not below:
                require(not left_out.counts, f"{folder / name}: no usable images of this class ({left_out})")
                raise InputError(f"{folder / name}: no images of this class ({', '.join(sorted(SUFFIXES))})")
            names.append(pa.array(below, pa.string()))
        self._stops = np.cumsum([len(below) for below in names])
        super().__init__(pa.table({"image": pa.chunked_array(names)}), folder, folder, left_out=left_out)

    def cells(self, index: int) -> Row:
        name, label = self._table["image"][index].as_py(), int(np.searchsorted(self._stops, index, side="right"))
        return Row(name, self.texts[label], "", self.classes[label], f"{self.path}: {name}")
