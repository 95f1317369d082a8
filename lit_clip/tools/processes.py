"""The process that started this one, as another rank or as a data worker, and what becomes of this one without it."""

import os
import sys
import threading
import time

LAUNCHER = "LIT_CLIP_LAUNCHER"  # the process that other ranks of this machine are started by
GRACE = 10.0  # seconds; after an orderly end the other ranks need one or two


def is_launched() -> bool:
    """Whether another rank's ``lit-clip`` started this process (not torchrun, SLURM or a person)."""
    return "LOCAL_RANK" in os.environ and os.environ.get(LAUNCHER) == str(os.getppid())


def watch_launcher() -> None:
    """End this process soon after the one that started it as a rank; other processes are left alone.

    A rank that computes or waits for data notices only at its next collective that the first rank was killed, and is
    in nobody's care until then. Called before Lightning starts the other ranks.
    """
    launcher = os.environ.get(LAUNCHER)
    if "LOCAL_RANK" not in os.environ or launcher is None:
        os.environ[LAUNCHER] = str(os.getpid())
    elif is_launched() or _has_ended(int(launcher)):
        threading.Thread(target=_wait_for_launcher, args=(int(launcher),), daemon=True).start()


def let_launcher_end(seconds: float) -> None:
    """Wait for the rank that started this one to end, which it may be about to do for the same reason.

    Lightning kills it, in the middle of what it says and saves, when a rank that it started ends with an error.
    """
    deadline = time.monotonic() + seconds
    while is_launched() and time.monotonic() < deadline:
        time.sleep(0.05)


def _has_ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's
        pass
    return False


def _wait_for_launcher(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    time.sleep(GRACE)
    sys.stderr.write("lit-clip: error: the first process of this machine has ended, so this one ends too\n")
    sys.stderr.flush()
    os._exit(1)


def end_with_parent() -> None:
    """End this process, a data worker, soon after the one that it reads for.

    A worker whose process was killed, or left without a word, notices; but it can end by itself only if what waits in
    its queue fits into a pipe (64 KiB), which nobody will read any more.
    """
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
