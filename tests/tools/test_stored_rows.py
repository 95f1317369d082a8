"""Stored rows that are damaged are created again; none is taken for one that was written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_clip.errors import InputError
from lit_clip.tools.sharded_files import lazy_zeros
from lit_clip.tools.stored_rows import ABSENT, StoredRows
from tests.helpers import forks
from tests.helpers.disks import mounted, why_no_disk

VALUES = torch.arange(1.0, 41.0).reshape(10, 4)


def filled(folder: Path) -> None:
    stored = StoredRows.create(folder, 10, (4,), torch.float32)
    stored.write(np.arange(10), VALUES)
    stored.close()


def layout(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "layout.json").write_text(text)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "values", 80),
        lambda folder: os.truncate(folder / "state", 3),
        lambda folder: (folder / "values").unlink(),
        lambda folder: (folder / "layout.json").unlink(),
        lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
        layout("[" * 100_000),
        layout('{"rows": 10, "shape": [2], "dtype": "float32"}'),
        layout('{"rows": Infinity, "shape": [4], "dtype": "float32"}'),
    ],
)
def test_damaged_rows_are_created_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    folder = tmp_path / "rows"
    filled(folder)
    damage(folder)
    with pytest.raises(InputError, match="rows: "):
        StoredRows(folder)
    stored = StoredRows.create(folder, 10, (4,), torch.float32)
    assert [stored.read(row) for row in range(10)] == [None] * 10
    filled(folder)
    for row in range(10):
        found = stored.read(row)
        assert found is not None
        assert torch.equal(found, VALUES[row])


def test_rows_of_another_shape_or_type_are_created_again(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    filled(folder)
    assert StoredRows.create(folder, 10, (4,), torch.float32).read(3) is not None
    assert StoredRows.create(folder, 10, (8,), torch.float16).read(3) is None


def swapped(values: np.ndarray) -> None:
    values[[2, 7]] = values[[7, 2]]


def not_numbers(values: np.ndarray) -> None:
    values[4, 1] = np.nan


def zeroed(values: np.ndarray) -> None:
    values[9] = 0


@pytest.mark.parametrize(("damage", "rows"), [(swapped, [2, 7]), (not_numbers, [4]), (zeroed, [9])])
def test_rows_whose_values_have_changed_become_absent(
    tmp_path: Path, damage: Callable[[np.ndarray], None], rows: list[int]
) -> None:
    filled(tmp_path / "rows")
    values = np.memmap(tmp_path / "rows" / "values", np.float32, "r+", shape=(10, 4))
    damage(values)
    values.flush()
    stored = StoredRows.create(tmp_path / "rows", 10, (4,), torch.float32)
    assert sum(damaged for _, damaged in stored.remove_damaged(np.arange(10))) == len(rows)
    assert np.flatnonzero(stored.state() == ABSENT).tolist() == rows
    stored.write(np.array(rows), VALUES[rows])
    stored.close()
    assert sum(damaged for _, damaged in stored.remove_damaged(np.arange(10))) == 0
    found = stored.read(np.arange(10))
    assert found is not None
    assert torch.equal(found, VALUES)


def test_damage_behind_the_end_of_a_short_row_is_undone(tmp_path: Path) -> None:
    stored = StoredRows.create(tmp_path / "rows", 2, (4,), torch.float32)
    stored.write(np.array([0, 1]), VALUES[:2, :2])
    stored.close()
    values = np.memmap(tmp_path / "rows" / "values", np.float32, "r+", shape=(2, 4))
    values[1, 3] = 5
    values.flush()
    assert list(stored.remove_damaged(np.arange(2))) == [(2, 1)]
    stored.write(np.array([1]), VALUES[1:2, :2])
    stored.close()
    assert list(stored.remove_damaged(np.arange(2))) == [(2, 0)]
    assert values.tolist() == [[1, 2, 0, 0], [5, 6, 0, 0]]


PROGRAM = """
import sys, numpy as np, torch
from pathlib import Path
from lit_clip.errors import InputError
from lit_clip.tools.stored_rows import StoredRows
from tests.helpers.disks import enter
enter(int(sys.argv[1]))
stored = StoredRows.create(Path(sys.argv[2]), 1000, (1000,), torch.float32)
try:
    for row in range(1000):
        stored.write(np.array([row]), torch.ones(1, 1000))
except InputError as error:
    print(error)
"""


@pytest.mark.skipif(bool(why_no_disk()), reason=why_no_disk())
def test_a_full_disk_is_an_error_and_no_bus_error(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "disk").mkdir()
    with mounted(tmp_path / "disk", "1m") as disk:
        words = [str(tmp_path / "program.py"), str(disk.holder), str(tmp_path / "disk/rows")]
        (done,) = forks.run([forks.Program(forks.script, words, tmp_path, {**os.environ})], timeout=60)
    line = f"{tmp_path}/disk/rows: cannot be written (No space left on device)\n"
    assert (done.returncode, done.stdout) == (0, line), done.stderr


def test_the_first_entries_of_rows_are_written_and_read(tmp_path: Path) -> None:
    stored = StoredRows.create(tmp_path / "rows", 10, (4,), torch.bfloat16)
    stored.write(np.array([7, 2]), VALUES[:2, :3].bfloat16())
    stored.close()
    found = stored.read(np.array([2, 7]), 3)
    assert found is not None
    assert torch.equal(found, VALUES[:2, :3].bfloat16().flip(0))


# Zeros that take no memory until they are written to.


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 5, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_they_equal_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.testing.assert_close(lazy_zeros(shape, dtype), torch.zeros(shape, dtype=dtype), rtol=0, atol=0)


def test_they_equal_torchs_where_the_system_has_no_private_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("mmap.MAP_PRIVATE")
    assert lazy_zeros((2, 3), torch.int64).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_another_process_writes_to_pages_of_its_own() -> None:
    zeros = lazy_zeros((4,), torch.float32)
    child = os.fork()
    if not child:
        zeros += 1
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert zeros.tolist() == [0, 0, 0, 0]
