"""The cache folder: files made once from the data, then read by every process and every run."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_info

from lit_clip.tools.atomic import replacing
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.own_files import default_cache_dir

Content = TypeVar("Content")


def cache_file(kind: str, source: Path, settings: Iterable[object], suffix: str) -> Path:
    """Return the cache path, in the folder ``kind``, of a result made from a file with settings."""
    stat = source.stat()
    key = hex_digest([str(source.resolve()), stat.st_size, stat.st_mtime_ns, *settings])
    return default_cache_dir() / kind / f"{source.stem[:40]}-{key[:20]}{suffix}"


@contextmanager
def writing_cached(path: Path) -> Iterator[Path]:
    """Create the cache folder if needed, and use :func:`lit_clip.tools.atomic.replacing` for a file in it."""
    with replacing(path, "; set XDG_CACHE_HOME to a folder with room") as draft:
        draft.parent.mkdir(parents=True, exist_ok=True)
        yield draft


def made_once(path: Path, load: Callable[[Path], Content], make: Callable[[Path], None]) -> Content:
    """Load a file of the cache; first make it if it is missing, or if ``load`` raises because it is damaged."""
    if path.is_file():
        try:
            return load(path)
        except Exception:  # parsers raise anything for a damaged file
            rank_zero_info(f"{path}: damaged, so it is made again")
    with writing_cached(path) as draft:
        make(draft)
    return load(path)
