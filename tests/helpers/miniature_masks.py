"""Miniatures of the sets with masks or boxes, in their owners' layouts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("one", "two", "three")
OBJECT = "<object><name>{}</name><bndbox>{}</bndbox></object>"


def write_image(path: Path, number: int, width: int = 40, height: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path: Path, values: Sequence[int], palette: bool = False) -> None:
    """Write a mask of vertical stripes, one for each value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.array(values, dtype=np.uint8).repeat(-(-40 // len(values)))[:40]
    image = Image.fromarray(np.tile(stripes, (24, 1)))
    if palette:
        image.putpalette([channel for value in range(256) for channel in (value, 255 - value, 7)])
    image.save(path)


def write_listed(root: Path, masks: str, listed: str) -> None:
    """Pascal VOC's layout, also of Pascal Context: masks have palettes, and a list names two of three images."""
    for number, name in enumerate(NAMES):
        write_image(root / f"JPEGImages/{name}.jpg", number)
        write_mask(root / masks / f"{name}.png", [0, number + 1, 255, 2], palette=True)
    (root / listed).parent.mkdir(parents=True, exist_ok=True)
    (root / listed).write_text("one\nthree\n")


def write_ade(root: Path) -> None:
    for number, name in enumerate(NAMES):
        write_image(root / f"images/validation/{name}.jpg", number)
        write_mask(root / f"annotations/validation/{name}.png", [0, 1, 150, number + 1])


def write_stuff(root: Path) -> None:
    for number, name in enumerate(NAMES):
        write_image(root / f"images/val2017/{name}.jpg", number)
        write_mask(root / f"annotations/val2017/{name}_labelTrainIds.png", [255, 0, 170, number])
        write_mask(root / f"annotations/val2017/{name}.png", [200])  # COCO's own, beside


def write_cityscapes(root: Path) -> None:
    for number, city in enumerate(("ulm", "bonn")):
        stem = f"{city}/{city}_000000"
        write_image(root / f"leftImg8bit/val/{stem}_leftImg8bit.png", number)
        write_mask(root / f"gtFine/val/{stem}_gtFine_labelIds.png", [0, 7, 33, 255, 21 + number])
        write_mask(root / f"gtFine/val/{stem}_gtFine_instanceIds.png", [99])


def write_voc_boxes(root: Path) -> None:
    folder = root / "VOCdevkit/VOC2007"
    objects = [("dog", (1, 1, 10, 24)), ("tvmonitor", (21, 3, 40, 20)), ("dog", (30, 1, 32, 2))]
    sides = [
        (
            name,
            "".join(f"<{key}>{side}</{key}>" for key, side in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)),
        )
        for name, box in objects
    ]
    for number, name in enumerate(NAMES[:2]):
        write_image(folder / f"JPEGImages/{name}.jpg", number)
        (folder / "Annotations").mkdir(exist_ok=True)
        own = "".join(OBJECT.format(*each) for each in sides[number:])
        (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{own}</annotation>")
    (folder / "ImageSets/Main").mkdir(parents=True)
    (folder / "ImageSets/Main/test.txt").write_text("one\ntwo\n")


def write_coco_boxes(root: Path) -> None:
    """Ids are not contiguous, and an image has no box."""
    for number, name in enumerate(NAMES):
        write_image(root / f"val2017/{name}.jpg", number)
    boxes: list[dict[str, Any]] = [
        {"image_id": 9, "category_id": 90, "bbox": [0, 0, 20, 24]},
        {"image_id": 4, "category_id": 1, "bbox": [20.5, 2, 10, 20]},
        {"image_id": 9, "category_id": 90, "bbox": [30, 0, 10, 5]},
    ]
    content = {
        "images": [{"id": n, "file_name": f"{name}.jpg"} for n, name in zip((9, 4, 5), NAMES, strict=True)],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
        "annotations": boxes,
    }
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))


def write_all(data: Path) -> None:
    """Write all sets of ``configs/evaluation/segmentation.yaml`` that are downloaded."""
    listed = "ImageSets/Segmentation/val.txt"
    write_listed(data / "voc2012/VOCdevkit/VOC2012", "SegmentationClass", listed)
    write_listed(data / "VOCdevkit/VOC2010", "SegmentationClassContext", "ImageSets/SegmentationContext/val.txt")
    write_ade(data / "ADEChallengeData2016")
    write_stuff(data / "coco_stuff164k")
    write_cityscapes(data / "cityscapes")
    write_voc_boxes(data / "voc2007")
    write_coco_boxes(data / "coco")
