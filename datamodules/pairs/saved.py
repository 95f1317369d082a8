"""Data sets saved by Hugging Face's ``datasets``: memory-mapped Arrow files, read without that library."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from datamodules.pairs.columns import Columns, check_types, find_columns, is_encoded
from datamodules.pairs.source import PairSource, SourceOptions, find_split
from datamodules.pairs.stored import RowRange, StoredPairs, blank_rows
from lit_clip.errors import InputError


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_saved(folder: Path, options: SourceOptions) -> PairSource:
    """Open a saved ``Dataset``, or one split of a saved ``DatasetDict``.

    Raises:
        InputError: damaged, no such split or column, or no row with a caption.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = [str(name) for name in _json(splits).get("splits", [])]
        return _open(folder / find_split(folder, names, options), options)
    options.refuse_split(folder)
    return _open(folder, options)


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); save the data set again") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: not a JSON object; save the data set again")
    return values


def _open(folder: Path, options: SourceOptions) -> PairSource:
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise InputError(f"{folder}: it has an indices mapping; call flatten_indices() and save it again")
    files = [folder / str(entry["filename"]) for entry in state.get("_data_files") or []]
    if not files:
        raise InputError(f"{folder}: state.json lists no data files; the data set is empty")
    tables = [_map_stream(file) for file in files]
    schema = tables[0].schema
    columns = find_columns(folder, schema.names, options)
    check_types(folder, schema, columns)
    blank, start = [], 0
    for table in tables:
        blank.append(blank_rows(table.select(columns.captions).to_batches(), columns.captions) + start)
        start += table.num_rows
    parts = [RowRange(file, 0, 0, table.num_rows) for file, table in zip(files, tables, strict=True)]
    return SavedPairs(folder, options.image_root(folder), parts, columns, np.concatenate(blank))


def _map_stream(file: Path) -> pa.Table:
    try:
        with pa.memory_map(str(file)) as source:
            return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable Arrow file ({str(error).splitlines()[0]})") from error


class SavedPairs(StoredPairs):
    """Pairs in the mapped files of a saved data set."""

    columns: Columns

    def table(self, number: int) -> pa.Table:
        return self.opened(number, lambda: _map_stream(self.part(number).file))

    def image_paths(self) -> pa.ChunkedArray | None:
        first = self.table(0)
        if is_encoded(first.schema.field(self.columns.image).type):
            return None
        paths = [chunk for number in range(len(self._stops)) for chunk in self.table(number)[self.columns.image].chunks]
        return self._without_blank(pa.chunked_array(paths))
