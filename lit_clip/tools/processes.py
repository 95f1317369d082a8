"""End this process, a rank or a data worker, after the process that started it; check its limit of open files."""

import os
import sys
import threading
import time

from lit_clip.errors import InputError

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None

LAUNCHER = "LIT_CLIP_LAUNCHER"  # id of the process that starts this machine's other ranks
LEAST_FILES = 128  # that a process may open; a data worker that can open no more loses its batch without an error
GRACE = 10.0  # seconds; after an orderly end the other ranks need one or two


def is_launched() -> bool:
    """Return whether another rank's ``lit-clip`` started this process (not torchrun, SLURM or a person)."""
    return "LOCAL_RANK" in os.environ and os.environ.get(LAUNCHER) == str(os.getppid())


def check_open_files() -> None:
    """Raise :class:`InputError` if this process may open too few files to train."""
    if _most_files() < LEAST_FILES:
        raise few_files()


def few_files() -> InputError:
    """Return the error for a process that may open too few files."""
    return InputError(
        f"too many open files: a process may open {_most_files():.0f}, and needs {LEAST_FILES} or more; raise the "
        "limit: ulimit -n 4096"
    )


def _most_files() -> float:
    return float("inf") if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**63


def watch_launcher() -> None:
    """In a rank, start a thread that ends this process soon after the process that launched it.

    A rank that computes or waits for data would notice only at its next collective that the first rank was killed.
    To be called before Lightning launches the other ranks.
    """
    launcher = os.environ.get(LAUNCHER)
    if "LOCAL_RANK" not in os.environ or launcher is None:
        os.environ[LAUNCHER] = str(os.getpid())
    elif is_launched() or _has_ended(int(launcher)):
        message = "lit-clip: error: the first process of this machine has ended, so this one ends too\n"
        threading.Thread(target=_end_after, args=(int(launcher), GRACE, message), daemon=True).start()


def let_launcher_end(seconds: float) -> None:
    """Wait for the rank that launched this one to end; it may be about to fail for the same reason.

    If this one ended first with an error, the launcher would be ended, too, and maybe while it reports and saves.
    """
    deadline = time.monotonic() + seconds
    while is_launched() and time.monotonic() < deadline:
        time.sleep(0.05)


def _has_ended(process: int) -> bool:
    if os.name == "nt":
        return False  # unknown; signal 0 is Ctrl-C there
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)  # others: it is another user's
    return False


def end_with_parent() -> None:
    """In a data worker, start a thread that ends this process soon after the process that it reads for.

    torch's own watchdog notices, too, but such a worker can end only if its queued data fit into a pipe (64 KiB).
    """
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(parent: int, seconds: float = 0.0, message: str = "") -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(seconds)
    if message:
        sys.stderr.write(message)
        sys.stderr.flush()
    os._exit(1)
