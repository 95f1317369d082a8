"""Stored rows that are damaged are created again; none is taken for one that was written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_clip.errors import InputError
from lit_clip.tools.stored_rows import StoredRows

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
        lambda folder: os.truncate(folder / "values", 1000),
        lambda folder: os.truncate(folder / "state", 3),
        lambda folder: (folder / "values").unlink(),
        lambda folder: (folder / "layout.json").unlink(),
        lambda folder: ((folder / "values").unlink(), os.mkfifo(folder / "values")),
        lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
        layout("[]"),
        layout("[" * 100_000),
        layout('{"rows": 10, "shape": [2], "dtype": "float32"}'),
        layout('{"rows": 10, "shape": 4, "dtype": "float32"}'),
        layout('{"rows": 10, "shape": [4], "dtype": []}'),
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
