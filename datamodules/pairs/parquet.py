"""Captions in parquet files, with image paths or encoded images."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities import rank_zero_info

from lit_clip.embedding.parts import load_arrays, save_arrays
from lit_clip.errors import InputError, require
from lit_clip.tools.own_files import cache_file, made_once
from lit_clip.tools.reading import reading
from ..loading.store import StoreFolder
from .column_names import ColumnNames, check_types, find_columns, image_type, images_of, is_encoded
from .columns import map_table, map_valid_table
from .source import PairSource, SourceOptions, find_split
from .stored import ColumnarPairs, RowRange, blank_rows

BATCH_ROWS = 16_384
IN_MEMORY = 64 << 20  # bytes of decoded texts that each process may hold; more are copied once and mapped
IMAGE_MEMORY = 256 << 20  # bytes of encoded images that each process may hold
LARGE = 1_000_000  # rows; from this size on what is searched for is cached
IMAGE_ROWS = 256  # whose images are counted at once
THREADS = 4  # that search for blank captions
LAYOUT = 2  # of the cached files; a new number makes old ones be written again


def files_of_split(folder: Path, files: Sequence[Path], options: SourceOptions) -> list[Path]:
    """Return a folder's files of the wanted split, if their names (``train-00000-of-00001``) show it."""
    splits = [re.match(r"(.+?)-\d{5}-of-\d{5}", file.name) for file in files]
    names = [split[1] for split in splits if split]
    if len(names) < len(files):
        options.refuse_split(folder)
        return list(files)
    wanted = find_split(folder, list(dict.fromkeys(names)), options)
    return [file for file, name in zip(files, names, strict=True) if name == wanted]


def holds_features(path: Path) -> bool:
    """Return whether ``lit-clip embed`` wrote a file, perhaps into the folder of its images."""
    try:
        with reading(path, "parquet file"):
            return b"model_sha256" in (pq.read_schema(path).metadata or {})
    except InputError:  # opening it will report it
        return False


def open_parquet(paths: Sequence[Path], options: SourceOptions) -> PairSource:
    """Open parquet files as one source."""
    whole = paths[0] if len(paths) == 1 else paths[0].parent
    parts, sizes, columns = [], [], None
    for path in paths:
        file = open_file(path)
        schema = file.schema_arrow
        if columns is None:
            columns = find_columns(path, schema.names, options)
        missing = [name for name in columns.names() if name not in schema.names]
        require(not missing, f"{path}: no column {', '.join(missing)!r}, which {paths[0].name} has")
        check_types(path, schema, columns)
        first = 0
        for group in range(file.num_row_groups):
            parts.append(RowRange(path, group, first, file.metadata.row_group(group).num_rows))
            first += parts[-1].rows
        with reading(path, "parquet file"):  # which names its columns a second time
            chunks = [chunks_of(file, group, columns.names()) for group in range(file.num_row_groups)]
        sizes += [sum(chunk.total_uncompressed_size for chunk in group.values()) for group in chunks]
    assert columns is not None
    root = options.image_root(whole if whole.is_dir() else whole.parent)
    return ParquetPairs(whole, root, parts, columns, np.array(sizes, dtype=np.int64))


def open_file(path: Path) -> pq.ParquetFile:
    """Open a parquet file and parse its schema."""
    with reading(path, "parquet file"):
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)  # read pages on demand
        assert file.schema_arrow is not None  # parsed when it is first wanted
        return file


def chunks_of(file: pq.ParquetFile, group: int, names: Sequence[str]) -> dict[str, pq.ColumnChunkMetaData]:
    """Return a row group's metadata for the leaves of columns, by path.

    pyarrow ends the process where that is damaged, unless its reader has looked at it before: that raises. Asked for
    batches of no rows, the reader reads nothing else.
    """
    reader = file.reader
    leaves = {".".join(path): number for number, path in enumerate(reader.column_paths) if path[0] in names}
    next(reader.iter_batches(0, [group], list(leaves.values()), use_threads=False), None)
    return {path: file.metadata.row_group(group).column(number) for path, number in leaves.items()}


