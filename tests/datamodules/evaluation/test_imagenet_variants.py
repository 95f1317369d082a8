"""Class folders: ImageNetV2, ImageNet-A, ObjectNet and the user's own."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchvision import datasets
from torchvision.datasets import ImageFolder

from datamodules import ImageFolderClasses, OpenMojiClasses, ParquetClasses
from datamodules.evaluation import ImageNetV2, ObjectNet
from datamodules.evaluation.imagenet import imagenet_wnids
from datamodules.evaluation.own_classes import ClassNames
from datamodules.openmoji import read_table
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
    for label in range(999):
        paint(tmp_path / str(label) / "a.jpeg", label)
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
