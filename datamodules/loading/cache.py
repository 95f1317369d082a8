"""The folder for what is made once from the data and read again by every process and every run."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/lit-clip`` or ``~/.cache/lit-clip``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lit-clip"


def cache_file(kind: str, source: Path, said: Iterable[object], suffix: str) -> Path:
    """Where something made from a file is kept: another name once the file or what is said of it is another.

    Args:
        kind: the folder in the cache.
        source: the file.
        said: all that decides what is made of it.
        suffix: of the name.
    """
    stat = source.stat()
    identity = repr((str(source.resolve()), stat.st_size, stat.st_mtime_ns, *said))
    return default_cache_dir() / kind / f"{source.stem[:40]}-{hashlib.sha1(identity.encode()).hexdigest()[:20]}{suffix}"
