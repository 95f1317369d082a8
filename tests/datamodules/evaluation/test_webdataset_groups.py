"""Sets in tar files with metadata, as DataComp writes them."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from datamodules.evaluation import WebDataset, WebDatasetGroups
from lit_clip.evaluation.targets import Targets
from tests.helpers.coloured_sets import WDS_LABELS, WDS_NAMES, message_of, wds_sample, write_wds

METADATA = [[3, 2016, 1], [0, 2017, 0], [3, 2016, 1], [1, 2016, 0], [0, 2016, 2], [3, 2017, 0], [12, 2017, 2]]


def npy(values: object, dtype: str) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values, dtype=dtype))
    return file.getvalue()


def write(root: Path, dtype: str = "int64", **changed: bytes) -> str:
    samples = [
        wds_sample(n, cls=str(label).encode(), npy=npy(METADATA[n], dtype)) for n, label in enumerate(WDS_LABELS)
    ]
    for name, content in changed.items():
        samples[5][f"s0000005.{name}"] = content
    return write_wds(root, samples, WDS_NAMES)


@pytest.mark.parametrize("dtype", ["int64", "int32", "float32"])
def test_groups_are_the_first_columns(tmp_path: Path, dtype: str) -> None:
    images = WebDatasetGroups(write(tmp_path, dtype), ["region", "year"])
    assert images.groups()["region"] == ["3", "0", "3", "1", "0", "3", "12"]
    assert images.groups()["year"] == [str(row[1]) for row in METADATA]
    assert images.labels() == WDS_LABELS
    assert images.stamp() == WebDataset(str(tmp_path)).stamp()
    assert pickle.loads(pickle.dumps(images)).groups() == images.groups()
    targets = Targets.of(images, [0, 6])
    assert targets.groups == {"region": ["3", "12"], "year": ["2016", "2017"]}


@pytest.mark.parametrize(
    "content",
    [b"no array", npy([1.5, 2.0], "float64"), npy([1], "int64"), npy([[1, 2]], "int64"), npy([np.nan] * 2, "f4")],
)
def test_metadata_without_the_columns_is_an_error_that_names_the_sample(tmp_path: Path, content: bytes) -> None:
    message = message_of(lambda: WebDatasetGroups(write(tmp_path, npy=content), ["region", "year"]))
    for part in ("1.tar", "s0000005", ".npy"):
        assert part in message


def test_a_sample_without_metadata_is_an_error_that_names_it(tmp_path: Path) -> None:
    samples = [wds_sample(n, cls=str(label).encode()) for n, label in enumerate(WDS_LABELS)]
    assert "0.tar sample s0000000: no .npy" in message_of(
        lambda: WebDatasetGroups(write_wds(tmp_path, samples, WDS_NAMES), ["region"])
    )
