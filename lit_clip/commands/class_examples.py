"""True classes of images for ``lit-clip classify``: one or several each, from class folders or a table."""

import csv
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import torch
from torch import Tensor

from lit_clip.embedding.image_files import FileRows, ImageFile, image_file, images_in
from lit_clip.errors import InputError, listed, require
from lit_clip.evaluation.thresholds import check_names
from lit_clip.tools.hashing import sha256_of_file
from lit_clip.tools.images import OnError
from lit_clip.tools.reading import from_cell, read_text, reading

TABLES = {".csv": ",", ".tsv": "\t"}
SEPARATOR = ";"  # of an image's classes in a table
CLASSES = "classes"  # the column of an image's classes in a table
TOO_MANY = f"more cells than the head has names; put {SEPARATOR} between an image's classes, in one cell"
MOST = 2**26  # relevance of examples


class ExampleFiles(NamedTuple):
    """Images and classes: int64 ``[N]``, -1 for none; with several classes, relevance int8 ``[N, C]``.

    ``place`` is the folder that the examples are in.
    """

    files: FileRows
    labels: Tensor
    names: list[str]
    place: Path


def read_examples(
    path: str, names: Sequence[str] | None, on_error: OnError, column: str = CLASSES, option: str = "--examples"
) -> ExampleFiles:
    """Read images from class folders, or from a table with the columns ``image`` and ``classes``.

    Without ``names`` the classes are the folder's subfolders, or those of the table in their order. As soon as an
    image of a table has two classes, images may have several; otherwise one without a class shows none of them.
    Another ``column`` is that of a group of classes, of which an image has one.
    """
    where = f"{option} {path}".strip()
    if Path(path).suffix.lower() in TABLES:
        found = _table(Path(path), names, column, option, where)
    else:
        require(column == CLASSES, f"{where}: groups need a .csv or .tsv table with a column for each")
        found = _folder(path, names, on_error)
    check_names(found.names, where)
    _check_copies(found, path)
    return found


def _check_copies(examples: ExampleFiles, path: str) -> None:
    sizes = Counter(file.size for file in examples.files)
    seen: dict[str, tuple[ImageFile, list[int]]] = {}
    for file, label in zip(examples.files, examples.labels.reshape(len(examples.files), -1).tolist(), strict=True):
        if sizes[file.size] > 1 and os.path.isfile(file.path) and os.access(file.path, os.R_OK):
            other, others = seen.setdefault(sha256_of_file(file.path), (file, label))
            if label != others:
                raise InputError(
                    f"--examples {path}: {other.key} and {file.key} are the same image with different classes; keep "
                    "the right one, or in a table one line with all its classes"
                )


def _folder(path: str, names: Sequence[str] | None, on_error: OnError) -> ExampleFiles:
    require(not os.path.isfile(path), f"--examples {path}: must be a folder of class folders, or a .csv or .tsv table")
    files = images_in(Path(path), on_error)
    inside = FileRows(image_file(f"{path}/{each.key}", each.path) for each in files if "/" in each.key)
    found = list(names or folder_names([path], inside))
    labels = folder_truth(files, found, [Path()])
    require(any(label >= 0 for label in labels), f"--examples {path}: no folder there is named like a class")
    return ExampleFiles(FileRows(files), torch.tensor(labels), found, Path(path))


def _table(path: Path, names: Sequence[str] | None, column: str, option: str, where: str) -> ExampleFiles:
    text = io.StringIO(read_text(path, option))
    with reading(path, "table", option):
        reader = csv.DictReader(text, delimiter=TABLES[path.suffix.lower()])
        found = reader.fieldnames or []
        rows = [(reader.line_num, row) for row in reader]
    lacking = [name for name in ("image", column) if name not in found]
    require(not lacking, f"{where}: has no column {' and '.join(lacking)}; there are {listed(found) or 'none'}")
    require(len(set(found)) == len(found), f"{where}: two columns have the same name")
    images = [from_cell(row["image"] or "") for _, row in rows]
    words_of = [from_cell(row[column] or "").split(SEPARATOR) for _, row in rows]
    split = [[word.strip() for word in words if word.strip()] for words in words_of]
    names = list(names or {word.casefold(): word for words in reversed(split) for word in reversed(words)}.values())
    places = {name.casefold(): place for place, name in enumerate(names)}
    files, relevant = dict[str, Path](), list[list[int]]()
    for (number, row), image, words in zip(rows, images, split, strict=True):
        require(not any(row.get(None) or ()), f"{where}: line {number}: {TOO_MANY}")
        unknown = [word for word in words if word.casefold() not in places]
        require(not unknown, f"{where}: line {number}: {listed(unknown)} is not among --classes")
        one = column == CLASSES or len(words) <= 1
        require(one, f"{where}: line {number}: {column}: {listed(words)}; name one, as an image has one of a group")
        require(bool(image), f"{where}: line {number}: names no image")
        image = os.path.normpath(image)
        again = f"{image} is there twice; write one line with all its classes"
        require(image not in files, f"{where}: line {number}: {again}")
        files[image] = path.parent / image
        relevant.append([places[word.casefold()] for word in words])
    require(bool(files), f"{where}: the table is empty")
    most = f"{where}: {len(files):,} images of {len(names):,} classes are too many; give fewer"
    require(len(files) * len(names) <= MOST, most)
    if all(len(set(classes)) <= 1 for classes in relevant):
        labels = torch.tensor([classes[0] if classes else -1 for classes in relevant])
        require(bool((labels >= 0).any()), f"{where}: no image has a class")
    else:
        labels = torch.zeros(len(files), len(names), dtype=torch.int8)
        for number, classes in enumerate(relevant):
            labels[number, classes] = 1
    return ExampleFiles(FileRows(image_file(*each) for each in files.items()), labels, names, path.parent)


def folder_names(paths: Sequence[str], files: Sequence[ImageFile]) -> list[str]:
    """Return the names of a folder's subfolders as class names, with spaces for underscores."""
    root = Path(paths[0])
    one = len(paths) == 1 and root.is_dir()
    inside = [PurePath(file.path).relative_to(root).parts for file in files] if one else []
    if not inside or any(len(parts) < 2 for parts in inside):
        raise InputError(
            f"--classes: not given, and {' '.join(paths[:2])} is no folder with a subfolder of images for each class; "
            "name the classes"
        )
    names = list(dict.fromkeys(parts[0].replace("_", " ") for parts in inside))
    require(len(names) > 1, f"--classes: not given, and {root} has one subfolder, {names[0]}; name the classes' folder")
    return names


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


def folder_truth(files: Sequence[ImageFile], names: Sequence[str], folders: Sequence[PurePath] = ()) -> list[int]:
    """Return the class of each image: the innermost folder named after a class; -1 if there is none.

    Counted are the folders below the one of ``folders`` that the image is in, and that one itself; of an image in none
    of them its own folder. Letters may be small or capital, and underscores and hyphens stand for spaces.
    """
    places = {_plain(name): place for place, name in reversed(list(enumerate(names)))}
    places |= {name: place for place, name in enumerate(names)}
    above = sorted(folders, key=lambda folder: -len(folder.parts))

    def place(path: PurePath) -> int:
        root = next((folder for folder in above if path.is_relative_to(folder)), path.parent)
        inside = (root.name, *path.relative_to(root).parts[:-1])
        known = (places.get(name, places.get(_plain(name), -1)) for name in reversed(inside))
        return next((each for each in known if each >= 0), -1)

    return [place(PurePath(file.key)) for file in files]
