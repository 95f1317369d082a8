"""Sets of table 9 with images in files, in torchvision's layout on disk, that need more than a rule."""

from collections import defaultdict
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import torch

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import Truth
from lit_clip.tools.reading import reading
from lit_clip.tools.untrusted import entries
from ..loading.bad_samples import is_unicode
from .annotation_files import AGAIN, number, read_json, read_lines, read_mat, read_text, read_words, whole_number
from .image_files import ImageFiles, ListedImages, TrainTest, TrainValTest, by_hash, labels_of

# In the order of the paper's prompts, which is not alphabetical.
VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dog", "horse"),
    *("motorbike", "person", "sheep", "sofa", "diningtable", "pottedplant", "train", "tvmonitor"),
]
COUNTS = (10, 3, 4, 5, 6, 7, 8, 9)  # labels follow the paper's prompts: "10" sorts before "3"
SCENES = entries({"scenes": list[entries({"image_filename": str, "objects": list}, total=True)]}, total=True)
DISTANCES = ["a car on the left or right side", "a car nearby", "a car in the distance", "no car"]
VEHICLES = {"Car", "Van", "Truck"}


def StanfordCars(root: str, split: TrainTest = "test") -> ImageFiles:
    """Stanford Cars: makes, models and years, listed in MATLAB files."""
    folder = Path(root) / "stanford_cars"
    train = split == "train"
    path = folder / ("devkit/cars_train_annos.mat" if train else "cars_test_annos_withlabels.mat")
    (annotations,) = read_mat(path, "annotations")
    meta = folder / "devkit" / "cars_meta.mat"
    class_names = [str(name) for name in read_mat(meta, "class_names")[0]]
    if not {"fname", "class"} <= set(annotations.dtype.names or ()):
        raise InputError(f"{path}: no class labels in it; get the file with labels")
    with reading(path, "list of cars and their classes", hint=AGAIN):
        labels = [int(label) - 1 for label in annotations["class"]]
    if not all(0 <= label < len(class_names) for label in labels):
        raise InputError(f"{path}: a label is none of the {len(class_names)} classes of {meta}; get both again")
    files = [f"{'cars_train' if train else 'cars_test'}/{name}" for name in annotations["fname"]]
    return ListedImages(folder, files, labels, class_names, [path, meta])


def Flowers102(root: str, split: TrainValTest = "test") -> ImageFiles:
    """Oxford 102 Flower: 10 training and 10 validation images per class; the other images are for testing."""
    from torchvision.datasets import Flowers102 as Flowers

    folder = Path(root) / "flowers-102"
    labels_path, path = folder / "imagelabels.mat", folder / "setid.mat"
    (labels,) = read_mat(labels_path, "labels")
    (numbers,) = read_mat(path, {"train": "trnid", "val": "valid", "test": "tstid"}[split])
    with reading(path, "list of images with labels in imagelabels.mat", hint="get both again"):
        wanted = [int(number) for number in numbers if int(number) == number]
        classes = [int(labels[number - 1]) - 1 for number in wanted]
    of_images = len(wanted) == len(numbers) and all(1 <= number <= len(labels) for number in wanted)
    if not of_images or not all(0 <= label < len(Flowers.classes) for label in classes):
        raise InputError(f"{path}: lists images that have no labels; get it and imagelabels.mat again")
    files = [f"jpg/image_{number:05}.jpg" for number in wanted]
    return ListedImages(folder, files, classes, list(Flowers.classes), [labels_path, path])


def VOC2007(root: str, split: Literal["train", "val", "trainval", "test"] = "test") -> ImageFiles:
    """PASCAL VOC 2007: which of 20 kinds of objects an image shows; ``VOCdevkit/VOC2007``."""
    folder = Path(root) / "VOCdevkit" / "VOC2007"
    listed = folder / "ImageSets" / "Main" / f"{split}.txt"
    images = read_lines(listed)
    annotations = [folder / "Annotations" / f"{image}.xml" for image in images]
    relevance = torch.tensor([_relevance_of_classes(path) for path in annotations], dtype=torch.int8)
    files, lists = [f"JPEGImages/{image}.jpg" for image in images], [listed, *annotations]
    return ListedImages(folder, files, [-1] * len(files), list(VOC_CLASSES), lists, Truth(relevance=relevance))


def _relevance_of_classes(path: Path) -> list[int]:
    """Return 1, 0, or -1 (all objects are marked difficult) for each class, as VOC's classification lists do."""
    relevance = [0] * len(VOC_CLASSES)
    for element in voc_objects(path):
        (label,) = labels_of([str(element.findtext("name", "")).strip()], VOC_CLASSES, path)
        difficult = element.findtext("difficult", "0").strip() == "1"
        relevance[label] = 1 if relevance[label] == 1 or not difficult else -1
    return relevance


