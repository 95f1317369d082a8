"""Copy batches to a GPU while it computes."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lit_clip.batch import CaptionBatch


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def on_copy_stream(move: Callable[[], CaptionBatch], device: torch.device) -> CaptionBatch:
    """Move a batch on a separate CUDA stream; on other devices, call the transfer directly.

    Lightning fetches a batch just before its step, and the host queues steps ahead of the device. On the stream of the
    steps the copy would start after the step before it; on its own it starts at once, so no batch has to be fetched
    earlier and the order of the data is the same. ``move`` does not wait for the device: its tensors are pinned.
    """
    if device.type != "cuda":
        return move()
    copying, computing = _stream_of(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        batch = move()
    computing.wait_stream(copying)
    for value in batch:
        if isinstance(value, Tensor):
            value.record_stream(computing)  # its memory is used again only after the step
    return batch
