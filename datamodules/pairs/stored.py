"""Pairs in column files that are read in parts: the base of parquet files and of data sets saved by ``datasets``."""

import json
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lit_clip.errors import BadSample, InputError, require
from lit_clip.tools.reading import reading
from ..loading.store import StoreFolder
from .column_names import ColumnNames, blank_mask, check_types, find_columns, image_type, images_of, is_encoded
from .columns import ColumnPairs, checked_extra, group_name
from .source import IMAGES_OF, LISTED, NO_CAPTION, PairSource, Row, SourceOptions, find_split, row_names, thing_names


class RowRange(NamedTuple):
    """Rows of a file that are read together: row group (0 if there is none), first row and number of rows."""

    file: Path
    group: int
    first: int
    rows: int


class ColumnarPairs(ColumnPairs):
    """Pairs in the columns of several files, without rows that lack a caption.

    ``blank`` are the numbers of those rows over all files, ascending, int64 ``[K]``; see :func:`blank_rows`. ``images``
    are the numbers of images of all rows, int64 ``[N]``, each a pair of its own; None: each has one.
    """

    encoded: bool  # whether the files hold encoded images, not only their paths

    def __init__(
        self,
        path: Path,
        root: Path | StoreFolder,
        parts: Sequence[RowRange],
        columns: ColumnNames,
        blank: np.ndarray,
        images: np.ndarray | None = None,
    ) -> None:
        super().__init__(path, root)
        self.files = list(dict.fromkeys(part.file for part in parts))
        self.parts = list(parts)
        self._stops = np.cumsum([part.rows for part in parts], dtype=np.int64)
        self.columns = columns
        self._blank, self._kept_before = blank, blank - np.arange(len(blank))  # usable rows before each unusable one
        self._size = int(self._stops[-1] if len(parts) else 0) - len(blank)
        require(self._size > 0, f"{path}: no row with an image and a caption ({len(blank)} without a caption)")
        self._image_stops: np.ndarray | None = None  # of the rows over all files, in pairs
        if images is not None:
            images[blank] = 0
            self._image_stops = np.cumsum(images)
            self._size = int(self._image_stops[-1])
        self._open: dict[Any, Any] = {}
        self._process = os.getpid()
        for row in blank[:LISTED].tolist():
            self.left_out.add(self._where(row)[0], NO_CAPTION)
        if len(blank):
            self.left_out.counts[NO_CAPTION] = len(blank)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return self._size

    @abstractmethod
    def table(self, number: int) -> pa.Table:
        """Return the columns of a part."""

    @abstractmethod
    def whole(self, names: Sequence[str]) -> pa.Table:
        """Return the named columns of all files."""

    def opened(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the object that this process opened under a key; the parent's objects are not shared after a fork."""
        if self._process != os.getpid():
            self._open, self._process = {}, os.getpid()
        if key not in self._open:
            self._open[key] = make()
        return self._open[key]

    def _usable(self) -> np.ndarray:
        """Return each pair's row number, counted over all files, int64 ``[len(self)]``."""
        rows = np.arange(int(self._stops[-1]))
        if self._image_stops is not None:
            return np.repeat(rows, np.diff(self._image_stops, prepend=0))
        return np.delete(rows, self._blank)

    def image_names(self) -> pa.ChunkedArray | None:
        if self.encoded:
            return None
        rows = self.whole(self.columns.images)
        if len(self._kept_before):
            usable = np.ones(len(rows), dtype=bool)
            usable[self._blank] = False
            rows = rows.filter(pa.array(usable))
        if self._image_stops is None:
            return rows[self.columns.images[0]]
        return pa.chunked_array([images_of(batch, self.columns.images)[1] for batch in rows.to_batches()])

    def things(self, rows: bool = False) -> pa.ChunkedArray | None:
        if self.columns.group is not None and not rows:
            groups = self.whole([self.columns.group])[self.columns.group].to_pylist()
            if (names := thing_names(pa.chunked_array([[*map(group_name, groups)]]))) is not None:
                return names.take(pa.array(self._usable()))
        return None if self._image_stops is None else pa.chunked_array([row_names(self._usable())])

    def number(self, index: int) -> int:
        """Return a pair's row number, counted over all files."""
        if self._image_stops is not None:
            return int(np.searchsorted(self._image_stops, index, side="right"))
        return index + int(np.searchsorted(self._kept_before, index, side="right"))

    def _where(self, row: int) -> tuple[str, int, int]:
        """Return a row's name in messages, its part's number, and its number in that part."""
        number = int(np.searchsorted(self._stops, row, side="right"))
        part = self.parts[number]
        within = row - (int(self._stops[number - 1]) if number else 0)
        return f"{self.shown(part.file)} row {part.first + within}", number, within

    def cells(self, index: int) -> Row:
        row = self.number(index)
        where, number, within = self._where(row)
        key, of_row = self._place(where), ""
        try:
            table = self.table(number)
            captions = [table[name][within].as_py() for name in self.columns.captions]
            if self._image_stops is None:
                image = table[self.columns.images[0]][within].as_py()
            else:
                place = index - (int(self._image_stops[row - 1]) if row else 0)
                images = images_of(table.slice(within, 1).combine_chunks().to_batches()[0], self.columns.images)[1]
                image, key, of_row = images[place].as_py(), f"{key}:{place}", f"{IMAGES_OF}{key}"
            group = "" if self.columns.group is None else group_name(table[self.columns.group][within].as_py())
            negative: Any = () if self.columns.negative is None else table[self.columns.negative][within].as_py() or ()
            extra = checked_extra(self.columns, lambda name: table[name][within].as_py(), where)
        except UnicodeDecodeError as error:
            raise BadSample(where, "not UTF-8", f"not UTF-8 text ({error.reason}); write the file again") from error
        except (pa.ArrowException, OSError) as error:  # damaged pages go unnoticed when the file is opened
            cause = str(error).splitlines()[0]
            raise BadSample(where, "damaged table", f"cannot read this part ({cause}); write the file again") from error
        caption = captions[0] if len(captions) == 1 else captions
        return Row(image, caption, key, group or of_row, where, negative, extra)

    @staticmethod
    def _place(where: str) -> str:
        """Return the key of an image stored in the file, from the row's name in messages."""
        file, line = where.rsplit(" row ", 1)
        return f"{Path(file).name}:{line}"


def blank_rows(batches: Any, captions: Sequence[str]) -> np.ndarray:
    """Return the numbers of rows that are blank in all caption columns, ascending, int64 ``[K]``."""
    found, first = [], 0
    for batch in batches:
        blank = np.logical_and.reduce([blank_mask(batch.column(caption)) for caption in captions])
        found.append(np.flatnonzero(blank) + first)
        first += batch.num_rows
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, dtype=np.int64)


