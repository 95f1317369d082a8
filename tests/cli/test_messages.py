"""What mistakes on the command line and in YAML files say: the table of ``tests/messages.yaml``."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from tests.conftest import ROOT, TINY_YAML

ROWS = yaml.safe_load((ROOT / "tests/messages.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: next(iter(row.values()))[:60])
def test_a_mistake_is_one_line(
    row: Mapping[str, str], in_process: Callable[..., CompletedProcess[str]], caption_table: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text("model: {optimizer: {lr: 1}}", encoding="utf-8")
    (tmp_path / "typo.yaml").write_text(row.get("file", ""), encoding="utf-8")
    fit = ["fit", "--data", "datamodules.Captions", "--data.train", str(caption_table), "--data.val"]
    fit += [str(caption_table), "--data.batch_size", "16", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    fit += ["--model.architecture", TINY_YAML, "--trainer.max_steps", "4", "--trainer.enable_progress_bar", "false"]
    fit += ["--config", "typo.yaml"] if "file" in row else []
    typed = shlex.split(row.get("call", row.get("command", "")))
    result = in_process(*typed) if "command" in row else in_process(*fit, *typed)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("lit-clip: error: ")
    assert row["line"] in last
    assert len(last) < 700
