"""Sets in tars, tables and folders, each a miniature in its own layout: which image has which label."""

import io
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision import datasets

from datamodules import ImageFolderClasses, OpenMojiClasses, ParquetClasses
from datamodules.evaluation import (
    RESISC45,
    SUN,
    AYahoo,
    Birdsnap,
    Digits,
    HatefulMemes,
    ImageNetFolders,
    ImageNetV2,
    LabelledTable,
    ObjectNet,
    WebDataset,
    WebDatasetCaptions,
    WebDatasetMultiLabel,
)
from datamodules.evaluation.imagenet_variants import imagenet_wnids
from datamodules.openmoji import read_table
from lit_clip.errors import BadSample, InputError
from lit_clip.evaluation.data import ImageSet, MissingData
from lit_clip.evaluation.suite import read_suite
from lit_clip.evaluation.zero_shot import imagenet_class_names
from tests.conftest import ROOT

PROMPTS = json.loads((ROOT / "lit_clip/evaluation/paper_prompts.json").read_text())["sets"]


def message_of(call: Callable[[], Any], kind: type[InputError] = InputError) -> str:
    """The one line that a call fails with."""
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def colour(number: int) -> tuple[int, int, int]:
    return number * 10 % 256, 255 - number % 256, number // 256


def encoded(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour(number)).save(file, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def paint(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number))
    return path


def colour_of(images: Any, index: int) -> Any:
    return images.images(index)[0].convert("RGB").getpixel((1, 1))


