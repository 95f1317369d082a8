"""Versions, the machine, and the rates that no step can exceed."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from device_speed import matmul_peak
from lightning.fabric.utilities.throughput import get_available_flops
from results import PACKAGES, machine

from gpu.setting import Row, Setting, attempt, seconds_per_call


def rows(setting: Setting):
    yield attempt(setting, "versions", versions)
    yield attempt(setting, "machine", lambda: {**machine()})
    yield attempt(setting, "card", card, cuda=True)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield attempt(setting, f"peak of {name}", lambda dtype=dtype: peaks(setting, dtype))
    yield attempt(setting, "copies", lambda: copies(setting))


def versions() -> Row:
    """Return the versions of Python and of the packages; lit-clip need not be installed."""
    found: Row = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def card() -> Row:
    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "gib": found.total_memory / 2**30,
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "cudnn": torch.backends.cudnn.version(),
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def peaks(setting: Setting, dtype: torch.dtype) -> Row:
    """Return the measured and the listed TFLOP/s."""
    device = torch.device(setting.device)
    listed = get_available_flops(device, dtype) if setting.cuda else None
    measured = matmul_peak(device, dtype, seconds=0.05 if setting.tiny else 1.0)
    return {"measured_tflops": measured / 1e12, "listed_tflops": listed and listed / 1e12}


def copies(setting: Setting) -> Row:
    """Return GB/s of copies on the device (read and written) and from pinned memory to it."""
    size, calls = (2**20, 2) if setting.tiny else (2**30, 10)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=setting.cuda)
    one, other = (torch.empty(size, dtype=torch.uint8, device=setting.device) for _ in range(2))
    inside = seconds_per_call(lambda: other.copy_(one), calls, setting)
    towards = seconds_per_call(lambda: one.copy_(host, non_blocking=True), calls, setting)
    return {"on_device": 2 * size / inside / 1e9, "from_host": size / towards / 1e9}
