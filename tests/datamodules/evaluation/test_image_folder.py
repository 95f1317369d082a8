"""Labelled images in folders and in parquet files: which image has which label, and what is refused."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from datamodules import ImageFolderClasses, ParquetClasses
from lit_clip.errors import InputError
from lit_clip.evaluation.zero_shot import LabelledImages, ZeroShotSet


def message_of(call: Callable[[], Any]) -> str:
    """The one line that a call fails with."""
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def colour(number: int) -> tuple[int, int, int]:
    return number * 10 % 256, 255 - number, 7


def paint(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), colour(number)).save(path)
    return path


def colours(images: LabelledImages) -> list[tuple[tuple[int, int, int], int]]:
    """The colour and the label of every image."""
    pairs: list[Any] = [images[index] for index in range(len(images))]
    assert all(image.mode == "RGB" and image.size == (4, 3) for image, _ in pairs)
    return [(image.getpixel((1, 1)), label) for image, label in pairs]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, made in another order than that of their names; one with nested images and a text."""
    root = tmp_path / "pets"
    paint(root / "tabby_cat/deep/er/1.png", 3)
    paint(root / "tabby_cat/0.png", 2)
    paint(root / "Zebra_finch/b.PNG", 0)
    paint(root / "a_dog/x.bmp", 1)
    (root / "a_dog/licence.txt").write_text("MIT")
    (root / "readme.md").write_text("pets")
    return root


def test_classes_are_the_folders_in_the_order_of_their_names(folder: Path) -> None:
    images = ImageFolderClasses(str(folder))
    assert images.class_names == ["Zebra finch", "a dog", "tabby cat"]
    assert colours(images) == [(colour(0), 0), (colour(1), 1), (colour(2), 2), (colour(3), 2)]
    oracle = ImageFolder(str(folder))
    assert [name.replace("_", " ") for name in oracle.classes] == images.class_names
    assert sorted(oracle.targets) == images.labels()


def test_labels_are_those_of_the_images(folder: Path) -> None:
    images = ImageFolderClasses(str(folder))
    assert images.labels() == [label for _, label in colours(images)] == [0, 1, 2, 2]
    assert len(images) == 4


@pytest.mark.parametrize("hidden", [".git/x.png", "a_dog/.ipynb_checkpoints/x-checkpoint.png", "a_dog/._x.bmp"])
def test_what_is_hidden_is_no_class_and_no_image(folder: Path, hidden: str) -> None:
    """Version control, notebooks' copies, and what macOS leaves beside each file (which is no image at all)."""
    paint(folder / hidden)
    images = ImageFolderClasses(str(folder))
    assert images.class_names == ["Zebra finch", "a dog", "tabby cat"]
    assert images.labels() == [0, 1, 2, 2]


def test_names_given_replace_those_of_the_folders_in_their_order(folder: Path) -> None:
    images = ImageFolderClasses(str(folder), class_names=["finch", "dog", "cat"])
    assert images.class_names == ["finch", "dog", "cat"]
    assert images.labels() == [0, 1, 2, 2]


def test_a_list_of_names_of_another_length_is_an_error_with_both_numbers(folder: Path) -> None:
    message = message_of(lambda: ImageFolderClasses(str(folder), class_names=["finch", "dog"]))
    for part in ("2 names", "3 classes", "pets", "class_names"):
        assert part in message


def test_imagenet_with_two_folders_is_an_error(tmp_path: Path) -> None:
    for name in ("n01440764", "n01443537"):
        paint(tmp_path / name / "a.png")
    message = message_of(lambda: ImageFolderClasses(str(tmp_path), class_names="imagenet"))
    for part in ("1000 names", "2 classes", "n01440764"):
        assert part in message


