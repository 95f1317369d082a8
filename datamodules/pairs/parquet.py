"""Captions in parquet files, with the paths of images or the images themselves."""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities import rank_zero_info

from datamodules.loading.cache import cache_file, writing_cached
from datamodules.pairs.columns import Columns, check_types, find_columns, is_encoded, map_table
from datamodules.pairs.source import PairSource, SourceOptions, find_split
from datamodules.pairs.stored import RowRange, StoredPairs, blank_rows
from lit_clip.errors import InputError

BATCH_ROWS = 16_384
IN_MEMORY = 64 << 20  # bytes of texts that each process may hold decoded; more are copied once and mapped
AT_ONCE = 256 << 20  # bytes of images that each process may hold
REMEMBERED = 1_000_000  # rows from which on it is worth a file that some of them have no caption
THREADS = 4  # that look for rows without a caption
LAYOUT = 1  # of the files in the cache; another number makes old ones be written anew


def of_split(folder: Path, files: Sequence[Path], options: SourceOptions) -> list[Path]:
    """Those of a folder's files that are of the wanted split, if their names say of which they are.

    Raises:
        InputError: there is no such split, or there are several and none is wanted.
    """
    splits = [re.match(r"(.+?)-\d{5}-of-\d{5}", file.name) for file in files]
    names = [split[1] for split in splits if split]
    if len(names) < len(files):
        options.no_split(folder)
        return list(files)
    wanted = find_split(folder, list(dict.fromkeys(names)), options)
    return [file for file, name in zip(files, names, strict=True) if name == wanted]


def open_parquet(paths: Sequence[Path], options: SourceOptions) -> PairSource:
    """The pairs of some parquet files, one after the other.

    Raises:
        InputError: unreadable, no such column, or no row with a caption.
    """
    whole = paths[0] if len(paths) == 1 else paths[0].parent
    parts, sizes, columns = [], [], None
    for path in paths:
        file = _open_file(path)
        schema = file.schema_arrow
        if columns is None:
            columns = find_columns(path, schema.names, options)
        missing = [name for name in columns.names() if name not in schema.names]
        if missing:
            raise InputError(f"{path}: no column {missing[0]!r}, which {paths[0].name} has")
        check_types(path, schema, columns)
        parts += list(_parts(path, file.metadata))
        sizes += [_size(file.metadata.row_group(group), columns) for group in range(file.num_row_groups)]
    assert columns is not None
    root = Path(options.root).expanduser() if options.root else whole if whole.is_dir() else whole.parent
    return ParquetPairs(whole, root, parts, columns, np.array(sizes, dtype=np.int64))


def _open_file(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)  # pages as they come, not all row groups
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def _parts(path: Path, metadata: pq.FileMetaData) -> Iterator[RowRange]:
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        yield RowRange(path, group, first, rows)
        first += rows