def same_after_pickling(images: Any) -> None:
    """A data worker sees the same images, labels and names."""
    other = pickle.loads(pickle.dumps(images))
    assert len(other) == len(images)
    assert (other.labels(), other.class_names, other.stamp()) == (images.labels(), images.class_names, images.stamp())
    assert [other.key(i) for i in range(len(images))] == [images.key(i) for i in range(len(images))]
    for index in range(0, len(images), 1 + len(images) // 5):
        assert other[index][0].tobytes() == images[index][0].tobytes()
        assert other[index][1] == images[index][1] == images.labels()[index]


# --- tars -----------------------------------------------------------------------------------------------------------


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


LABELS = [2, 0, 1, 1, 2, 0, 2]
KINDS = ["webp", "png", "jpg", "png", "webp", "png", "png"]


def sample(number: int, **answers: bytes) -> dict[str, bytes]:
    key, kind = f"s{number:07}", KINDS[number % len(KINDS)]
    image = encoded(number, {"jpg": "JPEG"}.get(kind, kind.upper()))
    return {f"{key}.{kind}": image, **{f"{key}.{name}": content for name, content in answers.items()}}


def merged(samples: list[dict[str, bytes]]) -> dict[str, bytes]:
    return {name: content for each in samples for name, content in each.items()}


def write_set(
    root: Path, samples: list[dict[str, bytes]], names: str = "", templates: str = "", kind: str = ""
) -> Path:
    """All but the last three samples in ``0.tar``, these in ``1.tar``."""
    for number, part in enumerate((samples[:-3], samples[-3:])):
        write_tar(root / "test" / f"{number}.tar", merged(part))
    (root / "test/nshards.txt").write_text("2\n")
    said = {"classnames.txt": names, "zeroshot_classification_templates.txt": templates, "dataset_type.txt": kind}
    for name, text in said.items():
        if text:
            (root / name).write_text(text)
    return str(root)


NAMES, TEMPLATES = "apple\nriver boat\ncafé\n", "a photo of a {c}.\n{c}, a {c} thing\n"


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    samples = [sample(number, cls=str(label).encode()) for number, label in enumerate(LABELS)]
    samples[1]["s0000001.json"] = b'{"anything": 1}'
    return Path(write_set(tmp_path / "wds", samples, NAMES, TEMPLATES))


def test_a_set_in_tars_has_its_own_names_templates_and_order(tars: Path) -> None:
    images = WebDataset(str(tars))
    assert images.labels() == LABELS
    assert images.class_names == ["apple", "river boat", "café"]
    assert images.templates == ["a photo of a {}.", "{}, a {} thing"]
    assert [images.key(i) for i in (0, 3, 4)] == ["0/s0000000", "0/s0000003", "1/s0000004"]
    for index in (6, 0, 4, 2, 1, 5, 3):
        got = colour_of(images, index)
        assert got == pytest.approx(colour(index), abs=3 if KINDS[index] == "jpg" else 0)
    same_after_pickling(images)


def test_a_set_in_tars_is_read_as_clip_benchmark_reads_it(tars: Path) -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    peer = builder.build_wds_dataset("x", lambda image: image.convert("RGB"), "test", str(tars))
    images = WebDataset(str(tars))
    rows = list(peer)
    assert [label for _, label in rows] == images.labels()
    for index, (photo, _) in enumerate(rows):
        assert photo.tobytes() == images[index][0].convert("RGB").tobytes()
    assert peer.classes == images.class_names
    assert [template.replace("{c}", "{}") for template in peer.templates] == images.templates


def test_captions_in_tars_are_the_lines_of_their_files(tmp_path: Path) -> None:
    texts = ["a cat\nthe same cat", "ein Hündchen\n", "one\n\ntwo", "x", "y"]
    root = write_set(
        tmp_path, [sample(number, txt=text.encode()) for number, text in enumerate(texts)], kind="retrieval"
    )
    pairs = WebDatasetCaptions(str(root))
    assert [pairs.captions(index) for index in range(5)] == [
        ["a cat", "the same cat"],
        ["ein Hündchen"],
        ["one", "two"],
        ["x"],
        ["y"],
    ]
    assert [colour_of(pickle.loads(pickle.dumps(pairs)), index) for index in (3, 4)] == [colour(3), colour(4)]
    assert pairs.templates == []
    assert "retrieval" in message_of(lambda: WebDataset(str(root)))


def npy(marks: list[int]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(marks, np.float32))
    return file.getvalue()


def test_marks_in_tars_are_the_classes_that_are_there(tmp_path: Path) -> None:
    marks = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]
    samples = [sample(number, npy=npy(mark)) for number, mark in enumerate(marks)]
    images = WebDatasetMultiLabel(write_set(tmp_path / "a", samples, NAMES, kind="multilabel"))
    assert images.relevance().tolist() == marks
    assert images.relevance().dtype == torch.int8
    assert images.labels() == [-1] * 4
    same_after_pickling(images)
    samples[2] = sample(2, npy=npy([0, 1]))
    message = message_of(lambda: WebDatasetMultiLabel(write_set(tmp_path / "b", samples, NAMES, kind="multilabel")))
    for part in ("1.tar", "s0000002", "2 marks", "3 class names"):
        assert part in message
    samples[2] = sample(2, npy=b"no array")
    message = message_of(lambda: WebDatasetMultiLabel(write_set(tmp_path / "c", samples, NAMES, kind="multilabel")))
    assert "s0000002" in message


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        (b"3", ("its label is 3", "3 names")),
        (b"-1", ("'-1'",)),
        (b"cat", ("'cat'",)),
        (b"\xff", ("UTF-8",)),
        (b"", ("''",)),
    ],
)
def test_a_label_in_tars_that_is_no_class_is_an_error_that_names_tar_and_sample(
    tmp_path: Path, label: bytes, parts: tuple[str, ...]
) -> None:
    samples = [sample(number, cls=b"0") for number in range(6)]
    samples[4]["s0000004.cls"] = label
    message = message_of(lambda: WebDataset(write_set(tmp_path, samples, NAMES)))
    for part in ("1.tar", "s0000004", *parts):
        assert part in message


def test_what_is_wrong_with_a_set_in_tars_is_said_of_its_file(tars: Path, tmp_path: Path) -> None:
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
    lonely = [sample(number, **({} if number == 1 else {"cls": b"0"})) for number in range(4)]
    message = message_of(lambda: WebDataset(write_set(tmp_path / "b", lonely, NAMES)))
    assert "s0000001.cls" in message


def test_a_broken_or_missing_image_in_tars_can_be_skipped_for_it_is_an_error_of_its_own(tmp_path: Path) -> None:
    samples = [sample(number, cls=b"0") for number in range(5)]
    samples[1] = {"s0000001.png": encoded(1)[:40], "s0000001.cls": b"0"}
    samples[3] = {"s0000003.cls": b"0"}
    images = WebDataset(write_set(tmp_path, samples, NAMES))
    assert len(images) == 5
    for index, key in ((1, "s0000001"), (3, "s0000003")):
        with pytest.raises(BadSample, match=key):
            images[index]
    assert colour_of(images, 4) == colour(4)


def test_the_stamp_of_a_set_in_tars_changes_with_its_tars_only(tars: Path) -> None:
    before = WebDataset(str(tars)).stamp()
    (tars / "classnames.txt").write_text("a\nb\nc\n")
    assert WebDataset(str(tars)).stamp() == before
    write_tar(tars / "test/1.tar", merged([sample(number, cls=b"0") for number in (4, 5)]))
    assert WebDataset(str(tars)).stamp() != before


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(6):
        paint(tmp_path / "in" / f"{number}.png", number)
    return tmp_path