def _batches(file: pq.ParquetFile, groups: list[int], names: list[str]) -> Iterator[pa.RecordBatch]:
    # Without threads: they would not survive the fork of a data worker.
    return file.iter_batches(BATCH_ROWS, row_groups=groups, columns=names, use_threads=False)


class ParquetPairs(ColumnarPairs):
    """Pairs in parquet files.

    A row can only be read with its whole row group. Large texts are therefore copied once into memory-mapped files of
    the cache folder. Images are not copied: an epoch takes row groups in random order, and shuffles the rows of as many
    row groups together as fit ``IMAGE_MEMORY``.

    ``parts`` are the row groups of all files, ``sizes`` their uncompressed bytes in the columns, int64 ``[P]``.
    """

    def __init__(
        self, path: Path, root: Path | StoreFolder, parts: Sequence[RowRange], columns: ColumnNames, sizes: np.ndarray
    ) -> None:
        self.sizes = sizes
        kind, several = image_type(open_file(parts[0].file).schema_arrow, columns) if parts else (pa.string(), False)
        self.encoded = is_encoded(kind)
        self.copied = not self.encoded and int(sizes.sum()) > IN_MEMORY
        blank, images, start = [], [], 0
        for file in dict.fromkeys(part.file for part in parts):
            blank.append(_blank(file, columns.captions) + start)
            if several:
                images.append(_images(file, columns.images, self.encoded))
            start += sum(part.rows for part in parts if part.file == file)
        unusable = np.concatenate(blank) if blank else np.zeros(0, dtype=np.int64)
        super().__init__(path, root, parts, columns, unusable, np.concatenate(images) if images else None)
        self._recent: dict[int, None] = {}  # numbers of the parts in memory, the most recently used last

    def table(self, number: int) -> pa.Table:
        if self.copied:
            return self.opened(number, lambda: map_table(self._copy(number)))
        table = self.opened(number, lambda: self._decoded(number))
        self._recent.pop(number, None)
        self._recent[number] = None
        while len(self._recent) > 1 and sum(self.sizes[part] for part in self._recent) > IMAGE_MEMORY:
            oldest = next(iter(self._recent))
            del self._recent[oldest]
            self._open.pop(oldest, None)
        return table

    def _decoded(self, number: int) -> pa.Table:
        part = self.parts[number]
        file = self.opened(part.file, lambda: open_file(part.file))
        return file.read_row_group(part.group, columns=self.columns.names(), use_threads=False)

    def _copy(self, number: int, valid: bool = False) -> Path:
        """Return the Arrow file of a row group's texts; write it if it is missing, or with ``valid`` if damaged."""
        part = self.parts[number]
        path = cache_file("tables", part.file, (LAYOUT, part.group, *self.columns.names()), ".arrow")
        if valid or not path.is_file():
            schema = self._schema(open_file(part.file))
            made_once(path, lambda file: map_valid_table(file, schema), lambda file: self._write(file, part))
        return path

    def _schema(self, file: pq.ParquetFile) -> pa.Schema:
        return pa.schema([file.schema_arrow.field(name) for name in self.columns.names()])

    def _write(self, path: Path, part: RowRange) -> None:
        file = open_file(part.file)
        with reading(part.file, "parquet file"), pa.ipc.new_file(str(path), self._schema(file)) as writer:
            for batch in _batches(file, [part.group], self.columns.names()):
                writer.write_batch(batch)

    def key(self, index: int) -> str:
        where, number, _ = self._where(self.number(index))
        single = self.encoded and self._image_stops is None
        if single and self.opened(("bytes", number), lambda: self._has_no_paths(number)):
            return self._place(where)
        return super().key(index)

    def _has_no_paths(self, number: int) -> bool:
        """Return whether every row of a part surely holds an encoded image, and not just its path."""
        part, image = self.parts[number], self.columns.images[0]
        with reading(part.file, "parquet file"):
            chunks = chunks_of(open_file(part.file), part.group, [image])
        counts = [chunks[path].statistics for path in (image, f"{image}.bytes") if path in chunks]
        return bool(counts) and all(
            count is not None and count.has_null_count and not count.null_count for count in counts
        )

    def prepare(self) -> None:
        if self.copied:
            rank_zero_info(f"{self.path}: copying its texts into the cache folder, unless they are there already")
            for number in range(len(self._stops)):
                self._copy(number, valid=True)

    def whole(self, names: Sequence[str]) -> pa.Table:
        tables = []
        for file in self.files:
            with reading(file, "parquet file"):
                tables.append(open_file(file).read(columns=list(names), use_threads=False))
        chunks = {name: [chunk for table in tables for chunk in table[name].chunks] for name in names}
        return pa.table({name: pa.chunked_array(each) for name, each in chunks.items()})

    def order(self, epoch: int, seed: int) -> np.ndarray:
        if not self.encoded:
            return super().order(epoch, seed)
        rng = np.random.default_rng((seed, epoch))
        numbers = rng.permutation(len(self._stops))
        window = np.cumsum(self.sizes[numbers]) // IMAGE_MEMORY
        stops = self._stops - np.searchsorted(self._blank, self._stops)  # in usable rows
        if self._image_stops is not None:
            stops = np.concatenate([[0], self._image_stops])[self._stops]
        bounds = list(zip([0, *stops[:-1].tolist()], stops.tolist(), strict=True))
        order = []
        for number in np.unique(window):
            rows = np.concatenate([np.arange(*bounds[part]) for part in numbers[window == number].tolist()])
            order.append(rng.permutation(rows))
        return np.concatenate(order).astype(np.int32 if len(self) < 2**31 else np.int64)