def test_imagenet_with_its_thousand_folders_has_the_papers_names_in_order(tmp_path: Path) -> None:
    for i in range(1000):
        (tmp_path / f"n{i:08}").mkdir()
        (tmp_path / f"n{i:08}/a.png").write_bytes(encoded(0))
    images = ImageFolderClasses(str(tmp_path), class_names="imagenet")
    assert [images.class_names[i] for i in (0, 1, 2, 999)] == ["tench", "goldfish", "great white shark", "toilet paper"]
    assert images.labels() == list(range(1000))


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    message = message_of(lambda: ImageFolderClasses(str(tmp_path / "nowhere")))
    assert "nowhere" in message
    assert "no such folder" in message


def test_a_folder_of_images_without_subfolders_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    paint(tmp_path / "flat/a.png")
    message = message_of(lambda: ImageFolderClasses(str(tmp_path / "flat")))
    assert "flat" in message
    assert "no subfolders" in message


def test_a_class_without_images_is_named(folder: Path) -> None:
    (folder / "b_bird").mkdir()
    (folder / "b_bird/notes.txt").write_text("none yet")
    message = message_of(lambda: ImageFolderClasses(str(folder)))
    assert "b_bird" in message
    assert "no images" in message


def test_a_file_that_is_no_image_is_an_error_before_anything_is_trained(folder: Path) -> None:
    (folder / "a_dog/broken.png").write_bytes(b"not an image")
    message = message_of(lambda: ZeroShotSet(ImageFolderClasses(str(folder))))  # as the callback's YAML is read
    assert "broken.png" in message
    assert "not an image" in message


def test_a_truncated_image_is_an_error_that_names_its_file_once_it_is_read(folder: Path) -> None:
    Image.effect_noise((40, 40), 90).save(folder / "a_dog/broken.png")
    whole = (folder / "a_dog/broken.png").read_bytes()
    (folder / "a_dog/broken.png").write_bytes(whole[: len(whole) // 2])
    images = ImageFolderClasses(str(folder))
    message = message_of(lambda: images[1])
    assert "broken.png" in message
    assert "truncated" in message
    assert images[2][1] == 1  # the next one can be read


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour(number)).save(file, format="PNG")
    return file.getvalue()


LABELS = [(7 * i) % 5 for i in range(23)]
NAMES = ["tench", "goldfish", "shark", "ray", "cock"]


def write(
    path: Path, images: list[bytes], labels: list[Any], layout: str = "struct", label_type: Any = None, rows: int = 4
) -> Path:
    """A parquet file with 4 rows a group; ``struct`` as the Hugging Face hub stores images, or plain ``bytes``."""
    values = pa.array(images, pa.binary())
    if layout == "struct":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        values = pa.array([{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)], kind)
    table = pa.table({"image": values, "label": pa.array(labels, label_type)})
    pq.write_table(table, path, row_group_size=rows)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """23 images in two files of 10 and 13, in groups of 4, and a file that is not parquet."""
    images = [encoded(i) for i in range(23)]
    write(tmp_path / "val-00001.parquet", images[10:], LABELS[10:])
    write(tmp_path / "val-00000.parquet", images[:10], LABELS[:10])
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert pq.ParquetFile(tmp_path / "val-00001.parquet").num_row_groups == 4
    return tmp_path


def test_parquet_rows_come_in_the_order_of_files_and_rows_with_their_labels(shards: Path) -> None:
    images = ParquetClasses(str(shards), NAMES)
    assert images.class_names == NAMES
    assert colours(images) == [(colour(i), label) for i, label in enumerate(LABELS)]
    assert images.labels() == LABELS
    assert len(images) == 23


def test_one_parquet_file_can_be_named(shards: Path) -> None:
    images = ParquetClasses(str(shards / "val-00001.parquet"), NAMES)
    assert colours(images) == [(colour(10 + i), label) for i, label in enumerate(LABELS[10:])]


@pytest.mark.parametrize("layout", ["struct", "bytes"])
def test_parquet_rows_can_be_read_in_any_order(tmp_path: Path, layout: str) -> None:
    path = write(tmp_path / "a.parquet", [encoded(i) for i in range(23)], LABELS, layout)
    images = ParquetClasses(str(path), NAMES)
    for index in (22, 0, 4, 3, 21, 8, 7, 0, 22, 12, 11):  # the ends of groups among them
        image, label = images[index]
        assert (image.getpixel((0, 0)), label) == (colour(index), LABELS[index])


def test_parquet_columns_can_have_other_names(tmp_path: Path) -> None:
    table = pa.table({"img": [encoded(3)], "fine_label": [0]})
    pq.write_table(table, tmp_path / "a.parquet")
    images = ParquetClasses(str(tmp_path), ["apple"], image_column="img", label_column="fine_label")
    assert colours(images) == [(colour(3), 0)]


@pytest.mark.parametrize("option", ["image_column", "label_column"])
def test_a_missing_parquet_column_is_an_error_that_lists_the_columns(shards: Path, option: str) -> None:
    options: Any = {option: "photo"}
    message = message_of(lambda: ParquetClasses(str(shards), NAMES, **options))
    for part in ("val-00000.parquet", "'photo'", "image, label"):
        assert part in message


def test_hidden_test_labels_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "test.parquet", [encoded(i) for i in range(3)], [-1, -1, -1])
    message = message_of(lambda: ParquetClasses(str(path), NAMES))
    assert "test.parquet" in message
    assert "its label is -1" in message


