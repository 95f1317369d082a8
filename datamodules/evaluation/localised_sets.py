"""Sets with masks (VOC, Context, ADE20K, COCO-Stuff, Cityscapes) or boxes (VOC, COCO), and grids of images."""

import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import Box, Boxed, ImageSet, LabelledImages, Masked
from lit_clip.models.preprocess import to_rgb
from lit_clip.tools.hashing import hex_digest, stamp_of_files
from lit_clip.tools.images import stored_image
from lit_clip.tools.parts import instantiate
from lit_clip.tools.reading import read_yaml, reading
from lit_clip.tools.untrusted import entries
from .annotation_files import AGAIN, find, read_json, read_lines
from .image_files import UnlabelledFiles, labels_of, refuse_no_folder
from .owners_layouts import VOC_CLASSES, voc_objects

CLASSES = Path(__file__).with_name("segmentation_classes.yaml")
HIGHEST = 2**16  # values of a mask, exclusive
UNKNOWN = -2
VOC_NAMES = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}
INSTANCES = entries(
    {
        "categories": list[entries({"id": int, "name": str}, total=True)],
        "images": list[entries({"id": int, "file_name": str}, total=True)],
        "annotations": list[entries({"image_id": int, "category_id": int, "bbox": Box}, total=True)],
    },
    total=True,
)
Boxes = list[tuple[int, Box]]


class MaskedFiles(UnlabelledFiles, Masked):
    """Images in one folder and their one-channel masks in another; the names differ only in suffix.

    Args:
        root: the folder of the set.
        images: folder of the images below it.
        masks: folder of the masks below it; both may have subfolders.
        classes: a list of ``segmentation_classes.yaml`` (``voc``, ``context``, ``ade20k``, ``coco_stuff``,
            ``cityscapes``), or the class names in label order, each once.
        background: names of a class that stands before them; None: there is none. A pixel is background where one of
            its names has the highest cosine.
        first: value of the first class in the masks, which the others follow.
        values: or each class's value.
        ignored: values of pixels that do not count, none of them a class's; None: 255, unless a class has it. Any other
            value is an error.
        image_suffix: end of an image's name.
        mask_suffix: end of a mask's name.
        listed: file below ``root`` with the names to use, without suffixes; None: those of all masks.
        short_side: pixels that an image's short side is resized to; None: twice the model's image size.
    """

    def __init__(
        self,
        root: str,
        images: str,
        masks: str,
        classes: str | list[str],
        background: list[str] | None = None,
        first: int = 0,
        values: list[int] | None = None,
        ignored: list[int] | None = None,
        image_suffix: str = ".jpg",
        mask_suffix: str = ".png",
        listed: str | None = None,
        short_side: int | None = None,
    ) -> None:
        known = read_yaml(CLASSES)
        names = known.get(classes) if isinstance(classes, str) else classes
        require(bool(names), f"classes: {classes!r} must be a list of names or one of {', '.join(known)}")
        self.synonyms = [*([background] if background else []), *([name] for name in names)]
        self.class_names = [*(["background"] if background else []), *names]
        for given in (self.class_names, [name for group in self.synonyms for name in group]):
            twice = [repr(name) for name, count in Counter(map(str.casefold, given)).items() if count > 1]
            require(not twice, f"classes, background: {', '.join(twice)} is named more than once; name each once")
        self.resized = short_side
        self._values = list(range(first, first + len(self.synonyms))) if values is None else values
        self._ignored = list({255}.difference(self._values)) if ignored is None else ignored
        _check_values(self._values, self._ignored, self.class_names)
        top, self._masks = Path(root), Path(root) / masks
        refuse_no_folder(top / images)
        refuse_no_folder(self._masks)
        found = (path.relative_to(self._masks).as_posix() for path in self._masks.rglob(f"*{escape(mask_suffix)}"))
        stems = read_lines(top / listed) if listed else sorted(name.removesuffix(mask_suffix) for name in found)
        require(bool(stems), f"{self._masks}: no masks that end in {mask_suffix}; get the set again")
        self._files = [self._masks / f"{stem}{mask_suffix}" for stem in stems]
        lists = [top / listed] if listed else []
        super().__init__(top / images, [f"{stem}{image_suffix}" for stem in stems], [*lists, *self._files])

    def mask(self, index: int) -> np.ndarray:
        path = self._files[index]
        stored = np.asarray(stored_image(path))
        whole = stored.ndim == 2 and np.issubdtype(stored.dtype, np.integer)
        require(whole, f"{path}: a mask must have one channel of whole numbers")
        possible = int(stored.min()) >= 0 and int(stored.max()) < HIGHEST
        require(possible, f"{path}: values must be from 0 to {HIGHEST - 1}")
        label_of = np.full(HIGHEST, UNKNOWN, dtype=np.int16)
        label_of[self._ignored] = -1
        label_of[self._values] = np.arange(len(self._values))
        labels_HW = label_of[stored]
        if (labels_HW == UNKNOWN).any():
            value = int(stored[labels_HW == UNKNOWN][0])
            raise InputError(f"{path}: the value {value} is no class's; correct first or values, or add it to ignored")
        return labels_HW

    def truth_stamp(self) -> str:
        stamp = stamp_of_files(path for path in self._files if os.path.isfile(path))
        return hex_digest([stamp, self._values, self._ignored])


