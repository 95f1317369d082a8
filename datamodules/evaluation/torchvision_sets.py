"""Sets of table 9 whose images are files, in torchvision's layout on disk.

torchvision's own classes are not used. Some decode images or hash gigabytes on construction, their label order is not
always the order of the paper's prompts, and a broken list ends in a traceback that does not name the file. The tests
compare with them.
"""

import random
from collections import defaultdict
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import torch
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.evaluation.data import MultiLabel
from lit_clip.tools.reading import reading
from ..loading.bad_samples import is_unicode
from .annotation_files import (
    AGAIN,
    find,
    find_folder,
    number,
    read_json,
    read_lines,
    read_mat,
    read_table,
    read_text,
    read_words,
    whole_number,
)
from .image_files import (
    ImageFiles,
    ListedImages,
    TrainTest,
    TrainValTest,
    by_hash,
    images_in,
    in_class_folders,
    labels_of,
    subfolders,
)

EUROSAT = [
    *("Forest", "PermanentCrop", "Residential", "River", "Pasture"),
    *("SeaLake", "HerbaceousVegetation", "AnnualCrop", "Industrial", "Highway"),
]
# Meanings of GTSRB's signs in label order; its files only number them.
GTSRB_SIGNS = [
    *("speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70", "speed limit 80"),
    *("end of speed limit 80", "speed limit 100", "speed limit 120", "no passing", "no passing for trucks"),
    *("right of way at the next crossing", "priority road", "yield", "stop", "no vehicles", "no trucks", "no entry"),
    *("danger", "curve to the left", "curve to the right", "double curve", "bumpy road", "slippery road"),
    *("road narrows on the right", "road works", "traffic lights", "pedestrians", "children", "bicycles"),
    *("ice or snow", "wild animals", "end of all limits", "turn right", "turn left", "straight on"),
    *("straight on or right", "straight on or left", "keep right", "keep left", "roundabout"),
    *("end of no passing", "end of no passing for trucks"),
]
# In the order of the paper's prompts, which is not alphabetical.
VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dog", "horse"),
    *("motorbike", "person", "sheep", "sofa", "diningtable", "pottedplant", "train", "tvmonitor"),
]
COUNTS = (10, 3, 4, 5, 6, 7, 8, 9)  # labels follow the paper's prompts: "10" sorts before "3"
DISTANCES = ["a car on the left or right side", "a car nearby", "a car in the distance", "no car"]
VEHICLES = {"Car", "Van", "Truck"}


def Food101(root: str, split: TrainTest = "test") -> ImageFiles:
    """Food-101: dishes, with 750 training and 250 test images each; ``food-101/meta/SPLIT.json``."""
    folder = Path(root) / "food-101"
    path = folder / "meta" / f"{split}.json"
    lists = read_json(path)
    is_lists = isinstance(lists, dict) and all(isinstance(names, list) for names in lists.values())
    if not is_lists or not all(isinstance(name, str) for names in lists.values() for name in names):
        raise InputError(f"{path}: not lists of images by dish; get it again")
    classes = sorted(lists)
    files = [f"images/{image}.jpg" for name in classes for image in lists[name]]
    labels = [label for label, name in enumerate(classes) for _ in lists[name]]
    return ListedImages(folder, files, labels, [name.replace("_", " ") for name in classes], [path])


def SUN397(root: str, split: TrainTest = "test", partition: int = 1) -> ImageFiles:
    """SUN397: scenes, with 50 training and 50 test images each in every one of ten partitions.

    ``SUN397`` also holds the lists of ``Partitions.zip``. Labels follow the sorted class names in words, like the
    paper's prompts (``jail cell`` before ``jail indoor``), and not the order in ``ClassName.txt``.
    """
    folder = Path(root) / "SUN397"
    name = f"{'Training' if split == 'train' else 'Testing'}_{partition:02}.txt"
    listed = find(folder, [name, f"Partitions/{name}"], "list of the partition's images")
    files = [line.lstrip("/") for line in read_lines(listed)]
    path = folder / "ClassName.txt"
    words = {line.strip("/"): _scene(line) for line in read_lines(path)}
    classes = sorted(words, key=lambda name: words[name])
    labels = labels_of([file.rpartition("/")[0] for file in files], classes, listed)
    return ListedImages(folder, files, labels, [words[name] for name in classes], [listed, path])


def _scene(path: str) -> str:
    """``/a/apartment_building/outdoor`` -> ``apartment building outdoor``."""
    return path.strip("/").partition("/")[2].replace("/", " ").replace("_", " ")


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


def FGVCAircraft(root: str, split: Literal["train", "val", "trainval", "test"] = "test") -> ImageFiles:
    """FGVC-Aircraft: 100 variants, such as ``Boeing 717`` or ``A310``."""
    folder = Path(root) / "fgvc-aircraft-2013b" / "data"
    path, variants = folder / f"images_variant_{split}.txt", folder / "variants.txt"
    rows = read_words(path, 2)
    classes = sorted(read_lines(variants))
    labels = labels_of([variant for _, variant in rows], classes, path)
    return ListedImages(folder, [f"images/{image}.jpg" for image, _ in rows], labels, classes, [path, variants])


