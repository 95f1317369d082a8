"""Sets without a class in torchvision: Birdsnap, RESISC45, Hateful Memes, aYahoo, SUN; and scikit-learn's digits."""

from pathlib import Path
from typing import Any, Literal

from PIL import Image

from datamodules.evaluation.image_files import ImageFiles, by_hash, images_in, in_class_folders, subfolders
from datamodules.evaluation.indexes import find, read_table, read_text, read_words
from datamodules.evaluation.labelled_table import read_labels, resolve_labels
from lit_clip.errors import InputError
from lit_clip.evaluation.data import LabelledImages
from lit_clip.tools.hashing import hex_digest

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TRAINING_DIGITS = 1000


class Birdsnap(ImageFiles):
    """Birdsnap 1.1: North American birds, of the images those that its ``get_birdsnap.py`` could still fetch.

    Args:
        root: with ``species.txt``, ``images.txt`` and ``test_images.txt``, and ``download/images`` or ``images``.
        split: ``test``: the images in ``test_images.txt``; ``train``: the others.

    Attributes:
        class_names: the species in the order of their folders' names, which is that of the paper's list.

    Raises:
        MissingData: no such file, or no folder of images.
        InputError: a list that cannot be read, a species unknown to it, or no image left.
    """

    def __init__(self, root: str, split: Literal["train", "test"] = "test") -> None:
        folder = Path(root)
        species = read_table(folder / "species.txt", {"dir": ["dir"]}, delimiter="\t")
        folders = sorted(row["dir"] for row in species)
        listed = [row["path"] for row in read_table(folder / "images.txt", {"path": ["path"]}, delimiter="\t")]
        test = {row["path"] for row in read_table(folder / "test_images.txt", {"path": ["path"]}, delimiter="\t")}
        place = {name: label for label, name in enumerate(folders)}
        images = find(folder, ["download/images", "images"], "folder of images")
        files, labels = [], []
        for path in listed:
            if path.split("/")[0] not in place:
                raise InputError(f"{folder / 'images.txt'}: {path} is of no species in species.txt")
            if (path in test) == (split == "test") and (images / path).is_file():
                files.append((images / path).relative_to(folder).as_posix())
                labels.append(place[path.split("/")[0]])
        super().__init__(folder, files, labels, [name.replace("_", " ") for name in folders])


class RESISC45(ImageFiles):
    """NWPU-RESISC45: aerial images of 45 kinds of places, 700 each.

    The paper trains on 3,150 and tests on 25,200 and does not say on which. Here of each class the first tenth by
    the BLAKE2 hash of ``seed/name`` is trained on and the next eight tenths are tested; the last tenth is not used.

    Args:
        root: with ``NWPU-RESISC45``, or that folder itself.
        split: of the images.
        seed: of the division.

    Raises:
        MissingData: no such folder.
        InputError: other classes than 45, or one without images.
    """

    def __init__(self, root: str, split: Literal["train", "test"] = "test", seed: int = 0) -> None:
        folder = find(Path(root), ["NWPU-RESISC45", ""], "folder of classes")
        classes = subfolders(folder)
        if len(classes) != 45:
            raise InputError(f"{folder}: {len(classes)} folders of classes instead of 45; unpack the archive again")
        files, labels = [], []
        for label, name in enumerate(classes):
            order = by_hash([f"{name}/{image}" for image in images_in(folder / name)], seed)
            tenth = len(order) // 10
            chosen = sorted(order[:tenth] if split == "train" else order[tenth : 9 * tenth])
            files += chosen
            labels += [label] * len(chosen)
        super().__init__(folder, files, labels, [name.replace("_", " ") for name in classes])


class HatefulMemes(ImageFiles):
    """The Hateful Memes Challenge: images with writing, harmless or not.

    Args:
        root: with ``train.jsonl``, ``dev_seen.jsonl`` (in the first release ``dev.jsonl``, of the same 500) and
            ``img``.
        split: ``dev`` is what the paper tests on.

    Raises:
        MissingData: no such file.
        InputError: a row without image or label, or another label than 0 and 1.
    """

    def __init__(self, root: str, split: Literal["train", "dev"] = "dev") -> None:
        names = ["train.jsonl"] if split == "train" else ["dev_seen.jsonl", "dev.jsonl"]
        path = find(Path(root), names, f"list of the {split} split")
        rows = read_labels(path, "img", "label")
        class_names = ["not hateful", "hateful"]
        labels, _ = resolve_labels(path, [(number, label) for number, _, label in rows], class_names)
        super().__init__(Path(root), [image for _, image, _ in rows], labels, class_names)


class AYahoo(ImageFiles):
    """aYahoo: images of 12 classes that a search engine found (Farhadi et al. 2009), as Visual N-Grams was tested on.

    Whole images, each once; of one in which several objects are marked the first one's class.

    Args:
        root: with ``ayahoo_test_images`` and ``attribute_data/ayahoo_test.txt`` (or that file itself).

    Raises:
        MissingData: no such file.
        InputError: a line that cannot be read.
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
        super().__init__(folder, files, [class_names.index(name) for name in class_of.values()], class_names)


class SUN(ImageFiles):
    """SUN397 without a division: all its images, 108,754, of 397 kinds of places.

    Labels follow the names in words, as the paper's prompts do.

    Args:
        root: with ``SUN397``, in which ``ClassName.txt`` lists the classes' folders.

    Raises:
        MissingData: no such file.
        InputError: a class without images.
    """

    def __init__(self, root: str) -> None:
        folder = find(Path(root), ["SUN397"], "folder of the set")
        classes = [name.strip("/") for name in read_text(folder / "ClassName.txt").split()]
        folder_of = {" ".join(name.split("/")[1:]).replace("_", " "): name for name in classes}
        names = sorted(folder_of)
        files, labels = in_class_folders(folder, [folder_of[name] for name in names])
        super().__init__(folder, files, labels, names)


class Digits(LabelledImages):
    """scikit-learn's handwritten digits, which it brings along: 1,797 grey images of 8 x 8 pixels.

    Args:
        split: ``train``: the first 1,000; ``test``: the other 797.

    Raises:
        InputError: scikit-learn is not installed.
    """

    def __init__(self, split: Literal["train", "test"] = "test") -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError(
                "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
            ) from error
        rows = slice(0, TRAINING_DIGITS) if split == "train" else slice(TRAINING_DIGITS, None)
        self.class_names, self.first = list(DIGIT_NAMES), rows.start
        digits: Any = load_digits()
        self.pixels = (digits.images[rows] * (255 / 16)).round().astype("uint8")  # uint8 [N, 8, 8], of 0 to 16
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
