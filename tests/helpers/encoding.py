"""What commands encode, seen from within the process."""

from collections.abc import Callable
from typing import Any

import pytest

from lit_clip.embedding.encode import EncodingTask
from lit_clip.embedding.pair_scores import PairTask
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
