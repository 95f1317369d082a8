"""Data sets saved by Hugging Face's ``datasets``: memory-mapped Arrow files, read without that library."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lit_clip.errors import InputError, require
from lit_clip.tools.reading import reading
from .column_names import ColumnNames, check_types, find_columns, is_encoded
from .source import PairSource, SourceOptions, find_split
from .stored import ColumnarPairs, RowRange, blank_rows

SAVE_AGAIN = "save the data set again"
LONGEST_NAME = 255


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


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
    """Return a list of names of files or folders that lie beside ``file``."""
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
    blank, start = [], 0
    for table in tables:
        blank.append(blank_rows(table.select(columns.captions).to_batches(), columns.captions) + start)
        start += table.num_rows
    parts = [RowRange(file, 0, 0, table.num_rows) for file, table in zip(files, tables, strict=True)]
    return ArrowDatasetPairs(folder, options.image_root(folder), parts, columns, np.concatenate(blank))


def _map_stream(file: Path) -> pa.Table:
    """Map a file and check its structure: Arrow reads wherever the offsets in a damaged one point, and crashes."""
    with reading(file, "Arrow file", hint=SAVE_AGAIN), pa.memory_map(str(file)) as source:
        table = pa.ipc.open_stream(source).read_all()
        for column in table.columns:
            for chunk in column.chunks:
                _without_texts(chunk).validate(full=True)
        return table


def _without_texts(array: pa.Array) -> pa.Array:
    """Return an array whose texts are seen as bytes: a text that is not UTF-8 concerns its row alone."""
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

    columns: ColumnNames

    def table(self, number: int) -> pa.Table:
        return self.opened(number, lambda: _map_stream(self.part(number).file))

    def image_names(self) -> pa.ChunkedArray | None:
        first = self.table(0)
        if is_encoded(first.schema.field(self.columns.image).type):
            return None
        paths = [chunk for number in range(len(self._stops)) for chunk in self.table(number)[self.columns.image].chunks]
        return self._without_blank(pa.chunked_array(paths))