SAVE_AGAIN = "save the data set again"
LONGEST_NAME = 255


def open_saved(folder: Path, options: SourceOptions) -> PairSource:
    """Open a saved ``Dataset``, or one split of a saved ``DatasetDict``."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = _names(splits, "splits", _json(splits).get("splits"))
        return _open(folder / find_split(folder, names, options), options)
    options.refuse_split(folder)
    return _open(folder, options)


def _json(file: Path) -> dict[str, Any]:
    with reading(file, "JSON file", hint=SAVE_AGAIN):
        values = json.loads(file.read_text(encoding="utf-8"))
    require(isinstance(values, dict), f"{file}: not a JSON object; {SAVE_AGAIN}")
    return values


def _names(file: Path, key: str, values: object) -> list[str]:
    """Return a checked list of names of files or folders beside ``file``."""
    names: list[Any] = values if isinstance(values, list) else [None]
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or name != Path(name).name or len(name) > LONGEST_NAME:
            raise InputError(f"{file}: {key} is not a list of names in this folder; {SAVE_AGAIN}")
    return names


def _open(folder: Path, options: SourceOptions) -> PairSource:
    about = folder / "state.json"
    state = _json(about)
    mapped = state.get("_indices_data_files")
    require(not mapped, f"{folder}: it has an indices mapping; call flatten_indices() and save it again")
    entries = state.get("_data_files") or []
    named = [isinstance(entry, dict) and entry.get("filename") for entry in entries] if type(entries) is list else None
    files = [folder / name for name in _names(about, "_data_files", named)]
    require(bool(files), f"{folder}: state.json lists no data files; the data set is empty")
    tables = [_map_stream(file) for file in files]
    schema = tables[0].schema
    for file, table in zip(files, tables, strict=True):
        require(table.schema.equals(schema), f"{file}: has other columns than {files[0].name}; {SAVE_AGAIN}")
    require(len(set(schema.names)) == len(schema.names), f"{folder}: two columns have the same name; {SAVE_AGAIN}")
    columns = find_columns(folder, schema.names, options)
    check_types(folder, schema, columns)

    def batches(names: Sequence[str]) -> list[pa.RecordBatch]:
        return [batch for table in tables for batch in table.select(names).to_batches()]

    blank = blank_rows(batches(columns.captions), columns.captions)
    parts = [RowRange(file, 0, 0, table.num_rows) for file, table in zip(files, tables, strict=True)]
    images, (kind, several) = None, image_type(schema, columns)
    if several:
        images = np.concatenate([images_of(batch, columns.images)[0] for batch in batches(columns.images)])
    pairs = ArrowDatasetPairs(folder, options.image_root(folder), parts, columns, blank, images)
    pairs.encoded = is_encoded(kind)
    return pairs


def _map_stream(file: Path) -> pa.Table:
    """Map a file and check its structure: Arrow follows the offsets in a damaged file, and crashes."""
    with reading(file, "Arrow file", hint=SAVE_AGAIN), pa.memory_map(str(file)) as source:
        table = pa.ipc.open_stream(source).read_all()
        for column in table.columns:
            for chunk in column.chunks:
                _without_texts(chunk).validate(full=True)
        return table


def _without_texts(array: pa.Array) -> pa.Array:
    """Return an array with texts viewed as bytes: invalid UTF-8 then concerns only its own row."""
    storage = array.storage if isinstance(array, pa.ExtensionArray) else array
    kind = _bytes_for_texts(storage.type)
    if kind == storage.type:
        return storage
    storage.validate()  # the view reads lengths, which must be those of the buffers
    return storage.view(kind)


def _bytes_for_texts(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_bytes_for_texts(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_bytes_for_texts(kind.value_type))
    if pa.types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        return pa.struct([field.with_type(_bytes_for_texts(field.type)) for field in fields])
    return kind


class ArrowDatasetPairs(ColumnarPairs):
    """Pairs in the mapped files of a saved data set."""

    def table(self, number: int) -> pa.Table:
        return self.opened(number, lambda: _map_stream(self.parts[number].file))

    def whole(self, names: Sequence[str]) -> pa.Table:
        return pa.concat_tables([self.table(number).select(names) for number in range(len(self._stops))])