ROWS = [("in/3.png", "dog"), ("in/0.png", "ant, red"), ("in/5.png", "dog"), ("in/1.png", "cat")]


def write_rows(
    folder: Path, form: str, rows: list[tuple[Any, Any]], names: tuple[str, str] = ("image", "label")
) -> Path:
    """A table with a column that nobody asks for."""
    path = folder / f"labels.{form.removesuffix('_bom')}"
    if form == "parquet":
        columns: Any = {names[0]: [row[0] for row in rows], names[1]: [row[1] for row in rows]}
        pq.write_table(pa.table({"id": list(range(len(rows))), **columns}), path, row_group_size=2)
    elif form == "jsonl":
        path.write_text(
            "".join(json.dumps({"id": i, names[0]: a, names[1]: b}) + "\n" for i, (a, b) in enumerate(rows))
        )
    else:
        mark = "\t" if form == "tsv" else ","
        quoted = [(a, f'"{b}"' if mark in str(b) else b) for a, b in rows]
        text = "".join(f"{mark.join(map(str, (i, *row)))}\n" for i, row in enumerate(quoted))
        start = "\ufeff" if form.endswith("_bom") else ""
        path.write_text(f"{start}id{mark}{names[0]}{mark}{names[1]}\n{text}", encoding="utf-8")
    return path


FORMS = ["csv", "csv_bom", "tsv", "jsonl", "parquet"]


@pytest.mark.parametrize("form", FORMS)
def test_a_table_gives_the_images_of_its_rows_and_the_classes_that_it_names(photos: Path, form: str) -> None:
    images = LabelledTable(str(write_rows(photos, form, ROWS)))
    assert images.class_names == ["ant, red", "cat", "dog"]
    assert images.labels() == [2, 0, 2, 1]
    assert [colour_of(images, i) for i in range(4)] == [colour(number) for number in (3, 0, 5, 1)]
    assert images.key(1) == "in/0.png"
    same_after_pickling(images)


@pytest.mark.parametrize("form", FORMS)
def test_a_table_with_numbers_takes_names_in_label_order(photos: Path, form: str) -> None:
    rows = [(path, label) for (path, _), label in zip(ROWS, (2, 0, 2, 1), strict=True)]
    path = write_rows(photos, form, rows, ("file", "class_id"))
    images = LabelledTable(str(path), class_names=["wolf", "ant", "bee", "unseen"])
    assert (images.labels(), len(images.class_names)) == ([2, 0, 2, 1], 4)
    assert LabelledTable(str(path)).class_names == ["0", "1", "2"]
    columns = LabelledTable(str(path), ["a", "b", "c", "d"], image_column="file", label_column="id")
    assert columns.labels() == [0, 1, 2, 3]


def test_a_table_with_names_takes_the_order_of_the_classes_given(photos: Path) -> None:
    path = write_rows(photos, "csv", ROWS)
    assert LabelledTable(str(path), class_names=["dog", "eel", "cat", "ant, red"]).labels() == [0, 3, 0, 2]


def test_numbers_in_a_table_that_are_also_names_of_other_classes_are_an_error(photos: Path) -> None:
    """CLEVR's classes are 10, 3, 4, ...: is 3 the fourth or the second?"""
    names = ["10", "3", "4", "5"]
    path = write_rows(photos, "csv", [("in/0.png", 10), ("in/1.png", 3)])
    assert LabelledTable(str(path), names).labels() == [0, 1]  # 10 can be no number: the column holds names
    message = message_of(lambda: LabelledTable(str(write_rows(photos, "csv", [("in/1.png", 3)])), names))
    assert "labels.csv row 2" in message
    assert LabelledTable(str(write_rows(photos, "jsonl", [("in/1.png", 3)])), names).labels() == [3]  # no text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("label", "names", "parts"),
    [
        (4, ["a", "b", "c"], ("label 4", "between 0 and 2")),
        (-1, None, ("label -1",)),
        ("elk", ["dog", "cat", "ant, red"], ("'elk'", "3 classes", "dog")),
        ("", None, ("row",)),
    ],
)
def test_a_label_that_is_no_class_is_an_error_that_names_file_and_row(
    photos: Path, form: str, label: Any, names: list[str] | None, parts: tuple[str, ...]
) -> None:
    others = [1, 0, 2] if isinstance(label, int) else ["dog", "cat", "dog"]
    rows = [(f"in/{number}.png", value) for number, value in enumerate([*others[:2], label, others[2]])]
    path = write_rows(photos, form, rows)
    row = {"parquet": 2, "jsonl": 3}.get(form, 4)
    message = message_of(lambda: LabelledTable(str(path), class_names=names))
    for part in (f"{path.name} row {row}", *parts):
        assert part in message


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_column_or_image_is_an_error_that_says_what_to_set(photos: Path, form: str) -> None:
    path = write_rows(photos, form, ROWS, ("image", "thing"))
    message = message_of(lambda: LabelledTable(str(path)))
    for part in (path.name, "id, image, thing", "label_column"):
        assert part in message
    assert "'x'" in message_of(lambda: LabelledTable(str(path), image_column="x", label_column="thing"))
    message = message_of(lambda: LabelledTable(str(path), label_column="thing", root=str(photos / "in")))
    for part in (f"{path.name} row", "set root"):
        assert part in message
    rows = [ROWS[0], (None if form in ("jsonl", "parquet") else "", "cat")]
    assert "no image" in message_of(lambda: LabelledTable(str(write_rows(photos, form, rows))))


