"""Sets in their owners' layouts, or torchvision's, that need more than a rule."""

from collections import defaultdict
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import Truth
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.reading import reading
from lit_clip.tools.untrusted import entries
from ..loading.bad_samples import is_unicode
from .annotation_files import (
    AGAIN,
    find,
    import_optional,
    number,
    own_dataset,
    read_json,
    read_lines,
    read_mat,
    read_table,
    read_text,
    read_words,
)
from .image_files import ImageFiles, KnownLabels, TrainTest, TrainValTest, by_hash, labels_of

# In the order of the paper's prompts, which is not alphabetical.
VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dog", "horse"),
    *("motorbike", "person", "sheep", "sofa", "diningtable", "pottedplant", "train", "tvmonitor"),
]
COUNTS = (10, 3, 4, 5, 6, 7, 8, 9)  # labels follow the paper's prompts: "10" sorts before "3"
SCENES = entries({"scenes": list[entries({"image_filename": str, "objects": list}, total=True)]}, total=True)
DISTANCES = ["a car on the left or right side", "a car nearby", "a car in the distance", "no car"]
VEHICLES = {"Car", "Van", "Truck"}
DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TRAINING_DIGITS = 1000
LONGEST_CELL = 4096  # letters of a name, or digits of a number


def StanfordCars(root: str, split: TrainTest = "test") -> ImageFiles:
    """Stanford Cars: makes, models and years, listed in MATLAB files."""
    folder, train = Path(root) / "stanford_cars", split == "train"
    path = folder / ("devkit/cars_train_annos.mat" if train else "cars_test_annos_withlabels.mat")
    (annotations,) = read_mat(path, "annotations")
    meta = folder / "devkit" / "cars_meta.mat"
    names = [str(name) for name in read_mat(meta, "class_names")[0]]
    with reading(path, "list of cars and their classes", hint="get the file with labels"):
        cars = zip(annotations["fname"], map(int, annotations["class"]), strict=True)
        rows = [(f"cars_{split}/{name}", number) for name, number in cars]
    return ImageFiles(folder, rows, range(1, len(names) + 1), [path, meta], names)


def Flowers102(root: str, split: TrainValTest = "test") -> ImageFiles:
    """Oxford 102 Flower: 10 training and 10 validation images per class; the other images are for testing."""
    from torchvision.datasets import Flowers102 as Flowers

    folder = Path(root) / "flowers-102"
    labels_path, path = folder / "imagelabels.mat", folder / "setid.mat"
    (labels,) = read_mat(labels_path, "labels")
    (numbers,) = read_mat(path, {"train": "trnid", "val": "valid", "test": "tstid"}[split])
    with reading(path, "list of images with labels in imagelabels.mat", hint="get both again"):
        label_of = dict(enumerate(labels.tolist(), start=1))
        rows = [(f"jpg/image_{number:05}.jpg", label_of[number]) for number in numbers.tolist()]
    return ImageFiles(folder, rows, range(1, len(Flowers.classes) + 1), [labels_path, path], Flowers.classes)


def VOC2007(root: str, split: Literal["train", "val", "trainval", "test"] = "test") -> ImageFiles:
    """PASCAL VOC 2007: which of 20 kinds of objects an image shows; ``VOCdevkit/VOC2007``."""
    folder = Path(root) / "VOCdevkit" / "VOC2007"
    listed = folder / "ImageSets" / "Main" / f"{split}.txt"
    images = read_lines(listed)
    annotations = [folder / "Annotations" / f"{image}.xml" for image in images]
    relevance = torch.tensor([_relevance_of_classes(path) for path in annotations], dtype=torch.int8)
    rows = [(f"JPEGImages/{image}.jpg", None) for image in images]
    return ImageFiles(folder, rows, VOC_CLASSES, [listed, *annotations], truth=Truth(relevance=relevance))


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
    files = [f"image_2/{image:06}.png" for image in images]
    rows = list(zip(files, map(_closest_vehicle, annotations), strict=True))
    return ImageFiles(folder, rows, range(4), [*mapping, *annotations], DISTANCES)


