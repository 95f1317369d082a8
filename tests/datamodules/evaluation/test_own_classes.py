"""A user's own images: class folders, tables of labels and parquet files; folders of ImageNet's variants."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision import datasets

from datamodules import ImageFolderClasses, OpenMojiClasses, ParquetClasses
from datamodules.evaluation import ImageNetV2, LabelledTable, ObjectNet
from datamodules.evaluation.imagenet import imagenet_wnids
from datamodules.evaluation.own_classes import ClassNames
from datamodules.openmoji import read_table
from lit_clip.errors import BadSample
from lit_clip.evaluation.data import MissingData
from lit_clip.evaluation.zero_shot import ZeroShotSet, imagenet_class_names
from tests.helpers.coloured_sets import (
    assert_same_after_pickling,
    colour,
    colour_of,
    colours_and_labels,
    encoded,
    message_of,
    paint,
    write_files,
    write_objectnet,
)


def test_imagenet_v2_folders_are_sorted_as_numbers(imagenet_v2: Path) -> None:
    images = ImageNetV2(str(imagenet_v2))
    assert images.labels() == list(range(1000))
    for label in (0, 2, 10, 100, 999):
        assert colour_of(images, label) == colour(label)
        assert images.key(label) == f"{label}/a.jpeg"
    assert images.class_names == imagenet_class_names()
    assert [int(name) for name in datasets.ImageFolder(str(imagenet_v2)).classes[:3]] == [0, 1, 10]  # the wrong order
    assert_same_after_pickling(images)


def test_missing_class_folder_of_imagenet_v2_is_an_error(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{label}/a.jpeg": label for label in range(999)})
    assert "999" in message_of(lambda: ImageNetV2(str(tmp_path)))
    assert "nowhere" in message_of(lambda: ImageNetV2(str(tmp_path / "nowhere")), MissingData)


def test_imagenet_wnids_equal_clip_benchmarks() -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    assert list(imagenet_wnids()) == builder.all_imagenet_wordnet_ids


def test_objectnet_classes_equal_clip_benchmarks(tmp_path: Path) -> None:
    peer = pytest.importorskip("clip_benchmark.datasets.objectnet")
    root = write_objectnet(tmp_path / "objectnet-1.0")
    names = ["analog clock", "digital clock", "jersey, T-shirt, tee shirt"]
    for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"):
        (tmp_path / name).write_bytes((root / "mappings" / name).read_bytes())
    (tmp_path / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps({i: i for i in range(3)}))
    (tmp_path / "imagenet_to_label_2012_v2").write_text("\n".join(names))
    other = peer.ObjectNetDataset(str(tmp_path), None)
    images = ObjectNet(str(root))
    assert other.classes == images.class_names
    assert [other[index][1] for index in range(len(other))] == images.labels()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, created out of order; one has nested images, one a text file."""
    files = {"tabby_cat/deep/er/1.png": 3, "tabby_cat/0.png": 2, "Zebra_finch/b.PNG": 0, "a_dog/x.bmp": 1}
    return write_files(tmp_path / "pets", {**files, "a_dog/licence.txt": "MIT", "readme.md": "pets"})


def test_classes_are_the_subfolders_sorted_by_name(folder: Path) -> None:
    images = ImageFolderClasses(str(folder))
    assert images.class_names == ["Zebra finch", "a dog", "tabby cat"]
    assert colours_and_labels(images) == [(colour(0), 0), (colour(1), 1), (colour(2), 2), (colour(3), 2)]
    oracle = datasets.ImageFolder(str(folder))
    assert [name.replace("_", " ") for name in oracle.classes] == images.class_names
    assert sorted(oracle.targets) == images.labels()


@pytest.mark.parametrize("hidden", [".git/x.png", "a_dog/.ipynb_checkpoints/x-checkpoint.png", "a_dog/._x.bmp"])
def test_hidden_folders_and_files_are_ignored(folder: Path, hidden: str) -> None:
    """Version control, notebooks' copies, and the files that macOS leaves beside images, which are not images."""
    paint(folder / hidden)
    images = ImageFolderClasses(str(folder))
    assert images.class_names == ["Zebra finch", "a dog", "tabby cat"]
    assert images.labels() == [0, 1, 2, 2]


