"""Segmentation sets with masks of any mode, depth and values, and sets of boxes, each read again by a loop."""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from datamodules.evaluation import COCOInstances, MaskedFiles, VOCBoxes
from datamodules.evaluation.owners_layouts import VOC_CLASSES
from lit_clip.evaluation.places import window_of
from tests.fuzz.inputs import Input, Inputs, Target, damaged, edited_json, to_json
from tests.fuzz.samples import encoded, table_images
from tests.fuzz.targets.locating import DEEP, MODES, SIDE, odd_image
from tests.helpers.colours import PATCH, colour_model

CLASSES = ["cat", "dog", "tree"]
PIXELS = (-1, 0, 1, 2, 3, 5, 7, 254, 255, 256, 300, 40_000, 2**16 - 1)
SETTINGS = {"background": None, "first": 0, "values": None, "ignored": [255], "short_side": None}
ODD: dict[str, tuple[Any, ...]] = {
    "background": (None, ["ground", "wall"]),
    "first": (1, 254, 255, 40_000, 2**16 - 1, -1),
    "values": ([1, 2, 3], [7, 5, 300], [5, 5, 6], [255, 0, 1], [0, 1], [0, 1, 2**16], [], [1, 2, 3, 4]),
    "ignored": (None, [], [0], [0, 255], [-1], [2**16], [1, 300], [*range(3, 256)]),
    "short_side": (32, 64, 50, 0, -5, 10**6),
}


def mask_inputs() -> Inputs:
    modes = st.sampled_from([(suffix, mode) for suffix in ("png", "tiff") for mode in MODES[suffix]])
    of_any_mode = st.builds(odd_image, modes, st.just((4, 3)), st.integers(0, 2**32))
    pixels, depths = st.lists(st.sampled_from(PIXELS), min_size=1, max_size=4), st.sampled_from(("L", "P", *DEEP))
    option = st.sampled_from([(name, value) for name, values in ODD.items() for value in values])
    chosen = st.builds(_settings, depths, pixels, st.lists(option, max_size=3))
    eight = encoded(Image.fromarray(np.array([[0, 1, 2, 255]] * 3, np.uint8)), "PNG")
    return st.one_of(chosen, chosen, of_any_mode, damaged(lambda: {"a.png": eight}))


def _settings(mode: str, pixels: list[int], options: list[tuple[str, Any]]) -> Input:
    return Input("mask.json", to_json({"mode": mode, "pixels": pixels, **SETTINGS, **dict(options)}))


def _mask(tree: Any) -> bytes:
    """Return a mask of one row."""
    image = Image.fromarray(np.array([tree["pixels"]]).astype(DEEP.get(tree["mode"], np.uint8)))
    if tree["mode"] == "P":
        image.putpalette(bytes(range(256)) * 3)
    return encoded(image, "TIFF")


