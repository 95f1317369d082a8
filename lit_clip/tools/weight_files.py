"""Read weight files: safetensors, PyTorch files and OpenAI's TorchScript archives. Nothing in them is executed."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_clip.errors import InputError, require
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
FEW_BYTES = 2**27  # of weights, which may be in memory twice for a moment
DEEPEST = 100  # mappings and lists within each other; one that holds itself has no end

_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Bool")
_DTYPES: dict[str, torch.dtype] = {f"{kind}Storage": getattr(torch, kind.lower()) for kind in _KINDS}
_DTYPES |= {"CharStorage": torch.int8, "ByteStorage": torch.uint8}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file's tensors by name, floating-point ones in float32, on the CPU."""
    return tensors_of(read_file(path), path)


def tensors_of(values: dict[str, Any], name: Source) -> dict[str, Tensor]:
    """Return a file's tensors as :func:`read_tensors` does."""
    return as_float32(checked_tensors(values.get("state_dict", values), name))


def checked_tensors(state: Any, name: Source) -> dict[str, Tensor]:
    """Return the state dict; anything but plain tensors by name is an :class:`InputError`."""
    problem = f"it is a {type(state).__name__}"
    if isinstance(state, dict):
        problem = next((found for key, value in state.items() if (found := _problem(key, value))), "")
    if problem or not state:
        raise InputError(f"{name}: does not hold tensors by name: {problem or 'it is empty'}")
    return state


def _problem(key: Any, tensor: Any) -> str:
    """Return why an entry is no plain tensor with a name; an empty string if it is one."""
    if not isinstance(key, str) or not isinstance(tensor, Tensor):
        return f"{shortened(key)} is of type {type(tensor).__name__}"
    found = _oddity(tensor)
    return found and f"{shortened(key)} is {found}"


def _oddity(tensor: Tensor) -> str:
    """Return how a tensor is not a plain one; an empty string if it is."""
    kinds = {
        "on the meta device, without values": tensor.is_meta,
        f"{str(tensor.layout).removeprefix('torch.')}": tensor.layout != torch.strided or tensor.is_nested,
        "quantised": tensor.is_quantized,
        "complex": tensor.is_complex(),
    }
    problem = next((kind for kind, holds in kinds.items() if holds), "")
    # A copy of a view that repeats a few values would fill the memory.
    if not problem and tensor.nbytes > SMALL and tensor.nbytes > tensor.untyped_storage().nbytes():
        problem = f"{list(tensor.shape)} of fewer values"
    return problem


def check_tensors_within(values: Any, where: str = "", depth: int = 0) -> None:
    """Raise :class:`InputError` if values hold, at any depth, a tensor that is not plain, or are nested too deeply."""
    require(depth <= DEEPEST, f"{where.partition('.')[0]}: nested too deeply")
    if isinstance(values, Tensor):
        require(not (problem := _oddity(values)), f"{where}: a tensor that is {problem}")
    elif isinstance(values, Mapping):
        for name, value in values.items():
            check_tensors_within(value, f"{where}.{str(name)[:80]}" if where else str(name), depth + 1)
    elif isinstance(values, list | tuple):
        for value in values:
            check_tensors_within(value, where, depth + 1)


def as_float32(state: dict[str, Any]) -> dict[str, Tensor]:
    """Copy views, half-precision and memory-mapped tensors to float32 tensors of their own.

    The given dictionary is emptied on the way, so that a model is never in memory twice.
    """
    result = {}
    for key in list(state):
        value = state.pop(key)
        whole = value.untyped_storage().nbytes() == value.nbytes
        value = value.to(torch.float32) if value.is_floating_point() else value
        result[key.removeprefix("module.")] = value if whole and value.is_contiguous() else value.clone().contiguous()
    return result


def read_file(path: Path) -> dict[str, Any]:
    """Read a weight file's dictionary: tensors by name, or a checkpoint that has those as ``state_dict``."""
    with opening(path):
        if path.is_dir():
            return read_sharded(path, rows_of_weights)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return read_torchscript(archive)
        values = _torch_load(path)
    require(isinstance(values, dict), f"{path}: a {type(values).__name__}, not weights by name")
    return dict(values)


def read_mapped(path: Path) -> dict[str, Any]:
    """Read a checkpoint's values, but of its tensors only what is looked at; for checks, see :func:`read_file`."""
    with opening(path):
        values = load_mapped(path)
    require(isinstance(values, dict), f"{path}: a {type(values).__name__}, not weights by name")
    return dict(values)


