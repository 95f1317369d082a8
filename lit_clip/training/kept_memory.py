"""Keep memory that a process on a CPU frees, as torch does with a GPU's."""

import ctypes
import sys

import torch

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
