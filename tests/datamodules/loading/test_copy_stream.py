"""Batches are copied on a stream of their own on CUDA, here a fake one, and as always elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from datamodules import Captions, caption_datamodule
from datamodules.caption_datamodule import on_copy_stream
from lit_clip.batch import CaptionBatch


def batch_of(pairs: int) -> CaptionBatch:
    images = torch.arange(pairs * 12, dtype=torch.uint8).reshape(pairs, 3, 2, 2)
    return CaptionBatch(images, torch.arange(pairs)[:, None], [str(i) for i in range(pairs)])


class FakeStream:
    def __init__(self, name: str, events: list[tuple[str, ...]]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other: "FakeStream") -> None:
        self.events.append((self.name, "waits for", other.name))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, ...]]]:
    """Replace CUDA's streams by fakes that list what happens on which."""
    found: list[tuple[str, ...]] = []

    @contextmanager
    def entered(stream: FakeStream) -> Iterator[None]:
        found.append(("enter", stream.name))
        yield
        found.append(("leave", stream.name))

    def record(tensor: Tensor, stream: FakeStream) -> None:
        found.append(("memory used by", stream.name, str(tuple(tensor.shape))))

    caption_datamodule._stream_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("copying", found))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream("computing", found))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(Tensor, "record_stream", record)
    yield found
    caption_datamodule._stream_of.cache_clear()


def test_steps_wait_for_the_copy_and_keep_its_memory(events: list[tuple[str, ...]]) -> None:
    batch = batch_of(5)

    def move() -> CaptionBatch:
        events.append(("copied",))
        return batch

    assert on_copy_stream(move, torch.device("cuda", 0)) is batch
    assert events == [
        ("enter", "copying"),
        ("copied",),
        ("leave", "copying"),
        ("computing", "waits for", "copying"),
        ("memory used by", "computing", "(5, 3, 2, 2)"),
        ("memory used by", "computing", "(5, 1)"),
    ]
    streams = {id(caption_datamodule._stream_of(torch.device("cuda", 0))) for _ in range(3)}
    assert len(streams) == 1  # a device has one, not one a batch


def test_nothing_happens_on_a_cpu(events: list[tuple[str, ...]]) -> None:
    data, batch = Captions("pairs.csv", batch_size=2), batch_of(3)
    moved = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert [a is b or torch.equal(a, b) for a, b in zip(moved[:2], batch[:2], strict=True)] == [True, True]
    assert moved[2:] == batch[2:]
    assert events == []


def test_a_data_module_copies_on_the_stream(events: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning.pytorch.core.hooks.move_data_to_device", lambda batch, device: events.append((str(device),)) or batch
    )
    Captions("pairs.csv", batch_size=2).transfer_batch_to_device(batch_of(2), torch.device("cuda", 1), 0)
    assert events[:4] == [
        ("enter", "copying"),
        ("cuda:1",),
        ("leave", "copying"),
        ("computing", "waits for", "copying"),
    ]
