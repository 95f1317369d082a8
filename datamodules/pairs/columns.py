"""Pairs in Arrow columns: no Python object per row, and memory-mapped files stay outside the process's own memory."""

import io
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import pyarrow as pa
import torch

from lit_clip.errors import BadSample
from lit_clip.secrets import without_secrets
from lit_clip.tools.hashing import hash64
from lit_clip.tools.hub_client import is_relative
from lit_clip.tools.images import CHECKED, check_images
from lit_clip.tools.untrusted import shortened
from ..loading.bad_samples import BLANK, check_caption, is_blank
from ..loading.store import StoreFolder, is_remote, stamp_of
from .column_names import ColumnNames
from .source import NO_CAPTION, Columns, PairSource, Row, SkippedRows, compute, thing_names

CHECKED_IN_STORE = 8  # images that are read before training
LARGEST_WEIGHT = float(np.finfo(np.float32).max)


def group_name(value: Any) -> str:
    """Return the group name in a cell, empty for none; numbers are valid names."""
    name = "" if value is None else str(value).strip()
    return "" if name.lower() in BLANK else name


def checked_weight(cell: Any, column: str | None, where: str) -> float:
    """Return the weight in a cell."""
    try:
        weight = float(cell)
    except (TypeError, ValueError, OverflowError):
        weight = -1.0
    if not 0 <= weight <= LARGEST_WEIGHT:
        detail = (
            f"column {column!r} holds {shortened(cell)}, but a weight is a number of at least 0; fix or remove the row"
        )
        raise BadSample(where, "weight is not a number", detail)
    return weight


def checked_title(cell: Any, column: str | None, where: str) -> str:
    """Return the title in a cell."""
    if is_blank(cell) or not isinstance(cell, str):
        raise BadSample(where, "no title", f"column {column!r} holds {shortened(cell)}, not a title; write one")
    return check_caption(cell, where)


def extra_of(weight: float | None, title: str | None) -> dict[str, Any]:
    """Return the extra values of a row with a weight, a title, both or neither."""
    extra: dict[str, Any] = {} if weight is None else {"weight": torch.tensor(weight)}
    return extra if title is None else extra | {"title": title}


def checked_extra(columns: Columns | ColumnNames, cell: Callable[[str], Any], where: str) -> dict[str, Any]:
    """Return the extra values in a row's cells, which ``cell`` returns by name."""
    weight, title = columns.weight, columns.title
    return extra_of(
        None if weight is None else checked_weight(cell(weight), weight, where),
        None if title is None else checked_title(cell(title), title, where),
    )


