"""Keep unfinished work in one way: arrays in files; damaged files, or files of other settings, are made again."""

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lit_clip.errors import InputError
from lit_clip.tools.atomic import Share, not_written, replacing
from lit_clip.tools.console import stderr
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.reading import reading

T = TypeVar("T")
Arrays = Mapping[str, np.ndarray]
SECONDS_BETWEEN_PARTS = 10  # of work that a killed run can lose
DIGEST, SETTINGS = "digest", "model"  # names of two arrays of each file


def save_arrays(path: Path, settings: str, arrays: Arrays) -> None:
    """Write an ``.npz`` file, with a digest of its arrays and all settings that they depend on."""
    arrays = {**arrays, SETTINGS: np.array(settings)}
    with replacing(path) as draft, draft.open("wb") as file:
        np.savez(file, **{**arrays, DIGEST: np.array(_digest(arrays))})  # pyright: ignore[reportArgumentType]


def load_arrays(path: Path, settings: str, make: Callable[[dict[str, np.ndarray]], T]) -> T | None:
    """Return ``make``'s result for a file's arrays; None if the file is missing, damaged or of other settings."""
    try:
        with reading(path, "file of arrays"), np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            whole = str(arrays.pop(DIGEST)) == _digest(arrays) and str(arrays[SETTINGS]) == settings
            return make(arrays) if whole else None
    except InputError:
        return None


def _digest(arrays: Arrays) -> str:
    parts = ((name, str(array.dtype), array.shape, array.tobytes()) for name, array in sorted(arrays.items()))
    return hex_digest(part for each in parts for part in each)


def json_array(value: Any) -> np.ndarray:
    """Return a JSON value as an array of bytes; an array of ``str`` would be padded."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def json_value(array: np.ndarray) -> Any:
    """Return the JSON value of :func:`json_array`."""
    return json.loads(array.tobytes())


class Parts:
    """Finished parts of an unfinished output, in a hidden folder beside it; the next run resumes with them.

    Parts of other ``settings``, which are all that they depend on besides their items, are passed over. Several jobs
    may make a ``share`` of the parts each; the output is claimed by who makes it (:mod:`lit_clip.tools.atomic`).
    """

    def __init__(self, output: Path, settings: str, share: Share = Share()) -> None:  # noqa: B008
        self.output, self.settings, self.share = output, settings, share
        self.folder = output.with_name(f".{output.name.lstrip('.')}.parts")

    @property
    def stop(self) -> Path:
        """File that tells every rank that an unreadable image on one of them ends the run."""
        return self.folder / f"stop{self.share.suffix}"

    def start(self) -> None:
        """Make the folder, and remove an earlier run's :attr:`stop`; only one rank calls this."""
        try:
            self.folder.mkdir(exist_ok=True)
            self.stop.unlink(missing_ok=True)
        except OSError as error:
            raise not_written(self.folder, error) from error

    def add(self, arrays: Arrays, first: int) -> None:
        """Write a part; ``first`` is its first row."""
        self.folder.mkdir(exist_ok=True)  # another run with the same output may have removed it
        save_arrays(self.folder / f"{first:012}-{uuid.uuid4().hex}.npz", self.settings, arrays)

    @contextmanager
    def written(self, join: Callable[[list[T]], Arrays]) -> Iterator[Callable[[T, int], None]]:
        """Yield a function that takes a result and its first row.

        Results are joined and written every few seconds, and at the end, also of an interrupted run.
        """
        waiting: list[tuple[int, T]] = []
        last = time.monotonic()

        def write() -> None:
            nonlocal last
            if waiting:
                self.add(join([result for _, result in waiting]), waiting[0][0])
            waiting.clear()
            last = time.monotonic()

        def take(result: T, first: int) -> None:
            waiting.append((first, result))
            if time.monotonic() - last > SECONDS_BETWEEN_PARTS:
                write()

        try:
            yield take
        finally:
            write()

    def read(self, make: Callable[[dict[str, np.ndarray]], T]) -> Iterator[T]:
        """Yield ``make``'s result for each undamaged part, one at a time, by first row."""
        for path in sorted(self.folder.glob("*.npz")):
            part = load_arrays(path, self.settings, make)
            if part is not None:
                yield part

    def rows(self, number: int) -> np.ndarray:
        """Return which of N rows the parts have by their array ``rows``, bool ``[N]``."""
        done = np.zeros(number, dtype=bool)
        for rows in self.read(lambda arrays: arrays["rows"]):
            done[rows] = True
        return done

    def shared(self) -> bool:
        """End a run that makes only a share: keep its parts, and print how to join them; False for all parts."""
        if self.share == Share():
            return False
        self.end()
        stderr().print(self.share.finished(self.output))
        return True

    def end(self) -> None:
        """End an unfinished run: keep its parts, but remove an empty folder."""
        self.stop.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.folder.rmdir()

    def remove(self) -> None:
        """Remove the parts after the output is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)