def load_mapped(path: Path) -> Any:
    """Read as :func:`read_mapped` does, and raise what the parser raises; tensors in shards are 0."""
    if path.is_dir():
        return read_sharded(path, no_rows)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def read_sharded(folder: Path, wanted: Wanted = all_rows) -> dict[str, Any]:
    """Read a sharded checkpoint's folder as the dictionary that a whole checkpoint's file holds."""
    index = read_index(folder)
    with opening(rest := checked_rest(folder, index)):
        values = torch.load(rest, map_location="cpu", weights_only=True)
    require(isinstance(values, dict), f"{rest}: a {type(values).__name__}, not a checkpoint")
    fill(values, folder, index, wanted)
    return values


def _newest() -> str:
    """Return a hint at the newest checkpoint of the runs below the working folder."""
    newest = _newest_of(Path().glob("runs/*/*/checkpoints/*.ckpt"))
    return f"; the newest here is {newest}" if newest else ""


def _newest_of(files: Iterable[Path]) -> Path | None:
    """Return the newest of the files, or the last checkpoint of its run."""
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    last = newest and newest.with_name("last.ckpt")
    return last if last and last.exists() else newest


def _in_folder(folder: Path) -> str:
    """Say which checkpoint of a folder, often a run's, can be named."""
    newest = _newest_of([*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")])
    such = f"; name a file in it, such as {newest}" if newest else f" without {INDEX}; name a file"
    return f"is a folder{such}"


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Turn any error of somebody's weight file into one line that names it."""
    with reading(path, "weight file", hint="it may be incomplete"):
        sharded = is_sharded(path)
        if not sharded and path.is_dir():
            raise InputError(f"{path}: {_in_folder(path)}")
        require(sharded or path.is_file(), f"{path}: no such checkpoint file{_newest()}")
        try:
            if zipfile.is_zipfile(path):
                _check_unpacked_size(path)
            yield
        except pickle.UnpicklingError as error:  # torch's message advises to load the file unsafely
            message = "not a checkpoint of tensors and plain values, or incomplete; nothing in it was run"
            raise InputError(f"{path}: {message}") from error


def _check_unpacked_size(path: Path) -> None:
    """Refuse an archive that unpacks to far more than it is: torch's hold their tensors uncompressed."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    packed = path.stat().st_size
    if unpacked > 2 * packed + SMALL:
        raise InputError(f"{path}: {packed} bytes would unpack to {unpacked}; torch.save writes no such file")


def _torch_load(path: Path) -> Any:
    """Load a PyTorch file; of a checkpoint with optimiser states read only the weights, through a mapped file."""
    if not zipfile.is_zipfile(path):  # PyTorch's older format cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)
    values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        checked_tensors(values["state_dict"], path)
        size = sum(tensor.nbytes for tensor in values["state_dict"].values())
        if size < 0.7 * path.stat().st_size:
            copied: dict[str, Tensor] = {}
            for keys in _parts(list(values["state_dict"]), size):
                whole = len(keys) == len(values["state_dict"])  # it is mapped already; reading it again takes as long
                mapped = values if whole else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                copied |= {key: mapped["state_dict"][key].clone() for key in keys}
            return {**values, "state_dict": copied}
    return torch.load(path, map_location="cpu", weights_only=True)


def _parts(names: list[str], size: int) -> Iterator[list[str]]:
    """Yield the names of a file's tensors in eight parts, or in one if they have few bytes.

    A mapped tensor would change or crash when the file is overwritten, so each is copied. The file is mapped anew for
    each part, so that mapped pages do not add up to a second copy of the weights; not for each tensor, as safetensors'
    list of tensors is read every time.
    """
    each = 1 + len(names) // (8 if size > FEW_BYTES else 1)
    yield from (names[start : start + each] for start in range(0, len(names), each))


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    path.open("rb").close()  # of a file that may not be opened the library says that it does not exist
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    result: dict[str, Any] = {}
    for part in _parts(names, path.stat().st_size):
        with safe_open(path, "pt") as file:
            result |= {name: file.get_tensor(name).clone() for name in part}
    return result


class _Script:
    """Stand-in for an object of an archive's own code: keeps attributes, runs no methods."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _TensorUnpickler(pickle.Unpickler):
    """Reads a TorchScript archive's ``data.pkl``; refuses anything but tensors, containers and inert objects."""

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
    """Read the tensors of a TorchScript archive by their names in the state dict; its code is not read."""
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
    """Whether a source of weights can only be a file or folder."""
    text = os.fspath(source)
    return (
        os.path.exists(text)
        or text.startswith((".", "/", "~"))
        or text.endswith((".pt", ".ckpt", ".safetensors", ".bin"))
    )