def _search_once(
    path: Path, name: str, columns: Sequence[str], search: Callable[[], np.ndarray], slow: bool = False
) -> np.ndarray:
    """Return the result of a search in columns of a file, int64 ``[K]``; cached if it is ``slow`` or the file large."""
    if not slow and open_file(path).metadata.num_rows < LARGE:
        return search()

    def load(file: Path) -> np.ndarray:
        found = load_arrays(file, name, itemgetter("found"))
        assert found is not None, "damaged"
        return found

    return made_once(
        cache_file("tables", path, (LAYOUT, name, *columns), ".npz"),
        load,
        lambda file: save_arrays(file, name, {"found": search()}),
    )


def _images(path: Path, names: Sequence[str], encoded: bool) -> np.ndarray:
    """Return the number of images in each row of a file, int64 ``[N]``; cached for large files and encoded images."""

    def search() -> np.ndarray:
        with reading(path, "parquet file"):
            batches = open_file(path).iter_batches(IMAGE_ROWS, columns=list(names), use_threads=False)
            return np.concatenate([np.zeros(0, np.int64), *(images_of(batch, names)[0] for batch in batches)])

    return _search_once(path, "images", names, search, slow=encoded)


def _blank(path: Path, captions: Sequence[str]) -> np.ndarray:
    """Return the numbers of a file's rows without a caption, int64 ``[K]``; cached for a large file."""
    metadata = open_file(path).metadata
    rows = np.array([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)], dtype=np.int64)

    def search_groups(groups: np.ndarray) -> np.ndarray:
        numbers = blank_rows(_batches(open_file(path), groups.tolist(), list(captions)), captions)
        return numbers + rows[: groups[0]].sum() if len(groups) else numbers

    def search() -> np.ndarray:
        threads = min(THREADS, os.cpu_count() or 1)
        with reading(path, "parquet file"), ThreadPoolExecutor(threads) as pool:  # decoding releases the GIL
            return np.concatenate(list(pool.map(search_groups, np.array_split(np.arange(len(rows)), threads))))

    return _search_once(path, "blank", captions, search)
