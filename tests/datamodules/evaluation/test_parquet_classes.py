"""Labelled images in parquet files."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamodules import ParquetClasses
from lit_clip.evaluation.data import MissingData
from tests.helpers.coloured_sets import colour, colours_and_labels, encoded, message_of

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
def test_rows_can_be_read_in_any_order(tmp_path: Path, layout: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", [encoded(i) for i in range(23)], LABELS, layout)
    images = ParquetClasses(str(path), NAMES)
    for index in (22, 0, 4, 3, 21, 8, 7, 0, 22, 12, 11):  # includes the ends of row groups
        image, label = images[index]
        assert (image.getpixel((0, 0)), label) == (colour(index), LABELS[index])


def test_column_names_can_be_set(tmp_path: Path) -> None:
    table = pa.table({"img": [encoded(3)], "fine_label": [0]})
    pq.write_table(table, tmp_path / "a.parquet")
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


@pytest.mark.parametrize("broken", [b"not an image", None])
def test_broken_image_is_an_error_naming_file_and_row(tmp_path: Path, broken: bytes | None) -> None:
    contents: list[Any] = [encoded(i) for i in range(9)]
    contents[6] = broken
    write_parquet(tmp_path / "a.parquet", contents, [0] * 9)
    images = ParquetClasses(str(tmp_path), ["a"])
    message = message_of(lambda: images[6])
    assert "a.parquet" in message
    assert "row 6:" in message  # counted from 0 in the file, not in the row group
    assert images[7][1] == 0


def test_truncated_image_is_an_error_when_its_row_is_read(tmp_path: Path) -> None:
    """It must not be returned and fail where its pixels are first used."""
    file = io.BytesIO()
    Image.effect_noise((60, 60), 90).convert("RGB").save(file, format="JPEG")
    data = file.getvalue()
    write_parquet(tmp_path / "a.parquet", [data, data[: len(data) // 2]], [0, 0])
    images = ParquetClasses(str(tmp_path), ["a"])
    assert images[0][0].size == (60, 60)
    message = message_of(lambda: images[1])
    assert "a.parquet" in message
    assert "row 1" in message
