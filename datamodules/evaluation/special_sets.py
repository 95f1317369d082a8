"""Sets that know more, or other things, than a class an image: numbers, words, places, people."""

import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.evaluation.image_files import ImageFiles
from datamodules.evaluation.indexes import find, number, read_table, read_words
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import Grouped, ImageSet, Lexicons, Located
from lit_clip.tools.hashing import hash64, stamp_of_files
from lit_clip.tools.images import open_image

Split = Literal["train", "test"]


class SVHNNumbers(ImageFiles):
    """SVHN's photographs of house numbers (format 1), the class being the whole number.

    Classes are the numbers that occur in the split, in the order of their values and then of their spelling: what the
    paper chose between is not published.

    Args:
        root: the folder of ``test`` with ``digitStruct.mat`` and the images, as ``test.tar.gz`` has them.
        split: ``train``, ``test`` or ``extra``.

    Raises:
        MissingData: no such folder or file.
        InputError: ``h5py`` is not installed, or the file is not of this form.
    """

    def __init__(self, root: str, split: str = "test") -> None:
        folder = find(Path(root), (split,), f"folder of {split} (unpack {split}.tar.gz)")
        rows = _digit_structs(find(folder, ("digitStruct.mat",), "digitStruct.mat"))
        names = sorted({numeral for _, numeral in rows}, key=lambda numeral: (int(numeral), numeral))
        label_of = {numeral: label for label, numeral in enumerate(names)}
        super().__init__(folder, [name for name, _ in rows], [label_of[numeral] for _, numeral in rows], names)


def _digit_structs(path: Path) -> list[tuple[str, str]]:
    """Each image's file and number, of MATLAB's file (version 7.3: HDF5, in which cells are references)."""
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: is read by h5py, which is not installed; pip install h5py") from error
    everything = h5py.h5s.ALL

    def read(found: Any) -> np.ndarray:  # h5py's objects of a higher level take twice as long
        values = np.empty(found.shape, found.dtype)
        found.read(everything, everything, values)
        return values[:, 0]

    try:
        with h5py.File(path) as opened:
            file: Any = opened
            rows = []
            for name, box in zip(file["digitStruct/name"][:, 0], file["digitStruct/bbox"][:, 0], strict=True):
                cells = read(h5py.h5d.open(h5py.h5r.dereference(box, file.id), b"label"))
                if len(cells) > 1:  # references; a single value stands for itself
                    cells = [read(h5py.h5r.dereference(cell, file.id))[0] for cell in cells]
                letters = read(h5py.h5r.dereference(name, file.id))
                rows.append(("".join(map(chr, letters)), "".join(str(int(cell) % 10) for cell in cells)))
    except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{path}: not SVHN's digitStruct ({error}); get it again") from error
    require(bool(rows), f"{path}: no images in it; get it again")
    return rows


class IIIT5K(ImageFiles, Lexicons):
    """IIIT 5K-Word: images of single words, each with a list of words of its own to choose from.

    Case does not count, as in the set's own scoring: all words are in capitals. Classes are all words of all lists.

    Args:
        root: the folder of ``testdata.mat`` and ``test`` (``IIIT5K`` in the archive).
        split: its name.
        lexicon: ``medium``: 1,000 words ("1k"); ``small``: 50.

    Raises:
        MissingData: no such folder or file.
        InputError: SciPy is not installed, or the file is not of this form.
    """

    def __init__(self, root: str, split: Split = "test", lexicon: Literal["small", "medium"] = "medium") -> None:
        path = find(Path(root), (f"{split}data.mat", f"IIIT5K/{split}data.mat"), f"{split}data.mat")
        rows = _words_of_images(path, f"{split}data", f"{lexicon}Lexi")
        names = sorted({word for _, truth, words in rows for word in (truth, *words)})
        label_of = {word: label for label, word in enumerate(names)}
        super().__init__(path.parent, [name for name, _, _ in rows], [label_of[truth] for _, truth, _ in rows], names)
        self._candidates = [sorted({label_of[word] for word in (truth, *words)}) for _, truth, words in rows]

    def candidates(self) -> list[list[int]]:
        return [list(labels) for labels in self._candidates]


