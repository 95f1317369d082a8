"""How many FLOPs a device can do in a second, and the time of calls on it."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LARGEST_PRODUCT = 8192  # rows; the three matrices of a product take 800 MB
PEAK_SECONDS = 0.4  # for finding the fastest product
LONG_ENOUGH = 0.02  # seconds; products that take longer reach no higher rate
CALLS = 10  # that are timed together on a CUDA device


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float | None = None) -> float:
    """Measure the FLOP/s of the fastest of several products of square matrices, for about ``PEAK_SECONDS``."""

    def random(size: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)  # its own, to leave the run's random state untouched
        return torch.randn(size, size, generator=generator, device=device).to(dtype)

    end = time.perf_counter() + (PEAK_SECONDS if seconds is None else seconds)
    size, best, products = 512, 0.0, 0
    matrix = random(size)
    while products < 2 or time.perf_counter() < end:
        took, products = seconds_per_call(lambda: torch.mm(matrix, matrix), device), products + 1  # noqa: B023
        best = max(best, 2 * size**3 / took)
        if took < LONG_ENOUGH and size < LARGEST_PRODUCT:
            size *= 2
            matrix = random(size)
    return best


def seconds_per_call(work: Callable[[], object], device: torch.device, calls: int | None = None) -> float:
    """Time calls (by default one, or ``CALLS`` on a CUDA device, which idles while the host waits), with one wait."""
    calls = calls or (CALLS if device.type == "cuda" else 1)
    start = mark(device)
    for _ in range(calls):
        work()
    return seconds_between(start, mark(device)) / calls


def mark(device: torch.device) -> Any:
    """Return a point in time, for :func:`seconds_between`: of a CUDA device's queue, which is not waited for."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def seconds_between(start: Any, end: Any) -> float:
    """Return the seconds from one :func:`mark` to another, which is waited for."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
