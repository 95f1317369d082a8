"""Data workers: they end with the process that they read for, and leave signals to it."""

import os
import signal
import threading

from lightning.fabric.utilities.seed import pl_worker_init_function

from lit_clip.tools.processes import end_with_parent


def shield_worker(worker_id: int) -> None:
    """A data worker's ``worker_init_fn``: signals are for the process that the worker reads for, and it ends with it.

    SLURM, and whoever signals a process group, sends them to workers too; the loss of one is an error in the middle
    of a step, before anything could be saved.
    """
    if os.environ.get("PL_SEED_WORKERS") == "1":
        pl_worker_init_function(worker_id)  # Lightning sets it where there is no other
    if hasattr(signal, "pthread_sigmask"):
        signals = {signal.SIGTERM, signal.SIGUSR1}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before any thread starts: one that is open gets them
        if hasattr(signal, "sigwaitinfo"):
            threading.Thread(target=_wait_for_signal, args=(signals, os.getppid()), daemon=True).start()
    end_with_parent()


def _wait_for_signal(signals: set[signal.Signals], parent: int) -> None:
    """The data loader ends a worker that does not end by itself with SIGTERM."""
    while True:
        received = signal.sigwaitinfo(signals)
        if received.si_pid == parent and received.si_signo == signal.SIGTERM:
            os._exit(0)


def quiet_worker(worker_id: int) -> None:
    """A data worker's ``worker_init_fn``: it ends with the process that it reads for.

    Ctrl-C reaches every process of a terminal; the main one ends its workers, without a traceback from each.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
