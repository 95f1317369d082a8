"""Checkpoints of several ranks, and weights in several files: what opens has the values that were saved."""

import json
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from lit_clip import distributed, load_model
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, Preprocessing, TextTransformerConfig, VisionTransformerConfig
from lit_clip.tools.sharded_files import INDEX, REST
from lit_clip.tools.weight_files import read_sharded
from lit_clip.training.lightning import sharded_checkpoints as writer
from tests.fuzz.inputs import Input, Inputs, Target, damaged, damaged_members, edited_json, exchanged, placed, to_json
from tests.fuzz.targets.weights import HOSTILE, use

RANKS = 2
# Each tensor has an even number of rows, so that the files of both ranks look alike.
EVEN = CLIPConfig(
    8, VisionTransformerConfig(16, 16, 8, 1, 1), TextTransformerConfig(8, 50, 8, 1, 1), preprocessing=Preprocessing(16)
)


@cache
def _checkpoint(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    state = dict(CLIP(EVEN).state_dict())
    moments = {number: {"exp_avg": torch.randn_like(value)} for number, value in enumerate(state.values())}
    settings = {"architecture": EVEN.to_dict()}
    common = {"epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.6.0", "loops": {}, "callbacks": {}}
    return {**common, "hyper_parameters": settings, "state_dict": state, "optimizer_states": [{"state": moments}]}


class _Rows:
    """A rank's half of a tensor, in the place of torch's DTensor, which needs a process for each rank."""

    def __init__(self, whole: Tensor, rank: int) -> None:
        self.shape, self.dtype, self.rank, self.whole = whole.shape, whole.dtype, rank, whole

    def to_local(self) -> Tensor:
        return self.whole.chunk(RANKS)[self.rank]


@cache
def whole_shards(seed: int = 0) -> dict[str, bytes]:
    """Return the files of a checkpoint that two ranks save, each in a thread."""
    checkpoint = _checkpoint(seed)
    barrier, told, own = threading.Barrier(RANKS, timeout=60), dict[int, list[Any]](), threading.local()

    def gather(mine: list[Any]) -> list[Any]:
        told[own.rank] = mine
        barrier.wait()
        found = [each for rank in range(RANKS) for each in told[rank]]
        barrier.wait()
        return found

    def save(rank: int) -> None:
        own.rank = rank
        divided = tree_map(partial(_divided, rank=rank), checkpoint)
        writer.save_sharded(divided, Path(folder, "last.ckpt"), RANKS)

    with (
        TemporaryDirectory() as folder,
        patch.object(writer, "DTensor", _Rows),
        patch.object(uuid, "uuid4", lambda: uuid.UUID(int=seed)),  # the same files in each process
        patch.multiple(distributed, rank_and_world=lambda: (own.rank, RANKS), gather_objects=gather),
        ThreadPoolExecutor(RANKS) as threads,
    ):
        list(threads.map(save, range(RANKS)))
        return {path.name: path.read_bytes() for path in sorted(Path(folder, "last.ckpt").iterdir())}


def _divided(value: Any, rank: int) -> Any:
    return _Rows(value, rank) if isinstance(value, Tensor) and value.ndim else value


@cache
def other_shards() -> dict[str, bytes]:
    """Return the files of another checkpoint of the same shapes, and halves of the first one's."""
    other = {f"other/{name}": data for name, data in whole_shards(1).items()}
    return {**other, **{f"half/{name}": data[: len(data) // 2] for name, data in whole_shards().items()}}


def shard_inputs() -> Inputs:
    index = edited_json(lambda: {INDEX: json.loads(whole_shards()[INDEX])}, (*HOSTILE, 2**40, 2**62, [2**40], [0, 9]))
    rest, parts = damaged_members(lambda: {REST: whole_shards()[REST]}), exchanged(whole_shards(), other_shards())
    return st.one_of(index, parts, parts, damaged(whole_shards), rest)


def read_shards(folder: Path, given: Input) -> Iterator[str]:
    """Read a checkpoint as a run that resumes does, and its model; a changed rest has its own digest in the index."""
    top, files = folder / "last.ckpt", placed(given, whole_shards(), other_shards())
    if given.name == REST:
        files[INDEX] = to_json({**json.loads(files[INDEX]), "rest": sha256(given.data).hexdigest()})
    top.mkdir()
    for name, data in files.items():
        (top / name).write_bytes(data)
    found, saved = _tensors(read_sharded(top)), [_tensors(_checkpoint(seed)) for seed in (0, 1)]
    same = [all(torch.equal(found[key], value) for key, value in each.items()) for each in saved]
    assert any(same), "other values than those of any checkpoint that was saved"
    yield use(load_model(top))


def _tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that lie in shards."""
    moments = {str(number): each["exp_avg"] for number, each in checkpoint["optimizer_states"][0]["state"].items()}
    return {key: value for key, value in {**checkpoint["state_dict"], **moments}.items() if value.ndim}


sharded_checkpoints = Target(shard_inputs, read_shards)
