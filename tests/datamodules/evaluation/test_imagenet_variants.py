"""ImageNetV2, ImageNet-A and ObjectNet."""

import json
from pathlib import Path

import pytest
from torchvision import datasets

from datamodules.evaluation import ImageNetFolders, ImageNetV2, ObjectNet
from datamodules.evaluation.imagenet import imagenet_wnids
from lit_clip.errors import BadSample
from lit_clip.evaluation.data import MissingData
from lit_clip.evaluation.zero_shot import imagenet_class_names
from tests.helpers.coloured_sets import (
    assert_same_after_pickling,
    colour,
    colour_of,
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


def test_imagenet_a_has_its_own_classes_with_the_papers_names(tmp_path: Path) -> None:
    """Three of its classes, with their labels and names in ImageNet's list."""
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
    assert_same_after_pickling(images)
    assert "3 class folders instead of 200" in message_of(lambda: ImageNetFolders(str(tmp_path), classes=200))
    (tmp_path / "n02206856/0.000_x.jpg").unlink()
    (tmp_path / "n02206856/1.jpg").unlink()
    assert "n02206856" in message_of(lambda: ImageNetFolders(str(tmp_path)))
    paint(tmp_path / "n99999999/a.jpg")
    assert "n99999999 is not a class of ImageNet" in message_of(lambda: ImageNetFolders(str(tmp_path)))


def test_corrupt_image_in_a_class_folder_raises_bad_sample_only_when_read(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        paint(tmp_path / f"n01440764/{name}.png", 7)
    (tmp_path / "n01440764/b.png").write_bytes(encoded(0)[:40])
    images = ImageNetFolders(str(tmp_path))
    assert len(images) == 3
    with pytest.raises(BadSample, match="n01440764/b.png"):
        images[1]
    assert colour_of(images, 2) == colour(7)


def test_objectnet_is_its_overlap_with_imagenet_without_the_red_line(tmp_path: Path) -> None:
    images = ObjectNet(str(write_objectnet(tmp_path / "objectnet-1.0")))
    assert images.class_names == ["alarm clock", "t-shirt"]
    assert images.labels() == [0, 1]
    for index, number in ((0, 1), (1, 0)):
        image = images[index][0]
        assert image.getcolors() == [(image.width * image.height, colour(number))]
        assert min(image.size) >= 6
    assert_same_after_pickling(images)


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


def test_inconsistent_or_missing_objectnet_mappings_are_errors(tmp_path: Path) -> None:
    root = write_objectnet(tmp_path / "objectnet-1.0")
    (root / "mappings/objectnet_to_imagenet_1k.json").write_text('{"Unknown thing": "tench"}')
    assert "folder_to_objectnet_label.json" in message_of(lambda: ObjectNet(str(root)))
    (root / "mappings/objectnet_to_imagenet_1k.json").unlink()
    assert "objectnet_to_imagenet_1k.json" in message_of(lambda: ObjectNet(str(root)), MissingData)
