"""Counts where a training step waits for its device, on machines that have none.

The device is a pretended one: torch takes ``cpu:0`` for the CPU, but it is not equal to ``cpu``. Tensors count as the
device's if they

- are parameters or buffers of the module,
- were created on ``cpu:0`` or moved there, or
- are the result of a torch function of such a tensor;

they say that their device is ``cpu:0``, so code that follows another tensor's device is followed too. A step waits
where it reads a value of such a tensor on the host, where it copies a tensor from the host to the device or back
without ``non_blocking``, and where it reads a copy (:class:`lit_clip.tools.hardware.HostCopy`) in the step in which
it was made.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

DEVICE = torch.device("cpu:0")
DEVICE_OF: Any = vars(torch._C.TensorBase)["device"].__get__
READS = {
    getattr(Tensor, name): name.strip("_")
    for name in (
        *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"),
        *("numpy", "cpu", "nonzero", "equal", "allclose", "unique", "masked_select", "is_nonzero"),
    )
} | {getattr(torch, name): name for name in ("nonzero", "equal", "allclose", "masked_select", "is_nonzero")}
CREATIONS = {torch.tensor, torch.as_tensor, torch.asarray}  # of the host's values
TO_HOST = {"item", "tolist", "numpy", "cpu", "array"}
OURS = ("/lit_clip/", "/callbacks/", "/lightning/")
# These copy from pinned memory without waiting if the device is CUDA, or ask torch itself for a tensor's device.
ASYNCHRONOUS = {("hardware.py", "to_device"), ("batch.py", "to"), ("clip_grad.py", "_clip_grads_with_norm_")}


def tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and mappings."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)


def place() -> str:
    """Return the innermost frames of lit-clip and Lightning that led here; empty if these do not wait on CUDA."""
    frame: FrameType | None = sys._getframe(2)
    found: list[str] = []
    while frame is not None:
        folder, _, name = frame.f_code.co_filename.rpartition("/")
        if (name, frame.f_code.co_name) in ASYNCHRONOUS:
            return ""
        if any(ours in f"{folder}/" for ours in OURS) and len(found) < 3:
            found.append(f"{folder.rpartition('/')[2]}/{name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "elsewhere"


class Waits(TorchFunctionMode):
    """While active, records the waits of each step.

    Attributes:
        found: for each optimiser step the number of waits, by kind and place.
        step: the one under way; None: no step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Counter[str]] = {}
        self.step: int | None = None
        self._device, self._copied = WeakIdKeyDictionary(), WeakIdKeyDictionary()

    def mark(self, values: Any) -> None:
        """Count tensors as the device's."""
        for tensor in tensors(values):
            self._device[tensor] = True

    def _note(self, what: str) -> None:
        where = "" if self.step is None else place()
        if where and self.step is not None:
            self.found.setdefault(self.step, Counter())[f"{what} {where}"] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        on_device = any(tensor in self._device for tensor in tensors([args, kwargs]))
        if func == DEVICE_OF:
            return DEVICE if on_device else result
        if func in READS and (on_device or (self.step is not None and self._copied.get(args[0]) == self.step)):
            self._note(READS[func])
        if func is Tensor.__getitem__ and any(t.dtype == torch.bool and t in self._device for t in tensors(args[1:])):
            self._note("mask")
        if func is Tensor.copy_:
            self._copy(args[0], args[1], kwargs)
        elif READS.get(func) not in TO_HOST and self._is_on_device(func, args, kwargs, on_device):
            self.mark(result)
        return result

    def _copy(self, target: Tensor, source: Tensor, kwargs: Any) -> None:
        """Note an in-place copy between host and device that is waited for; remember any other to the host."""
        if (target in self._device) == (source in self._device):
            return
        if not kwargs.get("non_blocking"):
            self._note("copy_")
        elif source in self._device:
            self._copied[target] = self.step

    def _is_on_device(self, func: Any, args: Any, kwargs: Any, on_device: bool) -> bool:
        """Return where a result is, given whether an argument is on the device; note a copy that is waited for."""
        target = kwargs.get("device")
        if func is Tensor.to:
            target = next((value for value in (*args[1:2], target) if isinstance(value, str | torch.device)), None)
        if target is None:
            return on_device
        to_device = torch.device(target) == DEVICE
        copied = func is Tensor.to or (func in CREATIONS and to_device)
        if copied and to_device != on_device and not kwargs.get("non_blocking"):
            self._note(f"{func.__name__}({target})")
        return to_device


class Steps(Callback):
    """Put the module on the pretended device, and tell ``Waits`` which step is under way."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.waits.mark([*pl_module.parameters(), *pl_module.buffers()])
        pl_module._device = DEVICE
        strategy: Any = trainer.strategy
        move = strategy.batch_to_device

        def moved(batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
            self.waits.step = trainer.global_step  # until the next batch, the loop's own work included
            return move(batch, DEVICE, dataloader_idx)

        strategy.batch_to_device = moved

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.waits.step = None


@contextmanager
def counted() -> Iterator[tuple[Waits, Steps]]:
    """Count the waits of a ``fit`` with the callback."""
    waits = Waits()
    with waits:
        yield waits, Steps(waits)
