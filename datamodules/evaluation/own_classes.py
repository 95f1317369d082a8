"""A user's own images: class folders, parquet files, tables of labels, and tables of places (IM2GPS)."""

import io
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from lit_clip.errors import InputError, listed, require
from lit_clip.evaluation.data import MissingData, Truth, numbered
from lit_clip.evaluation.zero_shot import imagenet_class_names
from lit_clip.tools.hashing import stamp_of_files
from lit_clip.tools.images import SUFFIXES, image_for_model
from lit_clip.tools.reading import check_is_file, reading
from ..loading.bad_samples import BLANK, is_unicode
from ..pairs.column_names import IMAGE_COLUMNS, ColumnNames, find_column, is_encoded, refuse_equal
from ..pairs.folder import walk_images
from ..pairs.stored import RowRange
from ..pairs.text_table import RawRow, raw_rows, shown
from .annotation_files import number, read_table, whole_number
from .image_files import ImageFiles, KnownLabels, UnlabelledFiles

ClassNames = list[str] | Literal["imagenet"]
NAMED = "train|training|val|valid|validation|dev|test|testing"
SPLIT = re.compile(rf"(.+?)-\d{{5}}-of-\d{{5}}|({NAMED})([-_].*)?", re.IGNORECASE)
SEPARATE = "separate the sets, or convert them again"
LABEL_COLUMNS = ("label", "labels", "class", "target", "class_id", "class_name", "category")
Rows = Sequence[tuple[int, str, Any]]  # number in the file, path of the image, label as written


def resolve_names(names: ClassNames | None, default: list[str], where: str) -> list[str]:
    """Return the class names that a user gave, or ``default``."""
    if names is None:
        return default
    names = imagenet_class_names() if names == "imagenet" else list(names)
    if len(names) != len(default):
        classes = f"{len(default)} classes of {where} ({', '.join(default[:3])}, ...)"
        raise InputError(f"class_names: {len(names)} names for the {classes}; labels would get the wrong names")
    return names


class ImageFolderClasses(ImageFiles):
    """A folder with one subfolder of images for each class; labels follow the subfolders' sorted names.

    Args:
        root: the folder.
        class_names: names in that order; ``imagenet``: the paper's 1,000; None: the subfolders' names with
            underscores as spaces.
    """

    def __init__(self, root: str, class_names: ClassNames | None = None) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise MissingData(f"{root}: no such folder of classes")
        with reading(folder, "folder"):
            classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        require(bool(classes), f"{root}: no subfolders; put each class's images into a subfolder of its own")
        names = resolve_names(class_names, [name.replace("_", " ") for name in classes], str(root))
        images: list[tuple[Path, str]] = []
        for name in classes:
            require(is_unicode(name), f"{folder / name}: the name of this class is not UTF-8 text; rename the folder")
            files = sorted(folder / name / image for image, _ in walk_images(folder / name))
            require(bool(files), f"{folder / name}: no images of this class ({', '.join(sorted(SUFFIXES))})")
            images += [(file, name) for file in files]
        super().__init__(folder, images, classes, names=names)

    def where(self, index: int) -> str:
        return f"class folder {self.files[index].parent.name}"