def test_given_class_names_replace_the_folder_names_in_order(folder: Path) -> None:
    images = ImageFolderClasses(str(folder), class_names=["finch", "dog", "cat"])
    assert images.class_names == ["finch", "dog", "cat"]
    assert images.labels() == [0, 1, 2, 2]
    wrong: list[tuple[ClassNames, str]] = [(["finch", "dog"], "2 names"), ("imagenet", "1000 names")]
    for names, count in wrong:
        message = message_of(lambda names=names: ImageFolderClasses(str(folder), class_names=names))
        assert all(part in message for part in (count, "3 classes", "pets", "class_names"))


def test_imagenets_names_for_a_thousand_folders_are_the_papers_in_order(tmp_path: Path) -> None:
    write_files(tmp_path, {f"n{i:08}/a.png": 0 for i in range(1000)})
    images = ImageFolderClasses(str(tmp_path), class_names="imagenet")
    assert [images.class_names[i] for i in (0, 1, 2, 999)] == ["tench", "goldfish", "great white shark", "toilet paper"]
    assert images.labels() == list(range(1000))


def test_missing_folder_or_class_is_an_error_saying_what_to_do(folder: Path) -> None:
    assert "nowhere: no such folder" in message_of(lambda: ImageFolderClasses(str(folder / "nowhere")), MissingData)
    paint(folder / "b_bird/flat/a.png")
    assert "flat: no subfolders" in message_of(lambda: ImageFolderClasses(str(folder / "b_bird/flat")))
    (folder / "b_bird/flat/a.png").unlink()
    (folder / "b_bird/notes.txt").write_text("none yet")
    assert "b_bird: no images" in message_of(lambda: ImageFolderClasses(str(folder)))


def test_file_that_is_not_an_image_is_an_error_before_training(folder: Path) -> None:
    write_files(folder, {"a_dog/broken.png": b"not an image"})
    message = message_of(lambda: ZeroShotSet(ImageFolderClasses(str(folder))))  # as the callback does
    assert all(part in message for part in ("broken.png", "not an image"))


def test_folders_parquet_files_and_drawings_have_stable_keys_and_stamps(
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
    assert parquet[3][1] == 1  # afterwards it holds a row group
    for images in (folder, parquet, drawings):
        assert_same_after_pickling(images)
    before = folder.stamp(), parquet.stamp()
    paint(tmp_path / "folder/b/9.png")
    pq.write_table(table.slice(0, 4), tmp_path / "parquet/y.parquet")
    assert ImageFolderClasses(str(tmp_path / "folder")).stamp() != before[0]
    assert ParquetClasses(str(tmp_path / "parquet"), ["a", "b"]).stamp() != before[1]
    for kind in (ImageFolderClasses, lambda path: ParquetClasses(path, ["a"])):
        message_of(lambda kind=kind: kind(str(tmp_path / "nowhere")), MissingData)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(6):
        paint(tmp_path / "in" / f"{number}.png", number)
    return tmp_path


ROWS = [("in/3.png", "dog"), ("in/0.png", "ant, red"), ("in/5.png", "dog"), ("in/1.png", "cat")]


def write_rows(
    folder: Path, form: str, rows: list[tuple[Any, Any]], names: tuple[str, str] = ("image", "label")
) -> Path:
    """Write a table with an additional column."""
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
def test_table_gives_its_rows_images_and_sorted_class_names(photos: Path, form: str) -> None:
    images = LabelledTable(str(write_rows(photos, form, ROWS)))
    assert images.class_names == ["ant, red", "cat", "dog"]
    assert images.labels() == [2, 0, 2, 1]
    assert [colour_of(images, i) for i in range(4)] == [colour(number) for number in (3, 0, 5, 1)]
    assert images.key(1) == "in/0.png"
    assert_same_after_pickling(images)


@pytest.mark.parametrize("form", FORMS)
def test_numeric_labels_index_the_given_class_names(photos: Path, form: str) -> None:
    rows = [(path, label) for (path, _), label in zip(ROWS, (2, 0, 2, 1), strict=True)]
    path = write_rows(photos, form, rows, ("file", "class_id"))
    images = LabelledTable(str(path), class_names=["wolf", "ant", "bee", "unseen"])
    assert (images.labels(), len(images.class_names)) == ([2, 0, 2, 1], 4)
    assert LabelledTable(str(path)).class_names == ["0", "1", "2"]
    columns = LabelledTable(str(path), ["a", "b", "c", "d"], image_column="file", label_column="id")
    assert columns.labels() == [0, 1, 2, 3]


def test_names_follow_the_order_of_the_given_ones_and_are_not_taken_for_numbers(photos: Path) -> None:
    """CLEVR's classes are 10, 3, 4, 5: is 3 the label of "5", or the class "3"?"""
    path = write_rows(photos, "csv", ROWS)
    assert LabelledTable(str(path), class_names=["dog", "eel", "cat", "ant, red"]).labels() == [0, 3, 0, 2]
    names = ["10", "3", "4", "5"]
    path = write_rows(photos, "csv", [("in/0.png", 10), ("in/1.png", 3)])
    assert LabelledTable(str(path), names).labels() == [0, 1]  # 10 is out of range as a number: the column holds names
    message = message_of(lambda: LabelledTable(str(write_rows(photos, "csv", [("in/1.png", 3)])), names))
    assert "labels.csv row 2" in message
    assert LabelledTable(str(write_rows(photos, "jsonl", [("in/1.png", 3)])), names).labels() == [3]  # not text
    message = message_of(lambda: LabelledTable(str(write_rows(photos, "csv", [("in/0.png", "missile")])), "imagenet"))
    assert "the same name" in message
    path = write_rows(photos, "csv", [("in/0.png", 744), ("in/1.png", 657)])
    images = LabelledTable(str(path), "imagenet")
    assert [images.class_names[label] for label in images.labels()] == ["missile", "missile"]
    assert images.labels() == [744, 657]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("label", "names", "parts"),
    [
        (4, ["a", "b", "c"], ("4", "3 classes")),
        (-1, None, ("-1",)),
        ("elk", ["dog", "cat", "ant, red"], ("'elk'", "3 classes", "dog")),
        ("", None, ("row",)),
    ],
)
def test_label_without_a_class_is_an_error_naming_file_and_row(
    photos: Path, form: str, label: Any, names: list[str] | None, parts: tuple[str, ...]
) -> None:
    others = [1, 0, 2] if isinstance(label, int) else ["dog", "cat", "dog"]
    rows = [(f"in/{number}.png", value) for number, value in enumerate([*others[:2], label, others[2]])]
    path = write_rows(photos, form, rows)
    row = {"parquet": 2, "jsonl": 3}.get(form, 4)
    message = message_of(lambda: LabelledTable(str(path), class_names=names))
    assert all(part in message for part in (f"{path.name} row {row}", *parts))