def DTD(root: str, split: TrainValTest = "test", partition: int = 1) -> ImageFiles:
    """Describable Textures: 47 textures, with 40 images each in every split of ten partitions.

    ``root`` has torchvision's ``dtd/dtd``, or ``dtd`` as in the archive, or is that folder itself.
    """
    folder = find_folder(Path(root), ("dtd/dtd", "dtd", ""), "labels")
    path = folder / "labels" / f"{split}{partition}.txt"
    images = read_lines(path)
    classes = subfolders(folder / "images")
    labels = labels_of([image.partition("/")[0] for image in images], classes, path)
    return ListedImages(folder, [f"images/{image}" for image in images], labels, classes, [path])


def OxfordPets(root: str, split: Literal["trainval", "test"] = "test") -> ImageFiles:
    """Oxford-IIIT Pet: breeds of cats (capitalised) and of dogs (not capitalised).

    ``root`` has torchvision's ``oxford-iiit-pet``, or ``images`` and ``annotations`` from its archives. Labels follow
    the order of the paper's prompts, cats first; the set's own numbering mixes the two.
    """
    folder = find_folder(Path(root), ("oxford-iiit-pet", ""), "annotations")
    path = folder / "annotations" / f"{split}.txt"
    rows = read_words(path, 4)  # such as Abyssinian_100, the breed's number, cat or dog, its number among those
    breeds = [row[0].rpartition("_")[0] for row in rows]
    wrong = next((row for row, breed in zip(rows, breeds, strict=True) if not breed or not row[1].isdigit()), None)
    if wrong is not None:
        raise InputError(f"{path}: {' '.join(wrong)!r} is not an image and its breed; get the file again")
    classes = sorted(set(breeds))
    files = [f"images/{row[0]}.jpg" for row in rows]
    names = [name.replace("_", " ") for name in classes]
    return ListedImages(folder, files, labels_of(breeds, classes, path), names, [path])


def Caltech101(root: str, split: TrainTest = "test", shots: int = 30, seed: int = 0) -> ImageFiles:
    """Caltech-101 with its background class: 102 classes in the order of the folders, ``BACKGROUND_Google`` first.

    No split is published: ``train`` is the first ``shots`` images of each class by :func:`by_hash`, ``test`` the rest.
    ``root`` has ``101_ObjectCategories``, or ``caltech101`` (torchvision) or ``caltech-101`` (the archive) with it.
    """
    places = ("caltech101", "caltech-101", "")
    folder = find_folder(Path(root), places, "101_ObjectCategories") / "101_ObjectCategories"
    classes = subfolders(folder)
    if "BACKGROUND_Google" not in classes:
        raise InputError(f"{folder}: no BACKGROUND_Google, which is a class of table 9; unpack the archive again")

    def in_split(paths: list[str]) -> list[str]:
        shuffled = by_hash(paths, seed)
        return sorted(shuffled[:shots] if split == "train" else shuffled[shots:])

    files, labels = in_class_folders(folder, classes, in_split)
    names = ["background", *(name.replace("_", " ") for name in classes if name != "BACKGROUND_Google")]
    return ImageFiles(folder, files, labels, names)


def Flowers102(root: str, split: TrainValTest = "test") -> ImageFiles:
    """Oxford 102 Flower: 10 training and 10 validation images per class, the others to test."""
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


def EuroSAT(root: str, split: TrainValTest = "test", sampled: int = 1_500, seed: int = 42) -> ImageFiles:
    """EuroSAT: 27,000 colour satellite images of land use, without splits.

    Splits are drawn as the paper's author published it (openai/CLIP#45, comment 926334608): ``random`` with ``seed``
    draws ``sampled`` images of each class, in the order of the folders' names; the first third of them is ``train``,
    the next ``val``, the last ``test``. He listed each folder in the order of his file system, which is not known: here
    names are sorted, so that other images are drawn than his.

    ``root`` has torchvision's ``eurosat/2750``, or Zenodo's ``EuroSAT_RGB``, or is the class folders' parent.
    """
    folder = find_folder(Path(root), ("eurosat/2750", "EuroSAT_RGB", "2750", ""), EUROSAT[0])
    generator, third = random.Random(seed), sampled // 3
    start = ("train", "val", "test").index(split) * third
    kept: list[str] = []
    for name in sorted(EUROSAT):
        images = images_in(folder / name)
        if len(images) < sampled:
            raise InputError(f"{folder / name}: {len(images)} images, not {sampled}; unpack the archive again")
        drawn = generator.sample(images, sampled)[start : start + third]
        kept += [f"{name}/{image}" for image in sorted(drawn)]
    labels = [EUROSAT.index(file.partition("/")[0]) for file in kept]
    names = ["".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name) for name in EUROSAT]
    return ImageFiles(folder, kept, labels, [name.strip() for name in names])


