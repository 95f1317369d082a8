"""The bench that fine-tunes a small SigLIP: its loss is the package's, and finished runs are kept."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lit_clip.losses.contrastive import Duplicates, sigmoid_loss, unit
from tests.conftest import ROOT

BENCH = ROOT / "benchmarks/siglip"


@pytest.fixture(autouse=True)
def no_module_of_a_script_stays() -> Iterator[None]:
    yield
    for name in ("pairs", "towers"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("duplicates", ["negatives", "positives", "ignored"])
def test_its_sigmoid_loss_is_the_packages(duplicates: Duplicates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from towers import Training, sigmoid_sum  # pyright: ignore[reportMissingImports]  # a script's folder

    image, text = unit(torch.randn(2, 7, 5, dtype=torch.float64))
    ids = torch.tensor([0, 1, 0, 2, 2, 2, 3])
    same, scale, bias = ids[:, None] == ids, torch.tensor(9.0), torch.tensor(-3.0)
    ours = sigmoid_sum(scale * image @ text.T + bias, same, Training(duplicates=duplicates))
    theirs = sigmoid_loss(image, text, scale, bias, 0, same, duplicates)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_every_recipe_runs_and_a_second_command_repeats_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With random features in place of the two encoders', and few pairs."""

    def pairs(images: int, versions: int, captions: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(images, versions, 1280), torch.randint(30, (images, captions))

    names = {"drawings": 9, "other drawings": 7, "photographs": 1, "other photographs": 1}
    kept = {
        "texts": torch.randn(30, 384),
        "training": {name: pairs(40, 2, captions) for name, captions in names.items()},
        "tests": {name: pairs(12, 1, captions) for name, captions in names.items()},
    }
    torch.save(kept, tmp_path / "features.pt")
    tables = ["--known", "a.csv", "b.csv", "--target", "c.csv", "d.csv"]
    options = [*tables, "--seeds", "1", "--pairs", "64", "--out", str(tmp_path)]
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setattr(sys, "argv", [str(BENCH), *options])

    def run() -> str:
        runpy.run_path(str(BENCH), run_name="__main__")
        return capsys.readouterr().out

    rows = [line for line in run().splitlines() if "(0.0)" in line]
    lines = (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line) for line in lines]
    assert len({json.dumps([run["start"], run["target"], run["how"]]) for run in runs}) == len(runs) > 30
    assert all(0 <= run["measured"]["drawings"] <= 100 for run in runs)
    assert len(rows) >= len(runs)
    assert "SigLIP" not in run().splitlines()[0]  # only the table is printed again
    assert (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines() == lines
