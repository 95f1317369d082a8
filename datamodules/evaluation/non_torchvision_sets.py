"""Classification sets that torchvision lacks: Birdsnap, RESISC45, Hateful Memes, aYahoo, SUN, scikit-learn's digits."""

from pathlib import Path
from typing import Literal

from PIL import Image

from datamodules.evaluation.annotation_files import find, import_optional, read_table, read_text, read_words
from datamodules.evaluation.image_files import ImageFiles, TrainTest, by_hash, in_class_folders, subfolders
from datamodules.evaluation.labelled_table import read_labels, resolve_labels
from lit_clip.errors import InputError
from lit_clip.evaluation.data import LabelledImages
from lit_clip.tools.hashing import hex_digest

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TRAINING_DIGITS = 1000


class Birdsnap(ImageFiles):
    """Birdsnap 1.1: North American birds, as far as its ``get_birdsnap.py`` could still download the images.

    Args:
        root: with ``species.txt``, ``images.txt`` and ``test_images.txt``, and ``download/images`` or ``images``.
        split: ``test``: the images in ``test_images.txt``; ``train``: the others.

    Attributes:
        class_names: the species, sorted by folder name, which is the order of the paper's list.

    Raises:
        MissingData: a list or the folder of images does not exist.
    """

    def __init__(self, root: str, split: TrainTest = "test") -> None:
        folder = Path(root)
        species = read_table(folder / "species.txt", {"dir": ["dir"]}, delimiter="\t")
        folders = sorted(row["dir"] for row in species)
        listed = [row["path"] for row in read_table(folder / "images.txt", {"path": ["path"]}, delimiter="\t")]
        test = {row["path"] for row in read_table(folder / "test_images.txt", {"path": ["path"]}, delimiter="\t")}
        label_of = {name: label for label, name in enumerate(folders)}
        images = find(folder, ["download/images", "images"], "folder of images")
        files, labels = [], []
        for path in listed:
            species_folder = path.split("/")[0]
            if species_folder not in label_of:
                raise InputError(f"{folder / 'images.txt'}: {path} is of no species in species.txt; get both again")
            if (path in test) == (split == "test") and (images / path).is_file():
                files.append((images / path).relative_to(folder).as_posix())
                labels.append(label_of[species_folder])
        lists = [folder / name for name in ("species.txt", "images.txt", "test_images.txt")]
        super().__init__(folder, files, labels, [name.replace("_", " ") for name in folders], lists)


class RESISC45(ImageFiles):
    """NWPU-RESISC45: aerial images of 45 kinds of places, 700 each.

    The paper trains on 3,150 images and tests on 25,200. Its author said that a tenth is for training (openai/CLIP#45),
    not which; the tenth that is in neither is probably his validation split. Here each class is sorted by
    :func:`by_hash`: the first tenth is ``train``, the next eight tenths are ``test``, and the last tenth is not used.

    Args:
        root: the folder that contains ``NWPU-RESISC45``, or that folder itself.
        split: ``train`` or ``test``.
        seed: of the split.

    Raises:
        MissingData: no such folder.
    """

    def __init__(self, root: str, split: TrainTest = "test", seed: int = 0) -> None:
        folder = find(Path(root), ["NWPU-RESISC45", ""], "class folders")
        classes = subfolders(folder)
        if len(classes) != 45:
            raise InputError(f"{folder}: {len(classes)} class folders instead of 45; unpack the archive again")

        def in_split(paths: list[str]) -> list[str]:
            shuffled, tenth = by_hash(paths, seed), len(paths) // 10
            return sorted(shuffled[:tenth] if split == "train" else shuffled[tenth : 9 * tenth])

        files, labels = in_class_folders(folder, classes, in_split)
        super().__init__(folder, files, labels, [name.replace("_", " ") for name in classes])


class HatefulMemes(ImageFiles):
    """The Hateful Memes Challenge: images with text, hateful or not.

    Args:
        root: with ``train.jsonl``, ``dev_seen.jsonl`` (in the first release ``dev.jsonl``, the same 500 rows) and
            ``img``.
        split: ``train``, or ``dev``, which the paper tests on.

    Raises:
        MissingData: no such file.
    """

    def __init__(self, root: str, split: Literal["train", "dev"] = "dev") -> None:
        names = ["train.jsonl"] if split == "train" else ["dev_seen.jsonl", "dev.jsonl"]
        path = find(Path(root), names, f"list of the {split} split")
        rows = read_labels(path, "img", "label")
        class_names = ["not hateful", "hateful"]
        labels, _ = resolve_labels(path, [(number, label) for number, _, label in rows], class_names)
        super().__init__(Path(root), [image for _, image, _ in rows], labels, class_names, [path])


class AYahoo(ImageFiles):
    """aYahoo: search engine results for 12 classes (Farhadi et al. 2009), a test set of Visual N-Grams.

    Each image is used whole and once; where several objects are marked, the first gives the class.

    Args:
        root: with ``ayahoo_test_images`` and ``attribute_data/ayahoo_test.txt`` (or ``ayahoo_test.txt``).

    Raises:
        MissingData: no such file.
    """

    def __init__(self, root: str) -> None:
        folder = Path(root)
        index = find(folder, ["attribute_data/ayahoo_test.txt", "ayahoo_test.txt"], "list of the images")
        class_of: dict[str, str] = {}
        for name, class_name, _ in read_words(index, 3):
            class_of.setdefault(name, class_name)
        class_names = sorted(set(class_of.values()))
        images = find(folder, ["ayahoo_test_images"], "folder of images").relative_to(folder)
        files = [(images / name).as_posix() for name in class_of]
        labels = [class_names.index(name) for name in class_of.values()]
        super().__init__(folder, files, labels, class_names, [index])


class SUN(ImageFiles):
    """All 108,754 images of SUN397, without splits: 397 kinds of places.

    Labels follow the sorted class names in words, like the paper's prompts.

    Args:
        root: with ``SUN397``, whose ``ClassName.txt`` lists the class folders.

    Raises:
        MissingData: no such file.
    """

    def __init__(self, root: str) -> None:
        folder = find(Path(root), ["SUN397"], "folder of the set")
        classes = [name.strip("/") for name in read_text(folder / "ClassName.txt").split()]
        folder_of = {" ".join(name.split("/")[1:]).replace("_", " "): name for name in classes}
        names = sorted(folder_of)
        files, labels = in_class_folders(folder, [folder_of[name] for name in names])
        super().__init__(folder, files, labels, names, [folder / "ClassName.txt"])


class Digits(LabelledImages):
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
        self._labels: list[int] = digits.target[rows].tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), self._labels[index]

    def labels(self) -> list[int]:
        return list(self._labels)

    def key(self, index: int) -> str:
        return str(self.first + index)

    def stamp(self) -> str:
        return hex_digest([self.pixels.tobytes()])
