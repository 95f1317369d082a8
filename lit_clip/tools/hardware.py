"""How much memory this process has used and may still use; bytes."""

import os
import sys
from pathlib import Path

SHARED = Path("/dev/shm")  # through which data workers hand over their batches; containers may have little of it

GROUP, GROUP_FILES = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "memory.stat")  # a container's


def peak_of_process() -> int:
    """The most that was in memory at any time."""
    if peak := _table(Path("/proc/self/status")).get("VmHWM"):  # getrusage has that of the parent before a fork too
        return peak
    import resource  # of Unix alone

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def of_process() -> int:
    """What is in memory now, or, where that is not known, the most that was."""
    return _table(Path("/proc/self/status")).get("VmRSS") or peak_of_process()


def available() -> int:
    """What may still be used without swapping, within the limit of a container."""
    free = _table(Path("/proc/meminfo")).get("MemAvailable")
    if free is None:
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, used, kept = ((GROUP / name).read_text(encoding="ascii") for name in GROUP_FILES)
        files = next(int(line.split()[1]) for line in kept.splitlines() if line.startswith("inactive_file "))
        return max(0, min(free, int(limit) - int(used) + files))  # files that were read are let go of when needed
    except (OSError, ValueError, StopIteration):  # no such group, or "max": no limit
        return free


def available_to_workers() -> int | None:
    """What data workers may hand over at a time; None: not limited apart."""
    try:
        status = os.statvfs(SHARED)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _table(path: Path) -> dict[str, int]:
    """The sizes in a file of lines such as ``VmHWM:  1024 kB``."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): 1024 * int(number) for name, number, _ in words}
