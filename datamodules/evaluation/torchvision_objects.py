"""Sets of table 9 whose labels are made of the objects in an image: what is there, how many, how near.

Files lie as torchvision lays them out.
"""

from collections import defaultdict
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import torch
from torch import Tensor

from datamodules.evaluation.image_files import by_hash
from datamodules.evaluation.indexes import read_json, read_text, read_words
from datamodules.evaluation.torchvision_sets import Halves, ListedImages, Thirds, labels_of
from lit_clip.errors import InputError
from lit_clip.evaluation.data import MultiLabel

# In the order of the paper's prompts, which is not that of the alphabet.
VOC_CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "dog",
    "horse",
    "motorbike",
    "person",
    "sheep",
    "sofa",
    "diningtable",
    "pottedplant",
    "train",
    "tvmonitor",
]
COUNTS = (10, 3, 4, 5, 6, 7, 8, 9)  # labels follow the paper's prompts: "10" sorts before "3"
DISTANCES = [
    "a car on the left or right side",
    "a car nearby",
    "a car in the distance",
    "no car",
]
VEHICLES = {"Car", "Van", "Truck"}


class VOC2007(ListedImages, MultiLabel):
    """PASCAL VOC 2007: which of 20 kinds of objects an image shows.

    Args:
        root: the folder with ``VOCdevkit/VOC2007``.
        split: as the lists in ``ImageSets/Main`` are called.
    """

    def __init__(self, root: str, split: Literal["train", "val", "trainval", "test"] = "test") -> None:
        folder = Path(root) / "VOCdevkit" / "VOC2007"
        images = [row[0] for row in read_words(folder / "ImageSets" / "Main" / f"{split}.txt", 1)]
        self._relevance = [_objects(folder / "Annotations" / f"{image}.xml") for image in images]
        files = [f"JPEGImages/{image}.jpg" for image in images]
        super().__init__(folder, files, [-1] * len(files), list(VOC_CLASSES))

    def relevance(self) -> Tensor:
        return torch.tensor(self._relevance, dtype=torch.int8)


def _objects(path: Path) -> list[int]:
    """Of each class 1, 0, or -1 if all its objects are marked as difficult: as VOC's lists for classification."""
    relevance = [0] * len(VOC_CLASSES)
    try:
        things = ElementTree.fromstring(read_text(path)).findall("object")
    except ElementTree.ParseError as error:
        raise InputError(f"{path}: not an annotation of VOC2007 ({error}); get it again") from error
    if not things:
        raise InputError(f"{path}: no objects in it, which every annotation of VOC2007 has; get it again")
    for thing in things:
        (label,) = labels_of([str(thing.findtext("name", "")).strip()], VOC_CLASSES, path)
        difficult = thing.findtext("difficult", "0").strip() == "1"
        relevance[label] = 1 if relevance[label] == 1 or not difficult else -1
    return relevance


class KITTI(ListedImages):
    """KITTI's images of streets: how far the closest vehicle is.

    The labels are those of VTAB's task ``closest_vehicle_distance``: up to 8 m, up to 20 m, farther, none; a vehicle is
    a car, a van or a truck, its distance that along the camera's axis. Only images with public labels are used, and
    whole videos are drawn for ``val`` and ``test`` as TensorFlow Datasets 3 draws them, which VTAB takes.

    Args:
        root: the folder with ``Kitti/raw/training`` and, of ``devkit_object.zip``, ``Kitti/raw/mapping``.
        split: a part.
    """

    def __init__(self, root: str, split: Thirds = "test") -> None:
        raw = Path(root) / "Kitti" / "raw"
        numbers = _by_video(raw / "mapping")[split]
        folder = raw / "training"
        labels = [_closest_vehicle(folder / "label_2" / f"{number:06}.txt") for number in numbers]
        super().__init__(folder, [f"image_2/{number:06}.png" for number in numbers], labels, list(DISTANCES))


def _by_video(folder: Path) -> dict[str, list[int]]:
    """The numbers of the images of each part, rising, such that no video is in two of them."""
    import numpy as np

    rows = read_words(folder / "train_mapping.txt", 3)  # day, video, frame
    path = folder / "train_rand.txt"
    try:
        lines = [int(number) - 1 for number in read_text(path).split(",")]
        videos = [rows[line][1] for line in lines]
    except (ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not numbers of lines of train_mapping.txt; get devkit_object.zip again") from error
    of_video: dict[str, list[int]] = defaultdict(list)
    for number, video in enumerate(videos):
        of_video[video].append(number)
    count = max(1, len(of_video) // 10)
    generator = np.random.RandomState(123)  # TensorFlow Datasets' seed; this generator's numbers never change
    test = set(generator.choice(sorted(of_video), count, replace=False))
    val = set(generator.choice(sorted(of_video.keys() - test), count, replace=False))
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for video, numbers in of_video.items():
        parts["test" if video in test else "val" if video in val else "train"] += numbers
    return {part: sorted(numbers) for part, numbers in parts.items()}


def _closest_vehicle(path: Path) -> int:
    try:
        objects = [(row[0], float(row[13])) for row in read_words(path, 15)]
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not KITTI's labels ({error}); get it again") from error
    nearest = min((distance for kind, distance in objects if kind in VEHICLES), default=None)
    if nearest is None:
        return 3
    return 0 if nearest <= 8 else 1 if nearest <= 20 else 2


class CLEVRCounts(ListedImages):
    """CLEVR: how many objects an image shows, 3 to 10.

    The first ``train`` of CLEVR's training images by :func:`by_hash` are to train on, the first ``test`` of its
    validation images to test: table 9's numbers. (CLEVR's own test images have no public labels.)

    Args:
        root: the folder with ``clevr/CLEVR_v1.0``.
        split: ``train`` or ``test``.
        train: how many to train on.
        test: how many to test.
        seed: of the draw.
    """

    def __init__(self, root: str, split: Halves = "test", train: int = 2_000, test: int = 500, seed: int = 0) -> None:
        folder = Path(root) / "clevr" / "CLEVR_v1.0"
        part, wanted = ("train", train) if split == "train" else ("val", test)
        path = folder / "scenes" / f"CLEVR_{part}_scenes.json"
        try:
            counts = {scene["image_filename"]: len(scene["objects"]) for scene in read_json(path)["scenes"]}
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: not CLEVR's scenes (no {error}); get it again") from error
        if len(counts) < wanted:
            raise InputError(f"{path}: {len(counts)} scenes, not {wanted}; get it again")
        names = sorted(by_hash(list(counts), seed)[:wanted])
        strange = next((name for name in names if counts[name] not in COUNTS), None)
        if strange is not None:
            raise InputError(f"{path}: {strange} has {counts[strange]} objects; CLEVR's images have 3 to 10")
        files = [f"images/{part}/{name}" for name in names]
        super().__init__(folder, files, [COUNTS.index(counts[name]) for name in names], [str(n) for n in COUNTS])
