"""Sets that torchvision lacks: Birdsnap, digits, SVHN's house numbers, IIIT5K."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import Truth
from lit_clip.tools.hashing import hex_digest
from lit_clip.tools.reading import reading
from ..loading.bad_samples import is_unicode
from .annotation_files import AGAIN, find, import_optional, own_dataset, read_mat, read_table
from .image_files import ImageFiles, KnownLabels, TrainTest, labels_of

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TRAINING_DIGITS = 1000
LONGEST_CELL = 4096  # letters of a name, or digits of a number


def Birdsnap(root: str, split: TrainTest = "test") -> ImageFiles:
    """Birdsnap 1.1: North American birds, with the images that its ``get_birdsnap.py`` could still download.

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
    labels = labels_of([numeral for _, numeral in rows], names, path)
    return ImageFiles(folder, [name for name, _ in rows], labels, names, [path])


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
    require(bool(rows), f"{path}: no images in it; get it again")
    require(all(is_unicode(name) for name, _ in rows), f"{path}: a name is not Unicode; get it again")
    return rows


def IIIT5K(root: str, split: TrainTest = "test", lexicon: Literal["small", "medium"] = "medium") -> ImageFiles:
    """IIIT 5K-Word: images of single words; each has its own list of words to choose from.

    Case does not count, as in the set's own scoring: all words are upper-cased. Classes are all words of all lists.

    ``testdata.mat`` and ``test`` are in ``root`` or in ``IIIT5K``. ``medium`` lists have 1,000 words ("1k"), ``small``
    ones 50.
    """
    path = find(Path(root), (f"{split}data.mat", f"IIIT5K/{split}data.mat"), f"{split}data.mat")
    rows = _words_of_images(path, f"{split}data", f"{lexicon}Lexi")
    names = sorted({word for _, truth, words in rows for word in (truth, *words)})
    label_of = {word: label for label, word in enumerate(names)}
    labels = [label_of[truth] for _, truth, _ in rows]
    candidates = [sorted({label_of[word] for word in (truth, *words)}) for _, truth, words in rows]
    files = [name for name, _, _ in rows]
    return ImageFiles(path.parent, files, labels, names, [path], Truth(candidates=candidates))


def _words_of_images(path: Path, variable: str, lexicon: str) -> list[tuple[str, str, list[str]]]:
    """Read each image's file name, its word, and the words of its list."""
    (structs,) = read_mat(path, variable)
    with reading(path, f"file of IIIT5K's {variable} with {lexicon}", hint=AGAIN):
        rows = [
            (
                str(row["ImgName"]),
                str(row["GroundTruth"]).upper(),
                [str(word).upper() for word in np.atleast_1d(row[lexicon])],
            )
            for row in structs
        ]
    require(bool(rows), f"{path}: no images in it; get it again")
    return rows
