"""A user's tables: images with labels, or images with the places where they were taken (IM2GPS)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import MissingData, Truth, numbered
from lit_clip.evaluation.zero_shot import imagenet_class_names
from lit_clip.tools.reading import check_is_file, reading
from ..loading.bad_samples import BLANK, is_unicode
from ..pairs.column_names import IMAGE_COLUMNS, ColumnNames, find_column, is_encoded, refuse_equal
from ..pairs.text_table import RawRow, raw_rows, shown
from .annotation_files import number, read_table, whole_number
from .image_files import ImageFiles, UnlabelledFiles
from .own_classes import ClassNames

LABEL_COLUMNS = ("label", "labels", "class", "target", "class_id", "class_name", "category")


Rows = Sequence[tuple[int, str, Any]]  # number in the file, path of the image, label as written


def read_labels(path: Path, image_column: str | None = None, label_column: str | None = None) -> Rows:
    """Read a table of images and labels.

    ``path`` is ``.parquet``; ``.jsonl``, ``.ndjson`` or ``.json`` with one object per line; or a delimited file with a
    header, whose delimiter is detected (UTF-8, or UTF-16 with a byte order mark). A text file's first line is row 1, a
    parquet file's first row is row 0. Columns that are None are the first with a usual name.
    """
    check_is_file(path)
    if not path.is_file():
        raise MissingData(f"{path}: no such table")

    def find(found: list[str]) -> ColumnNames:
        image = find_column(path, found, image_column, IMAGE_COLUMNS, "image_column")
        return ColumnNames(image, find_column(path, found, label_column, LABEL_COLUMNS, "label_column"))

    source = _parquet_rows(path, find) if path.suffix.lower() == ".parquet" else raw_rows(path, find)
    rows = [_validated(path, row) for row in source]
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def _parquet_rows(path: Path, find: Any) -> list[RawRow]:
    import pyarrow.parquet as pq

    with reading(path, "parquet file"):
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    columns = find(schema.names)
    refuse_equal(path, schema.names, columns.names())
    kind = schema.field(columns.image).type
    if is_encoded(kind):
        problem = f"column {columns.image!r} holds {kind}, not paths"
        raise InputError(f"{path}: {problem}; use datamodules.ParquetClasses for images stored in the table")
    with reading(path, "parquet file"):
        table = file.read(columns=[columns.image, columns.caption])
        images, labels = (table[name].to_pylist() for name in (columns.image, columns.caption))
    return [RawRow(number, *row) for number, row in enumerate(zip(images, labels, strict=True))]


def _validated(path: Path, row: RawRow) -> tuple[int, str, Any]:
    where = f"{path} row {row.number}"
    if not isinstance(row.image, str) or row.image.strip().lower() in BLANK:
        raise InputError(f"{where}: no image ({shown(row.image)}); name its file or remove the row")
    require(is_unicode(row.image), f"{where}: its image is not UTF-8 text; save it as UTF-8")
    label = row.caption.strip() if isinstance(row.caption, str) else row.caption
    require(not isinstance(label, str) or is_unicode(label), f"{where}: its label is not UTF-8 text; save it as UTF-8")
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise InputError(f"{where}: its label is {shown(label)}, which must be a whole number or a class name")
    return row.number, row.image.strip(), label


def resolve_labels(path: Path, rows: Rows, class_names: list[str] | None) -> tuple[list[int], list[str]]:
    """Turn the labels of :func:`read_labels` into label numbers and class names.

    The column is read as names or as numbers, never as a mixture. Without ``class_names``, classes are the numbers, or
    the sorted names that occur.
    """
    numbers = [_number(label) for _, _, label in rows]
    if class_names is None:
        if all(number is not None for number in numbers):
            class_names = numbered([number or 0 for number in numbers], str(path))
        else:
            class_names = sorted({str(label) for _, _, label in rows})
    label_of = {name: label for label, name in enumerate(class_names)}
    named = [label_of.get(label) if isinstance(label, str) else None for _, _, label in rows]
    as_names = len(label_of) == len(class_names) and None not in named
    as_numbers = all(number is not None and 0 <= number < len(class_names) for number in numbers)
    if as_names and as_numbers and named != numbers:
        row, _, label = next(row for row, a, b in zip(rows, named, numbers, strict=True) if a != b)
        both = f"label {label!r} is the name of one class and the number of another"
        raise InputError(f"{path} row {row}: {both}; give the classes other names, or write names into the table")
    if not as_names and not as_numbers:
        # Most cells say whether the column is read as names or as numbers.
        as_numbers = sum(number is not None for number in numbers) > sum(label is not None for label in named)
        known = [number if number in range(len(class_names)) else None for number in numbers] if as_numbers else named
        unknown = next((row for row, label in zip(rows, known, strict=True) if label is None), rows[0])
        twice = "" if len(label_of) == len(class_names) else ", some of which have the same name"
        some = f"{', '.join(class_names[:3])}{', ...' if len(class_names) > 3 else ''}{twice}"
        problem = f"label {shown(unknown[2])} is none of the {len(class_names)} classes ({some})"
        raise InputError(f"{path} row {unknown[0]}: {problem}; fix it or class_names")
    return [label for label in (named if as_names else numbers) if label is not None], class_names


def _number(label: Any) -> int | None:
    if isinstance(label, str):
        number = whole_number(label.removeprefix("-"))
        return -number if number and label.startswith("-") else number
    return label


class LabelledTable(ImageFiles):
    """Images from a table with a column of paths and a column of labels, in row order.

    Args:
        path: ``.csv``, ``.tsv``, ``.txt``, ``.jsonl``, ``.ndjson``, ``.json`` (one object per line) or ``.parquet``.
        class_names: in label order; ``imagenet``: the paper's 1,000; None: the numbers in the table, or its names,
            sorted. Set them if some class may not occur in the table.
        image_column: paths of images; None: the first of ``image``, ``image_path``, ``filepath``, ...
        label_column: whole numbers from 0, or class names; None: the first of ``label``, ``class``, ...
        root: folder that image paths are relative to; None: the table's.
    """

    def __init__(
        self,
        path: str,
        class_names: ClassNames | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        root: str | None = None,
    ) -> None:
        self.path = Path(path)
        rows = read_labels(self.path, image_column, label_column)
        names = imagenet_class_names() if class_names == "imagenet" else class_names
        if names is not None and not names:
            raise InputError(f"class_names: must not be empty; leave it out to use the classes of {path}")
        labels, classes = resolve_labels(self.path, rows, None if names is None else list(names))
        self._numbers = [number for number, _, _ in rows]
        folder = Path(root).expanduser() if root else self.path.parent
        super().__init__(folder, [image for _, image, _ in rows], labels, classes, [self.path])
        if not os.path.isfile(self.files[0]):  # unlike the method, false for a name that is too long
            raise InputError(f"{self.where(0)}: no such image file: {self.files[0]}; set root to their folder")

    def where(self, index: int) -> str:
        return f"{self.path} row {self._numbers[index]}"


def LocatedImages(path: str, root: str | None = None) -> UnlabelledFiles:
    """A table of images and where they were taken: IM2GPS, or the reference images for it.

    Args:
        path: a CSV file with columns ``image`` (or ``img_id``), ``latitude`` (``lat``) and ``longitude`` (``lon``,
            ``lng``), as github.com/TIBHannover/GeoEstimation has them.
        root: folder that image paths are relative to; None: the table's.
    """
    columns = {
        "image": ("image", "img_id", "filename", "file", "path"),
        "latitude": ("latitude", "lat"),
        "longitude": ("longitude", "lon", "lng"),
    }
    rows = read_table(Path(path), columns)
    places: list[tuple[float, float]] = []
    for row in rows:
        where = f"{path}: {row['image']}"
        latitude, longitude = number(row, "latitude", where), number(row, "longitude", where)
        on_earth = abs(latitude) <= 90 and abs(longitude) <= 180
        require(on_earth, f"{where}: {latitude}, {longitude} is not a latitude and a longitude in degrees")
        places.append((latitude, longitude))
    folder = Path(path).parent if root is None else Path(root)
    images = UnlabelledFiles(folder, [row["image"] for row in rows], [Path(path)])
    images.truth = Truth(coordinates=torch.tensor(places, dtype=torch.float64))
    return images
