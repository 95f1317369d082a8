"""The folder for what is made once from the data and read again by every process and every run."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from lit_clip.errors import InputError


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


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file, which gets its name when it is whole; another process may be making it too.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            write(Path(name))
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be written ({reason}); set XDG_CACHE_HOME to a folder with room") from error