def _check_values(values: list[int], ignored: list[int], names: list[str]) -> None:
    each = len(set(values)) == len(values) == len(names)
    require(each, f"values: {len(set(values))} for {len(names)} classes; give each class one of its own")
    for option, given in (("first or values", values), ("ignored", ignored)):
        outside = [value for value in given if not 0 <= value < HIGHEST]
        require(not outside, f"{option}: {outside[:1]} must be between 0 and {HIGHEST - 1}")
    for value, name in zip(values, names, strict=True):
        require(value not in ignored, f"ignored: {value} is the value of the class {name!r}; correct one of both")


class BoxedFiles(UnlabelledFiles, Boxed):
    """Images and their boxes; ``short_side`` is in pixels, None: twice the model's image size."""

    def __init__(
        self,
        root: Path,
        names: list[str],
        boxes: list[Boxes],
        class_names: list[str],
        annotations: Sequence[Path],
        tolerance: int,
        short_side: int | None,
    ) -> None:
        super().__init__(root, names, annotations)
        self.class_names = class_names
        self._boxes = boxes
        self.tolerance = tolerance
        self.resized = short_side

    def boxes(self, index: int) -> Boxes:
        return list(self._boxes[index])

    def truth_stamp(self) -> str:
        return hex_digest([self._boxes, self.tolerance])


def VOCBoxes(
    root: str, year: str = "2007", split: str = "test", tolerance: int = 15, short_side: int | None = None
) -> BoxedFiles:
    """Pascal VOC's detection annotations, including difficult ones; in ``VOCdevkit/VOC2007`` or another year."""
    folder = Path(root) / "VOCdevkit" / f"VOC{year}"
    listed = folder / "ImageSets" / "Main" / f"{split}.txt"
    images = read_lines(listed)
    annotations = [folder / "Annotations" / f"{image}.xml" for image in images]
    boxes = list(map(_voc_boxes, annotations))
    names = [VOC_NAMES.get(name, name) for name in VOC_CLASSES]
    files = [f"JPEGImages/{image}.jpg" for image in images]
    return BoxedFiles(folder, files, boxes, names, [listed, *annotations], tolerance, short_side)


