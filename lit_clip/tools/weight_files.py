"""Read weight files: safetensors, PyTorch files and OpenAI's TorchScript archives. Nothing in them is executed."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from lit_clip.errors import InputError, similar_file
from lit_clip.tools.reading import reading
from lit_clip.tools.sharded_files import (
    INDEX,
    Wanted,
    all_rows,
    checked_rest,
    fill,
    is_sharded,
    no_rows,
    read_index,
    rows_of_weights,
)
from lit_clip.tools.untrusted import shortened

Source = str | os.PathLike[str]
"""The name of weights: a file, a folder, a name on the hub or in open_clip's registry."""

SMALL = 2**24  # bytes; no view or archive of this size is worth a refusal

_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Bool")
_DTYPES: dict[str, torch.dtype] = {f"{kind}Storage": getattr(torch, kind.lower()) for kind in _KINDS}
_DTYPES |= {"CharStorage": torch.int8, "ByteStorage": torch.uint8}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file's tensors by name, floating-point ones in float32, on the CPU."""
    return tensors_of(read_file(path), path)


def tensors_of(values: dict[str, Any], name: Source) -> dict[str, Tensor]:
    """Return copies of a file's tensors, which may be mapped, as :func:`read_tensors` does."""
    return as_float32(checked_tensors(values.get("state_dict", values), name))


def checked_tensors(state: Any, name: Source) -> dict[str, Tensor]:
    """Return the state dict; raise :class:`InputError` for anything but plain tensors by name."""
    problem = "" if isinstance(state, dict) else f"it is a {type(state).__name__}"
    for key, tensor in state.items() if not problem else ():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            problem = f"{shortened(key)} is of type {type(tensor).__name__}"
        elif oddity := _oddity(tensor):
            problem = f"{shortened(key)} is {oddity}"
        if problem:
            break
    if problem or not state:
        raise InputError(f"{name}: does not hold tensors by name: {problem or 'it is empty'}")
    return state


def _oddity(tensor: Tensor) -> str:
    """Return what makes a tensor not plain; an empty text for a plain tensor."""
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.layout != torch.strided or tensor.is_nested:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_quantized or tensor.is_complex():
        return "quantised" if tensor.is_quantized else "complex"
    # A copy of a view that repeats a few values would fill the memory.
    few = tensor.nbytes > SMALL and tensor.nbytes > tensor.untyped_storage().nbytes()
    return f"{list(tensor.shape)} of fewer values" if few else ""


def check_tensors_within(values: Any) -> None:
    """Raise :class:`InputError` if values contain, at any depth, a tensor that is not plain, or nest too deeply."""
    try:
        leaves = tree_flatten_with_path(values)[0]
    except RecursionError as error:
        raise InputError("nested too deeply") from error
    for keys, value in leaves:
        if isinstance(value, Tensor) and (problem := _oddity(value)):
            raise InputError(f"{keystr(keys)}: a tensor that is {problem}")


def as_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to new float32 tensors: mapped ones would change or crash when the file is overwritten."""
    return {
        key.removeprefix("module."): value.to(
            torch.float32 if value.is_floating_point() else value.dtype,
            copy=True,
            memory_format=torch.contiguous_format,
        )
        for key, value in state.items()
    }


def read_file(path: Path, wanted: Wanted = rows_of_weights) -> dict[str, Any]:
    """Read a weight file's dictionary: tensors by name, or a checkpoint with tensors in ``state_dict``.

    Tensors are mapped to the file where its format allows that: who keeps them copies them. Of tensors in shards only
    the ``wanted`` rows are read.
    """
    with opening(path):
        values = load_mapped(path, wanted)
    if not isinstance(values, dict):
        raise InputError(f"{path}: a {type(values).__name__}, not weights by name")
    return dict(values)


def read_mapped(path: Path) -> dict[str, Any]:
    """Read as :func:`read_file` does; tensors in shards are zeros that take no memory."""
    return read_file(path, no_rows)


def load_mapped(path: Path, wanted: Wanted = no_rows) -> Any:
    """Read as :func:`read_file` does, but raise the parser's own errors."""
    if path.is_dir():
        return read_sharded(path, wanted)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        path.open("rb").close()  # of a file that may not be opened the library says that it does not exist
        return load_file(path)
    archived = zipfile.is_zipfile(path)  # PyTorch's older format cannot be mapped
    if archived:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return read_torchscript(archive)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=archived)


