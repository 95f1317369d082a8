"""The cache folder: files made once from the data and read by every process and later run."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/lit-clip`` or ``~/.cache/lit-clip``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lit-clip"


def cache_file(kind: str, source: Path, settings: Iterable[object], suffix: str) -> Path:
    """Return the path for a file derived from ``source``; it changes with the source or the settings.

    Args:
        kind: subfolder of the cache.
        source: the file that it is made from.
        settings: everything else that decides its content.
        suffix: of the file's name.
    """
    stat = source.stat()
    identity = repr((str(source.resolve()), stat.st_size, stat.st_mtime_ns, *settings))
    return default_cache_dir() / kind / f"{source.stem[:40]}-{hashlib.sha1(identity.encode()).hexdigest()[:20]}{suffix}"
