"""Folders with one subfolder of images per class."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from datamodules import ImageFolderClasses, OpenMojiClasses, ParquetClasses
from datamodules.evaluation.own_classes import ClassNames
from datamodules.openmoji import read_table
from lit_clip.evaluation.data import MissingData
from lit_clip.evaluation.zero_shot import ZeroShotSet
from tests.helpers.coloured_sets import assert_same_after_pickling, colour, colours_and_labels, encoded, message_of


def paint(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), colour(number)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, created out of order; one has nested images, one a text file."""
    root = tmp_path / "pets"
    paint(root / "tabby_cat/deep/er/1.png", 3)
    paint(root / "tabby_cat/0.png", 2)
    paint(root / "Zebra_finch/b.PNG", 0)
    paint(root / "a_dog/x.bmp", 1)
    (root / "a_dog/licence.txt").write_text("MIT")
    (root / "readme.md").write_text("pets")
    return root


def test_classes_are_the_subfolders_sorted_by_name(folder: Path) -> None:
    images = ImageFolderClasses(str(folder))
    assert images.class_names == ["Zebra finch", "a dog", "tabby cat"]
    assert colours_and_labels(images) == [(colour(0), 0), (colour(1), 1), (colour(2), 2), (colour(3), 2)]
    oracle = ImageFolder(str(folder))
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
    for i in range(1000):
        (tmp_path / f"n{i:08}").mkdir()
        (tmp_path / f"n{i:08}/a.png").write_bytes(encoded(0))
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
    (folder / "a_dog/broken.png").write_bytes(b"not an image")
    message = message_of(lambda: ZeroShotSet(ImageFolderClasses(str(folder))))  # as the callback does
    assert "broken.png" in message
    assert "not an image" in message


def test_truncated_image_is_an_error_naming_the_file_when_read(folder: Path) -> None:
    Image.effect_noise((40, 40), 90).save(folder / "a_dog/broken.png")
    whole = (folder / "a_dog/broken.png").read_bytes()
    (folder / "a_dog/broken.png").write_bytes(whole[: len(whole) // 2])
    images = ImageFolderClasses(str(folder))
    message = message_of(lambda: images[1])
    assert "broken.png" in message
    assert "truncated" in message
    assert images[2][1] == 1  # the next image can be read


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
