"""A device that torch and Lightning know and no machine has, to find device errors and waits where there is no GPU.

It is torch's backend for devices written in Python (``privateuseone``), so autograd, optimisers and Lightning treat it
as any device that is not the CPU. A tensor on it holds one of the CPU, with which operators compute. As on a GPU, an
operator refuses tensors of the CPU beside those of the device, unless they are scalars. Autocast casts as CUDA's does
for the operators listed here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

NAME = "pretended"
aten: Any = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
CONCATENATIONS = {aten.cat.default, aten.stack.default}  # these take no scalar of the CPU
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default} | {
    *(aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default)
}
LOW = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "scaled_dot_product_attention")
HIGH = ("layer_norm", "group_norm", "log_softmax.int", "softmax.int", "exp", "log", "pow.Tensor_Scalar", "logsumexp")

_present = False
watchers: list[Callable[[str], None]] = []  # called with the name of each operator that the host waits for


class OnDevice(Tensor):
    """A tensor of the device; ``held`` has its values."""

    held: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        options = {"dtype": held.dtype, "strides": held.stride(), "storage_offset": held.storage_offset()}
        with torch.inference_mode(held.is_inference()):  # also of a view, in that mode, of a tensor that is none
            tensor = Tensor._make_wrapper_subclass(cls, held.shape, device=f"{NAME}:0", **options)
        tensor.held = held
        return tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # a module that is moved then keeps its parameters
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "OnDevice":
        return OnDevice(inner["held"])

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file has no device
        return self.held.__reduce_ex__(protocol)

    def tolist(self) -> Any:  # torch refuses it for any subclass
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first")
        return self.detach().cpu().numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_two_devices(func, args, kwargs)
        if _waits(func, args, kwargs):
            _note(func.overloadpacket.__name__)
        target = kwargs.get("device")
        options = kwargs if target is None else {**kwargs, "device": torch.device("cpu")}
        result = func(*_mapped(_held, args), **{name: _mapped(_held, value) for name, value in options.items()})
        if not (isinstance(args[0], OnDevice) if func is aten.copy_.default else target is None or target.type == NAME):
            return args[0] if func is aten.copy_.default else result
        return return_and_correct_aliasing(func, args, kwargs, _mapped(OnDevice, result))


def _mapped(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """Apply a function to an operator's tensors; torch's own tree_map takes several times as long."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, list | tuple):
        return type(values)([_mapped(function, value) for value in values])
    return values


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, OnDevice) else tensor


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(lambda tensor: found.append(tensor) or tensor, values)
    return found


def _refuse_two_devices(func: Any, args: Any, kwargs: Any) -> None:
    operands = (args[0], *args[2:]) if func in INDEXING else args  # indices may be the CPU's
    for number, tensor in enumerate(_tensors([*operands, *kwargs.values()])):
        scalar = tensor.ndim == 0 and func not in CONCATENATIONS and not (number == 0 and func._schema.is_mutable)
        if not isinstance(tensor, OnDevice) and not scalar and func not in COPIES:
            found = f"found at least two devices, {NAME}:0 and {tensor.device}! ({func})"
            raise RuntimeError(f"Expected all tensors to be on the same device, but {found}")


def _note(wait: str) -> None:
    for watcher in watchers:
        watcher(wait)


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a GPU's host would wait for an operator."""
    if func is aten._to_copy.default:
        return kwargs.get("device", args[0].device).type != NAME and not kwargs.get("non_blocking")
    if func is aten.copy_.default:
        return isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice) and not (args[2:] or [False])[0]
    if func in INDEXING:  # the number of a mask's rows is unknown
        return any(each is not None and (each.dtype == torch.bool or each.device.type != NAME) for each in args[1])
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return func in READS


class _Generator(torch.Generator):
    """Random numbers of any device are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")


class _Module(backend_registration._DummyBackendModule):
    """What would be ``torch.cuda`` of CUDA."""

    def is_available(self) -> bool:
        return _present

    def device_count(self) -> int:
        return int(_present)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    device = nullcontext


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _present


class Pretended(CPUAccelerator):
    """Lightning's accelerator."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == NAME

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def is_available() -> bool:
        return _present


@cache
def _register() -> list[torch.library.Library]:
    """Tell torch and Lightning, once in a process."""
    # From now on autograd has no threads but the caller's; a thread for the device would forbid forks for good.
    torch.ones((), requires_grad=True).backward()
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
    backend, cast = torch.library.Library("aten", "IMPL", "PrivateUse1"), torch.library.Library("aten", "IMPL")
    for create in (aten.empty.memory_format, aten.empty_strided.default):
        backend.impl(create.name(), partial(_created, create))
    backend.impl("aten::_copy_from", _copied)
    rest = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel)
    for name in (*LOW, *HIGH):
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")
        cast.impl(func.name(), partial(_cast, func, name in HIGH), "AutocastPrivateUse1")
    AcceleratorRegistry.register(NAME, Pretended)
    return [backend, cast, rest]


def _created(create: Any, *args: Any, **kwargs: Any) -> Tensor:
    return OnDevice(create(*args, **{**kwargs, "device": torch.device("cpu")}))


def _copied(source: Tensor, target: OnDevice, non_blocking: bool = False) -> Tensor:
    """Fill what ``torch.tensor(..., device=...)`` creates."""
    _note("tensor")
    target.held.copy_(source)
    return target


def _cast(func: Any, high: bool, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.float32 if high else torch.get_autocast_dtype(NAME)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return func(*_mapped(cast, args), **{name: _mapped(cast, value) for name, value in kwargs.items()})


@contextmanager
def present() -> Iterator[torch.device]:
    """Let this process have the device, as torch's accelerator and Lightning's ``pretended``."""
    global _present
    _register()
    strategy, precision = _AcceleratorConnector._choose_strategy, _AcceleratorConnector._check_and_init_precision

    def chosen(connector: Any) -> Any:
        ours = isinstance(connector.accelerator, Pretended)
        return SingleDeviceStrategy(torch.device(NAME, 0)) if ours else strategy(connector)

    def precise(connector: Any) -> Any:
        plugin = precision(connector)
        if isinstance(connector.accelerator, Pretended) and isinstance(plugin, MixedPrecision):
            plugin.device = NAME
        return plugin

    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False):
        patch.setattr(_AcceleratorConnector, "_choose_auto_accelerator", staticmethod(lambda: NAME))
        patch.setattr(_AcceleratorConnector, "_choose_strategy", chosen)
        patch.setattr(_AcceleratorConnector, "_check_and_init_precision", precise)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.accelerator, "synchronize", lambda device=None: _note("synchronize"))
        _present = True
        try:
            yield torch.device(NAME, 0)
        finally:
            _present = False