def _words_of_images(path: Path, variable: str, lexicon: str) -> list[tuple[str, str, list[str]]]:
    """Each image's file, its word, and the words of its list."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError(f"{path}: is read by SciPy, which is not installed; pip install scipy") from error
    try:
        structs = loadmat(str(path))[variable][0]
        rows = [
            (
                str(row["ImgName"][0]),
                str(row["GroundTruth"][0]).upper(),
                [str(word[0]).upper() for word in row[lexicon].ravel()],
            )
            for row in structs
        ]
    except Exception as error:  # SciPy answers a broken file with whatever it trips over
        what = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not IIIT5K's {variable} with {lexicon} ({what}); get it again") from error
    require(bool(rows), f"{path}: no images in it; get it again")
    return rows


class LocatedImages(ImageSet, Located):
    """Images and where they were taken, in a table: IM2GPS and the images that it is told from.

    Args:
        path: a CSV file with columns ``image`` (or ``img_id``), ``latitude`` (``lat``) and ``longitude`` (``lon``,
            ``lng``), as github.com/TIBHannover/GeoEstimation has them.
        root: where the paths of images start; None: beside the table.

    Raises:
        MissingData: no such table.
        InputError: it lacks a column, or a place is not on Earth.
    """

    def __init__(self, path: str, root: str | None = None) -> None:
        self.root = Path(path).parent if root is None else Path(root)
        columns = {
            "image": ("image", "img_id", "filename", "file", "path"),
            "latitude": ("latitude", "lat"),
            "longitude": ("longitude", "lon", "lng"),
        }
        self._names: list[str] = []
        places: list[tuple[float, float]] = []
        for row in read_table(Path(path), columns):
            where = f"{path}: {row['image']}"
            latitude, longitude = number(row, "latitude", where), number(row, "longitude", where)
            on_earth = abs(latitude) <= 90 and abs(longitude) <= 180
            require(on_earth, f"{where}: {latitude}, {longitude} is no latitude and longitude in degrees")
            self._names.append(row["image"])
            places.append((latitude, longitude))
        self._coordinates = torch.tensor(places, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._names)

    def images(self, index: int) -> list[Image.Image]:
        path = self.root / self._names[index]
        return [open_image(path, str(path))]

    def key(self, index: int) -> str:
        return self._names[index]

    def stamp(self) -> str:
        files = stamp_of_files(file for file in (self.root / name for name in self._names) if file.is_file())
        return f"{files}-{hash64(repr(self._names)).hex()}"

    def coordinates(self) -> Tensor:
        return self._coordinates


Attribute = Literal["race", "gender", "age"]
FAIRFACE: dict[str, list[str]] = {  # as the tables write them
    "race": ["White", "Black", "Indian", "East Asian", "Southeast Asian", "Middle Eastern", "Latino_Hispanic"],
    "gender": ["Male", "Female"],
    "age": ["0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70"],
}


class FairFace(ImageFiles, Grouped):
    """FairFace: ``fairface_label_val.csv`` and ``val/1.jpg``; one of three attributes is the class, all are groups.

    Args:
        root: the folder of the tables and of ``train`` and ``val``.
        attribute: ``race`` (7 classes), ``gender`` (2) or ``age`` (9).
        split: ``val``, which one tests on, or ``train``.

    Raises:
        MissingData: no such folder, table or images.
        InputError: the table lacks a column, or has a value that FairFace has not.
    """

    def __init__(self, root: str, attribute: Attribute = "race", split: Literal["train", "val"] = "val") -> None:
        require(attribute in FAIRFACE, f"attribute: {attribute!r} is none of {', '.join(FAIRFACE)}")
        table = find(Path(root), (f"fairface_label_{split}.csv",), f"fairface_label_{split}.csv")
        folders = ("", "fairface-img-margin125-trainval", "fairface-img-margin025-trainval")
        images = find(Path(root), [f"{folder}/{split}".lstrip("/") for folder in folders], "images").parent
        rows = read_table(table, {"file": ("file",), **{name: (name,) for name in get_args(Attribute)}})
        for row in rows:
            for name, values in FAIRFACE.items():
                require(
                    row[name] in values, f"{table}: {row['file']}: {name} is {row[name]!r}, not {', '.join(values)}"
                )
        labels = [FAIRFACE[attribute].index(row[attribute]) for row in rows]
        super().__init__(images, [row["file"] for row in rows], labels, list(FAIRFACE[attribute]))
        self._groups = {name: [row[name] for row in rows] for name in FAIRFACE}

    def groups(self) -> dict[str, list[str]]:
        return {name: list(values) for name, values in self._groups.items()}


class CelebAIdentities(ImageFiles):
    """CelebA's people by name: ``identity_CelebA.txt``, ``list_eval_partition.txt``, ``img_align_celeba`` and names.

    CelebA's own files number the people; the names are a file of the user's with a number and a name a line
    (``2880 Some Body`` or ``2880,Some_Body``). Of the people with a name the ``identities`` with the most images are
    the classes, at equal numbers those with the smaller number; the others' images are left out. Which people the
    paper took is not published.

    Args:
        root: the folder of these files.
        names: the file of names, below ``root``.
        identities: number of classes; the paper has 100, 1,000 and 2,000.
        split: whose images; None: all, as the partitions share no person.

    Raises:
        MissingData: no such folder or file.
        InputError: a line that cannot be read, or fewer people than ``identities``.
    """

    def __init__(
        self,
        root: str,
        names: str = "identity_names.txt",
        identities: int = 100,
        split: Literal["train", "val", "test"] | None = None,
    ) -> None:
        top = Path(root)
        person_of = dict(read_words(find(top, ("identity_CelebA.txt",), "identity_CelebA.txt"), 2))
        name_of = _names_of_people(find(top, (names,), "file of the people's names"))
        images = [name for name, person in person_of.items() if person in name_of]
        if split is not None:
            part = str(("train", "val", "test").index(split))
            part_of = dict(read_words(find(top, ("list_eval_partition.txt",), "list_eval_partition.txt"), 2))
            images = [name for name in images if part_of.get(name) == part]
        counts = Counter(person_of[name] for name in images)
        require(
            1 < identities <= len(counts),
            f"{top / names}: {len(counts)} named people have images, {identities} are wanted; set identities",
        )
        people = sorted(counts, key=lambda person: (-counts[person], int(person)))[:identities]
        label_of = {person: label for label, person in enumerate(people)}
        kept = [name for name in images if person_of[name] in label_of]
        folder = find(top, ("img_align_celeba", "img_celeba"), "folder of images")
        labels = [label_of[person_of[name]] for name in kept]
        super().__init__(folder, kept, labels, [name_of[person] for person in people])


def _names_of_people(path: Path) -> dict[str, str]:
    names = {}
    for row in read_words(path, 1):
        match = re.fullmatch(r"(\d+)[\s,;:]+(.+)", row[0])
        if match:
            names[match[1]] = match[2].strip().strip('"').replace("_", " ")
        elif names:  # the first line may be a header
            raise InputError(f"{path}: {row[0]!r} is no number and name; fix the line")
    return names
