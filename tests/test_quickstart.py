"""The quickstart reaches about the figures of the README."""

from pathlib import Path

import pytest

from tests.cli.test_main import results
from tests.conftest import ROOT, lit_clip_command


@pytest.mark.slow
def test_the_quickstart_reaches_about_the_figures_of_the_readme(tmp_path: Path) -> None:
    config = ("--config", str(ROOT / "configs/quickstart.yaml"))
    threads = {"OMP_NUM_THREADS": "2"}  # the same for both runs: the order of sums changes their rounding
    fitted = lit_clip_command(tmp_path, "fit", *config, environment=threads, timeout=3600)
    assert fitted.returncode == 0, fitted.stderr
    reached = {name: float(value.removesuffix(" %")) for name, value in results(fitted.stdout).items()}
    assert reached["zero_shot/trained_names/top1"] >= 75
    assert reached["zero_shot/trained_names/top5"] >= 95
    assert reached["val/image_to_text_recall@1"] >= 10  # baseline: 0.6
    assert reached["zero_shot/line_art/top5"] >= 75  # baseline: 0.3
    assert reached["zero_shot/unseen_groups/top1"] >= 40  # baseline: 24
    (run,) = (tmp_path / "runs/quickstart").iterdir()
    checkpoint = run / "checkpoints/last.ckpt"
    again = ("validate", "--config", str(run / "fit_config.yaml"), "--ckpt_path", str(checkpoint))  # with its precision
    validated = lit_clip_command(tmp_path, *again, environment=threads, timeout=600)
    assert results(validated.stdout) == results(fitted.stdout)