def read_sharded(folder: Path, wanted: Wanted = all_rows) -> dict[str, Any]:
    """Read a sharded checkpoint's folder as the dictionary that a whole checkpoint's file contains."""
    index = read_index(folder)
    with opening(rest := checked_rest(folder, index)):
        values = torch.load(rest, map_location="cpu", weights_only=True)
    if not isinstance(values, dict):
        raise InputError(f"{rest}: a {type(values).__name__}, not a checkpoint")
    fill(values, folder, index, wanted)
    return values


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Turn any error about a user's weight file into one line that names it."""
    with reading(path, "weight file", hint="it may be incomplete"):
        if not (path.is_file() or is_sharded(path)):
            if not path.is_dir():
                raise InputError(f"{path}: no such checkpoint file{similar_file(path)}")
            files = [*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt")]
            newest = max(files, key=lambda file: (file.name == "last.ckpt", file.stat().st_mtime), default=None)
            such = f"; name a file in it, such as {newest}" if newest else f" without {INDEX}; name a file"
            raise InputError(f"{path}: is a folder{such}")
        try:
            if zipfile.is_zipfile(path):  # torch's hold their tensors uncompressed
                with zipfile.ZipFile(path) as archive:
                    unpacked = sum(entry.file_size for entry in archive.infolist())
                if unpacked > 2 * (packed := path.stat().st_size) + SMALL:
                    raise InputError(
                        f"{path}: {packed} bytes would unpack to {unpacked}; torch.save writes no such file"
                    )
            yield
        except pickle.UnpicklingError as error:  # torch's message advises to load the file unsafely
            message = "not a checkpoint of tensors and plain values, or incomplete; nothing in it was run"
            raise InputError(f"{path}: {message}") from error


class _Script:
    """Stand-in for an object of an archive's own code: it keeps attributes and runs no methods."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _TensorUnpickler(pickle.Unpickler):
    """Unpickle a TorchScript archive's ``data.pkl``; refuse anything but tensors, containers and inert objects."""

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
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is not a tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        _, storage_type, key, _, _ = pid
        if key not in self.storages:
            self.storages[key] = torch.frombuffer(bytearray(self.read(key)), dtype=_DTYPES[storage_type])
        return self.storages[key]

    @staticmethod
    def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        return torch.as_strided(storage, size, stride, offset)


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Read a TorchScript archive's tensors by their names in the state dict; its code is not read."""
    root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).rpartition("/")[0]
    unpickler = _TensorUnpickler(archive.read(f"{root}/data.pkl"), lambda key: archive.read(f"{root}/data/{key}"))
    return checked_tensors(dict(_named_tensors(unpickler.load(), "")), archive.filename or "the archive")


def _named_tensors(script: _Script, prefix: str) -> list[tuple[str, Tensor]]:
    found = []
    for name, value in getattr(script, "attributes", {}).items():
        if isinstance(value, Tensor):
            found.append((prefix + name, value))
        elif isinstance(value, _Script):
            found.extend(_named_tensors(value, f"{prefix}{name}."))
    return found


def is_path(source: str | os.PathLike[str]) -> bool:
    """Return whether a source of weights can only be a file or folder."""
    text = os.fspath(source)
    return (
        os.path.exists(text)
        or text.startswith((".", "/", "~"))
        or text.endswith((".pt", ".ckpt", ".safetensors", ".bin"))
    )
