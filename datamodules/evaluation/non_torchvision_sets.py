"""Classification sets that torchvision lacks: Birdsnap, RESISC45, Hateful Memes, aYahoo, SUN, scikit-learn's digits."""

from pathlib import Path
from typing import Literal

from PIL import Image

from datamodules.evaluation.annotation_files import find, import_optional, read_table, read_text, read_words
from datamodules.evaluation.image_files import ImageFiles, KnownLabels, TrainTest, by_hash, in_class_folders, subfolders
from datamodules.evaluation.labelled_table import read_labels, resolve_labels
from lit_clip.errors import InputError
from lit_clip.tools.hashing import hex_digest

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TRAINING_DIGITS = 1000


def Birdsnap(root: str, split: TrainTest = "test") -> ImageFiles:
    """Birdsnap 1.1: North American birds, as far as its ``get_birdsnap.py`` could still download the images.

    ``root`` has ``species.txt``, ``images.txt`` and ``test_images.txt``, and ``download/images`` or ``images``. Labels
    follow the species' folder names, which is the order of the paper's list.
    """
    folder = Path(root)

    def column(path: Path, name: str) -> list[str]:
        return [row[name] for row in read_table(path, {name: [name]}, delimiter="\t")]

    lists = [folder / name for name in ("species.txt", "images.txt", "test_images.txt")]
    folders, listed, test = sorted(column(lists[0], "dir")), column(lists[1], "path"), set(column(lists[2], "path"))
    label_of = {name: label for label, name in enumerate(folders)}
    images = find(folder, ["download/images", "images"], "folder of images")
    files, labels = [], []
    for path in listed:
        species = path.split("/")[0]
        if species not in label_of:
            raise InputError(f"{lists[1]}: {path} is of no species in species.txt; get both again")
        if (path in test) == (split == "test") and (images / path).is_file():
            files.append((images / path).relative_to(folder).as_posix())
            labels.append(label_of[species])
    return ImageFiles(folder, files, labels, [name.replace("_", " ") for name in folders], lists)


def RESISC45(root: str, split: TrainTest = "test", seed: int = 0) -> ImageFiles:
    """NWPU-RESISC45: aerial images of 45 kinds of places, 700 each, in class folders in or below ``root``.

    The paper trains on 3,150 images and tests on 25,200. Its author said that a tenth is for training (openai/CLIP#45),
    not which; the tenth that is in neither is probably his validation split. Here each class is sorted by
    :func:`by_hash`: the first tenth is ``train``, the next eight tenths are ``test``, and the last tenth is not used.
    """
    folder = find(Path(root), ["NWPU-RESISC45", ""], "class folders")
    classes = subfolders(folder)
    if len(classes) != 45:
        raise InputError(f"{folder}: {len(classes)} class folders instead of 45; unpack the archive again")

    def in_split(paths: list[str]) -> list[str]:
        shuffled, tenth = by_hash(paths, seed), len(paths) // 10
        return sorted(shuffled[:tenth] if split == "train" else shuffled[tenth : 9 * tenth])

    files, labels = in_class_folders(folder, classes, in_split)
    return ImageFiles(folder, files, labels, [name.replace("_", " ") for name in classes])


def HatefulMemes(root: str, split: Literal["train", "dev"] = "dev") -> ImageFiles:
    """The Hateful Memes Challenge: images with text, hateful or not; the paper tests on ``dev``.

    ``root`` has ``img``, ``train.jsonl`` and ``dev_seen.jsonl`` (in the first release ``dev.jsonl``, the same rows).
    """
    names = ["train.jsonl"] if split == "train" else ["dev_seen.jsonl", "dev.jsonl"]
    path = find(Path(root), names, f"list of the {split} split")
    rows = read_labels(path, "img", "label")
    class_names = ["not hateful", "hateful"]
    labels, _ = resolve_labels(path, rows, class_names)
    return ImageFiles(Path(root), [image for _, image, _ in rows], labels, class_names, [path])


def AYahoo(root: str) -> ImageFiles:
    """aYahoo: search engine results for 12 classes (Farhadi et al. 2009), a test set of Visual N-Grams.

    Each image is used whole and once; where several objects are marked, the first gives the class. ``root`` has
    ``ayahoo_test_images`` and ``attribute_data/ayahoo_test.txt`` (or ``ayahoo_test.txt``).
    """
    folder = Path(root)
    index = find(folder, ["attribute_data/ayahoo_test.txt", "ayahoo_test.txt"], "list of the images")
    class_of: dict[str, str] = {}
    for name, class_name, _ in read_words(index, 3):
        class_of.setdefault(name, class_name)
    class_names = sorted(set(class_of.values()))
    images = find(folder, ["ayahoo_test_images"], "folder of images").relative_to(folder)
    labels = [class_names.index(name) for name in class_of.values()]
    return ImageFiles(folder, [(images / name).as_posix() for name in class_of], labels, class_names, [index])


def SUN(root: str) -> ImageFiles:
    """All 108,754 images of SUN397, without splits: 397 kinds of places, which ``SUN397/ClassName.txt`` lists.

    Labels follow the sorted class names in words, like the paper's prompts.
    """
    folder = find(Path(root), ["SUN397"], "folder of the set")
    classes = [name.strip("/") for name in read_text(folder / "ClassName.txt").split()]
    folder_of = {" ".join(name.split("/")[1:]).replace("_", " "): name for name in classes}
    names = sorted(folder_of)
    files, labels = in_class_folders(folder, [folder_of[name] for name in names])
    return ImageFiles(folder, files, labels, names, [folder / "ClassName.txt"])


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