def read_mask(folder: Path, given: Input) -> Iterator[str]:
    """Open a set with one mask; each pixel has the class that its value is, or does not count."""
    described = given.name == "mask.json"
    tree = json.loads(given.data) if described else SETTINGS
    settings, data = {name: tree[name] for name in SETTINGS}, _mask(tree) if described else given.data
    name = "a.tiff" if described else given.name
    for each, content in {f"masks/{name}": data, "images/a.png": table_images()["0.png"]}.items():
        (folder / each).parent.mkdir()
        (folder / each).write_bytes(content)
    suffixes = {"image_suffix": ".png", "mask_suffix": Path(name).suffix}
    opened = MaskedFiles(str(folder), "images", "masks", CLASSES, **suffixes, **settings)
    found, values = opened.mask(0), settings["values"]
    count = len(CLASSES) + bool(settings["background"])
    values = [settings["first"] + place for place in range(count)] if values is None else values
    ignored = settings["ignored"] or ([255] if settings["ignored"] is None and 255 not in values else [])
    assert len({*values}) == len(values) == count, f"the values {values} were taken for {count} classes"
    assert not {*values} & {*ignored}, f"of the values {values} some are in {ignored}, too"
    pixels = Image.open(io.BytesIO(data))
    assert pixels.mode in ("L", "P", "I", "I;16", "I;16B"), f"a mask of the mode {pixels.mode} was read"
    label_of = {**dict.fromkeys(ignored, -1), **{value: label for label, value in enumerate(values)}}
    expected = [[label_of.get(int(value), "refused") for value in row] for row in np.asarray(pixels)]
    assert found.tolist() == expected, f"the labels {found.tolist()[:2]} are {expected[:2]}"
    side = 2 * SIDE if settings["short_side"] is None else settings["short_side"]
    window = window_of(colour_model(), opened)
    assert tuple(window) == (side, side // PATCH), f"{window} for a short side of {side}"
    yield "used"


BOX = {"xmin": "3", "ymin": "2", "xmax": "30", "ymax": "24"}
NUMBERS = ("nan", "inf", "-1", "0", "30.5", " 7 ", "", "1_0", "\uff11", "99999", "2", "a", "cow", " dog ", "Dog")
COCO = {
    "images": [{"id": number, "file_name": f"{place}.png"} for place, number in enumerate((7, 5, 6))],
    "categories": [{"id": 90, "name": "tree"}, {"id": 1, "name": "cat"}, {"id": 18, "name": "dog"}],
    "annotations": [
        {"image_id": image, "category_id": kind, "bbox": box}
        for image, kind, box in ((7, 18, [1, 2, 10, 20]), (5, 1, [0, 0, 70, 50]), (7, 90, [3.5, 4.5, 0, 1.25]))
    ],
}


def box_inputs() -> Inputs:
    def make(changes: list[tuple[str, str]]) -> Input:
        sides = "".join(f"<{key}>{value}</{key}>" for key, value in {**BOX, **dict(changes)}.items())
        one = f"<object><name>{dict(changes).get('name', 'dog')}</name><bndbox>{sides}</bndbox></object>"
        return Input("0.xml", f"<annotation>{one}{one}</annotation>".encode())

    voc = st.builds(make, st.lists(st.tuples(st.sampled_from(("name", *BOX)), st.sampled_from(NUMBERS)), max_size=2))
    coco = edited_json(lambda: {"coco.json": COCO}, (7, 5, 18, 90, 7.9, "7", [1, 2, -3, 4], [1, 2, 3]), most=2)
    return st.one_of(voc, coco, damaged(lambda: {"0.xml": make([]).data}))


def read_boxes(folder: Path, given: Input) -> Iterator[str]:
    """Open a set of Pascal VOC's or COCO's layout; each image has the boxes that its annotation names."""
    voc = "VOCdevkit/VOC2007/"
    files = {f"val2017/{row}.png": table_images()[f"{row}.png"] for row in range(3)}
    files |= {f"{voc}JPEGImages/0.jpg": files["val2017/0.png"], f"{voc}ImageSets/Main/test.txt": b"0\n"}
    files["instances_val2017.json" if given.name == "coco.json" else f"{voc}Annotations/0.xml"] = given.data
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    opened = COCOInstances(str(folder)) if given.name == "coco.json" else VOCBoxes(str(folder))
    found = [opened.boxes(row) for row in range(len(opened))]
    for left, top, right, bottom in [box for boxes in found for _, box in boxes]:
        assert all(map(math.isfinite, (left, top, right, bottom))), f"sides of {(left, top, right, bottom)}"
        assert left <= right, f"from {left} to {right}"
        assert top <= bottom, f"from {top} to {bottom}"
    assert found == (_coco_boxes if given.name == "coco.json" else _voc_boxes)(given.data)
    for row in range(len(opened)):
        assert opened.images(row)
        yield "used"


def _voc_boxes(data: bytes) -> Any:
    found = []
    for each in ElementTree.fromstring(data.decode("utf-8-sig")).iter("object"):
        left, top, right, bottom = (float(each.findtext(f"bndbox/{key}", "")) for key in BOX)
        found.append((VOC_CLASSES.index(each.findtext("name", "").strip()), (left - 1, top - 1, right, bottom)))
    return [found]


def _coco_boxes(data: bytes) -> Any:
    """Return the boxes of each image that has some; images and categories are in the order of their ids."""
    content = json.loads(data)
    kinds, images = (sorted(float(each["id"]) for each in content[name]) for name in ("categories", "images"))
    assert len({*kinds}) == len(kinds), "two categories of one id"
    assert len({*images}) == len(images), "two images of one id"
    found: dict[float, Any] = {number: [] for number in images}
    for each in content["annotations"]:
        left, top, width, height = map(float, each["bbox"])
        box = left, top, left + width, top + height
        found[float(each["image_id"])].append((kinds.index(float(each["category_id"])), box))
    return [boxes for boxes in found.values() if boxes]


masks = Target(mask_inputs, read_mask, named=False)
boxes = Target(box_inputs, read_boxes)
