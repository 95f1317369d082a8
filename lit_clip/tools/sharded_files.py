"""Sharded checkpoints: folders with a separate file for each rank's rows of the tensors.

``NAME.ckpt/`` holds

- ``rank_0.safetensors`` and so on: a rank's rows of tensors, by their path in the checkpoint (RFC 6901, without the
  first slash), such as ``state_dict/visual.proj`` or ``optimizer_states/0/state/7/exp_avg``; the metadata
  (:func:`place_of`) say which file of which checkpoint it is, and the SHA-256 of each tensor
- ``rest.pt``: all else, as in the file of a whole checkpoint, with None in the place of these tensors
- ``sharded_checkpoint.json``: the :class:`Index`

:func:`lit_clip.tools.weight_files.read_sharded` opens one, and checks everything in it.
"""

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.tools.hashing import sha256_of_file
from lit_clip.tools.reading import naming, reading
from lit_clip.tools.untrusted import Count, shortened, wrong_value

INDEX, REST = "sharded_checkpoint.json", "rest.pt"
VERSION = 1
LARGEST_INDEX = 2**27  # bytes; 3,000 tensors on 1,000 ranks take a fifth
Files = Annotated[int, msgspec.Meta(ge=1, le=2**16)]
INSTEAD = "copy the whole folder again, or use another checkpoint"

Wanted = Callable[[str, int], range]
"""Path and number of rows of a tensor -> the rows to read; the others are 0."""


def all_rows(name: str, rows: int) -> range:
    """Read a whole tensor."""
    return range(rows)


def no_rows(name: str, rows: int) -> range:
    """Read only a tensor's shape and type, which takes no memory."""
    return range(0)


def rows_of_weights(name: str, rows: int) -> range:
    """Read everything except an optimiser's states."""
    return range(0 if name.startswith("optimizer_states/") else rows)


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a CPU tensor that takes memory page by page when written to, and frees it with the tensor.

    ``torch.zeros`` writes to them at once, and what malloc has it may keep.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return torch.zeros(tuple(shape), dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE)
    return torch.frombuffer(pages, dtype=torch.uint8)[:size].view(dtype).view(torch.Size(shape))


