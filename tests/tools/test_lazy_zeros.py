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


def mebibytes() -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1]) // 1024


def test_their_pages_take_memory_when_they_are_written_to_and_give_it_back_with_the_tensor() -> None:
    before = mebibytes()
    zeros = lazy_zeros((200, MIB), torch.uint8)
    assert int(zeros[:20].sum()) == 0
    assert mebibytes() - before < 50
    zeros[:100] = 1
    assert 90 < mebibytes() - before < 150
    del zeros
    assert mebibytes() - before < 50


def test_another_process_writes_to_pages_of_its_own() -> None:
    zeros = lazy_zeros((4,), torch.float32)
    child = os.fork()
    if not child:
        zeros += 1
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert zeros.tolist() == [0, 0, 0, 0]
