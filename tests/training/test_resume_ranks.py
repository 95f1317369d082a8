"""Ranks that would resume from different checkpoints say so together."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, run_lightning_ranks
from tests.helpers.small_sets import write_table

SCRIPT = str(ROOT / "tests/helpers/ranks_resume.py")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_table(tmp_path_factory.mktemp("table"), 8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, table: str) -> Path:
    """A run's checkpoint after its only step."""
    folder = tmp_path_factory.mktemp("one")
    run_lightning_ranks(1, folder, SCRIPT, "shard", "one", table, "auto", "8")
    return folder / "one.ckpt"


def other_weights(path: Path, folder: Path) -> Path:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["visual.proj"][0, 0] += 1
    torch.save(checkpoint, folder / "other.ckpt")
    return folder / "other.ckpt"


@pytest.mark.parametrize("case", ["none", "missing", "other"])
def test_ranks_with_different_checkpoints_all_end_with_the_same_line(
    case: str, checkpoint: Path, table: str, tmp_path: Path
) -> None:
    second = {"none": "none", "missing": str(tmp_path / "gone.ckpt")}.get(case) or other_weights(checkpoint, tmp_path)
    run_lightning_ranks(2, tmp_path, SCRIPT, "resume", table, str(checkpoint), str(second), timeout=60)
    lines = [(tmp_path / f"{rank}.error").read_text(encoding="utf-8") for rank in range(2)]
    assert lines[0] == lines[1]
    what = {"none": "from the beginning", "missing": "no such file", "other": "step 1"}[case]
    assert lines[0] == (
        f"--ckpt_path: ranks would resume from different checkpoints: {checkpoint} (step 1) on rank 0 and {second} "
        f"({what}) on rank 1; put the same file on every machine, or on a disk that all of them share"
    )


def test_ranks_may_have_copies_of_a_checkpoint_on_their_own_disks(checkpoint: Path, table: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes(checkpoint.read_bytes())
    run_lightning_ranks(2, tmp_path, SCRIPT, "resume", table, str(checkpoint), str(copy), timeout=60)
    assert not list(tmp_path.glob("*.error"))