class ShardedTensor(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor's shape and torch dtype, and its number of rows in each file, in order."""

    shape: list[Count]
    dtype: str
    rows: list[Count]

    def __post_init__(self) -> None:
        require(isinstance(getattr(torch, self.dtype, None), torch.dtype), f"{shortened(self.dtype)} is no type")
        require(self.shape[:1] == [sum(self.rows)], f"{shortened(self.rows)} are not the rows of {self.shape}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a torch object."""
        return getattr(torch, self.dtype)


class Index(msgspec.Struct, forbid_unknown_fields=True):
    """Contents of a sharded checkpoint; it names no files, so that none outside of the folder is opened.

    Attributes:
        version: of the format.
        world_size: ranks of the run; those of other machines that only hold copies have no file.
        files: number of ranks' files.
        checkpoint: a name that each rank's file has in its metadata, too.
        rest: SHA-256 of ``rest.pt``.
        tensors: by path.
    """

    version: int
    world_size: Files
    files: Files
    checkpoint: str
    rest: str
    tensors: dict[str, ShardedTensor]

    def __post_init__(self) -> None:
        require(self.version == VERSION, "written by a later version of lit-clip; install that one")
        for name, each in self.tensors.items():
            if len(each.rows) != self.files:
                raise InputError(f"{shortened(name)}: has rows of {len(each.rows)} files")


def is_sharded(path: str | Path) -> bool:
    """Return whether a path is a sharded checkpoint's folder, complete or not."""
    return Path(path, INDEX).is_file()


def file_of(folder: Path, number: int) -> Path:
    """Return the file with a rank's rows."""
    return folder / f"rank_{number}.safetensors"


def place_of(number: int, files: int, checkpoint: str) -> dict[str, str]:
    """Return metadata that identify a rank's file within its checkpoint."""
    return {"checkpoint": checkpoint, "file": f"{number} of {files}"}


def sha256_of(rows: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, in about a second for 1 GB; ranks check what they write and read."""
    return sha256(rows.contiguous().view(torch.uint8).numpy().data).hexdigest()


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn any error about a file in the folder into one line that names it and says what to do."""
    require(file.is_file(), f"{file}: missing, or no file; {INSTEAD}")
    with reading(file, "part of a sharded checkpoint", hint=INSTEAD), naming(file):
        yield


def read_index(folder: Path) -> Index:
    """Read and check a folder's index."""
    file = folder / INDEX
    with _reading(file):
        require(file.stat().st_size <= LARGEST_INDEX, f"larger than {LARGEST_INDEX} bytes; {INSTEAD}")
        try:
            return msgspec.json.decode(file.read_bytes(), type=Index)
        except msgspec.ValidationError as error:
            raise wrong_value(error, None) from error


def checked_rest(folder: Path, index: Index) -> Path:
    """Return the file of everything outside the shards, if it belongs to the index."""
    file = folder / REST
    with _reading(file):
        require(sha256_of_file(file) == index.rest, f"damaged, or of another checkpoint; {INSTEAD}")
    return file


def fill(rest: dict[str, Any], folder: Path, index: Index, wanted: Wanted) -> None:
    """Read the wanted rows of tensors into a checkpoint's dictionary, which has None in their places."""
    with _reading(folder / INDEX):
        tensors = {name: lazy_zeros(each.shape, each.torch_dtype) for name, each in index.tensors.items()}
        for name, tensor in tensors.items():
            values, key = _place(rest, name)
            require(values[key] is None, f"{shortened(name)}: has a value in {REST}, too; {INSTEAD}")
            values[key] = tensor
    first = dict.fromkeys(tensors, 0)
    for number in range(index.files):
        with _reading(file := file_of(folder, number)):
            _read_rows(file, number, index, first, tensors, wanted)


def _read_rows(
    file: Path, number: int, index: Index, first: dict[str, int], tensors: Mapping[str, Tensor], wanted: Wanted
) -> None:
    """Check a file against the index and read its wanted rows; ``first`` has its first row of each tensor."""
    from safetensors import safe_open

    with safe_open(file, "pt") as shards:  # maps the file: only what is copied is read
        facts, place = shards.metadata() or {}, place_of(number, index.files, index.checkpoint)
        require(facts.get("checkpoint") == index.checkpoint, f"of another checkpoint than {INDEX}; {INSTEAD}")
        require(place.items() <= facts.items(), f"holds the rows of file {shortened(facts.get('file'))}; {INSTEAD}")
        expected = {name for name, each in index.tensors.items() if each.rows[number]}
        differing = sorted(expected ^ set(shards.keys()))
        require(not differing, f"has not the tensors of {INDEX} ({shortened(differing[:1])}); {INSTEAD}")
        for name in expected:
            each, part = index.tensors[name], shards.get_tensor(name)
            shape = [each.rows[number], *each.shape[1:]]
            found = f"{shortened(name)}: {str(part.dtype).removeprefix('torch.')} {list(part.shape)}"
            same = list(part.shape) == shape and part.dtype == each.torch_dtype
            require(same, f"{found}, and by {INDEX} {each.dtype} {shape}; {INSTEAD}")
            start, rows = first[name], wanted(name, each.shape[0])
            low, high = max(rows.start, start), min(rows.stop, start + len(part))
            if low < high:
                same = facts.get(name) == sha256_of(part)
                require(same, f"{shortened(name)}: other values than were saved; {INSTEAD}")
                tensors[name][low:high] = part[low - start : high - start]
            first[name] += len(part)


def path_of(keys: tuple[Any, ...]) -> str:
    """Return the path of a place in a checkpoint."""
    return "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def _place(values: Any, path: str) -> tuple[Any, Any]:
    *above, last = (key.replace("~1", "/").replace("~0", "~") for key in path.split("/"))
    for key in above:
        values = values[_key(values, key)]
    return values, _key(values, last)


def _key(values: Any, key: str) -> str | int:
    return key if isinstance(values, dict) and key in values else int(key)