def test_tables_that_are_not_there_or_empty_or_hold_images_are_errors(photos: Path) -> None:
    assert "no such table" in message_of(lambda: LabelledTable(str(photos / "x.csv")), MissingData)
    for form in ("csv", "parquet"):
        assert "no rows" in message_of(lambda form=form: LabelledTable(str(write_rows(photos, form, []))))
    path = write_rows(photos, "parquet", [(encoded(0), 0)])
    assert "ParquetClasses" in message_of(lambda: LabelledTable(str(path)))
    path.write_bytes(b"PAR1")
    assert "labels.parquet" in message_of(lambda: LabelledTable(str(path)))


def test_images_of_a_table_that_cannot_be_read_are_errors_of_their_rows(photos: Path) -> None:
    (photos / "in/0.png").write_bytes(encoded(0)[:40])
    images = LabelledTable(str(write_rows(photos, "csv", [ROWS[0], ROWS[1], ("in/99.png", "cat")])))
    for index, row in ((1, "labels.csv row 3"), (2, "labels.csv row 4")):
        with pytest.raises(BadSample, match=row):
            images[index]
    assert images.stamp()
    before = images.stamp()
    paint(photos / "in/99.png")
    assert images.stamp() != before


def test_names_that_two_classes_share_cannot_label_a_table(photos: Path) -> None:
    message = message_of(lambda: LabelledTable(str(write_rows(photos, "csv", [("in/0.png", "missile")])), "imagenet"))
    assert "two classes are called" in message
    path = write_rows(photos, "csv", [("in/0.png", 744), ("in/1.png", 657)])
    images = LabelledTable(str(path), "imagenet")
    assert [images.class_names[label] for label in images.labels()] == ["missile", "missile"]
    assert images.labels() == [744, 657]


def test_the_stamp_of_files_changes_with_their_order_too(photos: Path) -> None:
    stamps = {LabelledTable(str(write_rows(photos, "csv", rows))).stamp() for rows in (ROWS, ROWS[::-1], ROWS[:3])}
    assert len(stamps) == 3
    again = [(path, "one class") for path, _ in ROWS]
    assert LabelledTable(str(write_rows(photos, "csv", again))).stamp() in stamps  # labels are not part of it


# --- ImageNet's variants --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("v2") / "imagenetv2-matched-frequency-format-val"
    for label in range(1000):
        paint(root / str(label) / "a.jpeg", label)
    return root


def test_folders_of_imagenet_v2_are_numbers_and_not_sorted_as_names(imagenet_v2: Path) -> None:
    images = ImageNetV2(str(imagenet_v2))
    assert images.labels() == list(range(1000))
    for label in (0, 2, 10, 100, 999):
        assert colour_of(images, label) == colour(label)
        assert images.key(label) == f"{label}/a.jpeg"
    assert images.class_names == imagenet_class_names()
    assert [int(name) for name in datasets.ImageFolder(str(imagenet_v2)).classes[:3]] == [0, 1, 10]  # what must not be
    same_after_pickling(images)


def test_a_class_that_imagenet_v2_lacks_is_an_error(tmp_path: Path) -> None:
    for label in range(999):
        (tmp_path / str(label)).mkdir()
    assert "999" in message_of(lambda: ImageNetV2(str(tmp_path)))
    assert "nowhere" in message_of(lambda: ImageNetV2(str(tmp_path / "nowhere")), MissingData)