@pytest.mark.parametrize("labels", [[0, None, 1], ["cat", "dog", "cat"], [0.5, 1.0, 0.0]])
def test_labels_that_are_no_whole_numbers_are_an_error(tmp_path: Path, labels: list[Any]) -> None:
    path = write(tmp_path / "a.parquet", [encoded(i) for i in range(3)], labels)
    message = message_of(lambda: ParquetClasses(str(path), ["a", "b"]))
    assert "a.parquet" in message
    assert "label" in message


@pytest.mark.parametrize("count", [4, 6])
def test_another_number_of_names_than_labels_is_an_error_with_both_numbers(shards: Path, count: int) -> None:
    message = message_of(lambda: ParquetClasses(str(shards), ["a"] * count))
    assert f"{count} names" in message
    assert "5 classes" in message


def test_imagenets_names_need_its_labels(shards: Path) -> None:
    assert "1000 names" in message_of(lambda: ParquetClasses(str(shards), "imagenet"))


@pytest.mark.parametrize("name", ["nothing.parquet", "empty folder"])
def test_a_missing_parquet_file_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty folder").mkdir()
    message = message_of(lambda: ParquetClasses(str(tmp_path / name), NAMES))
    assert name in message
    assert "no such parquet file" in message


def test_a_file_that_is_not_parquet_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("<html>404: not found</html>")  # what a failed download leaves
    assert "a.parquet" in message_of(lambda: ParquetClasses(str(tmp_path), NAMES))


@pytest.mark.parametrize("broken", [b"not an image", None])
def test_a_broken_image_in_parquet_is_an_error_that_names_file_and_row(tmp_path: Path, broken: bytes | None) -> None:
    photos: list[Any] = [encoded(i) for i in range(9)]
    photos[6] = broken
    write(tmp_path / "a.parquet", photos, [0] * 9)
    images = ParquetClasses(str(tmp_path), ["a"])
    message = message_of(lambda: images[6])
    assert "a.parquet" in message
    assert "row 6:" in message  # of the file from 0, whatever group it is in
    assert images[7][1] == 0


def test_a_truncated_image_in_parquet_is_an_error_of_its_row(tmp_path: Path) -> None:
    """Not of whoever looks at its pixels first."""
    file = io.BytesIO()
    Image.effect_noise((60, 60), 90).convert("RGB").save(file, format="JPEG")
    data = file.getvalue()
    write(tmp_path / "a.parquet", [data, data[: len(data) // 2]], [0, 0])
    images = ParquetClasses(str(tmp_path), ["a"])
    assert images[0][0].size == (60, 60)
    message = message_of(lambda: images[1])
    assert "a.parquet" in message
    assert "row 1" in message
