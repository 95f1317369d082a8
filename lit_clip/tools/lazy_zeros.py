"""Zeros that take memory only when written to."""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a CPU tensor that takes memory page by page when written to, and frees it with the tensor.

    ``torch.zeros`` writes to them at once, and what malloc has it may keep.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return torch.zeros(tuple(shape), dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE)
    return torch.frombuffer(pages, dtype=torch.uint8)[:size].view(dtype).view(torch.Size(shape))
