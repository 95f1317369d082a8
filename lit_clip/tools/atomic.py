"""Files and folders that appear whole or not at all."""

import ctypes
import glob
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_clip.errors import InputError

OS_ERROR = "(os error "  # of safetensors and tokenizers, which raise no OSError


@contextmanager
def replacing(path: Path, hint: str = "") -> Iterator[Path]:
    """Yield a temporary name beside ``path`` for a file or folder; on success, rename it to ``path``.

    On failure, and where nothing was written, what is at the temporary name is removed. A folder can only replace an
    empty one. ``hint`` says what to do, at the end of the error message.
    """
    whole = path.absolute()
    draft = draft_of(whole)
    try:
        yield draft
        to_disk(draft)
        os.replace(draft, path)
    except Exception as error:
        if not isinstance(error, OSError) and (isinstance(error, InputError) or OS_ERROR not in str(error)):
            raise
        raise not_written(path, error, hint) from error
    finally:
        remove(draft)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Like :func:`replacing`, with a new folder; also makes its parents, and removes them on failure."""
    made = [parent for parent in path.absolute().parents if not parent.exists()]  # the innermost first
    try:
        with replacing(path) as draft:
            draft.mkdir(parents=True)
            yield draft
    except BaseException:
        with suppress(OSError):  # another process has put something into one
            for parent in made:
                parent.rmdir()
        raise


def draft_of(path: Path) -> Path:
    """Return a temporary name beside ``path`` that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; return False if the system or disk cannot (Linux can, on most disks)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchanging = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchanging) == 0


def to_disk(draft: Path) -> None:
    """Flush a file, or a folder's files, to disk: after a power loss, the name must not lead to lost content."""
    for path in [draft, *draft.rglob("*")] if draft.is_dir() and not draft.is_symlink() else [draft]:
        if path.is_file():
            with path.open("r+b" if os.name == "nt" else "rb") as file:  # Windows syncs what may be written alone
                os.fsync(file.fileno())


def remove_drafts(path: Path) -> None:
    """Remove drafts that killed processes left beside ``path`` when :func:`replacing` it."""
    for draft in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        remove(draft)


def make_folder(path: Path, option: str = "") -> None:
    """Make a folder and its missing parents; an error begins with ``option``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be created ({error.strerror})".lstrip()) from error


def not_written(path: Path, error: Exception, hint: str = "") -> InputError:
    """Return the error for a file that could not be written."""
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
    return InputError(f"{path}: cannot be written ({reason}){hint}")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
