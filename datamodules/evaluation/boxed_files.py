"""Images with boxes around objects: Pascal VOC and COCO."""

import math
from collections.abc import Sequence
from pathlib import Path

from lit_clip.errors import InputError
from lit_clip.evaluation.data import Box, Boxed
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.reading import reading
from lit_clip.tools.untrusted import entries
from .annotation_files import AGAIN, find, read_json, read_lines
from .image_files import UnlabelledFiles, labels_of, refuse_no_folder
from .torchvision_sets import VOC_CLASSES, voc_objects

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
        super().__init__(root, names, list(annotations))
        refuse_no_folder(self.files[0].parent)
        self.class_names = class_names
        self._boxes = boxes
        self.tolerance = tolerance
        self._short_side = short_side

    def boxes(self, index: int) -> Boxes:
        return list(self._boxes[index])

    def short_side(self, image_size: int) -> int:
        return super().short_side(image_size) if self._short_side is None else self._short_side

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
