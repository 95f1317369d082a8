"""Labelled images: folders of classes, and parquet files as image hubs store them."""

import io
from bisect import bisect_right
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from lit_clip.errors import InputError
from lit_clip.evaluation.data import MissingData, numbered
from lit_clip.evaluation.zero_shot import LabelledImages, imagenet_class_names
from lit_clip.tools.hashing import hex_digest, stamp_of_files
from lit_clip.tools.images import SUFFIXES, check_images, open_image

ClassNames = list[str] | Literal["imagenet"]


def resolve_names(names: ClassNames | None, default: list[str], where: str) -> list[str]:
    """The names that a user gave, or ``default``.

    Raises:
        InputError: they are not as many as ``default``; ``where`` is named in it.
    """
    if names is None:
        return default
    names = imagenet_class_names() if names == "imagenet" else list(names)
    if len(names) != len(default):
        raise InputError(
            f"class_names: {len(names)} names for the {len(default)} classes of {where} "
            f"({', '.join(default[:3])}, ...); the labels would be read as other classes"
        )
    return names


def images_below(folder: Path) -> list[Path]:
    """All images in a folder and those below it, in the order of their paths."""
    return sorted(file for file in folder.rglob("*") if _is_image(file.relative_to(folder)))


def _is_image(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)  # editors and macOS leave hidden copies
    return path.suffix.lower() in SUFFIXES and not hidden


class LabelledFiles(LabelledImages):
    """Images that are files of their own, in the order of ``files``.

    Attributes:
        root: the folder below which they lie; keys are paths from there.
        files: each image and its label.
    """

    root: Path
    files: list[tuple[Path, int]]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        return open_image(path, self.where(index)), label

    def where(self, index: int) -> str:
        """How the user knows an image, for errors."""
        return f"class folder {self.files[index][0].parent.name}"

    def check(self) -> None:
        check_images([(file, self.where(index)) for index, (file, _) in enumerate(self.files)])

    def labels(self) -> list[int]:
        return [label for _, label in self.files]

    def key(self, index: int) -> str:
        path = self.files[index][0]
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()

    def stamp(self) -> str:
        # Of two sets of the same files in another order, or of which some are wanting, the features differ too.
        order = hex_digest(self.key(index) for index in range(len(self)))
        files = stamp_of_files(path for path, _ in self.files if path.is_file())
        return f"{order}-{files}"


class ImageFolderClasses(LabelledFiles):
    """A folder with one subfolder of images a class, in the order of the subfolders' names.

    Args:
        root: the folder.
        class_names: names in that order; ``imagenet``: the paper's 1,000; None: the subfolders' names with
            underscores as spaces.

    Raises:
        MissingData: no such folder.
        InputError: a class without images, or names that do not match the subfolders.
    """

    def __init__(self, root: str, class_names: ClassNames | None = None) -> None:
        self.root = folder = Path(root)
        if not folder.is_dir():
            raise MissingData(f"{root}: no such folder of classes")
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not classes:
            raise InputError(f"{root}: no subfolders; put each class's images into a folder of its own")
        default = [path.name.replace("_", " ") for path in classes]
        self.class_names = resolve_names(class_names, default, str(root))
        self.files = []
        for label, path in enumerate(classes):
            images = images_below(path)
            if not images:
                raise InputError(f"{path}: no images of this class ({', '.join(sorted(SUFFIXES))})")
            self.files += [(file, label) for file in images]


class ParquetClasses(LabelledImages):
    """Parquet files with encoded images and labels, as Hugging Face stores ImageNet.

    Args:
        path: a file, or a folder of ``.parquet`` files (read in the order of their names).
        class_names: names in label order, or ``imagenet``.
        image_column: bytes, or a struct with a field ``bytes``.
        label_column: integers from 0.

    Raises:
        MissingData: no such file.
        InputError: no such column, labels other than 0 to the number of names.
    """

    def __init__(
        self, path: str, class_names: ClassNames, image_column: str = "image", label_column: str = "label"
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.paths = sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else [Path(path)]
        if not self.paths or not all(file.is_file() for file in self.paths):
            raise MissingData(f"{path}: no such parquet file, nor a folder of them")
        self.image_column = image_column
        self._labels: list[int] = []
        self._groups: list[tuple[Path, int, int]] = []  # (file, row group, its first row in the file) in row order
        self._starts: list[int] = []  # the first row of each over all files
        self._loaded: tuple[int, Any] | None = None
        for file in self.paths:
            try:
                self._index(file, pq.ParquetFile(file), label_column)
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from error
        if not self._labels:
            raise InputError(f"{path}: no rows")
        self.class_names = resolve_names(class_names, numbered(self._labels, path), path)

    def _index(self, file: Path, parquet: Any, label_column: str) -> None:
        import pyarrow as pa

        schema = parquet.schema_arrow
        for column in (self.image_column, label_column):
            if column not in schema.names:
                raise InputError(f"{file}: no column {column!r}; its columns are {', '.join(schema.names)}")
        if not pa.types.is_integer(schema.field(label_column).type):
            raise InputError(
                f"{file}: column {label_column!r} holds {schema.field(label_column).type}, not labels from 0"
            )
        first = 0
        for group in range(parquet.num_row_groups):
            labels = parquet.read_row_group(group, columns=[label_column])[label_column].to_pylist()
            for row, label in enumerate(labels, start=first):
                if label is None or label < 0:
                    raise InputError(f"{file} row {row}: its label is {label}; only labelled images can be scored")
            self._groups.append((file, group, first))
            self._starts.append(len(self._labels))
            self._labels += labels
            first += len(labels)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        import pyarrow.parquet as pq

        group, file, row = self._place(index)
        number = self._groups[group][1]
        if self._loaded is None or self._loaded[0] != group:  # rows are read in order: keep the last group
            column = pq.ParquetFile(file).read_row_group(number, columns=[self.image_column])[self.image_column]
            self._loaded = (group, column)
        value = self._loaded[1][index - self._starts[group]].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        where = f"{file} row {row}"
        if not isinstance(data, bytes):
            raise InputError(f"{where}: column {self.image_column!r} holds no encoded image")
        return open_image(io.BytesIO(data), where), self._labels[index]

    def _place(self, index: int) -> tuple[int, Path, int]:
        """The number of the row group of a row, its file, and the row's number in that."""
        group = bisect_right(self._starts, index) - 1
        file, _, first = self._groups[group]
        return group, file, first + index - self._starts[group]

    def labels(self) -> list[int]:
        return self._labels

    def key(self, index: int) -> str:
        _, file, row = self._place(index)
        return f"{file.name}:{row}"

    def stamp(self) -> str:
        return f"{stamp_of_files(self.paths)}-{self.image_column}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}  # a data worker reads for itself
