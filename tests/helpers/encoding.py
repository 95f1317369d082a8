"""What commands encode, seen from within the process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.commands.score import PairTask
from lit_clip.embedding.encode import EncodingTask
from lit_clip.embedding.reading import EncoderBatch

STEPS: dict[type[EncodingTask], Any] = {kind: kind.step for kind in (EncodingTask, PairTask)}


def watch_encoding(monkeypatch: pytest.MonkeyPatch, see: Callable[[EncodingTask, EncoderBatch], object]) -> None:
    """Call a function with each batch before it is encoded, in place of an earlier call's function."""

    def watch(kind: type[EncodingTask], plain: Any) -> None:
        def step(task: EncodingTask, batch: EncoderBatch, *more: Any) -> Any:
            see(task, batch)
            return plain(task, batch, *more)

        monkeypatch.setattr(kind, "step", step)

    for kind, plain in STEPS.items():
        watch(kind, plain)


def changed_copy(checkpoint: Path, path: str, weight: str) -> str:
    """Write a copy of a checkpoint with another value of the first weight whose name ends so; return its path."""
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"][next(key for key in content["state_dict"] if key.endswith(weight))] += 0.5
    torch.save(content, path)
    return path
