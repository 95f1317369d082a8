"""The cache folder: files made once from the data and read again by every process and every run."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_info

from lit_clip.tools.atomic import replacing
from lit_clip.tools.cache_folder import default_cache_dir
from lit_clip.tools.hashing import hex_digest

Content = TypeVar("Content")


def cache_file(kind: str, source: Path, settings: Iterable[object], suffix: str) -> Path:
    """Return the cached path, in the folder ``kind``, of something made from a file with settings."""
    stat = source.stat()
    key = hex_digest([str(source.resolve()), stat.st_size, stat.st_mtime_ns, *settings])
    return default_cache_dir() / kind / f"{source.stem[:40]}-{key[:20]}{suffix}"


@contextmanager
def writing_cached(path: Path) -> Iterator[Path]:
    """:func:`lit_clip.tools.atomic.replacing` for a file in the cache, whose folder is made if it is not there."""
    with replacing(path, "; set XDG_CACHE_HOME to a folder with room") as draft:
        draft.parent.mkdir(parents=True, exist_ok=True)
        yield draft


def made_once(path: Path, load: Callable[[Path], Content], make: Callable[[Path], None]) -> Content:
    """Load a file of the cache; if there is none, or ``load`` raises anything for a damaged one, make it first."""
    if path.is_file():
        try:
            return load(path)
        except Exception:  # parsers raise anything for a damaged file
            rank_zero_info(f"{path}: damaged, so it is made again")
    with writing_cached(path) as draft:
        make(draft)
    return load(path)
