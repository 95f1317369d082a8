"""Calls are timed together where the host would otherwise wait for the device after each of them."""

import runpy
import time
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

SPEED = runpy.run_path(str(ROOT / "benchmarks/device_speed.py"))
CALLS, matmul_peak, seconds_between, seconds_per_call = (
    SPEED[name] for name in ("CALLS", "matmul_peak", "seconds_between", "seconds_per_call")
)


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


def test_the_matrix_product_peak_leaves_the_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    since = time.perf_counter()
    peak = matmul_peak(torch.device("cpu"), torch.float32, seconds=0.1)
    elapsed = time.perf_counter() - since
    assert torch.equal(torch.get_rng_state(), state)
    assert peak >= 2 * 2 * 512**3 / elapsed  # at least two products of at least that size ran in that time