def voc_objects(path: Path) -> list[ElementTree.Element]:
    """Return the objects in an annotation file of Pascal VOC."""
    text = read_text(path)
    if "<!" in text:  # entities may stand for gigabytes
        raise InputError(f"{path}: not an annotation of VOC, which has no declarations or comments; get it again")
    with reading(path, "annotation of VOC", hint=AGAIN):
        objects = ElementTree.fromstring(text).findall("object")
    if not objects:
        raise InputError(f"{path}: no objects, although every annotation of VOC has some; get it again")
    return objects


def KITTI(root: str, split: TrainValTest = "test") -> ImageFiles:
    """KITTI's street scenes: the distance of the closest vehicle.

    Labels follow VTAB's task ``closest_vehicle_distance``: up to 8 m, up to 20 m, farther, no vehicle. A vehicle
    is a car, a van or a truck; distance is measured along the camera's axis. Only images with public labels are used.
    ``val`` and ``test`` are whole videos, drawn as in TensorFlow Datasets 3, which VTAB uses. ``Kitti/raw`` has
    ``training``, and ``mapping`` from ``devkit_object.zip``.
    """
    raw = Path(root) / "Kitti" / "raw"
    mapping = [raw / "mapping" / name for name in ("train_mapping.txt", "train_rand.txt")]
    images = _split_by_video(*mapping)[split]
    folder = raw / "training"
    annotations = [folder / "label_2" / f"{image:06}.txt" for image in images]
    labels = [_closest_vehicle(path) for path in annotations]
    files = [f"image_2/{image:06}.png" for image in images]
    return ListedImages(folder, files, labels, list(DISTANCES), [*mapping, *annotations])


def _split_by_video(mapping: Path, path: Path) -> dict[str, list[int]]:
    """Return each split's image numbers, ascending; no video is in two splits."""
    import numpy as np

    rows = read_words(mapping, 3)  # day, video, frame
    numbers = [whole_number(word.strip()) for word in read_text(path).split(",")]
    lines = [number - 1 for number in numbers if number is not None and 0 < number <= len(rows)]
    if len(lines) < len(numbers):
        raise InputError(f"{path}: not line numbers of train_mapping.txt; get devkit_object.zip again")
    videos = [rows[line][1] for line in lines]
    of_video: dict[str, list[int]] = defaultdict(list)
    for image, video in enumerate(videos):
        of_video[video].append(image)
    if len(of_video) < 3:
        raise InputError(f"{path}: {len(of_video)} videos cannot be three splits; get devkit_object.zip again")
    count = max(1, len(of_video) // 10)
    generator = np.random.RandomState(123)  # TensorFlow Datasets' seed; numpy keeps this generator's output fixed
    test = set(generator.choice(sorted(of_video), count, replace=False))
    val = set(generator.choice(sorted(of_video.keys() - test), count, replace=False))
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for video, images in of_video.items():
        splits["test" if video in test else "val" if video in val else "train"] += images
    return {split: sorted(images) for split, images in splits.items()}


def _closest_vehicle(path: Path) -> int:
    objects = [(row[0], number({"distance": row[13]}, "distance", str(path))) for row in read_words(path, 15)]
    nearest = min((distance for kind, distance in objects if kind in VEHICLES), default=None)
    if nearest is None:
        return 3
    return 0 if nearest <= 8 else 1 if nearest <= 20 else 2


def CLEVRCounts(root: str, split: TrainTest = "test", train: int = 2_000, test: int = 500, seed: int = 0) -> ImageFiles:
    """CLEVR: the number of objects in an image, 3 to 10; ``clevr/CLEVR_v1.0``.

    ``train`` is the first ``train`` of CLEVR's training images by :func:`by_hash`, ``test`` the first ``test`` of its
    validation images: the sizes of table 9. (CLEVR's own test images have no public labels.)
    """
    folder = Path(root) / "clevr" / "CLEVR_v1.0"
    part, wanted = ("train", train) if split == "train" else ("val", test)
    path = folder / "scenes" / f"CLEVR_{part}_scenes.json"
    counts = {scene["image_filename"]: len(scene["objects"]) for scene in read_json(path, SCENES)["scenes"]}
    require(all(map(is_unicode, counts)), f"{path}: the name of an image is not text; {AGAIN}")
    if len(counts) < wanted:
        raise InputError(f"{path}: {len(counts)} scenes, not {wanted}; get it again")
    names = sorted(by_hash(list(counts), seed)[:wanted])
    wrong = next((name for name in names if counts[name] not in COUNTS), None)
    if wrong is not None:
        raise InputError(f"{path}: {wrong} has {counts[wrong]} objects; CLEVR's images have 3 to 10")
    labels = [COUNTS.index(counts[name]) for name in names]
    return ListedImages(folder, [f"images/{part}/{name}" for name in names], labels, [str(n) for n in COUNTS], [path])
