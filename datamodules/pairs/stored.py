"""Pairs in files of columns that are read in parts when needed: parquet and Arrow files."""

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lit_clip.errors import BadSample, require
from ..loading.bad_samples import is_blank
from ..loading.store import StoreFolder
from .column_names import ColumnNames, blank_mask
from .columns import Cells, ColumnPairs, checked_weight, group_name
from .source import LISTED, NO_CAPTION


class RowRange(NamedTuple):
    """Rows of a file that are read together: their row group (0 where there is none), first row and number."""

    file: Path
    group: int
    first: int
    rows: int


class ColumnarPairs(ColumnPairs):
    """Pairs in the columns of several files, without the rows that have no caption.

    ``blank`` are the numbers of those rows over all files, ascending, int64 ``[K]``; see :func:`blank_rows`.
    """

    def __init__(
        self, path: Path, root: Path | StoreFolder, parts: Sequence[RowRange], columns: ColumnNames, blank: np.ndarray
    ) -> None:
        super().__init__(path, root)
        self.files = list(dict.fromkeys(part.file for part in parts))
        numbers = {file: number for number, file in enumerate(self.files)}
        self._parts = np.array([(numbers[part.file], part.group, part.first) for part in parts], dtype=np.int64)
        self._stops = np.cumsum([part.rows for part in parts], dtype=np.int64)
        self.columns = columns
        self._kept_before = blank - np.arange(len(blank))  # usable rows before each unusable one
        self._size = int(self._stops[-1] if len(parts) else 0) - len(blank)
        require(self._size > 0, f"{path}: no row with an image and a caption ({len(blank)} without a caption)")
        self._open: dict[Any, Any] = {}
        self._process = os.getpid()
        for row in blank[:LISTED].tolist():
            self._left_out.add(self._where(row)[0], NO_CAPTION)
        if len(blank):
            self._left_out.counts[NO_CAPTION] = len(blank)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return self._size

    def part(self, number: int) -> RowRange:
        file, group, first = self._parts[number].tolist()
        rows = self._stops[number] - (self._stops[number - 1] if number else 0)
        return RowRange(self.files[file], group, first, int(rows))

    @abstractmethod
    def table(self, number: int) -> pa.Table:
        """Return the columns of a part."""

    def opened(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what this process has opened under a key; what its parent opened before a fork is not shared."""
        if self._process != os.getpid():
            self._open, self._process = {}, os.getpid()
        if key not in self._open:
            self._open[key] = make()
        return self._open[key]

    @property
    def _blank(self) -> np.ndarray:
        return self._kept_before + np.arange(len(self._kept_before))

    def _without_blank(self, rows: pa.ChunkedArray) -> pa.ChunkedArray:
        usable = np.ones(len(rows), dtype=bool)
        usable[self._blank] = False
        return rows.filter(pa.array(usable)) if len(self) < len(rows) else rows

    def row(self, index: int) -> int:
        """Return the number over all files of a usable row."""
        return index + int(np.searchsorted(self._kept_before, index, side="right"))

    def _where(self, row: int) -> tuple[str, int, int]:
        """Return a row's name in messages, the number of its part, and its number in that part."""
        number = int(np.searchsorted(self._stops, row, side="right"))
        part = self.part(number)
        within = row - (int(self._stops[number - 1]) if number else 0)
        return f"{self.shown(part.file)} row {part.first + within}", number, within

    def cells(self, index: int) -> Cells:
        where, number, within = self._where(self.row(index))
        try:
            table = self.table(number)
            image, *captions = (table[name][within].as_py() for name in (self.columns.image, *self.columns.captions))
            group = "" if self.columns.group is None else group_name(table[self.columns.group][within].as_py())
            names = (self.columns.negative, self.columns.weight, self.columns.other_image)
            more = [None if name is None else table[name][within].as_py() for name in names]
        except UnicodeDecodeError as error:
            raise BadSample(where, "not UTF-8", f"not UTF-8 text ({error.reason}); write the file again") from error
        except (pa.ArrowException, OSError) as error:  # damaged pages go unnoticed when the file is opened
            cause = str(error).splitlines()[0]
            raise BadSample(where, "damaged table", f"cannot read this part ({cause}); write the file again") from error
        negative, weight, other = more
        weight = None if self.columns.weight is None else checked_weight(weight, self.columns.weight, where)
        other = image if self.columns.other_image and is_blank(other) else other
        caption = captions[0] if len(captions) == 1 else captions
        return Cells(image, caption, group, where, self._place(where), negative, weight, other)

    @staticmethod
    def _place(where: str) -> str:
        """Return the key of an image that is in the file, from the row's name in messages."""
        file, line = where.rsplit(" row ", 1)
        return f"{Path(file).name}:{line}"


def blank_rows(batches: Any, captions: Sequence[str]) -> np.ndarray:
    """Return the numbers of the rows that are blank in all caption columns, ascending, int64 ``[K]``."""
    found, first = [], 0
    for batch in batches:
        blank = np.logical_and.reduce([blank_mask(batch.column(caption)) for caption in captions])
        found.append(np.flatnonzero(blank) + first)
        first += batch.num_rows
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, dtype=np.int64)
