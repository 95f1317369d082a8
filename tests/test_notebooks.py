"""The notebooks run from top to bottom as they lie there, the second with what the first leaves."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

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
        assert not re.search(r"(?<![\w.:/<(])(?:/(?:home|root|tmp|work|Users|mnt|opt|usr|var)/|[A-Z]:\\)", said), said
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