class StoredImages:
    """Read encoded images from row groups of parquet files, in order; the last row group stays in memory."""

    _group: tuple[object, Any] = (None, None)

    def stored(self, file: Path, group: int, row: int, column: str, where: str) -> Image.Image:
        """Decode the image in a row of a row group; ``where`` names it in messages."""
        if self._group[0] != (file, group):
            with reading(file, "parquet file"):
                self._group = (file, group), pq.ParquetFile(file).read_row_group(group, columns=[column])[column]
        value = self._group[1][row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise InputError(f"{where}: column {column!r} holds no encoded image")
        return image_for_model(io.BytesIO(data), where)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": (None, None)}  # each data worker loads its own row groups


class ParquetClasses(StoredImages, KnownLabels):
    """Parquet files with encoded images and labels, as Hugging Face stores ImageNet.

    Args:
        path: a file, or a folder of ``.parquet`` files (read in the order of their names), such as
            ``train-00000-of-00002.parquet``.
        class_names: names in label order, or ``imagenet``; None: the names that ``datasets`` has written into the
            files, or the numbers.
        image_column: bytes, or a struct with a field ``bytes``.
        label_column: integers from 0.
        split: of the folder's files, by the beginning of their names; needed if there are several.
    """

    def __init__(
        self,
        path: str,
        class_names: ClassNames | None = None,
        image_column: str = "image",
        label_column: str = "label",
        split: str | None = None,
    ) -> None:
        files = sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else [Path(path)]
        for file in files:
            check_is_file(file)
        if not files or not all(file.is_file() for file in files):
            raise MissingData(f"{path}: no such parquet file, and no folder with parquet files")
        self.paths = _files_of_split(path, files, split)
        self.image_column = image_column
        self._labels: list[int] = []
        self._groups: list[RowRange] = []
        self._starts: list[int] = []  # first row of each group, counted over all files
        stored = [self._read(file, label_column) for file in self.paths]
        for file, names in zip(self.paths, stored, strict=True):
            if names != stored[0]:
                raise InputError(f"{file}: its class names are not those of {self.paths[0].name}; {SEPARATE}")
        require(bool(self._labels), f"{path}: no rows")
        if stored[0] is not None and max(self._labels) >= len(stored[0]):
            raise InputError(f"{path}: label {max(self._labels)}, but {len(stored[0])} class names in its metadata")
        self.class_names = resolve_names(class_names, stored[0] or numbered(self._labels, path), path)

    def _read(self, file: Path, label_column: str) -> list[str] | None:
        """Record the labels and row groups of a file, and return its class names."""
        with reading(file, "parquet file"):
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
        for option, column in (("image_column", self.image_column), ("label_column", label_column)):
            refuse_equal(file, schema.names, [find_column(file, schema.names, column, (), option)])
        kind = schema.field(label_column).type
        require(pa.types.is_integer(kind), f"{file}: column {label_column!r} holds {kind}, not labels from 0")
        first = 0
        for group in range(parquet.num_row_groups):
            with reading(file, "parquet file"):
                labels = parquet.read_row_group(group, columns=[label_column])[label_column].to_pylist()
            wrong = next((row for row, label in enumerate(labels) if label is None or label < 0), None)
            if wrong is not None:
                problem = f"its label is {labels[wrong]}; only labelled images can be scored"
                raise InputError(f"{file} row {first + wrong}: {problem}")
            self._groups.append(RowRange(file, group, first, len(labels)))
            self._starts.append(len(self._labels))
            self._labels += labels
            first += len(labels)
        return _stored_names(file, schema, label_column)

    def image(self, index: int) -> Image.Image:
        group, row = self._place(index)
        where = f"{group.file} row {group.first + row}"
        return self.stored(group.file, group.group, row, self.image_column, where)

    def _place(self, index: int) -> tuple[RowRange, int]:
        """Return a row's group, and the row's place in it."""
        number = bisect_right(self._starts, index) - 1
        return self._groups[number], index - self._starts[number]

    def image_paths(self) -> list[Path]:
        return self.paths

    def key(self, index: int) -> str:
        group, row = self._place(index)
        return f"{group.file.name}:{group.first + row}"

    def stamp(self) -> str:
        return f"{stamp_of_files(self.paths)}-{self.image_column}"


def _files_of_split(path: str, files: Sequence[Path], split: str | None) -> list[Path]:
    """Return the files of one split, by names such as ``train-00000-of-00002`` or ``val.parquet``."""
    matches = [SPLIT.fullmatch(file.stem) for file in files]
    splits = [match and (match[1] or match[2]) for match in matches]
    found = listed([name or "other files" for name in dict.fromkeys(splits)])
    if split is None:
        require(len(set(splits)) == 1, f"{path}: has files of several splits ({found}); set split to one of them")
        return list(files)
    if split not in splits:
        raise MissingData(f"{path}: no files of split {split!r}; there are {found}")
    return [file for file, name in zip(files, splits, strict=True) if name == split]


def _stored_names(file: Path, schema: Any, label_column: str) -> list[str] | None:
    """Read the label's class names from the metadata of Hugging Face's ``datasets``; None if absent."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return None
    with reading(file, "parquet file with datasets' metadata", hint="convert it again"):
        feature = json.loads(stored).get("info", {}).get("features", {}).get(label_column, {})
        names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("class names that are not text")
    return names


def _read_labels(path: Path, image_column: str | None, label_column: str | None) -> Rows:
    check_is_file(path)
    if not path.is_file():
        raise MissingData(f"{path}: no such table")

    def find(found: list[str]) -> ColumnNames:
        image = find_column(path, found, image_column, IMAGE_COLUMNS, "image_column")
        return ColumnNames([image], [find_column(path, found, label_column, LABEL_COLUMNS, "label_column")])

    source = _parquet_rows(path, find) if path.suffix.lower() == ".parquet" else raw_rows(path, find)
    rows = [_validated(path, row) for row in source]
    require(bool(rows), f"{path}: no rows")
    return rows


def _parquet_rows(path: Path, find: Callable[[list[str]], ColumnNames]) -> list[RawRow]:
    with reading(path, "parquet file"):
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    columns = find(schema.names)
    refuse_equal(path, schema.names, columns.names())
    image, label = columns.images[0], columns.captions[0]
    kind = schema.field(image).type
    if is_encoded(kind):
        problem = f"column {image!r} holds {kind}, not paths"
        raise InputError(f"{path}: {problem}; use datamodules.ParquetClasses for images stored in the table")
    with reading(path, "parquet file"):
        table = file.read(columns=[image, label])
        images, labels = (table[name].to_pylist() for name in (image, label))
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


def _resolve_labels(path: Path, rows: Rows, class_names: list[str] | None) -> tuple[list[int], list[str]]:
    """Return label numbers and class names; the column is read as names or as numbers, never as a mixture."""
    numbers = [_number(label) for _, _, label in rows]
    if class_names is None:
        numeric = [number for number in numbers if number is not None]
        names = {str(label) for _, _, label in rows}
        class_names = numbered(numeric, str(path)) if len(numeric) == len(rows) else sorted(names)
    label_of = {name: label for label, name in enumerate(class_names)}
    twice = len(label_of) < len(class_names)
    as_names = [label_of.get(label) if isinstance(label, str) and not twice else None for _, _, label in rows]
    as_numbers = [number if number in range(len(class_names)) else None for number in numbers]
    known = [[label for label in each if label is not None] for each in (as_names, as_numbers)]
    found = [labels for labels in known if len(labels) == len(rows)]
    if not found:
        meant = as_numbers if len(known[1]) > len(known[0]) else as_names  # as most cells are
        row, _, label = rows[meant.index(None)]
        some = f"{', '.join(class_names[:3])}{', ...' if len(class_names) > 3 else ''}"
        some += ", some of which have the same name" if twice else ""
        problem = f"label {shown(label)} is none of the {len(class_names)} classes ({some})"
        raise InputError(f"{path} row {row}: {problem}; fix it or class_names")
    if found[0] != found[-1]:
        row, _, label = next(row for row, a, b in zip(rows, *found, strict=True) if a != b)
        both = f"label {label!r} is the name of one class and the number of another"
        raise InputError(f"{path} row {row}: {both}; give the classes other names, or write names into the table")
    return found[0], class_names


def _number(label: str | int) -> int | None:
    if isinstance(label, int):
        return label
    number = whole_number(label.removeprefix("-"))
    return -number if number and label.startswith("-") else number


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
        rows = _read_labels(self.path, image_column, label_column)
        names = imagenet_class_names() if class_names == "imagenet" else class_names
        require(names is None or bool(names), f"class_names: must not be empty; leave it out to use those of {path}")
        labels, classes = _resolve_labels(self.path, rows, None if names is None else list(names))
        self._numbers = [number for number, _, _ in rows]
        folder = Path(root).expanduser() if root else self.path.parent
        if not os.path.isfile(folder / rows[0][1]):  # unlike the method, false for a name that is too long
            raise InputError(f"{self.where(0)}: no such image file: {folder / rows[0][1]}; set root to their folder")
        images = [(image, label) for (_, image, _), label in zip(rows, labels, strict=True)]
        super().__init__(folder, images, range(len(classes)), [self.path], classes)

    def where(self, index: int) -> str:
        return f"{self.path} row {self._numbers[index]}"


def LocatedImages(path: str, root: str | None = None) -> UnlabelledFiles:
    """A table of images and where they were taken: IM2GPS, or the reference images for it.

    Args:
        path: a CSV file with columns ``image`` (or ``img_id``), ``latitude`` (``lat``) and ``longitude`` (``lon``,
            ``lng``), as github.com/TIBHannover/GeoEstimation has them.
        root: folder that image paths are relative to; None: the table's.
    """
    columns = {"latitude": ("latitude", "lat"), "longitude": ("longitude", "lon", "lng")}
    rows = read_table(Path(path), {"image": ("image", "img_id", "filename", "file", "path"), **columns})
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
