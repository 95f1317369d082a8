"""Miniature sets that several test files use."""

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from datamodules.evaluation import annotation_files
from tests.conftest import ROOT
from tests.helpers.coloured_sets import WDS_LABELS, WDS_NAMES, WDS_TEMPLATES, wds_sample, write_files, write_wds

PROMPTS = json.loads((ROOT / "lit_clip/evaluation/paper_prompts.json").read_text(encoding="utf-8"))["sets"]


@pytest.fixture
def _mat_read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read MATLAB files in this process, which has SciPy: one of its own would import it anew for each file."""
    from scipy.io import loadmat

    def read(path: Path, names: Sequence[str]) -> dict[str, Any]:
        try:
            content = loadmat(path, squeeze_me=True)
        except Exception as error:
            raise ValueError(str(error)) from None
        found = pickle.dumps({name: content[name] for name in names if name in content}, protocol=4)
        return annotation_files.ArrayUnpickler(io.BytesIO(found)).load()

    monkeypatch.setattr(annotation_files, "_read_mat_apart", read)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A ``wds`` classification set of seven samples in two tars."""
    samples = [wds_sample(number, cls=str(label).encode()) for number, label in enumerate(WDS_LABELS)]
    samples[1]["s0000001.json"] = b'{"anything": 1}'
    return Path(write_wds(tmp_path / "wds", samples, WDS_NAMES, WDS_TEMPLATES))


@pytest.fixture(scope="session")
def imagenet_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 1,000 class folders, whose images encode their label."""
    root = tmp_path_factory.mktemp("v2") / "imagenetv2-matched-frequency-format-val"
    return write_files(root, {f"{label}/a.jpeg": label for label in range(1000)})


@pytest.fixture(scope="session")
def resisc45(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 45 class folders with 20 images each."""
    names = [name.replace(" ", "_") for name in PROMPTS["RESISC45"]["classes"]]
    files = {f"NWPU-RESISC45/{name}/{name}_{number:03}.jpg": 0 for name in names for number in range(1, 21)}
    return write_files(tmp_path_factory.mktemp("resisc45"), files)
