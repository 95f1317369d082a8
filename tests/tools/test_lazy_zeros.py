"""Zeros that take no memory until they are written to."""

import os
import re
from pathlib import Path

import pytest
import torch

from lit_clip.tools.lazy_zeros import lazy_zeros

MIB = 2**20


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 5, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_they_equal_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.testing.assert_close(lazy_zeros(shape, dtype), torch.zeros(shape, dtype=dtype), rtol=0, atol=0)


def test_they_equal_torchs_where_the_system_has_no_private_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("mmap.MAP_PRIVATE")
    assert lazy_zeros((2, 3), torch.int64).tolist() == [[0, 0, 0], [0, 0, 0]]


def resident(address: int) -> int | None:
    """Return the bytes in memory of the mapping that an address is in; None if it is in none."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and (found := re.match(r"Rss:\s+(\d+) kB", line)):
            return int(found[1]) * 1024
    return None


def test_their_pages_take_memory_when_they_are_written_to_and_give_it_back_with_the_tensor() -> None:
    zeros = lazy_zeros((200, MIB), torch.uint8)
    address, before = zeros.data_ptr(), resident(zeros.data_ptr())
    zeros[:100] = 1
    after = resident(address)
    assert before is not None
    assert after is not None
    assert 100 * MIB <= after - before < 110 * MIB
    assert int(zeros.sum()) == 100 * MIB
    del zeros
    assert (resident(address) or 0) < 100 * MIB


def test_another_process_writes_to_pages_of_its_own() -> None:
    zeros = lazy_zeros((4,), torch.float32)
    child = os.fork()
    if not child:
        zeros += 1
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert zeros.tolist() == [0, 0, 0, 0]
