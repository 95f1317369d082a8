"""The wall clock of a run, which another process can turn; the monotonic clock goes on as real clocks do."""

import datetime
import mmap
import struct
import sys
import time
from pathlib import Path
from typing import Any


def turn_clock(path: Path, seconds: float) -> None:
    """Set how far the clock of the processes that follow ``path`` differs from this machine's."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.write(struct.pack("d", seconds))


def follow_clock(path: Path) -> None:
    """Replace ``time.time`` and its relatives and ``datetime.now`` in this process and those it forks."""
    with path.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), 8)

    def ahead() -> float:
        return struct.unpack("d", shared[:8])[0]

    real, real_datetime = time.time, datetime.datetime

    def now() -> float:
        return real() + ahead()

    class Kind(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real_datetime)

    class Turned(real_datetime, metaclass=Kind):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return real_datetime.fromtimestamp(now(), tz)

        @classmethod
        def today(cls) -> datetime.datetime:
            return real_datetime.fromtimestamp(now())

    replaced = {
        time.time: now,
        time.time_ns: lambda: int(now() * 1e9),
        time.localtime: _at(time.localtime, now),
        time.gmtime: _at(time.gmtime, now),
        real_datetime: Turned,
    }
    by_id = {id(original): other for original, other in replaced.items()}
    for name, module in list(sys.modules.items()):
        if name.startswith(("pandas", "numpy", "pyarrow", "_strptime")):  # they compare the class itself
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in by_id:
                setattr(module, attribute, by_id[id(value)])


def _at(function: Any, now: Any) -> Any:
    return lambda seconds=None: function(now() if seconds is None else seconds)
