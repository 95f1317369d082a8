"""The cache folder: files made once from the data and read again by every process and every run."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_clip.tools.atomic import replacing
from lit_clip.tools.hashing import hex_digest


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/lit-clip`` or ``~/.cache/lit-clip``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lit-clip"


def cache_file(kind: str, source: Path, settings: Iterable[object], suffix: str) -> Path:
    """Return the cached path of something made from a file; the name changes with the file and the settings.

    Args:
        kind: the folder in the cache.
        source: the file.
        settings: everything else that the content depends on.
        suffix: of the name.
    """
    stat = source.stat()
    key = hex_digest([str(source.resolve()), stat.st_size, stat.st_mtime_ns, *settings])
    return default_cache_dir() / kind / f"{source.stem[:40]}-{key[:20]}{suffix}"


@contextmanager
def writing_cached(path: Path) -> Iterator[Path]:
    """:func:`lit_clip.tools.atomic.replacing` for a file in the cache, whose folder is made if it is not there."""
    with replacing(path, "; set XDG_CACHE_HOME to a folder with room") as draft:
        draft.parent.mkdir(parents=True, exist_ok=True)
        yield draft