@pytest.mark.parametrize(("labels", "row"), [(["cat", "1", "dog", "dog"], 3), (["0", "1", "dog", "1"], 4)])
def test_label_of_another_kind_than_most_is_the_one_that_is_named(photos: Path, labels: list[str], row: int) -> None:
    path = write_rows(photos, "csv", [(f"in/{number}.png", label) for number, label in enumerate(labels)])
    message = message_of(lambda: LabelledTable(str(path), ["cat", "dog"]))
    assert f"labels.csv row {row}: label {labels[row - 2]!r}" in message


@pytest.mark.parametrize("form", FORMS)
def test_missing_column_or_image_is_an_error_naming_the_option_to_set(photos: Path, form: str) -> None:
    path = write_rows(photos, form, ROWS, ("image", "thing"))
    message = message_of(lambda: LabelledTable(str(path)))
    assert all(part in message for part in (path.name, "id, image, thing", "label_column"))
    assert "'x'" in message_of(lambda: LabelledTable(str(path), image_column="x", label_column="thing"))
    message = message_of(lambda: LabelledTable(str(path), label_column="thing", root=str(photos / "in")))
    assert all(part in message for part in (f"{path.name} row", "set root"))
    rows = [ROWS[0], (None if form in ("jsonl", "parquet") else "", "cat")]
    assert "no image" in message_of(lambda: LabelledTable(str(write_rows(photos, form, rows))))


def test_missing_empty_broken_and_image_holding_tables_are_errors(photos: Path) -> None:
    assert "no such table" in message_of(lambda: LabelledTable(str(photos / "x.csv")), MissingData)
    for form in ("csv", "parquet"):
        assert "no rows" in message_of(lambda form=form: LabelledTable(str(write_rows(photos, form, []))))
    path = write_rows(photos, "parquet", [(encoded(0), 0)])
    assert "ParquetClasses" in message_of(lambda: LabelledTable(str(path)))
    path.write_bytes(b"PAR1")
    assert "labels.parquet" in message_of(lambda: LabelledTable(str(path)))