def _split_by_video(mapping: Path, path: Path) -> dict[str, list[int]]:
    """Return each split's image numbers, ascending; no video is in two splits."""
    video_of_line = {line: video for line, (_, video, _) in enumerate(read_words(mapping, 3), start=1)}
    lines = read_text(path).split(",")
    with reading(path, "list of line numbers of train_mapping.txt", hint="get devkit_object.zip again"):
        videos = [video_of_line[int(line)] for line in lines]
    of_video = defaultdict[str, list[int]](list)
    for image, video in enumerate(videos):
        of_video[video].append(image)
    require(len(of_video) >= 3, f"{path}: {len(of_video)} videos cannot be three splits; get devkit_object.zip again")
    count = max(1, len(of_video) // 10)
    generator = np.random.RandomState(123)  # TensorFlow Datasets' seed; numpy keeps this generator's output fixed
    test = set(generator.choice(sorted(of_video), count, replace=False))
    val = set(generator.choice(sorted(of_video.keys() - test), count, replace=False))
    of_split = {"train": of_video.keys() - test - val, "val": val, "test": test}
    return {split: sorted(image for video in of_split[split] for image in of_video[video]) for split in of_split}


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
    require(len(counts) >= wanted, f"{path}: {len(counts)} scenes, not {wanted}; {AGAIN}")
    rows = [(f"images/{part}/{name}", counts[name]) for name in sorted(by_hash(list(counts), seed)[:wanted])]
    return ImageFiles(folder, rows, COUNTS, [path])


def Birdsnap(root: str, split: TrainTest = "test") -> ImageFiles:
    """Birdsnap 1.1: North American birds, with the images that its ``get_birdsnap.py`` could still download.

    ``root`` has ``species.txt``, ``images.txt`` and ``test_images.txt``, and ``download/images`` or ``images``. Labels
    follow the species' folder names, which is the order of the paper's list.
    """
    folder, columns = Path(root), {"species.txt": "dir", "images.txt": "path", "test_images.txt": "path"}
    lists = [folder / name for name in columns]
    folders, listed, test = (
        [row["it"] for row in read_table(path, {"it": [columns[path.name]]}, delimiter="\t")] for path in lists
    )
    folders.sort()
    labels_of([path.partition("/")[0] for path in listed], folders, lists[1])  # also of images that are not there
    in_test = set(test)
    images = find(folder, ["download/images", "images"], "folder of images")
    chosen = [path for path in listed if (path in in_test) == (split == "test") and (images / path).is_file()]
    rows = [(images / path, path.partition("/")[0]) for path in chosen]
    return ImageFiles(folder, rows, folders, lists, [name.replace("_", " ") for name in folders])


class Digits(KnownLabels):
    """The handwritten digits that come with scikit-learn: 1,797 grey images of 8 x 8 pixels.

    Args:
        split: ``train``: the first 1,000; ``test``: the other 797.
    """

    def __init__(self, split: TrainTest = "test") -> None:
        load_digits = import_optional("sklearn.datasets", "scikit-learn", "the set of digits").load_digits
        rows = slice(0, TRAINING_DIGITS) if split == "train" else slice(TRAINING_DIGITS, None)
        self.class_names, self.first = list(DIGIT_NAMES), rows.start
        digits = load_digits()
        self.pixels = (digits.images[rows] * (255 / 16)).round().astype("uint8")  # [N, 8, 8], scaled from 0 to 16
        self._labels = digits.target[rows].tolist()

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def key(self, index: int) -> str:
        return str(self.first + index)

    def stamp(self) -> str:
        return hex_digest([self.pixels.tobytes()])


def SVHNNumbers(root: str, split: str = "test") -> ImageFiles:
    """SVHN's photographs of house numbers (format 1); the class is the whole number.

    Classes are the numbers that occur in the split, sorted by value and then by spelling. The paper does not say which
    classes it used. ``SPLIT`` (``train``, ``test`` or ``extra``) has ``digitStruct.mat`` and the images, as in
    ``test.tar.gz``.
    """
    folder = find(Path(root), (split,), f"folder of {split} (unpack {split}.tar.gz)")
    path = find(folder, ("digitStruct.mat",), "digitStruct.mat")
    rows = _digit_structs(path)
    names = sorted({numeral for _, numeral in rows}, key=lambda numeral: (int(numeral), numeral))
    return ImageFiles(folder, rows, names, [path])


def _digit_structs(path: Path) -> list[tuple[str, str]]:
    """Read each image's file name and number from a MATLAB 7.3 file: HDF5 with references in its cells."""
    h5py = import_optional("h5py", "h5py", path)
    everything = h5py.h5s.ALL

    def read(dataset: Any) -> np.ndarray:  # h5py's high-level objects take twice as long
        plan = dataset.get_create_plist()
        if plan.get_external_count() or plan.get_layout() == h5py.h5d.VIRTUAL or dataset.shape[0] > LONGEST_CELL:
            raise ValueError("a cell is not a name or a number")
        values = np.empty(dataset.shape, dataset.dtype)
        dataset.read(everything, everything, values)
        return values[:, 0]

    with reading(path, "file of SVHN's digitStruct", hint=AGAIN), h5py.File(path) as opened:
        file: Any = opened
        rows = []
        columns = [own_dataset(file, path, f"digitStruct/{name}") for name in ("name", "bbox")]
        for name, box in zip(*(column[:, 0] for column in columns), strict=True):
            cells = read(h5py.h5d.open(h5py.h5r.dereference(box, file.id), b"label"))
            if len(cells) > 1:  # references; a single value is stored directly
                cells = [read(h5py.h5r.dereference(cell, file.id))[0] for cell in cells]
            letters = read(h5py.h5r.dereference(name, file.id))
            rows.append(("".join(map(chr, letters)), "".join(str(int(cell) % 10) for cell in cells)))
    require(all(is_unicode(name) for name, _ in rows), f"{path}: a name is not Unicode; get it again")
    return rows


def IIIT5K(root: str, split: TrainTest = "test", lexicon: Literal["small", "medium"] = "medium") -> ImageFiles:
    """IIIT 5K-Word: images of single words; each has its own list of words to choose from.

    Case does not count, as in the set's own scoring: all words are upper-cased. Classes are all words of all lists.

    ``testdata.mat`` and ``test`` are in ``root`` or in ``IIIT5K``. ``medium`` lists have 1,000 words ("1k"), ``small``
    ones 50.
    """
    path = find(Path(root), (f"{split}data.mat", f"IIIT5K/{split}data.mat"), f"{split}data.mat")
    (structs,) = read_mat(path, f"{split}data")
    rows = []  # each image's file, its word, and the words of its list
    with reading(path, f"file of IIIT5K's {split}data with {lexicon}Lexi", hint=AGAIN):
        for row in structs:
            words = [str(word).upper() for word in np.atleast_1d(row[f"{lexicon}Lexi"])]
            rows.append((str(row["ImgName"]), str(row["GroundTruth"]).upper(), words))
    names = sorted({word for _, truth, words in rows for word in (truth, *words)})
    label_of = {word: label for label, word in enumerate(names)}
    candidates = [sorted({label_of[word] for word in (truth, *words)}) for _, truth, words in rows]
    truth = Truth(candidates=candidates)
    return ImageFiles(path.parent, [(name, word) for name, word, _ in rows], names, [path], truth=truth)
