"""Capabilities of this machine: devices, precisions by Lightning's names, memory of this process."""

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_clip.errors import require


def best_device() -> torch.device:
    """Return the accelerator, or the CPU if there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small tensor to a device; to a CUDA device without synchronising."""
    if device.type != "cuda":  # MPS would read freed memory (pytorch/pytorch#189690)
        return tensor.to(device)
    # From unpinned memory the copy would wait for all queued work.
    return tensor.pin_memory().to(device, non_blocking=True)


def has_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 matrices in hardware; emulation is slow."""
    # get_capabilities is newer than the oldest torch that is supported.
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))


def computes_in_bfloat16(accelerator: object) -> bool | None:
    """Return whether ``trainer.accelerator``'s device computes bfloat16 in hardware; None if unknown."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator != "cpu" and (accelerator != "auto" or torch.backends.mps.is_available()):
        return None
    return has_bfloat16()


def peak_of_process() -> int:
    """Return this process's peak resident memory in bytes; 0 if the system does not tell (Windows)."""
    try:  # getrusage's figure includes the parent's peak before a fork
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        try:
            import resource
        except ImportError:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def runs_ahead(device: torch.device) -> bool:
    """Return whether the host queues work for the device and continues, so that reading a value must wait."""
    return device.type == "cuda"  # MPS does too, but has no pinned memory to copy to


class HostCopy:
    """A tensor's values on their way to the host; the tensor may be changed at once."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._values.copy_(tensor, non_blocking=True)
        self._arrived: Any = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[Any]:
        """Return the values as nested lists; wait only for work that was queued before the copy."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory(device: torch.device) -> None:
    """Make this process and its forks keep the memory they free, if they compute on the CPU.

    glibc returns the memory of large tensors, so that the next ones are new pages, which the system clears and maps one
    by one. Without glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and device.type == "cpu":
        mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap
        mallopt(M_MMAP_MAX, 0)  # no large blocks outside the heap


Precision = Literal["32-true", "16-mixed", "bf16-mixed"]
"""float32, or matrix products under autocast with float32 weights."""

_DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def check_precision(precision: Precision, accelerator: str = "auto") -> None:
    """Refuse a precision that the device lacks; warn if it is emulated. ``accelerator`` is Lightning's name."""
    if precision == "16-mixed":
        on_cpu = accelerator == "cpu" or (accelerator == "auto" and best_device().type == "cpu")
        require(not on_cpu, "--precision 16-mixed: needs a GPU; on a CPU use 32-true")
    if precision == "bf16-mixed" and computes_in_bfloat16(accelerator) is False:
        from lightning.pytorch.utilities import rank_zero_warn  # takes seconds

        rank_zero_warn(
            "--precision bf16-mixed: emulated on this processor, which has no bfloat16 instructions, and slower than "
            "32-true"
        )


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the autocast context for encoding; ``32-true`` keeps the surrounding context, such as a trainer's."""
    return nullcontext() if precision == "32-true" else torch.autocast(device.type, _DTYPES[precision])
