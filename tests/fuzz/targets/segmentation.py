"""Segmentation sets with masks of any mode, depth and values, and sets of boxes: each pixel's and box's class by a loop."""

import io
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from datamodules.evaluation import COCOInstances, MaskedFiles, VOCBoxes
from datamodules.evaluation.torchvision_sets import VOC_CLASSES
from lit_clip.evaluation.places import window_of
from tests.fuzz.inputs import Input, Inputs, damaged, edited_json, to_json
from tests.fuzz.samples import encoded, table_images
from tests.fuzz.target import Target
from tests.fuzz.targets.locating import DEEP, FORMATS, odd_image
from tests.helpers.colours import PATCH, colour_model

CLASSES = ["cat", "dog", "tree"]
HIGHEST = 2**16
SETTINGS: dict[str, Any] = {
    "background": None,
    "first": 0,
    "values": None,
    "ignored": [255],
    "short_side": None,
}
ODD: dict[str, tuple[Any, ...]] = {
    "background": (None, ["ground", "wall"]),
    "first": (0, 1, 254, 255, 40_000, HIGHEST - 1, -1),
    "values": (None, [1, 2, 3], [7, 5, 300], [5, 5, 6], [255, 0, 1], [0, 1], [0, 1, HIGHEST], [], [1, 2, 3, 4]),
    "ignored": (None, [], [255], [0], [0, 255], [-1], [HIGHEST], [1, 300], [*range(3, 256)]),
    "short_side": (None, 32, 64, 50, 4, 0, -5, 10**6),
}
TIFF, PNG = "0.tif", "0.png"


def _tree(mode: str = "L", pixels: tuple[int, ...] = (0, 1, 2, 255), **settings: Any) -> dict[str, Any]:
    return {"mode": mode, "pixels": [*pixels], **SETTINGS, **settings}


@cache
def whole_masks() -> dict[str, bytes]:
    """Return masks of each depth, whose settings are the usual ones."""
    values = np.array([[0, 1, 2, 255]] * 3)
    return {
        PNG: encoded(Image.fromarray(values.astype("u1")), "PNG"),
        TIFF: encoded(Image.fromarray(values.astype("u2")), "TIFF"),
    }


def mask_inputs() -> Inputs:
    modes = st.sampled_from([(kind, mode) for kind in ("PNG", "TIFF") for mode in FORMATS[kind]])
    of_any_mode = st.builds(_odd_mask, modes, st.integers(0, 2**32))
    names = st.lists(st.sampled_from(sorted(ODD)), max_size=3)
    values = st.lists(
        st.sampled_from((-1, 0, 1, 2, 3, 5, 6, 7, 254, 255, 256, 300, 40_000, HIGHEST - 1)), min_size=1, max_size=4
    )
    settings = st.builds(
        _odd_settings, st.sampled_from(("L", "L", "P", "I;16", "I", "F")), values, names, st.integers(0, 99)
    )
    return st.one_of(settings, settings, of_any_mode, damaged(whole_masks))


def _odd_mask(kind: tuple[str, str], seed: int) -> Input:
    return Input(
        PNG if kind[0] == "PNG" else TIFF, encoded(odd_image(kind[1], (4, 3), np.random.default_rng(seed)), kind[0])
    )


def _odd_settings(mode: str, pixels: list[int], names: list[str], number: int) -> Input:
    chosen = {name: ODD[name][number % len(ODD[name])] for name in names}
    return Input("mask.json", to_json(_tree(mode, tuple(pixels), **chosen)))


