"""Values of a device that the host reads later, so that it need not wait for the work that is queued now."""

from typing import Any

import torch
from torch import Tensor


def runs_ahead(device: torch.device) -> bool:
    """Whether the host queues work for the device and goes on, so that reading a value means waiting."""
    return device.type == "cuda"  # MPS does too, but has no pinned memory to copy to


class HostCopy:
    """The values of a tensor, on their way to the host; the tensor may be changed at once."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._values.copy_(tensor, non_blocking=True)
        self._arrived: Any = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[Any]:
        """Return the values as nested lists; wait for what was queued before the copy, and for nothing queued later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()
