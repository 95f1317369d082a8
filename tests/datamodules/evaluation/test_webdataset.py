"""Sets in tar files, with metadata too, as DataComp writes them."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.evaluation import WebDataset, WebDatasetCaptions, WebDatasetGroups, WebDatasetMultiLabel
from lit_clip.errors import BadSample
from lit_clip.evaluation.data import MissingData
from lit_clip.evaluation.targets import Targets
from tests.helpers.coloured_sets import (
    IMAGE_FORMATS,
    WDS_LABELS,
    WDS_NAMES,
    assert_same_after_pickling,
    colour,
    colour_of,
    encoded,
    merged,
    message_of,
    wds_sample,
    write_tar,
    write_wds,
)


def test_tar_set_uses_its_own_class_names_templates_and_order(tars: Path) -> None:
    images = WebDataset(str(tars))
    assert images.labels() == WDS_LABELS
    assert images.class_names == ["apple", "river boat", "café"]
    assert images.templates == ["a photo of a {}.", "{}, a {} thing"]
    assert [images.key(i) for i in (0, 3, 4)] == ["0/s0000000", "0/s0000003", "1/s0000004"]
    for index in (6, 0, 4, 2, 1, 5, 3):
        got = colour_of(images, index)
        assert got == pytest.approx(colour(index), abs=3 if IMAGE_FORMATS[index] == "jpg" else 0)
    assert_same_after_pickling(images)


def test_tar_set_equals_what_clip_benchmark_reads(tars: Path) -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    peer = builder.build_wds_dataset("x", lambda image: image.convert("RGB"), "test", str(tars))
    images = WebDataset(str(tars))
    rows = list(peer)
    assert [label for _, label in rows] == images.labels()
    for index, (image, _) in enumerate(rows):
        assert image.tobytes() == images[index][0].convert("RGB").tobytes()
    assert peer.classes == images.class_names
    assert [template.replace("{c}", "{}") for template in peer.templates] == images.templates


def test_captions_are_the_lines_of_the_text_files(tmp_path: Path) -> None:
    texts = ["a cat\nthe same cat", "ein Hündchen\n", "one\n\ntwo", "x", "y"]
    root = write_wds(
        tmp_path, [wds_sample(number, txt=text.encode()) for number, text in enumerate(texts)], kind="retrieval"
    )
    pairs = WebDatasetCaptions(str(root))
    expected = [["a cat", "the same cat"], ["ein Hündchen"], ["one", "two"], ["x"], ["y"]]
    assert [pairs.captions(index) for index in range(5)] == expected
    assert [colour_of(pickle.loads(pickle.dumps(pairs)), index) for index in (3, 4)] == [colour(3), colour(4)]
    assert pairs.templates == []
    assert "retrieval" in message_of(lambda: WebDataset(str(root)))


def npy(values: object, dtype: str = "float32") -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values, dtype=dtype))
    return file.getvalue()


def test_multilabel_relevance_is_read_from_npy_files(tmp_path: Path) -> None:
    marks = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]
    samples = [wds_sample(number, npy=npy(mark)) for number, mark in enumerate(marks)]
    images = WebDatasetMultiLabel(write_wds(tmp_path / "a", samples, WDS_NAMES, kind="multilabel"))
    assert images.truth.relevance is not None
    assert images.truth.relevance.tolist() == marks
    assert images.truth.relevance.dtype == torch.int8
    assert images.labels() == [-1] * 4
    assert_same_after_pickling(images)
    for marks, words in ((npy([0, 1]), "2 marks for 3 class names"), (b"no array", "its .npy")):
        samples[2] = wds_sample(2, npy=marks)
        root = write_wds(tmp_path / "b", samples, WDS_NAMES, kind="multilabel")
        message = message_of(lambda root=root: WebDatasetMultiLabel(root))
        assert all(part in message for part in ("1.tar", "s0000002", words))


@pytest.mark.parametrize(
    ("label", "words"),
    [(b"3", "label is 3, but classnames.txt"), (b"-1", "'-1'"), (b"cat", "'cat'"), (b"\xff", "UTF-8"), (b"", "''")],
)
def test_label_without_a_class_is_an_error_naming_tar_and_sample(tmp_path: Path, label: bytes, words: str) -> None:
    samples = [wds_sample(number, cls=b"0") for number in range(6)]
    samples[4]["s0000004.cls"] = label
    message = message_of(lambda: WebDataset(write_wds(tmp_path, samples, WDS_NAMES)))
    assert all(part in message for part in ("1.tar", "s0000004", words))


def test_errors_of_a_tar_set_name_the_bad_file(tars: Path, tmp_path: Path) -> None:
    assert "nowhere" in message_of(lambda: WebDataset(str(tars / "nowhere")), MissingData)
    assert "train" in message_of(lambda: WebDataset(str(tars), "train"), MissingData)
    whole = (tars / "test/1.tar").read_bytes()
    (tars / "test/1.tar").write_bytes(whole[:1500])
    assert "1.tar" in message_of(lambda: WebDataset(str(tars)))
    (tars / "test/1.tar").write_bytes(b"<html>404</html>" * 100)
    assert "1.tar: not a readable tar" in message_of(lambda: WebDataset(str(tars)))
    (tars / "test/1.tar").unlink()
    assert "1.tar" in message_of(lambda: WebDataset(str(tars)), MissingData)
    (tars / "test/nshards.txt").write_text("many")
    assert "nshards.txt" in message_of(lambda: WebDataset(str(tars)))
    (tars / "test/nshards.txt").write_text("0")
    assert "no samples" in message_of(lambda: WebDataset(str(tars)))
    del whole
    lonely = [wds_sample(number, **({} if number == 1 else {"cls": b"0"})) for number in range(4)]
    message = message_of(lambda: WebDataset(write_wds(tmp_path / "b", lonely, WDS_NAMES)))
    assert "s0000001.cls" in message


def test_broken_or_missing_image_in_a_tar_raises_bad_sample_only_when_read(tmp_path: Path) -> None:
    samples = [wds_sample(number, cls=b"0") for number in range(5)]
    samples[1] = {"s0000001.png": encoded(1)[:40], "s0000001.cls": b"0"}
    samples[3] = {"s0000003.cls": b"0"}
    images = WebDataset(write_wds(tmp_path, samples, WDS_NAMES))
    assert len(images) == 5
    for index, key in ((1, "s0000001"), (3, "s0000003")):
        with pytest.raises(BadSample, match=key):
            images[index]
    assert colour_of(images, 4) == colour(4)


def test_stamp_of_a_tar_set_depends_on_its_tars_only(tars: Path) -> None:
    before = WebDataset(str(tars)).stamp()
    (tars / "classnames.txt").write_text("a\nb\nc\n")
    assert WebDataset(str(tars)).stamp() == before
    write_tar(tars / "test/1.tar", merged([wds_sample(number, cls=b"0") for number in (4, 5)]))
    assert WebDataset(str(tars)).stamp() != before


METADATA = [[3, 2016, 1], [0, 2017, 0], [3, 2016, 1], [1, 2016, 0], [0, 2016, 2], [3, 2017, 0], [12, 2017, 2]]


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
    assert images.truth.groups is not None
    assert images.truth.groups["region"] == ["3", "0", "3", "1", "0", "3", "12"]
    assert images.truth.groups["year"] == [str(row[1]) for row in METADATA]
    assert images.labels() == WDS_LABELS
    assert images.stamp() == WebDataset(str(tmp_path)).stamp()
    assert pickle.loads(pickle.dumps(images)).truth.groups == images.truth.groups
    targets = Targets.of(images).take([0, 6])
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