def GTSRB(root: str, split: TrainTest = "test") -> ImageFiles:
    """German traffic signs: 43 class folders of training images, a list of test images."""
    folder = Path(root) / "gtsrb"
    if split == "train":
        files, labels = in_class_folders(folder / "GTSRB/Training", [f"{n:05}" for n in range(len(GTSRB_SIGNS))])
        return ListedImages(folder / "GTSRB/Training", files, labels, list(GTSRB_SIGNS), [])
    path = folder / "GT-final_test.csv"
    rows = read_table(path, {"file": ["filename"], "class": ["classid"]}, delimiter=";")
    labels = labels_of([row["class"] for row in rows], [str(n) for n in range(len(GTSRB_SIGNS))], path)
    files = [row["file"] for row in rows]
    return ListedImages(folder / "GTSRB/Final_Test/Images", files, labels, list(GTSRB_SIGNS), [path])


def Country211(root: str, split: Literal["train", "valid", "test"] = "test") -> ImageFiles:
    """Country211: the country where an image was taken; 150 training, 50 validation and 100 test images each.

    Class names are the two-letter country codes, and labels follow their order.
    """
    folder = Path(root) / "country211" / split
    countries = subfolders(folder)
    return ImageFiles(folder, *in_class_folders(folder, countries), countries)


def RenderedSST2(root: str, split: TrainValTest = "test") -> ImageFiles:
    """Rendered SST2: sentences of the Stanford Sentiment Treebank rendered as images."""
    folder = Path(root) / "rendered-sst2" / ("valid" if split == "val" else split)
    names = ["negative", "positive"]
    return ImageFiles(folder, *in_class_folders(folder, names), names)


class VOC2007(ListedImages, MultiLabel):
    """PASCAL VOC 2007: which of 20 kinds of objects an image shows; ``VOCdevkit/VOC2007``."""

    def __init__(self, root: str, split: Literal["train", "val", "trainval", "test"] = "test") -> None:
        folder = Path(root) / "VOCdevkit" / "VOC2007"
        listed = folder / "ImageSets" / "Main" / f"{split}.txt"
        images = read_lines(listed)
        annotations = [folder / "Annotations" / f"{image}.xml" for image in images]
        self._relevance = [_relevance_of_classes(path) for path in annotations]
        files = [f"JPEGImages/{image}.jpg" for image in images]
        super().__init__(folder, files, [-1] * len(files), list(VOC_CLASSES), [listed, *annotations])

    def relevance(self) -> Tensor:
        return torch.tensor(self._relevance, dtype=torch.int8)


def _relevance_of_classes(path: Path) -> list[int]:
    """Return 1 or 0 for each class, or -1 if all its objects are marked difficult, like VOC's classification lists."""
    relevance = [0] * len(VOC_CLASSES)
    for element in voc_objects(path):
        (label,) = labels_of([str(element.findtext("name", "")).strip()], VOC_CLASSES, path)
        difficult = element.findtext("difficult", "0").strip() == "1"
        relevance[label] = 1 if relevance[label] == 1 or not difficult else -1
    return relevance


def voc_objects(path: Path) -> list[ElementTree.Element]:
    """Return the objects of an annotation of Pascal VOC."""
    text = read_text(path)
    if "<!" in text:  # entities may stand for gigabytes
        raise InputError(f"{path}: not an annotation of VOC, which has no declarations or comments; get it again")
    with reading(path, "annotation of VOC", hint=AGAIN):
        objects = ElementTree.fromstring(text).findall("object")
    if not objects:
        raise InputError(f"{path}: no objects, although every annotation of VOC has some; get it again")
    return objects


def KITTI(root: str, split: TrainValTest = "test") -> ImageFiles:
    """KITTI's street scenes: how far away the closest vehicle is.

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
    """CLEVR: how many objects an image shows, 3 to 10; ``clevr/CLEVR_v1.0``.

    ``train`` is the first ``train`` of CLEVR's training images by :func:`by_hash`, ``test`` the first ``test`` of its
    validation images: the sizes of table 9. (CLEVR's own test images have no public labels.)
    """
    folder = Path(root) / "clevr" / "CLEVR_v1.0"
    part, wanted = ("train", train) if split == "train" else ("val", test)
    path = folder / "scenes" / f"CLEVR_{part}_scenes.json"
    scenes = read_json(path)
    with reading(path, "file of CLEVR's scenes", hint=AGAIN):
        counts = {scene["image_filename"]: len(scene["objects"]) for scene in scenes["scenes"]}
    if not all(isinstance(name, str) and is_unicode(name) for name in counts):
        raise InputError(f"{path}: the name of an image is not text; get it again")
    if len(counts) < wanted:
        raise InputError(f"{path}: {len(counts)} scenes, not {wanted}; get it again")
    names = sorted(by_hash(list(counts), seed)[:wanted])
    wrong = next((name for name in names if counts[name] not in COUNTS), None)
    if wrong is not None:
        raise InputError(f"{path}: {wrong} has {counts[wrong]} objects; CLEVR's images have 3 to 10")
    labels = [COUNTS.index(counts[name]) for name in names]
    return ListedImages(folder, [f"images/{part}/{name}" for name in names], labels, [str(n) for n in COUNTS], [path])
