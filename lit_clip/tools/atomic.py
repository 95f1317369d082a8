"""Files and folders that one process reserves and writes, and that appear whole or not at all.

And shares of the work of jobs that do not communicate.
"""

import ctypes
import glob
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from lit_clip.errors import InputError

OS_ERROR = "(os error "  # of safetensors and tokenizers, which raise no OSError
DRAFTS = ".*.????????.tmp"  # see draft_of
_held: dict[Path, FileLock] = {}  # this process's locks


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


class Share(NamedTuple):
    """Every ``of``-th item, starting at item ``number``; by default all items."""

    number: int = 0  # counted from 0
    of: int = 1

    @classmethod
    def typed(cls, text: str | None) -> "Share":
        """Return the share of ``--share i/n``, counted from 1; all items without it."""
        if text is None:
            return cls()
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(f"--share {text}: must be i/n with i from 1 to n, such as 3/16 for the third job of 16")
        return cls(int(found[1]) - 1, int(found[2]))

    def has(self, item: int) -> bool:
        """Return whether the share contains an item."""
        return item % self.of == self.number

    @property
    def suffix(self) -> str:
        """Suffix for names of files that only this job writes; empty for all items."""
        return f"-{self.number + 1}-of-{self.of}" if self.of > 1 else ""

    def finished(self, output: object) -> str:
        """Return the last line that a job prints."""
        return (
            f"{output}: share {self.number + 1}/{self.of} is finished; when all are, the same command without --share "
            "joins them"
        )


@contextmanager
def claimed(*paths: Path | None, option: str = "--output", share: Share = Share()) -> Iterator[None]:  # noqa: B008
    """Claim files or folders to be written, from before their old content is read until the new content is there.

    Processes that write different shares of an output hold it together. One that writes all of it waits for no share:
    it is refused while any is held, but a share that starts later is not. What this process holds already stays held.

    Raises:
        InputError: another process holds one; the line names it, and ``option`` for another name.
    """
    before, names = frozenset(_held), [path for path in paths if path is not None]
    made = [parent for path in names for parent in path.absolute().parents if not parent.exists()]
    advice = f", or give another {option}" if option else ""
    try:
        for path in names:
            for each in _together(path.expanduser().resolve(), share):
                if holder := claim(each):
                    raise InputError(f"{path}: another process writes there ({holder}); wait for its end{advice}")
        yield
    finally:
        release(before)
        with suppress(OSError):  # not empty
            for parent in made:
                parent.rmdir()


def _together(path: Path, share: Share) -> list[Path]:
    """Return the files to claim for a share of an output; for the whole output, also others' claimed shares."""
    others = path.parent.glob(f".{glob.escape(path.name)}-*-of-*.lock") if share == Share() else ()
    names = [path.name + share.suffix, *(lock.name[1 : -len(".lock")] for lock in others)]
    return [path.parent / name for name in names]


def claim(path: Path) -> str:
    """Claim a file or folder until :func:`release` or the end of this process, however it ends.

    A file beside it is locked. Where that is impossible (no permission, no locks on this disk) it counts as held, and
    saving says what is wrong.

    Returns:
        who holds it instead; empty if this process does.
    """
    path = path.expanduser().resolve()
    file = path.parent / f".{path.name}.lock"
    if file in _held:
        return ""
    lock = FileLock(file, thread_local=False, fallback_to_soft=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.2)  # its holder may be about to remove the file
    except Timeout:
        with suppress(OSError):
            return file.read_text(encoding="utf-8") or "another process"
        return "another process"
    except (OSError, NotImplementedError):
        return ""
    _held[file] = lock
    with suppress(OSError):
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    return ""


def release(kept: Collection[Path] = ()) -> None:
    """Release this process's claims, except for the locks in ``kept``."""
    for file in _held.keys() - set(kept):
        lock = _held.pop(file)
        with suppress(OSError):
            file.unlink()  # while it is locked: a process that has opened it meanwhile finds it gone and makes another
        lock.release()


def remove_leftovers(checkpoint: Path) -> None:
    """Remove a killed run's leftovers beside a checkpoint, if no run writes there."""
    folder, before = checkpoint.absolute().parent, frozenset(_held)
    if not any(folder.glob(DRAFTS)):  # no lock is left beside folders that are only read
        return
    if not (claim(folder) or claim(folder.parent)):  # the folder of ModelCheckpoint.dirpath, or of a logger's version
        for draft in folder.glob(DRAFTS):
            remove(draft)
    release(before)
