"""Examples of ``lit-clip classify``: images of one class each, or of several, from class folders or a table."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_clip.commands.class_truth import folder_names, folder_truth
from lit_clip.embedding.image_files import FileRows, image_file, images_in
from lit_clip.errors import listed, require
from lit_clip.tools.images import OnError
from lit_clip.tools.reading import reading
from lit_clip.tools.text_files import from_cell, read_text

TABLES = {".csv": ",", ".tsv": "\t"}
SEPARATOR = ";"  # of an image's classes in a table
MOST = 2**26  # relevance of examples


class ExampleFiles(NamedTuple):
    """Images and their classes: int64 ``[N]``, -1 for an image of no class; or relevance, int8 ``[N, C]``, for several.

    ``place`` is the folder that the examples are in.
    """

    files: FileRows
    labels: Tensor
    names: list[str]
    place: Path


def read_examples(path: str, names: Sequence[str] | None, on_error: OnError) -> ExampleFiles:
    """Return the images of class folders, or of a table with the columns ``image`` and ``classes``.

    Without ``names`` the classes are the folder's subfolders, or those of the table in their order. As soon as an
    image of a table has two classes, images may have several; otherwise one without a class shows none of them.
    """
    if Path(path).suffix.lower() in TABLES:
        return _table(Path(path), names)
    files = images_in(Path(path), on_error)
    inside = FileRows(image_file(f"{path}/{each.key}", each.path) for each in files if "/" in each.key)
    found = list(names or folder_names([path], inside))
    labels = folder_truth(files, found, [Path()])
    require(any(label >= 0 for label in labels), f"--examples {path}: no folder there is named like a class")
    return ExampleFiles(FileRows(files), torch.tensor(labels), found, Path(path))


def _table(path: Path, names: Sequence[str] | None) -> ExampleFiles:
    text = io.StringIO(read_text(path, "--examples"))
    with reading(path, "table", "--examples"):
        reader = csv.DictReader(text, delimiter=TABLES[path.suffix.lower()])
        found = reader.fieldnames or []
        rows = [{name: from_cell(row[name] or "") for name in ("image", "classes") if name in row} for row in reader]
    lacking = [column for column in ("image", "classes") if column not in found]
    require(not lacking, f"--examples {path}: has no column {' and '.join(lacking)}; there are {listed(found)}")
    split = [[word.strip() for word in row["classes"].split(SEPARATOR) if word.strip()] for row in rows]
    names = list(names or {word.casefold(): word for words in reversed(split) for word in reversed(words)}.values())
    places = {name.casefold(): place for place, name in enumerate(names)}
    files, relevant = dict[str, Path](), list[list[int]]()
    for number, (row, words) in enumerate(zip(rows, split, strict=True), start=2):
        unknown = [word for word in words if word.casefold() not in places]
        require(not unknown, f"--examples {path}: line {number}: {listed(unknown)} is not among --classes")
        require(bool(row["image"]), f"--examples {path}: line {number}: names no image")
        require(row["image"] not in files, f"--examples {path}: line {number}: {row['image']} is there twice")
        files[row["image"]] = path.parent / row["image"]
        relevant.append([places[word.casefold()] for word in words])
    require(bool(files), f"--examples {path}: the table is empty")
    most = f"--examples {path}: {len(files):,} images of {len(names):,} classes are too many; give fewer"
    require(len(files) * len(names) <= MOST, most)
    if all(len(set(classes)) <= 1 for classes in relevant):
        labels = torch.tensor([classes[0] if classes else -1 for classes in relevant])
        require(bool((labels >= 0).any()), f"--examples {path}: no image has a class")
    else:
        labels = torch.zeros(len(files), len(names), dtype=torch.int8)
        for number, classes in enumerate(relevant):
            labels[number, classes] = 1
    return ExampleFiles(FileRows(image_file(*each) for each in files.items()), labels, names, path.parent)
