"""Calls are timed together where the host would otherwise wait for the device after each of them."""

from typing import Any

import pytest
import torch

from lit_clip.models.flops import CALLS, seconds_between, seconds_per_call


class Event:
    """A CUDA event whose time is the number of calls so far, in milliseconds."""

    log: list[str] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = float(self.log.count("call"))

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, other: Any) -> float:
        return other.time - self.time


def test_calls_on_cuda_are_timed_with_one_wait_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "log", [])
    assert seconds_per_call(lambda: Event.log.append("call"), torch.device("cuda")) == pytest.approx(1e-3)
    assert Event.log == ["call"] * CALLS + ["wait"]


def test_one_call_is_timed_on_a_cpu() -> None:
    calls: list[int] = []
    assert 0 < seconds_per_call(lambda: calls.append(1), torch.device("cpu")) < 1
    assert calls == [1]
    assert seconds_per_call(lambda: calls.append(1), torch.device("cpu"), 4) < 1
    assert len(calls) == 5
    assert seconds_between(2.0, 5.0) == 3
