"""A user's own classes: a folder with a subfolder of images for each, or parquet files of images and labels."""

import io
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lit_clip.errors import InputError, listed, require
from lit_clip.evaluation.data import MissingData, numbered
from lit_clip.evaluation.zero_shot import imagenet_class_names
from lit_clip.tools.hashing import stamp_of_files
from lit_clip.tools.images import SUFFIXES, image_for_model
from lit_clip.tools.reading import check_is_file, reading
from ..loading.bad_samples import is_unicode
from ..pairs.column_names import refuse_equal
from ..pairs.folder import walk_images
from ..pairs.stored import RowRange
from .image_files import ImageFiles, KnownLabels

ClassNames = list[str] | Literal["imagenet"]
NAMED = "train|training|val|valid|validation|dev|test|testing"
SPLIT = re.compile(rf"(.+?)-\d{{5}}-of-\d{{5}}|({NAMED})([-_].*)?", re.IGNORECASE)
SEPARATE = "separate the sets, or convert them again"


def resolve_names(names: ClassNames | None, default: list[str], where: str) -> list[str]:
    """Return the class names that a user gave, or ``default``."""
    if names is None:
        return default
    names = imagenet_class_names() if names == "imagenet" else list(names)
    if len(names) != len(default):
        raise InputError(
            f"class_names: {len(names)} names for the {len(default)} classes of {where} "
            f"({', '.join(default[:3])}, ...); labels would get the wrong names"
        )
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
        for name in classes:
            require(is_unicode(name), f"{folder / name}: the name of this class is not UTF-8 text; rename the folder")
        if not classes:
            raise InputError(f"{root}: no subfolders; put each class's images into a subfolder of its own")
        names = resolve_names(class_names, [name.replace("_", " ") for name in classes], str(root))
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            images = sorted(folder / name / image for image, _ in walk_images(folder / name))
            if not images:
                raise InputError(f"{folder / name}: no images of this class ({', '.join(sorted(SUFFIXES))})")
            files += images
            labels += [label] * len(images)
        super().__init__(folder, files, labels, names)

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
        refuse_equal(file, schema.names, (self.image_column, label_column))
        for column in (self.image_column, label_column):
            if column not in schema.names:
                raise InputError(f"{file}: no column {column!r}; its columns are {listed(schema.names, 20)}")
        kind = schema.field(label_column).type
        require(pa.types.is_integer(kind), f"{file}: column {label_column!r} holds {kind}, not labels from 0")
        first = 0
        for group in range(parquet.num_row_groups):
            with reading(file, "parquet file"):
                labels = parquet.read_row_group(group, columns=[label_column])[label_column].to_pylist()
            for row, label in enumerate(labels, start=first):
                if label is None or label < 0:
                    raise InputError(f"{file} row {row}: its label is {label}; only labelled images can be scored")
            self._groups.append(RowRange(file, group, first, len(labels)))
            self._starts.append(len(self._labels))
            self._labels += labels
            first += len(labels)
        return _stored_names(file, schema, label_column)

    def image(self, index: int) -> Image.Image:
        number, row = self._place(index)
        group = self._groups[number]
        where = f"{group.file} row {group.first + row}"
        return self.stored(group.file, group.group, row, self.image_column, where)

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of a row's group, and the row's place in it."""
        number = bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def image_paths(self) -> list[Path]:
        return self.paths

    def key(self, index: int) -> str:
        number, row = self._place(index)
        return f"{self._groups[number].file.name}:{self._groups[number].first + row}"

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
    chosen = [file for file, name in zip(files, splits, strict=True) if name == split]
    if not chosen:
        raise MissingData(f"{path}: no files of split {split!r}; there are {found}")
    return chosen


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