def read_mask(folder: Path, given: Input) -> Iterator[str]:
    """Open a set with one mask; each pixel has the class that its value is, or does not count."""
    tree = json.loads(given.data) if given.name == "mask.json" else _tree()
    settings = {name: tree[name] for name in SETTINGS}
    mode, name = tree["mode"], given.name if given.name != "mask.json" else TIFF
    stored = np.array([tree["pixels"]]).astype(DEEP[mode][0] if mode in DEEP else np.uint8)
    image = Image.fromarray(stored)
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    for each in ("images", "masks"):
        (folder / each).mkdir()
    data = given.data if given.name != "mask.json" else encoded(image, "TIFF")
    (folder / "masks" / name).write_bytes(data)
    (folder / "images" / "0.png").write_bytes(table_images()["0.png"])
    suffixes = {"image_suffix": ".png", "mask_suffix": Path(name).suffix}
    opened = MaskedFiles(str(folder), "images", "masks", CLASSES, **suffixes, **settings)
    found = opened.mask(0)
    assert opened.images(0)
    names = [*(["background"] if settings["background"] else []), *CLASSES]
    assert opened.class_names == names
    values = settings["values"]
    values = [settings["first"] + place for place in range(len(names))] if values is None else values
    ignored = [255] if settings["ignored"] is None and 255 not in values else settings["ignored"] or []
    assert len({*values}) == len(values) == len(names), f"the values {values} were taken for {len(names)} classes"
    assert not {*values} & {*ignored}, (
        f"of the values {values} the ignored ones are {ignored}, of which some are in both"
    )
    pixels = Image.open(io.BytesIO(data))
    assert len(pixels.getbands()) == 1, f"a mask of the mode {pixels.mode} was read"
    assert pixels.mode not in ("F", "1"), f"a mask of the mode {pixels.mode} was read"
    label_of = {**dict.fromkeys(ignored, -1), **{value: label for label, value in enumerate(values)}}
    expected = [[label_of.get(int(value), "refused") for value in row] for row in np.asarray(pixels)]
    assert found.tolist() == expected, f"the labels {found.tolist()[:2]} are {expected[:2]}"
    side = window_of(colour_model(), opened)
    wanted = 64 if settings["short_side"] is None else settings["short_side"]
    assert (side.side, side.places) == (wanted, wanted // PATCH), f"a window of {side} for a short side of {wanted}"
    yield "used"


BOX = {"xmin": "3", "ymin": "2", "xmax": "30", "ymax": "24"}
NUMBERS = ("nan", "inf", "-1", "1e400", "0", "30.5", " 7 ", "", "1_0", "0x10", "\uff11", "99999", "2", "a")


def _annotation(objects: list[dict[str, str]]) -> bytes:
    """Return an annotation of Pascal VOC."""
    parts = [
        f"<name>{each['name']}</name><bndbox>{''.join(f'<{key}>{each[key]}</{key}>' for key in BOX)}</bndbox>"
        for each in objects
    ]
    return f"<annotation>{''.join(f'<object>{part}</object>' for part in parts)}</annotation>".encode()


@cache
def coco_tree() -> dict[str, Any]:
    """Return a list of COCO's instances, whose ids have gaps and are not in order."""
    boxes = [(7, 18, [1, 2, 10, 20]), (5, 1, [0, 0, 70, 50]), (7, 90, [3.5, 4.5, 0, 1.25]), (5, 18, [9, 9, 9, 9])]
    return {
        "images": [{"id": number, "file_name": f"{place}.png"} for place, number in enumerate((7, 5, 6))],
        "categories": [{"id": number, "name": name} for number, name in ((90, "tree"), (1, "cat"), (18, "dog"))],
        "annotations": [
            {"id": row, "image_id": image, "category_id": kind, "bbox": box, "iscrowd": 0}
            for row, (image, kind, box) in enumerate(boxes)
        ],
    }


def box_inputs() -> Inputs:
    fields = st.tuples(
        st.sampled_from((*BOX, "name")), st.sampled_from((*NUMBERS, *VOC_CLASSES, "Dog", " dog ", "cow "))
    )
    box = st.lists(fields, max_size=2).map(lambda changes: {"name": "dog", **BOX, **dict(changes)})
    voc = st.lists(box, max_size=3).map(lambda objects: Input("0.xml", _annotation(objects)))
    coco = edited_json(
        lambda: {"coco.json": coco_tree()}, (7, 5, 18, 90, 1.5, 7.9, "7", [1, 2, -3, 4], [1, 2, 3]), most=2
    )
    return st.one_of(voc, coco, damaged(lambda: {"0.xml": _annotation([{"name": "dog", **BOX}] * 2)}))


def read_boxes(folder: Path, given: Input) -> Iterator[str]:
    """Open a set of Pascal VOC's or COCO's layout; each image has the boxes that its annotation names."""
    voc = folder / "VOCdevkit" / "VOC2007"
    places = {"0.xml": voc / "Annotations" / "0.xml", "coco.json": folder / "instances_val2017.json"}
    for path in (*places.values(), voc / "ImageSets" / "Main" / "test.txt", voc / "JPEGImages" / "0.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
    (voc / "ImageSets" / "Main" / "test.txt").write_text("0\n")
    (folder / "val2017").mkdir()
    for name in ("0.png", "1.png", "2.png"):
        (folder / "val2017" / name).write_bytes(table_images()[name])
    (voc / "JPEGImages" / "0.jpg").write_bytes(table_images()["0.png"])
    places[given.name].write_bytes(given.data)
    if given.name == "0.xml":
        opened, expected = VOCBoxes(str(folder)), [_voc_boxes(given.data)]
    else:
        opened = COCOInstances(str(folder))
        content = json.loads(given.data)
        kinds = sorted((_whole(each["id"]), each["name"]) for each in content["categories"])
        assert len({number for number, _ in kinds}) == len(kinds), "two categories of one id"
        assert opened.class_names == [name for _, name in kinds]
        expected = _coco_boxes(content, [number for number, _ in kinds])
    found = [opened.boxes(row) for row in range(len(opened))]
    sides = [side for boxes in found for _, box in boxes for side in box]
    assert all(map(math.isfinite, sides)), f"a box with the sides {sides}"
    assert found == expected, f"the boxes {found} are {expected}"
    empty = [box for boxes in found for _, box in boxes if box[2] < box[0] or box[3] < box[1]]
    assert not empty, f"the box {empty[0]} ends before it begins"
    for row in range(len(opened)):
        assert opened.images(row)
        yield "used"


def _voc_boxes(data: bytes) -> list[tuple[int, tuple[float, ...]]]:
    found = []
    for each in ElementTree.fromstring(data.decode("utf-8-sig")).iter("object"):
        left, top, right, bottom = (float(each.findtext(f"bndbox/{key}", "")) for key in BOX)
        found.append((VOC_CLASSES.index(each.findtext("name", "").strip()), (left - 1, top - 1, right, bottom)))
    return found


def _coco_boxes(content: Any, kinds: list[int]) -> list[list[tuple[int, tuple[float, ...]]]]:
    """Return the boxes of each image that has some, in the order of the images' ids."""
    images = [_whole(each["id"]) for each in content["images"]]
    assert len({*images}) == len(images), "two images of one id"
    found = {number: list[tuple[int, tuple[float, ...]]]() for number in sorted(images)}
    for each in content["annotations"]:
        left, top, width, height = map(float, each["bbox"])
        box = left, top, left + width, top + height
        found[_whole(each["image_id"])].append((kinds.index(_whole(each["category_id"])), box))
    return [boxes for boxes in found.values() if boxes]


def _whole(number: Any) -> int:
    assert not isinstance(number, bool) and float(number) == int(number), f"{number!r} was taken for an id"
    return int(number)


masks = Target(mask_inputs, read_mask, named=False)
boxes = Target(box_inputs, read_boxes)
