"""Pairs in Arrow columns: no Python object per row, and memory-mapped files stay outside the process's own memory."""

import io
import random
from abc import abstractmethod
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import pyarrow as pa
import torch

from lit_clip.errors import BadSample
from lit_clip.secrets import without_secrets
from lit_clip.tools.hashing import hash64
from lit_clip.tools.hub_client import is_relative
from lit_clip.tools.images import CHECKED, check_images, image_for_model
from lit_clip.tools.untrusted import shortened
from ..loading.bad_samples import BLANK, check_caption, is_blank
from ..loading.store import StoreFolder, is_remote, stamp_of
from .source import NO_CAPTION, EncodedPair, Pair, PairSource, PairText, SkippedRows, compute, thing_names

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


class Cells(NamedTuple):
    """Cells of a row; ``where`` names the row in messages."""

    image: Any  # a path, bytes, a function that reads these, or Hugging Face's struct of both
    caption: Any
    group: str
    where: str
    key: str  # of an image that is not a file of its own
    negative: Any = None
    weight: float | None = None
    title: str | None = None


class ColumnPairs(PairSource):
    """Pairs in columns of captions and of image paths or encoded images.

    ``path`` names the source in messages; relative paths of images start from ``root``.
    """

    inside = False  # whether the paths of images must stay inside the root: not in a table of the user's own

    def __init__(self, path: Path | str, root: Path | StoreFolder | None) -> None:
        self.path, self.root = path, root
        self._left_out = SkippedRows()
        self._versions: dict[str, str] = {}
        self._local, self._address = "", ""

    def copied_from(self, name: str, version: str, copy: str) -> Self:
        """Record that the file or folder ``copy`` is a version of ``name``; see :attr:`PairSource.versions`."""
        shown = without_secrets(name)  # the versions are in checkpoints
        self._versions, self._local, self._address = {shown: version}, copy, name
        left_out = self._left_out.listed
        self._left_out.listed = [(where.replace(copy, shown, 1), reason) for where, reason in left_out]
        return self

    def shown(self, path: Path | str) -> str:
        """Return the name of a file for messages."""
        return str(path).replace(self._local, self._address, 1) if self._local else str(path)

    @property
    def versions(self) -> dict[str, str]:
        return self._versions

    @abstractmethod
    def cells(self, index: int) -> Cells:
        """Return the cells of a usable row."""

    @property
    def left_out(self) -> SkippedRows:
        return self._left_out

    def image_names(self) -> pa.ChunkedArray | None:
        return None

    def load(self, index: int, rng: random.Random | None) -> Pair:
        cells = self.cells(index)
        source = self._opened(self._located(cells.image, cells)[0], cells.where)
        return Pair(image_for_model(source, cells.where), *self._text(cells, rng))

    def text(self, index: int, rng: random.Random | None) -> PairText:
        return self._text(self.cells(index), rng)

    def _text(self, cells: Cells, rng: random.Random | None) -> PairText:
        captions = _captions(cells)
        caption = captions[0] if rng is None or len(captions) == 1 else rng.choice(captions)
        negatives = [] if rng is None else _texts(cells.negative, cells.where)
        negative = rng.choice(negatives) if rng and len(negatives) > 1 else "".join(negatives)
        extra: dict[str, Any] = {} if cells.weight is None else {"weight": torch.tensor(cells.weight)}
        extra |= {} if cells.title is None else {"title": cells.title}
        return PairText(caption, self._located(cells.image, cells)[1], cells.group, negative, extra)

    def image_identity(self, index: int) -> object:
        cells = self.cells(index)
        image, _ = self._located(cells.image, cells)
        return hash64(image.getvalue()) if isinstance(image, io.BytesIO) else file_identity(image, cells.where)

    def read(self, index: int) -> EncodedPair:
        cells = self.cells(index)
        image, key = self._located(cells.image, cells)
        source = self._opened(image, cells.where)
        try:
            data = source.read_bytes() if isinstance(source, Path) else source.getvalue()
        except FileNotFoundError as error:
            raise BadSample(cells.where, "missing image", f"no such image file: {source}") from error
        except OSError as error:
            raise BadSample(cells.where, "broken image", f"cannot read image {source} ({error.strerror})") from error
        return EncodedPair(data, _captions(cells), key, cells.group, cells.where)

    def captions(self, index: int) -> list[str]:
        return _captions(self.cells(index))

    def key(self, index: int) -> str:
        cells = self.cells(index)
        return self._located(cells.image, cells)[1]

    def _opened(self, image: Path | str | io.BytesIO, where: str) -> Path | io.BytesIO:
        return io.BytesIO(cast(StoreFolder, self.root).read(image, where)) if isinstance(image, str) else image

    def _located(self, value: Any, cells: Cells) -> tuple[Path | str | io.BytesIO, str]:
        """Return a row's image and its key; the image is a file, an address in a store, or the content."""
        if callable(value):
            value = value()
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value.get("path")
        if isinstance(value, bytes):
            return io.BytesIO(value), cells.key
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
        named = [cells for cells in sample if not isinstance(cells.image, bytes | dict)]
        files = [(self._located(cells.image, cells)[0], cells.where) for cells in named]
        for path, where in files:
            if isinstance(path, Path) and not path.exists():
                hint = "a path starts at the table's folder, or at columns.root"
                raise BadSample(where, "missing image", f"no such image file: {path}; {hint}")
        check_images([(self._opened(source, where), where) for source, where in files])


def file_identity(path: Path | str, where: str) -> tuple[str, int, str]:
    """Return a file's path or store address, its size, and its modification time or the store's tag."""
    name = str(path.absolute()) if isinstance(path, Path) else path
    try:
        stamp = stamp_of(name)
    except FileNotFoundError as error:
        raise BadSample(where, "missing image", f"no such image file: {path}") from error
    return name, stamp.size, stamp.version


def _captions(cells: Cells) -> list[str]:
    captions = _texts(cells.caption, cells.where)
    if not captions:
        raise BadSample(cells.where, NO_CAPTION, "no caption; write one or remove it")
    return captions


def _texts(cell: Any, where: str) -> list[str]:
    """Return the non-blank texts of a cell."""
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
    """Pairs in an Arrow table with the columns of ``text_table.SCHEMA``; optional columns may be missing.

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
        self._left_out = left_out or SkippedRows()
        self._latest: tuple[int, Cells] | None = None  # row and cells: one row is often asked for several things

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
        if not rows:
            return thing_names(self._table["group"]) if "group" in self._table.column_names else None
        numbers = self._table["number"].cast(pa.string())
        return numbers if compute.count_distinct(numbers).as_py() < len(numbers) else None

    def cells(self, index: int) -> Cells:
        if (latest := self._latest) is not None and latest[0] == index:
            return latest[1]
        row = {name: self._table[name][index].as_py() for name in self._table.column_names}
        where = f"{self.shown(self.path)} {self.label} {row['number']}"
        more = (row.get(name) for name in ("negative", "weight", "title"))
        cells = Cells(row["image"], row["caption"], row.get("group") or "", where, "", *more)
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
