"""A small disk for one run, which can be filled or made read-only; it needs root and ends with its holder."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = "96m"
NEW_NAMESPACE = 0x20000  # CLONE_NEWNS of <sched.h>
HELD = 600  # seconds after which the disk vanishes even if nobody ends its holder


class Disk:
    """A file system in memory that is mounted at ``folder`` for the holder and the processes that enter it."""

    def __init__(self, holder: int, folder: Path) -> None:
        self.holder, self.folder = holder, folder

    def seen(self, path: Path) -> Path:
        """Return the path under which a process outside finds a file of the disk."""
        return Path(f"/proc/{self.holder}/root{path}")

    def fill(self) -> None:
        """Leave no byte."""
        with self.seen(self.folder / "filler").open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        """Undo :meth:`fill`."""
        self.seen(self.folder / "filler").unlink()

    def protect(self, folder: Path) -> None:
        """Make a folder read-only, by mounting it over itself: a whole disk with files open for writing is busy."""
        self._run("mount", "--bind", str(folder), str(folder))
        self._run("mount", "-o", "remount,bind,ro", str(folder))

    def unprotect(self, folder: Path) -> None:
        """Undo :meth:`protect`."""
        self._run("umount", "--lazy", str(folder))

    def _run(self, *command: str) -> None:
        inside = ["nsenter", "-t", str(self.holder), "-m", *command]
        done = subprocess.run(inside, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def why_no_disk() -> str:
    """Return why this process cannot mount a disk; empty if it can."""
    if os.name != "posix" or not Path("/proc/self/ns/mnt").exists() or os.geteuid() != 0:
        return "mounting a disk needs Linux and root"
    done = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return "this machine does not let root mount a disk" if done.returncode else ""


@contextmanager
def mounted(folder: Path, size: str = SIZE) -> Iterator[Disk]:
    """Mount a disk in a mount namespace, which no other process sees and which ends with the context."""
    script = f'mount -t tmpfs -o size={size} tmpfs "$1" && echo mounted && exec sleep {HELD}'
    holder = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script, "sh", str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mounted\n"
        yield Disk(holder.pid, folder)
    finally:
        holder.kill()
        holder.communicate()


def enter(holder: int) -> None:
    """Enter the holder's mount namespace and this folder in it; to be called before there is a second thread."""
    libc, here = ctypes.CDLL(None, use_errno=True), Path.cwd()
    with open(f"/proc/{holder}/ns/mnt") as namespace:
        if libc.setns(namespace.fileno(), NEW_NAMESPACE):
            raise OSError(ctypes.get_errno(), "setns")
    os.chdir(here)  # the kernel has gone to the root
