"""What every part is given, and how it measures."""

import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import device_speed
import torch

Row = dict[str, Any]
NEEDS_CUDA = "needs CUDA"


class Setting(NamedTuple):
    """How to measure.

    Attributes:
        device: ``cuda`` or ``cpu``.
        tiny: whether to use tiny models and few steps.
        until: the part's end, of ``time.time``.
    """

    device: str
    tiny: bool
    until: float

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        """Return the seconds left."""
        return self.until - time.time()

    def memory(self) -> int:
        """Return the bytes of the tensors on the device; 0 on a CPU."""
        return torch.cuda.memory_allocated() if self.cuda else 0


def message_of(error: BaseException) -> str:
    """Return an exception's type and the start of its message as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def attempt(setting: Setting, what: str, work: Callable[[], Row], needs: float = 1.0, cuda: bool = False) -> Row:
    """Return the figures of ``work``, or why there are none.

    Args:
        setting: how to measure.
        what: name of the measurement.
        work: measures.
        needs: seconds that must be left; otherwise it is skipped.
        cuda: whether it is impossible on a CPU.
    """
    if cuda and not setting.cuda:
        return {"what": what, "skipped": NEEDS_CUDA}
    if setting.left() < needs * (0 if setting.tiny else 1):
        return {"what": what, "skipped": f"needs {needs:.0f} s, {setting.left():.0f} s left"}
    try:
        found = work()
    except Exception as error:  # whatever it is, the next measurement is still worth having
        found = {"failed": message_of(error)}
    gc.collect()
    if setting.cuda:
        torch.cuda.empty_cache()
    return {"what": what, **found}


def gap(times: float, why: str) -> Row:
    """Return entries of a row for the list of gaps: how many times as fast it could be."""
    return {"times": times, "gap": why}


def seconds_per_call(work: Callable[[], object], calls: int, setting: Setting) -> float:
    """Time several calls with one wait at the end, after one that is not timed."""
    work()
    return device_speed.seconds_per_call(work, torch.device(setting.device), calls)