def test_imagenets_numbers_are_those_that_clip_benchmark_writes_down() -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    assert list(imagenet_wnids()) == builder.all_imagenet_wordnet_ids


def test_classes_of_imagenet_a_have_the_papers_names_and_only_their_own(tmp_path: Path) -> None:
    """Three of its classes; the numbers in label order, and the names, as anybody finds them in ImageNet's list."""
    known = {"n01498041": (6, "stingray"), "n12267677": (988, "acorn"), "n02206856": (309, "bee")}
    for wnid, (number, _) in known.items():
        paint(tmp_path / wnid / "0.000_x.jpg", number)
        paint(tmp_path / wnid / "1.jpg", number)
    (tmp_path / "README.txt").write_text("ImageNet-A")
    images = ImageNetFolders(str(tmp_path), classes=3)
    assert images.class_names == ["stingray", "bee", "acorn"]
    assert images.wnids == ["n01498041", "n02206856", "n12267677"]
    assert images.labels() == [0, 0, 1, 1, 2, 2]
    assert [colour_of(images, i) for i in (0, 2, 4)] == [colour(6), colour(309), colour(988)]
    same_after_pickling(images)
    assert "3 class folders instead of 200" in message_of(lambda: ImageNetFolders(str(tmp_path), classes=200))
    (tmp_path / "n02206856/0.000_x.jpg").unlink()
    (tmp_path / "n02206856/1.jpg").unlink()
    assert "n02206856" in message_of(lambda: ImageNetFolders(str(tmp_path)))
    paint(tmp_path / "n99999999/a.jpg")
    assert "n99999999 is no class of ImageNet" in message_of(lambda: ImageNetFolders(str(tmp_path)))


