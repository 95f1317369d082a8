"""Data workers: they end with the process that they read for, leave signals to it, and lose no batch."""

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert, get_worker_info

from lit_clip.errors import require
from lit_clip.tools.processes import end_with_parent

Item = TypeVar("Item")
T = TypeVar("T")
_warned = False


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_for_images(processes: int) -> int:
    """Return the number of data workers for each of several processes here, if workers only decode images.

    One core is left to the processes themselves, and more than eight workers are faster than any encoder of ours.
    """
    return min(8, (usable_cores() - 1) // processes)


def loader(batches: Dataset[Any], num_workers: int, pin_memory: bool = False) -> DataLoader[Any]:
    """Load a dataset of whole batches, with at most one data worker per core and per batch.

    A single batch is not worth starting processes for. The global random state is left alone.
    """
    require(num_workers >= 0, f"--num_workers {num_workers} must be at least 0")
    count: int = len(batches)  # pyright: ignore[reportArgumentType]  # Dataset declares no length, ours have one
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=min(num_workers, count, usable_cores()) if count > 1 else 0,
        pin_memory=pin_memory,
        collate_fn=SharedMemoryCollate(default_convert),
        worker_init_fn=shield_worker,
        generator=torch.Generator().manual_seed(0),  # a data loader draws its workers' seeds, by default globally
    )


class Mapped(Dataset[T]):
    """Results of a function for each item; data workers receive both."""

    def __init__(self, function: Callable[[Item], T], items: Sequence[Item]) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> T:
        return self.function(self.items[number])


class SharedMemoryCollate:
    """A ``collate_fn`` that makes sure, inside the data worker, that the batch can be sent.

    torch moves tensors to shared memory in a thread of the worker. Where that is full (a container has 64 MB of it) the
    thread prints an error, the batch is lost, and the main process waits for it for ever. Here they are moved before,
    and what does not fit goes through a pipe, which is slower.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Any) -> Any:
        batch = self.collate(items)
        return batch if get_worker_info() is None else _movable(batch)


def _movable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _shared(value)
    if isinstance(value, Mapping):
        return {key: _movable(each) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_movable, value))
    return type(value)(map(_movable, value)) if type(value) in (list, tuple) else value


def _shared(tensor: Tensor) -> "Tensor | _Piped":
    global _warned
    try:
        return tensor.share_memory_()
    except RuntimeError as error:
        if not _warned:
            from lightning.pytorch.utilities import rank_zero_warn  # takes seconds

            rank_zero_warn(
                f"shared memory (/dev/shm) is full ({str(error).partition(chr(10))[0][:100]}), so batches go through a "
                "pipe, which is slower; raise --shm-size of the container, or set num_workers to 0"
            )
        _warned = True
        return _Piped(tensor)


class _Piped:
    """A tensor that is pickled with its values, and becomes a tensor again on arrival."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.contiguous()

    def __reduce__(self) -> tuple[Any, ...]:
        values = self.tensor.reshape(-1).view(torch.uint8).numpy()  # numpy has no bfloat16
        return _arrived, (values, self.tensor.dtype, self.tensor.shape)


def _arrived(values: Any, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(values).view(dtype).reshape(shape)


def shield_worker(worker_id: int) -> None:
    """Make a data worker ignore signals and end with its process; a ``worker_init_fn``.

    SLURM, Ctrl-C in a terminal, and whoever signals a process group reach the workers too. Losing one is an error in
    the middle of a step, before anything could be saved; the main process ends its workers itself.
    """
    if os.environ.get("PL_SEED_WORKERS") == "1":
        from lightning.fabric.utilities.seed import pl_worker_init_function  # takes seconds

        pl_worker_init_function(worker_id)  # Lightning sets it where there is no other worker_init_fn
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on macOS and Windows the loader could not end a worker that blocks SIGTERM
        signals = {signal.SIGTERM, signal.SIGUSR1}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before any thread starts: threads inherit the mask
        threading.Thread(target=_wait_for_signal, args=(signals, os.getppid()), daemon=True).start()
    end_with_parent()


def _wait_for_signal(signals: set[signal.Signals], parent: int) -> None:
    """End this worker on the parent's SIGTERM; the data loader sends it to workers that do not end themselves."""
    while True:
        received = signal.sigwaitinfo(signals)
        if received.si_pid == parent and received.si_signo == signal.SIGTERM:
            os._exit(0)