def _size(group: Any, columns: Columns) -> int:
    """Bytes that the columns have in a row group when they are not compressed."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    names = columns.names()
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in names)


def _batches(file: pq.ParquetFile, groups: list[int], names: list[str]) -> Iterator[pa.RecordBatch]:
    # No threads: they do not survive the fork of a data worker.
    return file.iter_batches(BATCH_ROWS, row_groups=groups, columns=names, use_threads=False)


class ParquetPairs(StoredPairs):
    """The pairs of parquet files.

    A row of a parquet file cannot be read without its whole row group. Texts are therefore copied once into files of
    the cache folder that are mapped (few of them are held decoded); images are not copied: an epoch takes row groups
    in random order and mixes the rows of as many of them as ``AT_ONCE`` bytes hold.

    Args:
        path: of all files, named in errors.
        root: where relative image paths start.
        parts: the row groups of all files, in order.
        columns: that are read.
        sizes: of the columns in every row group, decoded: bytes, int64 ``[P]``.
    """

    def __init__(self, path: Path, root: Path, parts: Sequence[RowRange], columns: Columns, sizes: np.ndarray) -> None:
        self.sizes = sizes
        first = _open_file(parts[0].file) if parts else None
        self.encoded = first is not None and is_encoded(first.schema_arrow.field(columns.image).type)
        self.copied = not self.encoded and int(sizes.sum()) > IN_MEMORY
        blank, start = [], 0
        for file in dict.fromkeys(part.file for part in parts):
            blank.append(_blank(file, columns.caption) + start)
            start += sum(part.rows for part in parts if part.file == file)
        super().__init__(path, root, parts, columns, np.concatenate(blank) if blank else np.zeros(0, dtype=np.int64))
        self._recent: dict[int, None] = {}  # parts that are held, the last used last

    def table(self, number: int) -> pa.Table:
        if self.copied:
            return self.kept(number, lambda: map_table(self._copy(number)))
        table = self.kept(number, lambda: self._decoded(number))
        self._recent.pop(number, None)
        self._recent[number] = None
        while len(self._recent) > 1 and sum(self.sizes[part] for part in self._recent) > AT_ONCE:
            oldest = next(iter(self._recent))
            del self._recent[oldest]
            self._open.pop(oldest, None)
        return table

    def _decoded(self, number: int) -> pa.Table:
        part = self.part(number)
        file = self.kept(part.file, lambda: _open_file(part.file))
        return file.read_row_group(part.group, columns=self.columns.names(), use_threads=False)

    def _copy(self, number: int) -> Path:
        """The Arrow file of a row group's texts; it is written unless it is there."""
        part = self.part(number)
        path = cache_file("tables", part.file, (LAYOUT, part.group, *self.columns), ".arrow")
        if not path.is_file():
            with writing_cached(path) as draft:
                self._write(draft, part)
        return path

    def _write(self, path: Path, part: RowRange) -> None:
        file = _open_file(part.file)
        names = self.columns.names()
        schema = pa.schema([file.schema_arrow.field(name) for name in names])
        with pa.ipc.new_file(str(path), schema) as writer:
            for batch in _batches(file, [part.group], names):
                writer.write_batch(batch)

    def prepare(self) -> None:
        if self.copied:
            rank_zero_info(f"{self.path}: its texts are copied once, unless they are in the cache folder")
            for number in range(len(self._stops)):
                self._copy(number)

    def image_paths(self) -> pa.ChunkedArray | None:
        if self.encoded:
            return None
        tables = [_open_file(file).read(columns=[self.columns.image], use_threads=False) for file in self.files]
        paths = pa.chunked_array([chunk for table in tables for chunk in table[self.columns.image].chunks])
        usable = np.ones(len(paths), dtype=bool)
        usable[self._kept_before + np.arange(len(self._kept_before))] = False
        return paths.filter(pa.array(usable)) if len(self) < len(paths) else paths

    def order(self, epoch: int, seed: int) -> np.ndarray:
        if not self.encoded:
            return super().order(epoch, seed)
        rng = np.random.default_rng((seed, epoch))
        numbers = rng.permutation(len(self._stops))
        window = np.cumsum(self.sizes[numbers]) // AT_ONCE
        blank = self._kept_before
        stops = self._stops - np.searchsorted(blank + np.arange(len(blank)), self._stops)  # of usable rows
        bounds = list(zip([0, *stops[:-1].tolist()], stops.tolist(), strict=True))
        order = []
        for number in np.unique(window):
            rows = np.concatenate([np.arange(*bounds[part]) for part in numbers[window == number].tolist()])
            order.append(rng.permutation(rows))
        return np.concatenate(order).astype(np.int32 if len(self) < 2**31 else np.int64)


def _blank(path: Path, caption: str) -> np.ndarray:
    """The numbers of a file's rows without a caption, int64 ``[K]``: looked for once in a large file."""
    metadata = _open_file(path).metadata
    rows = np.array([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)], dtype=np.int64)

    def found_in(groups: np.ndarray) -> np.ndarray:
        numbers = blank_rows(_batches(_open_file(path), groups.tolist(), [caption]), caption)
        return numbers + rows[: groups[0]].sum() if len(groups) else numbers

    def found() -> np.ndarray:
        threads = min(THREADS, os.cpu_count() or 1)
        try:
            with ThreadPoolExecutor(threads) as pool:  # decoding leaves Python's lock alone
                return np.concatenate(list(pool.map(found_in, np.array_split(np.arange(len(rows)), threads))))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error

    if metadata.num_rows < REMEMBERED:
        return found()
    remembered = cache_file("tables", path, (LAYOUT, "blank", caption), ".npy")
    if not remembered.is_file():
        blank = found()
        with writing_cached(remembered) as draft, draft.open("wb") as stream:
            np.save(stream, blank)
        return blank
    return np.load(remembered)
