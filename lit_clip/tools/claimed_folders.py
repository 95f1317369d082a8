"""Folders that one process alone writes to, held by a locked file beside each."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lit_clip.tools.atomic import remove

DRAFTS = ".*.????????.tmp"  # as lit_clip.tools.atomic.replacing names them
_held: dict[Path, FileLock] = {}  # this process's locks


def claim(folder: Path) -> str:
    """Hold a folder until :func:`release_folders` or the end of this process, however it ends.

    A file beside the folder is locked. Where that is impossible (no permission, no locks on this disk) the folder
    counts as held, and saving says what is wrong with it.

    Returns:
        who holds the folder instead; empty if this process does.
    """
    folder = folder.expanduser().resolve()
    path = folder.with_name(f".{folder.name}.lock")
    if path in _held:
        return ""
    lock = FileLock(path, thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.2)  # its holder may be about to remove the file
    except Timeout:
        with suppress(OSError):
            return path.read_text(encoding="utf-8") or "another process"
        return "another process"
    except (OSError, NotImplementedError):
        return ""
    _held[path] = lock
    with suppress(OSError):
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    return ""


def release_folders(kept: frozenset[Path] = frozenset()) -> None:
    """Give back the folders that this process holds."""
    for path in _held.keys() - kept:
        lock = _held.pop(path)
        with suppress(OSError):
            path.unlink()
        lock.release()


def remove_leftovers(checkpoint: Path) -> None:
    """Remove what a killed run has left beside a checkpoint, if no run writes there."""
    folder, before = checkpoint.absolute().parent, frozenset(_held)
    if not any(folder.glob(DRAFTS)):  # no lock is left beside folders that are only read
        return
    if not (claim(folder) or claim(folder.parent)):  # the folder of ModelCheckpoint.dirpath, or of a logger's version
        for draft in folder.glob(DRAFTS):
            remove(draft)
    release_folders(before)
