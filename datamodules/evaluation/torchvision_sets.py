"""Sets of table 9 whose images are files, as torchvision lays them out on a disk.

torchvision's own classes are not what reads them: some decode, or check the sums of gigabytes, when they are made; the
order of their labels is not always that of the paper's prompts; and a broken list ends in a traceback without a file's
name. They are what the tests compare with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from datamodules.evaluation.image_files import ImageFiles, by_hash, images_in, in_class_folders, subfolders
from datamodules.evaluation.indexes import find, read_json, read_table, read_text, read_words
from lit_clip.errors import InputError
from lit_clip.evaluation.data import MissingData

Halves = Literal["train", "test"]
Thirds = Literal["train", "val", "test"]

EUROSAT = [
    "Forest",
    "PermanentCrop",
    "Residential",
    "River",
    "Pasture",
    "SeaLake",
    "HerbaceousVegetation",
    "AnnualCrop",
    "Industrial",
    "Highway",
]
# What the signs of GTSRB mean, in the order of its numbers; its files have no names.
GTSRB_SIGNS = [
    "speed limit 20",
    "speed limit 30",
    "speed limit 50",
    "speed limit 60",
    "speed limit 70",
    "speed limit 80",
    "end of speed limit 80",
    "speed limit 100",
    "speed limit 120",
    "no passing",
    "no passing for trucks",
    "right of way at the next crossing",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no trucks",
    "no entry",
    "danger",
    "curve to the left",
    "curve to the right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic lights",
    "pedestrians",
    "children",
    "bicycles",
    "ice or snow",
    "wild animals",
    "end of all limits",
    "turn right",
    "turn left",
    "straight on",
    "straight on or right",
    "straight on or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no passing",
    "end of no passing for trucks",
]


def read_mat(path: Path, *names: str) -> list[Any]:
    """Variables of a MATLAB file, as arrays of at least one dimension.

    Raises:
        MissingData: no such file.
        InputError: not a MATLAB file, or one without such a variable; or scipy is not installed.
    """
    try:
        import numpy as np
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError(f"{path}: is read with scipy, which is not installed; pip install scipy") from error
    if not path.is_file():
        raise MissingData(f"{path}: no such file")
    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy answers a broken file with whatever it trips over
        raise InputError(f"{path}: not a MATLAB file ({str(error).partition(chr(10))[0]}); get it again") from error
    for name in names:
        if name not in content:
            raise InputError(f"{path}: no variable {name!r}; get the file again")
    return [np.atleast_1d(content[name]) for name in names]


def labels_of(names: Sequence[str], classes: Sequence[str], where: Path) -> list[int]:
    """The places of class names among ``classes``.

    Raises:
        InputError: one is not among them; ``where`` is the file that says so.
    """
    places = {name: label for label, name in enumerate(classes)}
    unknown = next((name for name in names if name not in places), None)
    if unknown is not None:
        raise InputError(f"{where}: {unknown!r} is none of the {len(classes)} classes; get the file again")
    return [places[name] for name in names]


class ListedImages(ImageFiles):
    """Images that a list names.

    Raises:
        MissingData: the folder of the first of them is not there: only the lists are.
    """

    def __init__(self, root: Path, files: list[str], labels: list[int], class_names: list[str]) -> None:
        super().__init__(root, files, labels, class_names)
        folder = (root / files[0]).parent
        if not folder.is_dir():
            raise MissingData(f"{folder}: no such folder")


class Food101(ListedImages):
    """Food-101: dishes, 750 images of each to train on and 250 to test; ``food-101/meta/SPLIT.json``."""

    def __init__(self, root: str, split: Halves = "test") -> None:
        folder = Path(root) / "food-101"
        path = folder / "meta" / f"{split}.json"
        lists = read_json(path)
        if not isinstance(lists, dict) or not all(isinstance(names, list) for names in lists.values()):
            raise InputError(f"{path}: not a list of images by dish; get it again")
        classes = sorted(lists)
        files = [f"images/{image}.jpg" for name in classes for image in lists[name]]
        labels = [label for label, name in enumerate(classes) for _ in lists[name]]
        super().__init__(folder, files, labels, [name.replace("_", " ") for name in classes])


class SUN397(ListedImages):
    """SUN397: scenes, 50 images of each to train on and 50 to test in each of ten partitions.

    Labels follow the names in words, as the paper's prompts do (``jail cell`` before ``jail indoor``), whatever the
    order in ``ClassName.txt``.

    Args:
        root: the folder with ``SUN397``, where the lists of ``Partitions.zip`` are too.
        split: ``train`` or ``test``.
        partition: 1 to 10.
    """

    def __init__(self, root: str, split: Halves = "test", partition: int = 1) -> None:
        folder = Path(root) / "SUN397"
        name = f"{'Training' if split == 'train' else 'Testing'}_{partition:02}.txt"
        listed = find(folder, [name, f"Partitions/{name}"], "list of the partition's images")
        files = [line.strip().lstrip("/") for line in read_text(listed).splitlines() if line.strip()]
        path = folder / "ClassName.txt"
        words = {line.strip().strip("/"): _scene(line) for line in read_text(path).splitlines() if line.strip()}
        classes = sorted(words, key=lambda name: words[name])
        labels = labels_of([file.rpartition("/")[0] for file in files], classes, listed)
        super().__init__(folder, files, labels, [words[name] for name in classes])


def _scene(path: str) -> str:
    """``/a/apartment_building/outdoor`` -> ``apartment building outdoor``."""
    return path.strip().strip("/").partition("/")[2].replace("/", " ").replace("_", " ")


class StanfordCars(ListedImages):
    """Stanford Cars: makes, models and years; lists in MATLAB files."""

    def __init__(self, root: str, split: Halves = "test") -> None:
        folder = Path(root) / "stanford_cars"
        train = split == "train"
        path = folder / ("devkit/cars_train_annos.mat" if train else "cars_test_annos_withlabels.mat")
        (annotations,) = read_mat(path, "annotations")
        meta = folder / "devkit" / "cars_meta.mat"
        class_names = [str(name) for name in read_mat(meta, "class_names")[0]]
        fields = annotations.dtype.names or ()
        if not {"fname", "class"} <= set(fields):
            raise InputError(f"{path}: no classes of the images in it; get the one with labels")
        labels = [int(label) - 1 for label in annotations["class"]]
        if not all(0 <= label < len(class_names) for label in labels):
            raise InputError(f"{path}: a class is none of the {len(class_names)} of {meta}; get both again")
        files = [f"{'cars_train' if train else 'cars_test'}/{name}" for name in annotations["fname"]]
        super().__init__(folder, files, labels, class_names)


class FGVCAircraft(ListedImages):
    """FGVC-Aircraft: 100 variants, as ``Boeing 717`` or ``A310``."""

    def __init__(self, root: str, split: Literal["train", "val", "trainval", "test"] = "test") -> None:
        folder = Path(root) / "fgvc-aircraft-2013b" / "data"
        path = folder / f"images_variant_{split}.txt"
        rows = read_words(path, 2)
        classes = sorted(line.strip() for line in read_text(folder / "variants.txt").splitlines() if line.strip())
        labels = labels_of([variant for _, variant in rows], classes, path)
        super().__init__(folder, [f"images/{image}.jpg" for image, _ in rows], labels, classes)


class DTD(ListedImages):
    """Describable Textures: 47 textures, 40 images of each in each third.

    Args:
        root: the folder with ``dtd/dtd``.
        split: a third.
        partition: 1 to 10.
    """

    def __init__(self, root: str, split: Thirds = "test", partition: int = 1) -> None:
        folder = Path(root) / "dtd" / "dtd"
        path = folder / "labels" / f"{split}{partition}.txt"
        images = [row[0] for row in read_words(path, 1)]
        classes = subfolders(folder / "images")
        labels = labels_of([image.partition("/")[0] for image in images], classes, path)
        super().__init__(folder, [f"images/{image}" for image in images], labels, classes)


class OxfordPets(ListedImages):
    """Oxford-IIIT Pet: breeds of cats (which begin with a capital) and of dogs (which do not).

    Labels follow the order of the paper's prompts, cats first; the numbers of the set's own lists mix them.
    """

    def __init__(self, root: str, split: Literal["trainval", "test"] = "test") -> None:
        folder = Path(root) / "oxford-iiit-pet"
        path = folder / "annotations" / f"{split}.txt"
        rows = read_words(path, 4)  # Abyssinian_100, number of the breed, cat or dog, number among those
        breeds = [row[0].rpartition("_")[0] for row in rows]
        wrong = next((row for row, breed in zip(rows, breeds, strict=True) if not breed or not row[1].isdigit()), None)
        if wrong is not None:
            raise InputError(f"{path}: {' '.join(wrong)!r} is no image and its breed; get the file again")
        classes = sorted(set(breeds))
        labels = labels_of(breeds, classes, path)
        files = [f"images/{row[0]}.jpg" for row in rows]
        super().__init__(folder, files, labels, [name.replace("_", " ") for name in classes])


class Caltech101(ImageFiles):
    """Caltech-101 with its background: 102 classes in the order of the folders, ``BACKGROUND_Google`` first.

    No division is published: the first ``shots`` images of each class by :func:`by_hash` are to train on, the others
    to test.

    Args:
        root: the folder with ``caltech101/101_ObjectCategories``.
        split: ``train`` or ``test``.
        shots: images of each class to train on.
        seed: of the draw.
    """

    def __init__(self, root: str, split: Halves = "test", shots: int = 30, seed: int = 0) -> None:
        folder = Path(root) / "caltech101" / "101_ObjectCategories"
        classes = subfolders(folder)
        if "BACKGROUND_Google" not in classes:
            raise InputError(f"{folder}: no BACKGROUND_Google, which is a class of table 9; unpack the archive again")
        files, labels = [], []
        for label, name in enumerate(classes):
            drawn = by_hash([f"{name}/{image}" for image in images_in(folder / name)], seed)
            kept = sorted(drawn[:shots] if split == "train" else drawn[shots:])
            files += kept
            labels += [label] * len(kept)
        names = ["background", *(name.replace("_", " ") for name in classes if name != "BACKGROUND_Google")]
        super().__init__(folder, files, labels, names)


class Flowers102(ListedImages):
    """Oxford 102 Flower: 10 images of each to train on, 10 for validation, the others to test."""

    def __init__(self, root: str, split: Thirds = "test") -> None:
        from torchvision.datasets import Flowers102 as Flowers

        folder = Path(root) / "flowers-102"
        (labels,) = read_mat(folder / "imagelabels.mat", "labels")
        path = folder / "setid.mat"
        (numbers,) = read_mat(path, {"train": "trnid", "val": "valid", "test": "tstid"}[split])
        if not all(1 <= number <= len(labels) for number in numbers):
            raise InputError(f"{path}: it lists images without labels; get it and imagelabels.mat again")
        files = [f"jpg/image_{number:05}.jpg" for number in numbers]
        super().__init__(folder, files, [int(labels[number - 1]) - 1 for number in numbers], list(Flowers.classes))


class EuroSAT(ImageFiles):
    """EuroSAT: land use from satellites, in colour; 27,000 images without a division.

    The first ``train`` images by :func:`by_hash` are to train on, the next ``test`` to test: table 9's numbers.

    Args:
        root: the folder with ``eurosat/2750``.
        split: ``train`` or ``test``.
        train: how many to train on.
        test: how many to test.
        seed: of the draw.
    """

    def __init__(
        self, root: str, split: Halves = "test", train: int = 10_000, test: int = 5_000, seed: int = 0
    ) -> None:
        folder = Path(root) / "eurosat" / "2750"
        files, labels = in_class_folders(folder, EUROSAT)
        if len(files) < train + test:
            raise InputError(f"{folder}: {len(files)} images, not {train + test}; unpack the archive again")
        label_of = dict(zip(files, labels, strict=True))
        drawn = by_hash(files, seed)
        kept = sorted(drawn[:train] if split == "train" else drawn[train : train + test])
        names = ["".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name) for name in EUROSAT]
        super().__init__(folder, kept, [label_of[file] for file in kept], [name.strip() for name in names])


class GTSRB(ListedImages):
    """German traffic signs: 43 classes in folders to train on, a list of images to test."""

    def __init__(self, root: str, split: Halves = "test") -> None:
        base = Path(root) / "gtsrb"
        folder = base / "GTSRB" / ("Training" if split == "train" else "Final_Test/Images")
        if split == "train":
            files, labels = in_class_folders(folder, [f"{label:05}" for label in range(len(GTSRB_SIGNS))])
        else:
            path = base / "GT-final_test.csv"
            rows = read_table(path, {"file": ["filename"], "class": ["classid"]}, delimiter=";")
            signs = [str(label) for label in range(len(GTSRB_SIGNS))]
            files, labels = [row["file"] for row in rows], labels_of([row["class"] for row in rows], signs, path)
        super().__init__(folder, files, labels, list(GTSRB_SIGNS))


class Country211(ImageFiles):
    """Country211: where an image was taken; of each country 150 to train on, 50 for validation, 100 to test.

    Labels follow the countries' two letters, which are the names here.
    """

    def __init__(self, root: str, split: Literal["train", "valid", "test"] = "test") -> None:
        folder = Path(root) / "country211" / split
        countries = subfolders(folder)
        super().__init__(folder, *in_class_folders(folder, countries), countries)


class RenderedSST2(ImageFiles):
    """Sentences of the Stanford Sentiment Treebank, drawn as images."""

    def __init__(self, root: str, split: Thirds = "test") -> None:
        folder = Path(root) / "rendered-sst2" / ("valid" if split == "val" else split)
        names = ["negative", "positive"]
        super().__init__(folder, *in_class_folders(folder, names), names)
