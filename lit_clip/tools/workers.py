"""Data workers: they end with the process they read for, and leave signals to it."""

import os
import signal
import threading
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, Dataset

from lit_clip.errors import require
from lit_clip.tools.processes import end_with_parent


def loader(batches: Dataset[Any], num_workers: int, pin_memory: bool = False) -> DataLoader[Any]:
    """Load a dataset whose items are whole batches, with at most one data worker per core and per batch.

    A single batch is not worth starting processes for. The global random state is left alone.
    """
    require(num_workers >= 0, f"--num_workers {num_workers} must be at least 0")
    count: int = len(batches)  # pyright: ignore[reportArgumentType]  # Dataset declares no length, ours have one
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=min(num_workers, count, cores) if count > 1 else 0,
        pin_memory=pin_memory,
        worker_init_fn=shield_worker,
        generator=torch.Generator().manual_seed(0),  # a data loader draws its workers' seeds, by default globally
    )


def shield_worker(worker_id: int) -> None:
    """Make a data worker ignore signals and end with the process it reads for: a ``worker_init_fn``.

    SLURM, Ctrl-C in a terminal, and whoever signals a process group reach the workers too. Losing one is an error in
    the middle of a step, before anything could be saved; the main process ends its workers itself.
    """
    if os.environ.get("PL_SEED_WORKERS") == "1":
        pl_worker_init_function(worker_id)  # Lightning sets it where there is no other worker_init_fn
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signals = {signal.SIGTERM, signal.SIGUSR1}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before any thread starts: threads inherit the mask
        if hasattr(signal, "sigwaitinfo"):
            threading.Thread(target=_wait_for_signal, args=(signals, os.getppid()), daemon=True).start()
    end_with_parent()


def _wait_for_signal(signals: set[signal.Signals], parent: int) -> None:
    """End this worker on the parent's SIGTERM, which the data loader sends to one that does not end by itself."""
    while True:
        received = signal.sigwaitinfo(signals)
        if received.si_pid == parent and received.si_signo == signal.SIGTERM:
            os._exit(0)