def test_unreadable_images_of_a_table_raise_bad_sample_naming_the_row(photos: Path) -> None:
    (photos / "in/0.png").write_bytes(encoded(0)[:40])
    images = LabelledTable(str(write_rows(photos, "csv", [ROWS[0], ROWS[1], ("in/99.png", "cat")])))
    for index, row in ((1, "labels.csv row 3"), (2, "labels.csv row 4")):
        with pytest.raises(BadSample, match=row):
            images[index]
    assert images.stamp()
    before = images.stamp()
    paint(photos / "in/99.png")
    assert images.stamp() != before


def test_stamp_depends_on_the_order_of_files_but_not_on_labels(photos: Path) -> None:
    stamps = {LabelledTable(str(write_rows(photos, "csv", rows))).stamp() for rows in (ROWS, ROWS[::-1], ROWS[:3])}
    assert len(stamps) == 3
    again = [(path, "one class") for path, _ in ROWS]
    assert LabelledTable(str(write_rows(photos, "csv", again))).stamp() in stamps  # labels are not part of it


LABELS = [(7 * i) % 5 for i in range(23)]
NAMES = ["tench", "goldfish", "shark", "ray", "cock"]


def write_parquet(
    path: Path, images: list[bytes], labels: list[Any], layout: str = "struct", label_type: Any = None, rows: int = 4
) -> Path:
    """Write row groups of ``rows``; layout ``struct`` is Hugging Face's for images, ``bytes`` a plain column."""
    values = pa.array(images, pa.binary())
    if layout == "struct":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        values = pa.array([{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)], kind)
    table = pa.table({"image": values, "label": pa.array(labels, label_type)})
    pq.write_table(table, path, row_group_size=rows)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """23 images in files of 10 and 13, in row groups of 4, and a file that is not parquet."""
    images = [encoded(i) for i in range(23)]
    write_parquet(tmp_path / "val-00001.parquet", images[10:], LABELS[10:])
    write_parquet(tmp_path / "val-00000.parquet", images[:10], LABELS[:10])
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert pq.ParquetFile(tmp_path / "val-00001.parquet").num_row_groups == 4
    return tmp_path


def test_rows_come_in_the_order_of_files_and_rows_with_their_labels(shards: Path) -> None:
    images = ParquetClasses(str(shards), NAMES)
    assert images.class_names == NAMES
    assert colours_and_labels(images) == [(colour(i), label) for i, label in enumerate(LABELS)]
    assert images.labels() == LABELS
    assert len(images) == 23
    one = ParquetClasses(str(shards / "val-00001.parquet"), NAMES)
    assert colours_and_labels(one) == [(colour(10 + i), label) for i, label in enumerate(LABELS[10:])]


SPLITS = {"train-00000-of-00002": 0, "train-00001-of-00002": 1, "validation-00000-of-00001": 2, "test": 3}


def test_folder_of_several_splits_needs_one_of_them(tmp_path: Path) -> None:
    """Otherwise training images would be among those that are scored."""
    for name, label in SPLITS.items():
        write_parquet(tmp_path / f"{name}.parquet", [encoded(label)], [label])
    message = message_of(lambda: ParquetClasses(str(tmp_path), ["a", "b", "c", "d"]))
    assert "several splits (test, train, validation); set split" in message
    for split, labels in {"train": [0, 1], "validation": [2], "test": [3]}.items():
        images = ParquetClasses(str(tmp_path), [str(label) for label in range(max(labels) + 1)], split=split)
        assert images.labels() == labels
        assert all(split in path.name for path in images.image_paths())
    assert "test, train, validation" in message_of(lambda: ParquetClasses(str(tmp_path), split="val"), MissingData)
    write_parquet(tmp_path / "more.parquet", [encoded(4)], [0])
    assert "other files" in message_of(lambda: ParquetClasses(str(tmp_path)))


def stored_names(path: Path, names: list[str], label_column: str = "label") -> None:
    """Add the metadata that Hugging Face's datasets writes."""
    feature = {"names": names, "_type": "ClassLabel"}
    info = {"info": {"features": {"image": {"_type": "Image"}, label_column: feature}}}
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)