def test_a_corrupt_image_in_a_folder_can_be_skipped_for_it_is_an_error_of_its_own(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        paint(tmp_path / f"n01440764/{name}.png", 7)
    (tmp_path / "n01440764/b.png").write_bytes(encoded(0)[:40])
    images = ImageNetFolders(str(tmp_path))
    assert len(images) == 3
    with pytest.raises(BadSample, match="n01440764/b.png"):
        images[1]
    assert colour_of(images, 2) == colour(7)


def objectnet(root: Path) -> Path:
    """Two classes that ImageNet has and one that it has not; red lines of a pixel around the images."""
    labels = {"tshirt": "T-shirt", "alarm_clock": "Alarm clock", "air_freshener": "Air freshener"}
    (root / "mappings").mkdir(parents=True)
    (root / "mappings/folder_to_objectnet_label.json").write_text(json.dumps(labels))
    overlap = {"T-shirt": "jersey, T-shirt, tee shirt", "Alarm clock": "analog clock; digital clock"}
    (root / "mappings/objectnet_to_imagenet_1k.json").write_text(json.dumps(overlap))
    for number, name in enumerate(labels):
        image = Image.new("RGB", (12, 10), (255, 0, 0))
        image.paste(colour(number), (1, 1, 11, 9))
        (root / "images" / name).mkdir(parents=True)
        image.save(root / "images" / name / f"{number}.png")
    return root


def test_objectnet_is_its_overlap_with_imagenet_by_its_own_names_without_the_red_line(tmp_path: Path) -> None:
    images = ObjectNet(str(objectnet(tmp_path / "objectnet-1.0")))
    assert images.class_names == ["alarm clock", "t-shirt"]
    assert images.labels() == [0, 1]
    for index, number in ((0, 1), (1, 0)):
        image = images[index][0]
        assert image.getcolors() == [(image.width * image.height, colour(number))]
        assert min(image.size) >= 6
    same_after_pickling(images)


def test_objectnet_has_the_classes_of_clip_benchmark(tmp_path: Path) -> None:
    peer = pytest.importorskip("clip_benchmark.datasets.objectnet")
    root = objectnet(tmp_path / "objectnet-1.0")
    names = ["analog clock", "digital clock", "jersey, T-shirt, tee shirt"]
    for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"):
        (tmp_path / name).write_bytes((root / "mappings" / name).read_bytes())
    (tmp_path / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps({i: i for i in range(3)}))
    (tmp_path / "imagenet_to_label_2012_v2").write_text("\n".join(names))
    other = peer.ObjectNetDataset(str(tmp_path), None)
    images = ObjectNet(str(root))
    assert other.classes == images.class_names
    assert [other[index][1] for index in range(len(other))] == images.labels()


def test_mappings_of_objectnet_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    root = objectnet(tmp_path / "objectnet-1.0")
    (root / "mappings/objectnet_to_imagenet_1k.json").write_text('{"Unknown thing": "tench"}')
    assert "folder_to_objectnet_label.json" in message_of(lambda: ObjectNet(str(root)))
    (root / "mappings/objectnet_to_imagenet_1k.json").unlink()
    assert "objectnet_to_imagenet_1k.json" in message_of(lambda: ObjectNet(str(root)), MissingData)


# --- others ---------------------------------------------------------------------------------------------------------


def birdsnap(root: Path) -> Path:
    """Three species, in an order of its own; one image could not be fetched, and one more lies there unlisted."""
    (root / "download/images").mkdir(parents=True)
    species = ["1\tCooper's Hawk\tAccipiter cooperii\tCoopers_Hawk", "2\tBlack Vulture\tx\tBlack_Vulture"]
    species.append("3\tBlack-and-white Warbler\tx\tBlack_and_white_Warbler")
    (root / "species.txt").write_text("\n".join(["id\tcommon\tscientific\tdir", *species]) + "\n")
    listed = [f"{name}/{number}.jpg" for name in ("Coopers_Hawk", "Black_Vulture") for number in (1, 2, 3)]
    listed.append("Black_and_white_Warbler/9.jpg")
    (root / "images.txt").write_text("\n".join(["url\tmd5\tpath\tspecies_id", *(f"u\tm\t{x}\t1" for x in listed)]))
    (root / "test_images.txt").write_text(
        "path\nCoopers_Hawk/2.jpg\nCoopers_Hawk/3.jpg\nBlack_and_white_Warbler/9.jpg\n"
    )
    for number, name in enumerate([*listed, "Black_Vulture/unlisted.jpg"]):
        if name != "Coopers_Hawk/3.jpg":
            paint(root / "download/images" / name, number)
    return root


def test_birdsnap_tests_on_the_listed_images_that_could_be_fetched(tmp_path: Path) -> None:
    root = birdsnap(tmp_path)
    test, train = Birdsnap(str(root), "test"), Birdsnap(str(root), "train")
    assert test.class_names == train.class_names == ["Black Vulture", "Black and white Warbler", "Coopers Hawk"]
    found = [(colour_of(test, i), test.labels()[i]) for i in range(len(test))]
    assert found == [(colour(1), 2), (colour(6), 1)]
    found = [(colour_of(train, i), train.labels()[i]) for i in range(len(train))]
    assert found == [(colour(0), 2), (colour(3), 0), (colour(4), 0), (colour(5), 0)]
    assert test.stamp() != train.stamp()
    same_after_pickling(train)
    for image in (root / "download/images").rglob("*.jpg"):
        image.unlink()
    assert "no images of this split" in message_of(lambda: Birdsnap(str(root)))
    (root / "species.txt").unlink()
    assert "species.txt" in message_of(lambda: Birdsnap(str(root)), MissingData)


def test_species_are_in_the_order_of_the_papers_list() -> None:
    names = PROMPTS["Birdsnap"]["classes"]
    assert len(names) == 500
    assert sorted(name.replace(" ", "_") for name in names) == [name.replace(" ", "_") for name in names]


@pytest.fixture(scope="module")
def resisc45(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 45 folders with 20 images each."""
    root = tmp_path_factory.mktemp("resisc45")
    data = encoded(0)
    for name in PROMPTS["RESISC45"]["classes"]:
        folder = root / "NWPU-RESISC45" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        for number in range(1, 21):
            (folder / f"{folder.name}_{number:03}.jpg").write_bytes(data)
    return root


def test_resisc45_trains_on_a_tenth_of_each_class_and_tests_on_eight(resisc45: Path) -> None:
    train, test = RESISC45(str(resisc45), "train"), RESISC45(str(resisc45), "test")
    assert train.class_names == test.class_names == PROMPTS["RESISC45"]["classes"]
    assert Counter(train.labels()) == {label: 2 for label in range(45)}  # of 700: 70, which makes 3,150
    assert Counter(test.labels()) == {label: 16 for label in range(45)}  # 560, which makes 25,200
    keys = [{images.key(i) for i in range(len(images))} for images in (train, test)]
    assert not keys[0] & keys[1]
    for images in (train, test):
        for index in range(0, len(images), 7):
            assert images.key(index).split("/")[0] == images.class_names[images.labels()[index]].replace(" ", "_")
    assert RESISC45(str(resisc45), "train").stamp() == train.stamp()
    assert RESISC45(str(resisc45), "train", seed=1).stamp() != train.stamp()
    # Pinned, so that nobody's numbers change unseen: another hash would make another split.
    assert [train.key(0), train.key(1)] == ["airplane/airplane_007.jpg", "airplane/airplane_013.jpg"]


def test_resisc45_needs_all_its_classes(tmp_path: Path) -> None:
    paint(tmp_path / "NWPU-RESISC45/lake/1.jpg")
    assert "1 class folders instead of 45" in message_of(lambda: RESISC45(str(tmp_path)))
    assert "nowhere" in message_of(lambda: RESISC45(str(tmp_path / "nowhere")), MissingData)


@pytest.mark.parametrize("dev", ["dev.jsonl", "dev_seen.jsonl"])
def test_hateful_memes_are_the_rows_of_the_development_list(tmp_path: Path, dev: str) -> None:
    rows = [{"id": n, "img": f"img/{n:05}.png", "label": n % 2, "text": 'look, "text"'} for n in range(5)]
    for row in rows:
        paint(tmp_path / str(row["img"]), int(row["id"]))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    (tmp_path / dev).write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    images = HatefulMemes(str(tmp_path))
    assert images.labels() == [0, 1, 0]
    assert images.key(0) == "img/00002.png"
    assert len(images.class_names) == len(PROMPTS["HatefulMemes"]["classes"]) == 2
    assert [colour_of(images, i) for i in range(3)] == [colour(2), colour(3), colour(4)]
    assert HatefulMemes(str(tmp_path), "train").labels() == [0, 1]
    same_after_pickling(images)
    (tmp_path / dev).write_text(json.dumps({"id": 1, "img": "img/00001.png", "text": "the hidden test list"}))
    assert "no column 'label'" in message_of(lambda: HatefulMemes(str(tmp_path)))
    (tmp_path / dev).write_text(json.dumps({"img": "img/00001.png", "label": 2}))
    assert f"{dev} row 1" in message_of(lambda: HatefulMemes(str(tmp_path)))
    (tmp_path / dev).unlink()
    assert dev in message_of(lambda: HatefulMemes(str(tmp_path)), MissingData)


def test_a_image_of_ayahoo_comes_once_with_the_class_of_its_list(tmp_path: Path) -> None:
    attributes = " ".join("0" for _ in range(64))
    lines = [("wolf_1.jpg", "wolf"), ("bag_227.jpg", "bag"), ("bag_227.jpg", "bag"), ("zebra_3.jpg", "zebra")]
    (tmp_path / "attribute_data").mkdir()
    text = "".join(f"{name} {label} 1 2 30 40 {attributes}\n" for name, label in lines)
    (tmp_path / "attribute_data/ayahoo_test.txt").write_text(text)
    for number, (name, _) in enumerate(lines):
        paint(tmp_path / "ayahoo_test_images" / name, number)
    images = AYahoo(str(tmp_path))
    assert images.class_names == ["bag", "wolf", "zebra"]
    assert [(images.key(i), label) for i, label in enumerate(images.labels())] == [
        ("ayahoo_test_images/wolf_1.jpg", 1),
        ("ayahoo_test_images/bag_227.jpg", 0),
        ("ayahoo_test_images/zebra_3.jpg", 2),
    ]
    assert colour_of(images, 2) == colour(3)
    same_after_pickling(images)
    assert "ayahoo_test.txt" in message_of(lambda: AYahoo(str(tmp_path / "nowhere")), MissingData)


def test_sun_has_all_images_with_the_labels_of_their_names_in_words(tmp_path: Path) -> None:
    folders = ["/a/abbey", "/a/apartment_building/outdoor", "/j/jail_indoor", "/j/jail_cell"]
    for number, folder in enumerate(folders):
        for image in range(1 + number):
            paint(tmp_path / f"SUN397{folder}/sun_{image}.jpg", number)
    (tmp_path / "SUN397/ClassName.txt").write_text("\n".join(folders) + "\n")
    images = SUN(str(tmp_path))
    assert images.class_names == ["abbey", "apartment building outdoor", "jail cell", "jail indoor"]
    assert Counter(images.labels()) == {0: 1, 1: 2, 2: 4, 3: 3}
    numbers = [0, 1, 3, 2]
    for index, label in enumerate(images.labels()):
        assert colour_of(images, index) == colour(numbers[label])
    same_after_pickling(images)
    assert "SUN397" in message_of(lambda: SUN(str(tmp_path / "x")), MissingData)


def test_digits_are_scikit_learns_in_their_order() -> None:
    digits: Any = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1000, 797)
    assert train.labels() + test.labels() == digits.target.tolist()
    assert test.class_names[3] == "three"
    image, label = test[5]
    assert (image.mode, image.size, label) == ("L", (8, 8), digits.target[1005])
    assert np.abs(np.asarray(image) / 255 - digits.images[1005] / 16).max() < 1 / 255
    assert (train.key(7), test.key(5)) == ("7", "1005")
    assert train.stamp() != test.stamp()
    same_after_pickling(test)


# --- those that were there before -----------------------------------------------------------------------------------


def test_folders_parquet_files_and_drawings_say_what_their_images_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("b", "a", "a")):
        paint(tmp_path / "folder" / name / f"{number}.png", number)
    folder = ImageFolderClasses(str(tmp_path / "folder"))
    assert [folder.key(i) for i in range(3)] == ["a/1.png", "a/2.png", "b/0.png"]
    (tmp_path / "parquet").mkdir()
    table = pa.table({"image": [encoded(i) for i in range(5)], "label": [0, 1, 0, 1, 1]})
    for name in ("x", "y"):
        pq.write_table(table, tmp_path / f"parquet/{name}.parquet", row_group_size=2)
    parquet = ParquetClasses(str(tmp_path / "parquet"), ["a", "b"])
    assert [parquet.key(i) for i in (0, 4, 5, 9)] == ["x.parquet:0", "x.parquet:4", "y.parquet:0", "y.parquet:4"]
    few = read_table()[:25]
    monkeypatch.setattr("datamodules.openmoji.read_table", lambda: few)
    drawings = OpenMojiClasses(cache_dir=str(tmp_path))
    assert [drawings.key(i) for i in range(25)] == [emoji.hexcode for emoji in few]
    assert parquet[3][1] == 1  # and holds a row group then
    for images in (folder, parquet, drawings):
        same_after_pickling(images)
    before = folder.stamp(), parquet.stamp()
    paint(tmp_path / "folder/b/9.png")
    pq.write_table(table.slice(0, 4), tmp_path / "parquet/y.parquet")
    assert ImageFolderClasses(str(tmp_path / "folder")).stamp() != before[0]
    assert ParquetClasses(str(tmp_path / "parquet"), ["a", "b"]).stamp() != before[1]
    for kind in (ImageFolderClasses, lambda path: ParquetClasses(path, ["a"])):
        message_of(lambda kind=kind: kind(str(tmp_path / "nowhere")), MissingData)


# --- the suite ------------------------------------------------------------------------------------------------------


def test_sets_of_the_suite_are_opened_as_it_says(tmp_path: Path, tars: Path, imagenet_v2: Path, resisc45: Path) -> None:
    """The miniatures where the suite looks for them; sets that are not there are missing, and say how they are got."""
    suite = read_suite(ROOT / "configs/evaluation/paper.yaml")
    data = tmp_path / "data"
    data.mkdir()
    tars.rename(data / "wds_mnist")
    (data / "imagenetv2").mkdir()
    (data / "imagenetv2" / imagenet_v2.name).symlink_to(imagenet_v2)
    (data / "resisc45").symlink_to(resisc45)
    birdsnap(data / "birdsnap")
    objectnet(data / "objectnet/objectnet-1.0")
    opened: dict[str, ImageSet] = {
        name: suite[name].open("test", 0, data)
        for name in ("wds_mnist", "imagenetv2", "resisc45", "birdsnap", "objectnet", "digits")
    }
    assert {name: len(images) for name, images in opened.items()} == {
        "wds_mnist": 7,
        "imagenetv2": 1000,
        "resisc45": 720,
        "birdsnap": 2,
        "objectnet": 2,
        "digits": 797,
    }
    missing = ["imagenet_a", "imagenet_r", "imagenet_sketch", "ayahoo", "sun", "hateful_memes", "wds_flickr30k"]
    for name in missing:
        message = message_of(lambda name=name: suite[name].open("test", 0, data), MissingData)
        assert suite[name].how_to_get
        assert suite[name].how_to_get in message
    wds = {name: entry for name, entry in suite.items() if name.startswith("wds_")}
    assert len(wds) == 41
    assert {name for name, entry in wds.items() if entry.tasks == ["retrieval"]} == {
        "wds_mscoco_captions",
        "wds_flickr8k",
        "wds_flickr30k",
    }
    for entry in wds.values():
        assert entry.data["init_args"]["root"].startswith("wds_")
        own = (
            None if entry.tasks == ["zero_shot"] else ["{}"]
        )  # None: the set brings its own; captions stay as they are
        assert (entry.class_names, entry.templates) == (None, own)
