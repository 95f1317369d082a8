"""Weight files in: safetensors, PyTorch's zip files and OpenAI's TorchScript archives; nothing in them is executed."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_clip.errors import InputError

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, floating ones in float32, on the CPU.

    Raises:
        InputError: no such file, unreadable, incomplete, or holding anything but tensors by name.
    """
    values = read_file(path)
    state = values.get("state_dict", values)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: no tensors by name in it")
    return as_float32(state)


def as_float32(state: dict[str, Any]) -> dict[str, Tensor]:
    """Own float32 tensors for views, half precision and mapped files; the dictionary given is emptied on the way.

    One after the other, so that a model never lies in memory twice.
    """
    result = {}
    for key in list(state):
        value = state.pop(key)
        whole = value.untyped_storage().nbytes() == value.nbytes
        value = value.to(torch.float32) if value.is_floating_point() else value
        result[key.removeprefix("module.")] = value if whole and value.is_contiguous() else value.clone().contiguous()
    return result


def read_file(path: Path) -> dict[str, Any]:
    """Whatever dictionary a weight file holds: tensors by name, or a checkpoint that has those as ``state_dict``.

    Raises:
        InputError: no such file, unreadable, incomplete, or something in it that is neither tensor nor plain value.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return read_torchscript(archive)
        values = _torch_load(path)
    except pickle.UnpicklingError as error:  # torch's own text advises to load the file unsafely
        message = "not a checkpoint of tensors and plain values, or incomplete; nothing in it was run"
        raise InputError(f"{path}: {message}") from error
    except Exception as error:  # damaged bytes raise anything, IndexError and AssertionError too
        raise InputError(f"{path}: not a readable file of weights; it may be incomplete") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a {type(values).__name__}, not weights by name")
    return dict(values)


def _torch_load(path: Path) -> Any:
    """A mapped file costs no memory until it is read: of a checkpoint with optimiser states only the weights are."""
    if not zipfile.is_zipfile(path):  # PyTorch's older format cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)
    values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        tensors = [value for value in values["state_dict"].values() if isinstance(value, Tensor)]
        if sum(tensor.nbytes for tensor in tensors) < 0.7 * path.stat().st_size:
            # A mapped tensor would change or crash when the file is written again, so each is copied. Opened anew for
            # some at a time, the mapped pages do not add up to the weights once more.
            copied, keys = {}, list(values["state_dict"])
            for start in range(0, len(keys), 1 + len(keys) // 8):
                mapped = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
                for key in keys[start : start + 1 + len(keys) // 8]:
                    copied[key] = mapped[key].clone() if isinstance(mapped[key], Tensor) else mapped[key]
            return {**values, "state_dict": copied}
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = list(file.keys())
    result = {}
    for name in names:
        # The library maps the file, and a mapped tensor crashes when the file is written again, so each is copied.
        # Opened anew for each, the mapped pages do not add up to the weights once more.
        with safe_open(path, "pt") as file:
            result[name] = file.get_tensor(name).clone()
    return result


class _Script:
    """Stands for any object of an archive's own code: keeps its attributes, runs none of its methods."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _TensorUnpickler(pickle.Unpickler):
    """Reads a TorchScript archive's ``data.pkl``; anything but tensors, containers and inert objects is refused."""

    def __init__(self, data: bytes, read: Callable[[str], bytes]) -> None:
        super().__init__(io.BytesIO(data))
        self.read = read
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name.startswith("__torch__"):
            return _Script
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _type: value,
            **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "tensor", "double", "bool")},
        }
        if (module_name, global_name) in allowed:
            return allowed[module_name, global_name]
        if module_name == "torch" and global_name in _DTYPES:
            return global_name
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is no tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        _, storage_type, key, _, _ = pid
        if key not in self.storages:
            self.storages[key] = torch.frombuffer(bytearray(self.read(key)), dtype=_DTYPES[storage_type])
        return self.storages[key]

    @staticmethod
    def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        return torch.as_strided(storage, size, stride, offset)


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive under their state dict's names; its code is not even read."""
    root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).rpartition("/")[0]
    unpickler = _TensorUnpickler(archive.read(f"{root}/data.pkl"), lambda key: archive.read(f"{root}/data/{key}"))
    return dict(_named_tensors(unpickler.load(), ""))


def _named_tensors(script: _Script, prefix: str) -> list[tuple[str, Tensor]]:
    found = []
    for name, value in getattr(script, "attributes", {}).items():
        if isinstance(value, Tensor):
            found.append((prefix + name, value))
        elif isinstance(value, _Script):
            found.extend(_named_tensors(value, f"{prefix}{name}."))
    return found


def is_path(source: str | os.PathLike[str]) -> bool:
    """Whether something can only be meant as a file or folder."""
    text = os.fspath(source)
    return (
        os.path.exists(text)
        or text.startswith((".", "/", "~"))
        or text.endswith((".pt", ".ckpt", ".safetensors", ".bin"))
    )


Source = str | os.PathLike[str]