def test_class_names_come_from_the_metadata_of_datasets(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [encoded(i) for i in range(3)], [1, 0, 1])
    assert ParquetClasses(str(path)).class_names == ["0", "1"]
    stored_names(path, NAMES)
    assert ParquetClasses(str(path)).class_names == NAMES  # also those that do not occur
    assert ParquetClasses(str(path), [name.upper() for name in NAMES]).class_names[1] == "GOLDFISH"
    assert "2 names for the 5 classes" in message_of(lambda: ParquetClasses(str(path), ["a", "b"]))
    other = write_parquet(tmp_path / "b.parquet", [encoded(i) for i in range(3)], [1, 0, 1])
    stored_names(other, NAMES[::-1])
    assert "b.parquet: its class names are not those of a.parquet" in message_of(lambda: ParquetClasses(str(tmp_path)))
    stored_names(path, NAMES[:1])
    assert "label 1, but 1 class names" in message_of(lambda: ParquetClasses(str(path)))


@pytest.mark.parametrize("layout", ["struct", "bytes"])
def test_rows_can_be_read_in_any_order_and_from_other_columns(tmp_path: Path, layout: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", [encoded(i) for i in range(23)], LABELS, layout)
    images = ParquetClasses(str(path), NAMES)
    for index in (22, 0, 4, 3, 21, 8, 7, 0, 22, 12, 11):  # includes the ends of row groups
        image, label = images[index]
        assert (image.getpixel((0, 0)), label) == (colour(index), LABELS[index])
    pq.write_table(pa.table({"img": [encoded(3)], "fine_label": [0]}), path)
    images = ParquetClasses(str(tmp_path), ["apple"], image_column="img", label_column="fine_label")
    assert colours_and_labels(images) == [(colour(3), 0)]


MISTAKES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [  # the path, other arguments, and what the error says
    ("", {"image_column": "photo"}, ("val-00000.parquet", "'photo'", "image, label")),
    ("", {"label_column": "photo"}, ("val-00000.parquet", "'photo'", "image, label")),
    ("", {"class_names": ["a"] * 4}, ("4 names", "5 classes")),
    ("", {"class_names": ["a"] * 6}, ("6 names", "5 classes")),
    ("", {"class_names": "imagenet"}, ("1000 names",)),
    ("hidden.parquet", {}, ("hidden.parquet", "its label is -1")),
    ("none.parquet", {}, ("none.parquet", "its label is None")),
    ("words.parquet", {}, ("words.parquet", "'label'")),
    ("floats.parquet", {}, ("floats.parquet", "'label'")),
    ("page.parquet", {}, ("page.parquet",)),
    ("nothing.parquet", {}, ("nothing.parquet", "no such parquet file")),
    ("empty folder", {}, ("empty folder", "no such parquet file")),
]


@pytest.mark.parametrize(("name", "options", "parts"), MISTAKES)
def test_mistake_is_one_line(shards: Path, name: str, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    labels = {"hidden": [-1, -1, -1], "none": [0, None, 1], "words": ["cat", "dog", "cat"], "floats": [0.5, 1.0, 0.0]}
    stem = Path(name).stem
    if stem in labels:
        write_parquet(shards / name, [encoded(i) for i in range(3)], labels[stem])
    elif stem == "page":
        (shards / name).write_text("<html>404: not found</html>")  # what a failed download leaves
    (shards / "empty folder").mkdir()
    message = message_of(lambda: ParquetClasses(str(shards / name), **{"class_names": NAMES, **options}))
    assert all(part in message for part in parts)


def half_a_jpeg() -> bytes:
    """Return what opens, and would fail where its pixels are first used."""
    file = io.BytesIO()
    Image.effect_noise((60, 60), 90).convert("RGB").save(file, format="JPEG")
    return file.getvalue()[: file.tell() // 2]


@pytest.mark.parametrize("broken", [b"not an image", None, half_a_jpeg()], ids=["text", "nothing", "half"])
def test_broken_image_is_an_error_naming_file_and_row(tmp_path: Path, broken: bytes | None) -> None:
    contents: list[Any] = [encoded(i) for i in range(9)]
    contents[6] = broken
    write_parquet(tmp_path / "a.parquet", contents, [0] * 9)
    images = ParquetClasses(str(tmp_path), ["a"])
    message = message_of(lambda: images[6])
    assert "a.parquet" in message
    assert "row 6:" in message  # counted from 0 in the file, not in the row group
    assert images[7][1] == 0
