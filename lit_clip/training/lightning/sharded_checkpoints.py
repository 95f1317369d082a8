"""Save a checkpoint in shards: each rank writes its rows; see :mod:`lit_clip.tools.sharded_files`."""

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_with_path

from lit_clip import distributed
from lit_clip.errors import InputError, require
from lit_clip.tools.atomic import draft_of, remove, to_disk
from lit_clip.tools.hashing import sha256_of_file
from lit_clip.tools.reading import reason
from lit_clip.tools.sharded_files import INDEX, REST, VERSION, file_of, path_of, place_of, sha256_of
from lit_clip.training.lightning.checkpoint_io import put_in_place, write_plain

T = TypeVar("T")


def save_sharded(checkpoint: dict[str, Any], path: Path, files: int) -> None:
    """Save a checkpoint with tensors that the first ``files`` ranks together hold whole; a collective.

    The folder appears whole, in the place of what was there. If a rank cannot write, all ranks raise.
    """
    shards: dict[str, DTensor] = {}

    def leave_out(keys: tuple[Any, ...], value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        shards[path_of(tuple(getattr(key, "key", getattr(key, "idx", None)) for key in keys))] = value
        return None

    rest = tree_map_with_path(leave_out, checkpoint)
    rank, world = distributed.rank_and_world()
    draft, name = distributed.gather_objects([(draft_of(path.absolute()), uuid.uuid4().hex)])[0]
    try:
        _on_all_ranks(path, lambda: draft.mkdir(parents=True) if rank == 0 else None)
        place = place_of(rank, files, name)
        rows = _on_all_ranks(path, lambda: _write_rows(shards, file_of(draft, rank), place) if rank < files else {})
        index = {"version": VERSION, "world_size": world, "files": files, "checkpoint": name}
        tensors = {each: _description(shards[each], [rows[file][each] for file in range(files)]) for each in shards}
        _on_all_ranks(path, lambda: _finish(rest, {**index, "tensors": tensors}, draft, path) if rank == 0 else None)
    finally:
        if rank == 0:
            remove(draft)


def _on_all_ranks(path: Path, work: Callable[[], T]) -> list[T]:
    """Return the results of all ranks' work; if one fails, raise its error on all ranks."""
    mine: Any = None
    problem = error = None
    try:
        mine = work()
    except InputError as raised:
        problem, error = str(raised), raised
    except Exception as raised:  # any error of a disk or a library: the others would wait for ever
        rank = distributed.rank_and_world()[0]
        why = f"rank {rank}: {reason(raised)}"
        problem = f"{path}: the checkpoint cannot be written ({why}); the previous one is kept"
        error = raised
    everyone = distributed.gather_objects([(mine, problem)])
    for _, found in everyone:
        if found:
            raise InputError(found) from error
    return [result for result, _ in everyone]


def _write_rows(shards: Mapping[str, DTensor], file: Path, place: Mapping[str, str]) -> dict[str, int]:
    """Write this rank's rows, and return the number of rows."""
    from safetensors.torch import save_file

    require(
        file.parent.is_dir(),
        f"{file.parent.parent}: not seen by all machines; sharded checkpoints need a disk that they share",
    )
    mine = {name: each.to_local().detach().cpu().contiguous() for name, each in shards.items()}
    present = {name: each for name, each in mine.items() if len(each)}
    save_file(present, file, {**place, **{name: sha256_of(each) for name, each in present.items()}})
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
    to_disk(file)
    return {name: len(each) for name, each in mine.items()}


def _description(tensor: DTensor, rows: list[int]) -> dict[str, Any]:
    return {"shape": [*tensor.shape], "dtype": str(tensor.dtype).removeprefix("torch."), "rows": rows}


def _finish(rest: dict[str, Any], index: dict[str, Any], draft: Path, path: Path) -> None:
    write_plain(rest, draft / REST, path)
    (draft / INDEX).write_text(json.dumps({**index, "rest": sha256_of_file(draft / REST)}), encoding="utf-8")
    to_disk(draft / INDEX)
    put_in_place(draft, path)
