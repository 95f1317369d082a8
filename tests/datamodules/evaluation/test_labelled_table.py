"""Tables of images and labels."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.evaluation import LabelledTable
from lit_clip.errors import BadSample
from lit_clip.evaluation.data import MissingData
from tests.helpers.coloured_sets import assert_same_after_pickling, colour, colour_of, encoded, message_of, paint


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


def test_label_names_follow_the_order_of_the_given_class_names(photos: Path) -> None:
    path = write_rows(photos, "csv", ROWS)
    assert LabelledTable(str(path), class_names=["dog", "eel", "cat", "ant, red"]).labels() == [0, 3, 0, 2]


def test_labels_that_are_both_numbers_and_other_classes_names_are_an_error(photos: Path) -> None:
    """CLEVR's classes are 10, 3, 4, 5: is 3 the label of "5", or the class "3"?"""
    names = ["10", "3", "4", "5"]
    path = write_rows(photos, "csv", [("in/0.png", 10), ("in/1.png", 3)])
    assert LabelledTable(str(path), names).labels() == [0, 1]  # 10 is out of range as a number: the column holds names
    message = message_of(lambda: LabelledTable(str(write_rows(photos, "csv", [("in/1.png", 3)])), names))
    assert "labels.csv row 2" in message
    assert LabelledTable(str(write_rows(photos, "jsonl", [("in/1.png", 3)])), names).labels() == [3]  # not text


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
    for part in (f"{path.name} row {row}", *parts):
        assert part in message


@pytest.mark.parametrize("form", FORMS)
def test_missing_column_or_image_is_an_error_naming_the_option_to_set(photos: Path, form: str) -> None:
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


def test_class_name_shared_by_two_classes_cannot_be_a_label(photos: Path) -> None:
    message = message_of(lambda: LabelledTable(str(write_rows(photos, "csv", [("in/0.png", "missile")])), "imagenet"))
    assert "the same name" in message
    path = write_rows(photos, "csv", [("in/0.png", 744), ("in/1.png", 657)])
    images = LabelledTable(str(path), "imagenet")
    assert [images.class_names[label] for label in images.labels()] == ["missile", "missile"]
    assert images.labels() == [744, 657]


def test_stamp_depends_on_the_order_of_files_but_not_on_labels(photos: Path) -> None:
    stamps = {LabelledTable(str(write_rows(photos, "csv", rows))).stamp() for rows in (ROWS, ROWS[::-1], ROWS[:3])}
    assert len(stamps) == 3
    again = [(path, "one class") for path, _ in ROWS]
    assert LabelledTable(str(write_rows(photos, "csv", again))).stamp() in stamps  # labels are not part of it
