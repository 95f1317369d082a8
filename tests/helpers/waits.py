"""Counts where a training step waits for its device: the pretended one, so that no GPU is needed.

A step waits where :mod:`tests.helpers.pretended` says so, and where it reads a copy
(:class:`lit_clip.tools.hardware.HostCopy`) in the step in which it was made.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_clip.tools.hardware import HostCopy
from tests.helpers import pretended

OURS = ("/lit_clip/", "/callbacks/", "/datamodules/", "/lightning/")
ASYNCHRONOUS = {("hardware.py", "to_device"), ("batch.py", "to")}  # from pinned memory, if the device is CUDA


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


class Waits(Callback):
    """Records the waits of each step: from one batch to the next, the loop's own work included.

    Attributes:
        found: for each optimiser step the number of waits, by kind and place.
    """

    def __init__(self) -> None:
        self.found: dict[int, Counter[str]] = {}
        self._step: int | None = None
        self._copied: dict[int, int | None] = {}  # id of a copy -> step in which it was made

    def note(self, what: str) -> None:
        where = "" if self._step is None else place()
        if where and self._step is not None:
            self.found.setdefault(self._step, Counter())[f"{what} {where}"] += 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy: Any = trainer.strategy
        move = strategy.batch_to_device

        def moved(*args: Any, **options: Any) -> Any:
            self._step = trainer.global_step
            return move(*args, **options)

        strategy.batch_to_device = moved

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = None

    def copy(self, copy: HostCopy) -> None:
        self._copied[id(copy)] = self._step

    def read(self, copy: HostCopy) -> None:
        if self._copied[id(copy)] == self._step:
            self.note("read")


@contextmanager
def counted() -> Iterator[Waits]:
    """Count the waits of a ``fit`` with this callback and the accelerator ``pretended``."""
    waits, created, read = Waits(), HostCopy.__init__, HostCopy.read

    def create(copy: HostCopy, *args: Any) -> None:
        created(copy, *args)
        waits.copy(copy)

    def reading(copy: HostCopy) -> Any:
        waits.read(copy)
        return read(copy)

    with pretended.present(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostCopy, "__init__", create)
        patch.setattr(HostCopy, "read", reading)
        patch.setattr(pretended, "watchers", [waits.note])
        yield waits
