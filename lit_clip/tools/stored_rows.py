"""Rows of a tensor in a memory-mapped file, each with a digest; any number of processes write them in any order."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.tools.atomic import make_folder, not_written, remove, replacing_folder
from lit_clip.tools.reading import read_at, reading

ABSENT, DONE, UNUSABLE = 0, 1, 2
UNUSABLE_MARK = np.uint64(0x756E757361626C65)  # in place of a digest; damage does not make it by chance
CHECKED_AT_ONCE = 64  # rows
SECONDS_BETWEEN_MARKS = 10.0  # of work that a killed process can lose
DTYPES = {
    str(each).removeprefix("torch."): each for each in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


class StoredRows:
    """A tensor ``[N, ...]`` in a folder: its values, and the digest of each finished row.

    Every few seconds, the digests of the rows written since are stored after their values are on the disk. A process
    may be killed at any time, and a machine may lose its power. Processes that write different rows need no lock.
    :meth:`remove_damaged` finds rows whose values have changed since. Copies sent to data workers map the files again.
    ``shape`` is a row's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with reading(folder, "folder of stored rows", hint="delete the folder"):
            layout = json.loads((folder / "layout.json").read_text(encoding="utf-8"))
            self.rows, self.shape = int(layout["rows"]), tuple(int(size) for size in layout["shape"])
            self.dtype = DTYPES[layout["dtype"]]
            self._row_bytes = math.prod(self.shape) * self.dtype.itemsize
            for file, size in (("values", self.rows * self._row_bytes), ("state", 8 * self.rows)):
                if not (folder / file).is_file() or (folder / file).stat().st_size != size:
                    raise ValueError(f"{file} has not {size} bytes")
        self._values: Any = None
        self._state: Any = None
        self._file: Any = None
        self._pending: dict[int, np.uint64] = {}  # new digests of rows
        self._marked = time.monotonic()

    @classmethod
    def create(cls, folder: Path, rows: int, shape: Sequence[int], dtype: torch.dtype) -> "StoredRows":
        """Create the files unless they exist; create damaged files, or files of other rows, again.

        Absent rows take no space on most file systems. Values are not checked, see :meth:`remove_damaged`.
        """
        wanted = rows, tuple(shape), dtype
        if folder.exists() and not cls._holds(folder, wanted):
            with FileLock(f"{folder}.lock"):  # another rank may have created them again in the meantime
                if not cls._holds(folder, wanted):
                    remove(folder)
        if not folder.exists():
            make_folder(folder.parent)
            layout = {"rows": rows, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
            try:
                with replacing_folder(folder) as draft:
                    with (draft / "values").open("wb") as stream:
                        stream.truncate(rows * math.prod(shape) * dtype.itemsize)
                    (draft / "state").write_bytes(bytes(8 * rows))  # with space for all of it, see _open
                    (draft / "layout.json").write_text(json.dumps(layout), encoding="utf-8")
            except InputError:
                if not folder.exists():  # otherwise another process was faster
                    raise
        return cls(folder)

    @classmethod
    def _holds(cls, folder: Path, wanted: tuple[int, tuple[int, ...], torch.dtype]) -> bool:
        try:
            found = cls(folder)
        except InputError:
            return False
        return (found.rows, found.shape, found.dtype) == wanted

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_values": None, "_state": None, "_file": None}

    def _open(self) -> None:
        """Map the files. Values are written to the file, because writing to its map on a full disk ends the process."""
        if self._values is None:
            self._values = np.memmap(self.folder / "values", np.uint8, "r", shape=(self.rows, self._row_bytes))
            self._file = (self.folder / "values").open("r+b")
            self._state = np.memmap(self.folder / "state", np.uint64, "r+", shape=(self.rows,))

    def state(self) -> np.ndarray:
        """Return the state of each row, ``ABSENT``, ``DONE`` or ``UNUSABLE``: uint8 ``[N]``."""
        self._open()
        return np.select([self._state == 0, self._state == UNUSABLE_MARK], [ABSENT, UNUSABLE], DONE).astype(np.uint8)

    def remove_damaged(self, rows: np.ndarray) -> Iterator[tuple[int, int]]:
        """Mark rows that differ from their digests as absent; yield numbers of newly compared and damaged rows."""
        done = rows[self.state()[rows] == DONE]
        parts = [done[start : start + CHECKED_AT_ONCE] for start in range(0, len(done), CHECKED_AT_ONCE)]
        with reading(self.folder, "folder of stored rows", hint="delete the folder"), ThreadPoolExecutor() as pool:
            for part, damaged in zip(parts, pool.map(self._damaged, parts), strict=True):
                for row in damaged:
                    self._file.seek(row * self._row_bytes)
                    self._file.write(bytes(self._row_bytes))
                self._file.flush()
                self._state[damaged] = 0
                yield len(part), len(damaged)

    def _damaged(self, rows: np.ndarray) -> list[int]:
        size = self._row_bytes
        found = ((row, read_at(self._file, size, row * size)) for row in rows.tolist())
        return [row for row, data in found if _digest(row, data) != self._state[row]]

    def write(self, rows: np.ndarray, values: Tensor) -> None:
        """Write rows ``[n, ...]``, or only their first entries, such as for short texts."""
        self._open()
        if values.dtype != self.dtype:
            raise InputError(f"{self.folder}: holds {self.dtype}, not {values.dtype}; delete the folder")
        fits = values.shape[2:] == self.shape[1:] and values.shape[1:2] <= self.shape[:1]
        assert fits, "only the first entries of a row may be given"
        try:
            for row, value in zip(rows.tolist(), values.detach().cpu().contiguous(), strict=True):
                content = value.view(torch.uint8).numpy().tobytes()
                self._file.seek(row * self._row_bytes)
                self._file.write(content)
                self._pending[row] = _digest(row, content)
            self._file.flush()
        except OSError as error:
            raise not_written(self.folder, error) from error
        self._mark_in_time()

    def mark_unusable(self, rows: Sequence[int]) -> None:
        """Mark rows that cannot be computed."""
        self._open()
        self._pending.update(dict.fromkeys(rows, UNUSABLE_MARK))
        self._mark_in_time()

    def _mark_in_time(self) -> None:
        if time.monotonic() - self._marked >= SECONDS_BETWEEN_MARKS:
            self._mark_pending()

    def _mark_pending(self) -> None:
        os.fsync(self._file.fileno())
        self._state[list(self._pending)] = list(self._pending.values())
        self._state.flush()
        self._pending, self._marked = {}, time.monotonic()

    def close(self) -> None:
        """Mark the last rows; files open again when used."""
        if self._values is not None:
            self._mark_pending()
            self._file.close()
            self._values = self._state = self._file = None

    def read(self, rows: int | np.ndarray, length: int | None = None) -> Tensor | None:
        """Return a row, or ``[n, ...]`` for several, with its first ``length`` entries; None if one is absent."""
        self._open()
        marks = self._state[rows]
        if not np.all((marks != 0) & (marks != UNUSABLE_MARK)):
            return None
        length = self.shape[0] if length is None else length
        shape = (*np.shape(rows), length, *self.shape[1:])
        data = np.array(self._values[rows, : length * self._row_bytes // self.shape[0]])
        return torch.from_numpy(data).view(self.dtype).reshape(shape)


def _digest(row: int, content: bytes) -> np.uint64:
    """Return the digest of a row's place and values; trailing zeros may be left out."""
    found = blake2b(content.rstrip(b"\0"), digest_size=8, salt=row.to_bytes(8, "little")).digest()
    return np.uint64(int.from_bytes(found, "little") or 1)