class ColumnPairs(PairSource):
    """Pairs in columns of captions and of image paths or encoded images.

    ``path`` names the source in messages; relative paths of images start from ``root``.
    """

    inside = False  # whether the paths of images must stay inside the root: not in a table of the user's own

    def __init__(self, path: Path | str, root: Path | StoreFolder | None) -> None:
        self.path, self.root = path, root
        self._local, self._address = "", ""

    def copied_from(self, name: str, version: str, copy: str) -> Self:
        """Record that the file or folder ``copy`` is a version of ``name``; see :attr:`PairSource.versions`."""
        shown = without_secrets(name)  # the versions are in checkpoints
        self.versions, self._local, self._address = {shown: version}, copy, name
        self.left_out.listed = [(where.replace(copy, shown, 1), reason) for where, reason in self.left_out.listed]
        return self

    def shown(self, path: Path | str) -> str:
        return str(path).replace(self._local, self._address, 1) if self._local else str(path)

    @abstractmethod
    def cells(self, index: int) -> Row:
        """Return a usable row as written: the image may also be Hugging Face's struct, and texts any value or list.

        ``key`` is that of an image that is not a file of its own.
        """

    def image_names(self) -> pa.ChunkedArray | None:
        return None

    def row(self, index: int) -> Row:
        cells = self.cells(index)
        image, key = self._located(cells)
        if isinstance(image, str):
            image = partial(cast(StoreFolder, self.root).read, image, cells.where)
        negatives = _texts(cells.negatives, cells.where) if cells.negatives else ()
        return Row(image, _captions(cells), key, cells.group, cells.where, negatives, cells.extra)

    def captions(self, index: int) -> list[str]:
        return _captions(self.cells(index))

    def key(self, index: int) -> str:
        return self._located(self.cells(index))[1]

    def image_identity(self, index: int) -> object:
        cells = self.cells(index)
        image, _ = self._located(cells)
        return file_identity(image, cells.where) if isinstance(image, Path | str) else hash64(image)

    def _located(self, cells: Row) -> tuple[Any, str]:
        """Return a row's image and its key; the image is a file, an address in a store, the content, or a function."""
        value = cells.image
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value.get("path")
        if isinstance(value, bytes) or callable(value):
            return value, cells.key
        if not isinstance(value, str) or not value.strip():
            raise BadSample(cells.where, "missing image", "no image; add a path or remove the row")
        key = value.strip()
        if self.inside and not is_relative(key.removeprefix("./")):
            raise BadSample(cells.where, "image outside", f"image {shortened(key)} is outside of the data set")
        if is_remote(key) and not isinstance(self.root, StoreFolder):  # as a path it would lose a slash
            detail = f"{key} is an address; download the image, or set columns.root to its server"
            raise BadSample(cells.where, "image in a store", detail)
        assert self.root is not None
        return self.root.locate(key, cells.where) if isinstance(self.root, StoreFolder) else self.root / key, key

    def check(self) -> None:
        checked = CHECKED_IN_STORE if isinstance(self.root, StoreFolder) else CHECKED
        sample = [self.cells(index) for index in range(0, len(self), max(1, len(self) // checked))]
        files: list[tuple[Any, str]] = []
        for cells in sample:
            if isinstance(cells.image, bytes | dict):
                continue
            image, _ = self._located(cells)
            if isinstance(image, str):
                image = io.BytesIO(cast(StoreFolder, self.root).read(image, cells.where))
            elif not image.exists():
                hint = "a path starts at the table's folder, or at columns.root"
                raise BadSample(cells.where, "missing image", f"no such image file: {image}; {hint}")
            files.append((image, cells.where))
        check_images(files)


def file_identity(path: Path | str, where: str) -> tuple[str, int, str]:
    """Return a file's path or store address, its size, and its modification time or the store's tag."""
    name = str(path.absolute()) if isinstance(path, Path) else path
    try:
        stamp = stamp_of(name)
    except FileNotFoundError as error:
        raise BadSample(where, "missing image", f"no such image file: {path}") from error
    return name, stamp.size, stamp.version


def _captions(cells: Row) -> list[str]:
    captions = _texts(cells.captions, cells.where)
    if not captions:
        raise BadSample(cells.where, NO_CAPTION, "no caption; write one or remove it")
    return captions


def _texts(cell: Any, where: str) -> list[str]:
    texts = [_decoded(value, where) for value in (cell if isinstance(cell, list) else [cell])]
    return [check_caption(text, where) for text in texts if not is_blank(text)]


def _decoded(value: Any, where: str) -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"the caption is not UTF-8 text ({error.reason} at its byte {error.start}); fix or remove it"
        raise BadSample(where, "caption is not text", detail) from error


class TablePairs(ColumnPairs):
    """Pairs in an Arrow table with columns of ``text_table.SCHEMA``; a folder's has the image alone.

    Args:
        path: of the file that the table was made from, for messages.
        label: what ``number`` counts in that file.
        mapped: the Arrow file that ``table`` maps, if any.
    """

    def __init__(
        self,
        table: pa.Table,
        path: Path,
        root: Path | StoreFolder,
        label: str = "row",
        mapped: Path | None = None,
        left_out: SkippedRows | None = None,
    ) -> None:
        super().__init__(path, root)
        self._table, self.label, self._mapped = table, label, mapped
        self.left_out = left_out or SkippedRows()
        self._latest: tuple[int, Row] | None = None  # number and row: one row is often asked for several things

    def __getstate__(self) -> dict[str, Any]:
        """Leave out a mapped table: the receiving process maps it again."""
        state = dict(self.__dict__)
        return {**state, "_table": None} if self._mapped else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._mapped:
            self._table = map_table(self._mapped)

    def __len__(self) -> int:
        return self._table.num_rows

    def image_names(self) -> pa.ChunkedArray | None:
        return self._table["image"]

    def things(self, rows: bool = False) -> pa.ChunkedArray | None:
        if "number" not in self._table.column_names:
            return None
        if not rows:
            return thing_names(self._table["group"])
        numbers = self._table["number"].cast(pa.string())
        return numbers if compute.count_distinct(numbers).as_py() < len(numbers) else None

    def cells(self, index: int) -> Row:
        if (latest := self._latest) is not None and latest[0] == index:
            return latest[1]
        row = {name: self._table[name][index].as_py() for name in self._table.column_names}
        where = f"{self.shown(self.path)} {self.label} {row['number']}"
        extra = extra_of(row.get("weight"), row.get("title"))
        cells = Row(row["image"], row["caption"], "", row.get("group") or "", where, row.get("negative") or (), extra)
        self._latest = index, cells
        return cells


def map_table(path: Path) -> pa.Table:
    """Map an Arrow file as a table."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def map_valid_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Call :func:`map_table` on a file that may be damaged: read all of it, and raise Arrow's errors."""
    table = map_table(path)
    if table.schema != schema:
        raise pa.ArrowInvalid(f"it has the columns {table.schema}")
    table.validate(full=True)
    return table