def _voc_boxes(path: Path) -> Boxes:
    found: Boxes = []
    for element in voc_objects(path):
        (label,) = labels_of([str(element.findtext("name", "")).strip()], VOC_CLASSES, path)
        with reading(path, "annotation of Pascal VOC with boxes", hint=AGAIN):
            left, top, right, bottom = (
                float(element.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")
            )
        found.append((label, _checked((left - 1, top - 1, right, bottom), path)))  # from 1, the last pixel within
    return found


def _checked(box: Box, path: Path) -> Box:
    left, top, right, bottom = box
    if not (all(map(math.isfinite, box)) and left <= right and top <= bottom):
        raise InputError(f"{path}: a box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) has no inside; {AGAIN}")
    return box


def COCOInstances(root: str, split: str = "val2017", tolerance: int = 15, short_side: int | None = None) -> BoxedFiles:
    """COCO's boxes in ``root`` or ``root/annotations``, ``instances_SPLIT.json``, and its images in ``root/SPLIT``.

    Images without a box are left out. Labels are the 80 categories by ascending id.
    """
    name = f"instances_{split}.json"
    path = find(Path(root), [f"annotations/{name}", name], "list of instances")
    content = read_json(path, INSTANCES)
    categories = sorted((each["id"], each["name"]) for each in content["categories"])
    files = {each["id"]: each["file_name"] for each in content["images"]}
    if len(files) < len(content["images"]) or len(dict(categories)) < len(categories):
        raise InputError(f"{path}: two images or two categories have the same id; {AGAIN}")
    label_of, of_image = {number: label for label, (number, _) in enumerate(categories)}, dict[int, Boxes]()
    for each in content["annotations"]:
        image, category = each["image_id"], each["category_id"]
        if image not in files or category not in label_of:
            raise InputError(f"{path}: a box is of no image or category in it; {AGAIN}")
        left, top, width, height = each["bbox"]
        box = _checked((left, top, left + width, top + height), path)
        of_image.setdefault(image, []).append((label_of[category], box))
    if not of_image:
        raise InputError(f"{path}: no boxes in it; {AGAIN}")
    shown = sorted(of_image)
    names, places = [files[image] for image in shown], [of_image[image] for image in shown]
    return BoxedFiles(
        Path(root) / split, names, places, [name for _, name in categories], [path], tolerance, short_side
    )


class ImageGrids(ImageSet, Masked, Boxed):
    """Images of different classes in a grid, each cropped to a square and encoded at the model's image size.

    An image is in one grid at most.

    Args:
        images: ``class_path`` and ``init_args`` of labelled images.
        root: their ``root``, if they have one; in a suite below the data root.
        rows: of a grid.
        columns: of a grid.
        side: of an image in pixels.
        seed: of the order in which images are drawn.
    """

    def __init__(
        self,
        images: dict[str, Any],
        root: str | None = None,
        rows: int = 1,
        columns: int = 2,
        side: int = 224,
        seed: int = 0,
    ) -> None:
        require(min(rows, columns, side) >= 1, f"rows {rows}, columns {columns} and side {side} must be at least 1")
        arguments = {**images.get("init_args", {}), **({"root": root} if root else {})}
        self.source = instantiate(LabelledImages, {"class_path": images.get("class_path"), "init_args": arguments})
        self.rows, self.columns, self.side = rows, columns, side
        self.class_names, self.annotation_paths = self.source.class_names, self.source.annotation_paths
        self._labels = self.source.labels()
        self.grids = _grids(self._labels, rows * columns, seed)
        require(bool(self.grids), f"images: too few for a grid of {rows} x {columns} different classes")

    def __len__(self) -> int:
        return len(self.grids)

    def images(self, index: int) -> list[Image.Image]:
        cells = self.boxes(index)
        width, height = (max(int(box[edge]) for _, box in cells) for edge in (2, 3))
        grid = Image.new("RGB", (width, height))
        for row, (_, (left, top, _, _)) in zip(self.grids[index], cells, strict=True):
            image = to_rgb(self.source.images(row)[0])
            grid.paste(ImageOps.fit(image, (self.side, self.side)), (int(left), int(top)))
        return [grid]

    def boxes(self, index: int) -> Boxes:
        found: Boxes = []
        for place, row in enumerate(self.grids[index]):
            left, top = place % self.columns * self.side, place // self.columns * self.side
            found.append((self._labels[row], (left, top, left + self.side, top + self.side)))
        return found

    def mask(self, index: int) -> np.ndarray:
        labels = np.array([label for label, _ in self.boxes(index)], dtype=np.int16).reshape(-1, self.columns)
        return labels.repeat(self.side, axis=0).repeat(self.side, axis=1)

    def short_side(self, image_size: int) -> int:
        return min(self.rows, self.columns) * image_size

    def image_paths(self) -> Sequence[Path]:
        return self.source.image_paths()

    def check(self) -> None:
        self.source.check()

    def key(self, index: int) -> str:
        return " | ".join(self.source.key(row) for row in self.grids[index])

    def stamp(self) -> str:
        return hex_digest([self.source.stamp(), self.grids, self.columns, self.side])

    def truth_stamp(self) -> str:
        return hex_digest([self._labels, self.grids])


def _grids(labels: Sequence[int], cells: int, seed: int) -> list[list[int]]:
    """Draw grids of rows with different labels, each row once, until too few labels are left."""
    waiting = random.Random(seed).sample(range(len(labels)), len(labels))
    grids: list[list[int]] = []
    while waiting:
        chosen: dict[int, int] = {}
        for row in waiting:
            chosen.setdefault(labels[row], row)
            if len(chosen) == cells:
                break
        else:
            return grids
        grids.append(list(chosen.values()))
        waiting = [row for row in waiting if row not in chosen.values()]
    return grids
