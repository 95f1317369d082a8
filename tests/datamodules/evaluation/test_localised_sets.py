"""Sets with masks or boxes, on miniatures in their owners' layouts, and images composed to grids."""

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from datamodules.evaluation import COCOInstances, ImageGrids, MaskedFiles, VOCBoxes
from datamodules.evaluation.localised_sets import CLASSES
from lit_clip.errors import InputError
from lit_clip.evaluation.data import MissingData
from lit_clip.evaluation.prompts import prompts_of_set
from lit_clip.evaluation.suite import SuiteEntry, read_suite
from tests.conftest import ROOT
from tests.helpers.coloured_sets import message_of
from tests.helpers.miniature_masks import write_all, write_coco_boxes, write_image, write_mask

SUITE = read_suite(ROOT / "configs/evaluation/segmentation.yaml")
MASKED = {  # keys, and the labels of the first mask's stripes
    "voc21": (["one.jpg", "three.jpg"], [0, 1, -1, 2], 21),
    "voc20": (["one.jpg", "three.jpg"], [-1, 0, -1, 1], 20),
    "context60": (["one.jpg", "three.jpg"], [0, 1, -1, 2], 60),
    "context59": (["one.jpg", "three.jpg"], [-1, 0, -1, 1], 59),
    "ade20k": (["one.jpg", "three.jpg", "two.jpg"], [-1, 0, 149, 0], 150),
    "coco_stuff": (["one.jpg", "three.jpg", "two.jpg"], [-1, 0, 170, 0], 171),
    "cityscapes": ([f"{city}/{city}_000000_leftImg8bit.png" for city in ("bonn", "ulm")], [-1, 0, 18, -1, 9], 19),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_all(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", MASKED)
def test_masks_have_the_labels_of_their_values(data: Path, name: str) -> None:
    keys, stripes, classes = MASKED[name]
    images: Any = SUITE[name].open("test", 0, data)
    images = pickle.loads(pickle.dumps(images))
    assert [images.key(row) for row in range(len(images))] == keys
    mask = images.mask(0)
    assert mask.shape == (24, 40) == images.images(0)[0].size[::-1]
    assert mask[0].tolist() == np.repeat(stripes, 40 // len(stripes)).tolist()
    assert (mask == mask[0]).all()
    assert len(images.class_names) == classes
    assert images.short_side(224) == 448


def test_a_class_with_several_names_is_where_one_of_them_is(data: Path) -> None:
    images: Any = SUITE["voc21"].open("test", 0, data)
    prompts = prompts_of_set(SuiteEntry(SUITE["voc21"].data, templates=["a {}.", "{}"]), images)
    by_name, classes = prompts.by_name()
    assert prompts.names == images.class_names
    assert (prompts.names[0], prompts.names[-1]) == ("background", "tv monitor")
    assert classes == [0] * 26 + list(range(1, 21))
    assert by_name.texts[1:3] == [["a wall.", "wall"], ["a tree.", "tree"]]
    assert by_name.texts[-1] == ["a tv monitor.", "tv monitor"]


def test_the_stamp_of_the_truth_changes_with_masks_and_values(data: Path) -> None:
    def stamps(name: str) -> tuple[str, str]:
        images: Any = SUITE[name].open("test", 0, data)
        return images.stamp(), images.truth_stamp()

    first, other = stamps("voc21"), stamps("voc20")
    assert first[0] == other[0]
    assert first[1] != other[1]
    write_mask(data / "voc2012/VOCdevkit/VOC2012/SegmentationClass/one.png", [0, 3, 3, 3, 1])
    assert stamps("voc21") == (first[0], stamps("voc21")[1])
    assert stamps("voc21")[1] != first[1]


def test_unknown_values_channels_and_missing_files_are_one_line(data: Path) -> None:
    root = data / "ADEChallengeData2016"
    mask = root / "annotations/validation/one.png"
    images: Any = SUITE["ade20k"].open("test", 0, data)
    write_mask(mask, [1, 151])
    assert message_of(lambda: images.mask(0)).startswith(
        f"{mask}: the value 151 is no class's; correct first or values"
    )
    Image.new("RGB", (40, 24)).save(mask)
    assert "a mask must have one channel of whole numbers" in message_of(lambda: images.mask(0))
    mask.write_bytes(b"no image")
    assert "one.png" in message_of(lambda: images.mask(0))
    given: dict[str, Any] = {"images": "images/validation", "masks": "annotations/validation", "classes": "ade20k"}
    for name, value, words in (
        ("classes", "no_such", "classes: 'no_such' must be a list of names or one of voc, context, ade20k, coco_stuff"),
        ("values", [1, 2], "values: 2 for 150 classes"),
        ("first", 70000, "first or values: [70000] must be between 0 and 65535"),
        ("ignored", [-1], "ignored: [-1] must be between 0 and 65535"),
        ("ignored", [200, 3], "ignored: 3 is the value of the class"),
        ("values", [7] * 150, "values: 1 for 150 classes"),
        ("classes", ["red", "blue", "Red"], "classes, background: 'red' is named more than once"),
        ("background", ["sky", "sky"], "classes, background: 'sky' is named more than once"),
        ("mask_suffix", ".tif", "no masks that end in .tif"),
    ):
        assert words in message_of(partial(MaskedFiles, str(root), **{**given, name: value}))
    given["background"] = ["grey"]
    assert "'background' is named more than once" in message_of(
        partial(MaskedFiles, str(root), **{**given, "classes": ["background", "red"]})
    )
    with pytest.raises(MissingData, match="annotations/training: no such folder"):
        MaskedFiles(str(root), "images/validation", "annotations/training", "ade20k")


def test_255_is_ignored_unless_a_class_has_it(tmp_path: Path) -> None:
    write_image(tmp_path / "images/one.jpg", 1, 3, 1)
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.array([[0, 1, 255]], dtype=np.uint8)).save(tmp_path / "masks/one.png")
    options: dict[str, Any] = {"images": "images", "masks": "masks", "classes": ["a", "b"]}
    assert MaskedFiles(str(tmp_path), **options).mask(0).tolist() == [[0, 1, -1]]
    assert MaskedFiles(str(tmp_path), **options, values=[255, 0], ignored=[1]).mask(0).tolist() == [[1, -1, 0]]
    with_255 = MaskedFiles(str(tmp_path), **{**options, "classes": ["a", "b", "c"]}, values=[0, 1, 255])
    assert with_255.mask(0).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("mode", "suffix"), [("F", ".tif"), ("1", ".png"), ("LA", ".png")])
def test_masks_without_one_channel_of_whole_numbers_are_refused(tmp_path: Path, mode: str, suffix: str) -> None:
    write_image(tmp_path / "images/one.jpg", 1, 3, 1)
    (tmp_path / "masks").mkdir()
    Image.new(mode, (3, 1)).save(tmp_path / f"masks/one{suffix}")
    images = MaskedFiles(str(tmp_path), "images", "masks", ["a", "b"], mask_suffix=suffix)
    assert "one channel of whole numbers" in message_of(lambda: images.mask(0))


def test_class_names_are_distinct_and_as_many_as_published() -> None:
    names = yaml.safe_load(CLASSES.read_text(encoding="utf-8"))
    sizes = {"voc": 20, "context": 59, "ade20k": 150, "coco_stuff": 171, "cityscapes": 19}
    assert {key: len(set(each)) for key, each in names.items()} == sizes
    assert all(isinstance(name, str) and name == name.strip() for each in names.values() for name in each)


def test_boxes_of_voc_begin_at_0_and_include_their_last_pixel(data: Path) -> None:
    images = VOCBoxes(str(data / "voc2007"))
    assert [images.key(row) for row in range(2)] == ["JPEGImages/one.jpg", "JPEGImages/two.jpg"]
    named = [(images.class_names[label], box) for label, box in images.boxes(0)]
    assert named == [("dog", (0, 0, 10, 24)), ("tv monitor", (20, 2, 40, 20)), ("dog", (29, 0, 32, 2))]
    assert (len(images.boxes(1)), images.tolerance, len(images.class_names)) == (2, 15, 20)
    path = data / "voc2007/VOCdevkit/VOC2007/Annotations/one.xml"
    whole = path.read_text()
    for side, words in (("left", "not a readable annotation"), ("nan", "has no inside"), ("99", "has no inside")):
        path.write_text(whole.replace("<xmin>1<", f"<xmin>{side}<"))
        assert f"{path}: " in (message := message_of(lambda: VOCBoxes(str(data / "voc2007"))))
        assert words in message


def test_boxes_of_coco_have_labels_by_ascending_id(data: Path) -> None:
    images = COCOInstances(str(data / "coco"), tolerance=0)
    assert images.class_names == ["person", "toothbrush"]
    assert [images.key(row) for row in range(len(images))] == ["two.jpg", "one.jpg"]  # the third has no box
    assert [images.boxes(row) for row in range(2)] == [
        [(0, (20.5, 2, 30.5, 22))],
        [(1, (0, 0, 20, 24)), (1, (30, 0, 40, 5))],
    ]
    path = data / "coco/annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    for key, value, words in (
        ("bbox", [1, 2, 3], "length 4"),
        ("image_id", 77, "a box is of no image"),
        ("bbox", "x", "must be a list"),
        ("bbox", [1, 2, -3, 4], "has no inside"),
    ):
        path.write_text(json.dumps({**content, "annotations": [{**content["annotations"][0], key: value}]}))
        assert words in message_of(lambda: COCOInstances(str(data / "coco")))
    for twice in ("images", "categories"):
        path.write_text(json.dumps({**content, twice: [*content[twice], content[twice][0]]}))
        assert "the same id" in message_of(lambda: COCOInstances(str(data / "coco")))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Class folders of 4, 3, 2 and 1 images."""
    for label, name in enumerate("abcd"):
        for number in range(4 - label):
            write_image(tmp_path / name / f"{number}.png", 10 * label + number, 30 + 2 * label, 20)
    return tmp_path


def grids(root: Path, **options: Any) -> ImageGrids:
    return ImageGrids({"class_path": "datamodules.ImageFolderClasses"}, str(root), side=20, **options)


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 2), (2, 1)])
def test_grids_have_different_classes_and_each_image_once(folders: Path, rows: int, columns: int) -> None:
    images = grids(folders, rows=rows, columns=columns)
    keys = [key for row in range(len(images)) for key in images.key(row).split(" | ")]
    assert len(keys) == len(set(keys)) == rows * columns * len(images)
    assert len(images) == (5 if rows * columns == 2 else 1)
    for row in range(len(images)):
        picture, mask = images.images(row)[0], images.mask(row)
        assert picture.size == (20 * columns, 20 * rows) == mask.shape[::-1]
        places = images.boxes(row)
        assert len({label for label, _ in places}) == len(places) == rows * columns
        for (label, box), key in zip(places, images.key(row).split(" | "), strict=True):
            assert images.class_names[label] == key[0]
            left, top, right, bottom = map(int, box)
            assert (mask[top:bottom, left:right] == label).all()
            with Image.open(folders / key) as whole:
                margin = (whole.width - 20) // 2
                middle = whole.crop((margin, 0, margin + 20, 20))
                assert picture.crop((left, top, right, bottom)).tobytes() == middle.tobytes()
    assert images.short_side(32) == 32 * min(rows, columns)


def test_grids_depend_on_the_seed_alone(folders: Path) -> None:
    first, again, other = grids(folders), pickle.loads(pickle.dumps(grids(folders))), grids(folders, seed=1)
    assert first.grids == again.grids != other.grids
    assert (first.stamp(), first.truth_stamp()) == (again.stamp(), again.truth_stamp())
    assert first.stamp() != other.stamp()
    with pytest.raises(InputError, match="images: too few for a grid of 1 x 5 different classes"):
        grids(folders, columns=5)


def test_an_instance_file_elsewhere_is_found(tmp_path: Path) -> None:
    write_coco_boxes(tmp_path)
    (tmp_path / "annotations/instances_val2017.json").rename(tmp_path / "instances_val2017.json")
    assert len(COCOInstances(str(tmp_path))) == 2
    with pytest.raises(MissingData, match=r"no list of instances in it"):
        COCOInstances(str(tmp_path), split="val2014")
