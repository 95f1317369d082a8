"""Faces and people: FER2013, FER+'s labels for its images, FairFace, and CelebA's identities."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np
from PIL import Image

from lit_clip.errors import InputError, require
from lit_clip.evaluation.bias import VALUES as FAIRFACE
from lit_clip.evaluation.data import LabelledImages, Truth
from lit_clip.tools.reading import check_is_file, reading
from .annotation_files import AGAIN, find, read_lines, read_table, read_words, whole_number
from .image_files import ImageFiles, TrainValTest, in_class_folders, labels_of, subfolders
from .torchvision_arrays import ImageArrays

EMOTIONS = ("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral")
FER_PLUS = (*EMOTIONS, "contemptuous")
EMOTION_FOLDERS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")  # the same, as Kaggle has them
USAGES: dict[TrainValTest, str] = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
VOTED = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral", "contempt")  # in label order
# FER+'s columns, in their order, by which ties go; NF is "not a face".
VOTES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "NF")
FACE_SIDE = 48  # pixels
LONGEST_FACE = 100_000  # characters of a row; 48 x 48 pixels take ten thousand
TABLES_OF_FACES = ("fer2013.csv", "icml_face_data.csv")
Attribute = Literal["race", "gender", "age"]


def FER2013(root: str, split: TrainValTest = "test") -> LabelledImages:
    """FER2013: grey faces of 48 x 48 pixels with seven emotions.

    They are in the challenge's ``fer2013.csv`` or ``icml_face_data.csv``, or in the folders of Kaggle's
    ``msambare/fer2013``, ``train/angry`` and ``test/angry`` and so on, whose test images are named by their split.
    Splits are the challenge's Training (``train``), PublicTest (``val``) and PrivateTest (``test``).
    """
    places = [f"{place}{name}" for place in ("fer2013/", "") for name in (*TABLES_OF_FACES, "train/angry")]
    found = find(Path(root), places, "table or folders of faces")
    return _faces_in_table(found, split) if found.is_file() else _face_files(found.parents[1], split)


def _face_files(folder: Path, split: TrainValTest) -> ImageFiles:
    part = "train" if split == "train" else "test"
    words, folders = subfolders(folder / part), ", ".join(EMOTION_FOLDERS)
    require({*words} == {*EMOTION_FOLDERS}, f"{folder / part}: its folders are {', '.join(words)}, not {folders}")
    expected = {USAGES[each] for each in USAGES if (each == "train") == (split == "train")}
    rows = in_class_folders(folder, [f"{part}/{name}" for name in EMOTION_FOLDERS])
    for file, _ in rows:
        starts = " or ".join(sorted(expected))
        known = Path(file).name.partition("_")[0] in expected
        require(known, f"{folder / file}: its name does not start with {starts}; {AGAIN}")
    kept = [(file, name) for file, name in rows if Path(file).name.startswith(f"{USAGES[split]}_")]
    return ImageFiles(folder, kept, [f"{part}/{name}" for name in EMOTION_FOLDERS], names=EMOTIONS)


def FERPlus(root: str, split: TrainValTest = "test") -> ImageArrays:
    """FER+: FER2013's faces with eight emotions; ten people voted on each face (arXiv 1608.01041).

    An image's label is the emotion that its authors' code takes in its mode ``majority``
    (github.com/microsoft/FERPlus, ``src/ferplus.py``): single votes do not count, and the emotion needs more than half
    of the others. Images without such an emotion are left out, and so are those whose majority is "unknown" or "not
    a face". FER+'s ``fer2013new.csv`` lies beside FER2013's table.
    """
    votes = find(Path(root), [f"{place}fer2013new.csv" for place in ("fer2013/", "")], "table of votes")
    return _faces_in_table(find(votes.parent, TABLES_OF_FACES, "table of faces"), split, votes)


def _faces_in_table(path: Path, split: TrainValTest, votes: Path | None = None) -> ImageArrays:
    """Open a split of FER2013's table, with labels from FER+'s table of votes if given."""
    listed, starts = [], []  # each row's Usage and emotion, and where in the file it starts
    check_is_file(path)
    with path.open("rb") as file:
        columns = _cells(path, file.readline())
        if sorted(columns) != ["Usage", "emotion", "pixels"]:
            raise InputError(f"{path}: its columns are {', '.join(columns)}, not emotion, pixels, Usage")
        start = file.tell()
        while line := file.readline():
            if line.strip():
                cells = dict(zip(columns, _cells(path, line), strict=False))
                emotion = whole_number(cells.get("emotion", ""))
                if emotion is None or "Usage" not in cells:
                    raise InputError(f"{path} row {len(starts)}: not a face and its emotion; get the file again")
                listed.append((cells["Usage"], emotion))
                starts.append(start)
            start = file.tell()
    usages = [usage for usage, _ in listed]
    labels = [emotion for _, emotion in listed] if votes is None else _voted(votes, path, usages)
    kept = {row: label for row, label in enumerate(labels) if usages[row] == USAGES[split] and label is not None}
    names, annotations = (EMOTIONS, [path]) if votes is None else (FER_PLUS, [path, votes])
    face = partial(_face, path, columns, starts)
    return ImageArrays([path], partial(path.open, "rb"), list(kept.values()), names, annotations, list(kept), face)


def _cells(path: Path, line: bytes) -> list[str]:
    with reading(path, "table of faces", hint=AGAIN):
        if len(line) > LONGEST_FACE:
            raise ValueError(f"a row has more than {LONGEST_FACE:,} characters")
        return [cell.strip() for cell in next(csv.reader([line.decode("utf-8-sig", "replace")]), [])]


def _face(path: Path, columns: list[str], starts: list[int], file: BinaryIO, row: int) -> Image.Image:
    file.seek(starts[row])
    cells = dict(zip(columns, _cells(path, file.readline()), strict=True))
    values = np.array(cells["pixels"].split(), dtype=np.uint8)
    return Image.fromarray(values.reshape(FACE_SIDE, FACE_SIDE))


def _voted(votes: Path, table: Path, usages: Sequence[str]) -> list[int | None]:
    """Return the label of each row of the table of faces; None for a row to leave out."""
    rows = read_table(votes, {name: (name.lower(),) for name in ("usage", "image name", *VOTES)})
    if [row["usage"] for row in rows] != usages:
        problem = f"its {len(rows)} rows are not of the same splits as the {len(usages)} of {table.name}"
        raise InputError(f"{votes}: {problem}; get both again")
    labels: list[int | None] = []
    for number, row in enumerate(rows):
        numbers = [whole_number(row[name]) for name in VOTES]
        require(None not in numbers, f"{votes} row {number}: a vote is not a whole number; {AGAIN}")
        counted = [vote if vote and vote > 1 else 0 for vote in numbers]
        most = max(counted)
        name = VOTES[counted.index(most)]
        clear = row["image name"] and 2 * most > sum(counted) and name in VOTED
        labels.append(VOTED.index(name) if clear else None)
    return labels


def FairFace(root: str, attribute: Attribute = "race", split: Literal["train", "val"] = "val") -> ImageFiles:
    """FairFace: ``fairface_label_val.csv`` and ``val/1.jpg``; one attribute is the class, all three are groups.

    ``race`` has 7 classes, ``gender`` 2 and ``age`` 9; ``val`` is the usual test split.
    """
    require(attribute in FAIRFACE, f"attribute: must be one of {', '.join(FAIRFACE)}, not {attribute!r}")
    table = find(Path(root), (f"fairface_label_{split}.csv",), f"fairface_label_{split}.csv")
    folders = ("", "fairface-img-margin125-trainval/", "fairface-img-margin025-trainval/")
    images = find(Path(root), [f"{folder}{split}" for folder in folders], "images").parent
    rows = read_table(table, {"file": ("file",), **{name: (name,) for name in FAIRFACE}})
    groups = {name: [row[name] for row in rows] for name in FAIRFACE}
    for name, values in FAIRFACE.items():
        labels_of(groups[name], values, table)
    people = [(row["file"], row[attribute]) for row in rows]
    return ImageFiles(images, people, FAIRFACE[attribute], [table], truth=Truth(groups=groups))


def CelebAIdentities(
    root: str, names: str = "identity_names.txt", identities: int = 100, split: TrainValTest | None = None
) -> ImageFiles:
    """CelebA's people by name: ``identity_CelebA.txt``, ``list_eval_partition.txt``, ``img_align_celeba`` and names.

    CelebA only numbers the people. Their names come from a file of the user's with a number and a name on each line
    (``2880 Some Body`` or ``2880,Some_Body``). Classes are the ``identities`` named people with the most images, ties
    going to the smaller number; all other images are left out. The paper does not say which people it used.

    Args:
        root: the folder of these files.
        names: the file of names, below ``root``.
        identities: number of classes; the paper has 100, 1,000 and 2,000.
        split: the partition; None: all, since no person is in two partitions.
    """
    top = Path(root)
    identity = find(top, ("identity_CelebA.txt",), "identity_CelebA.txt")
    annotations = [identity, find(top, (names,), "file of the people's names")]
    person_of, name_of = dict(read_words(identity, 2)), _names_of_people(annotations[1])
    images = [name for name, person in person_of.items() if person in name_of]
    if split is not None:
        partition = str(get_args(TrainValTest).index(split))
        annotations.append(find(top, ("list_eval_partition.txt",), "list_eval_partition.txt"))
        partition_of = dict(read_words(annotations[-1], 2))
        images = [name for name in images if partition_of.get(name) == partition]
    counts = Counter(person_of[name] for name in images)
    require(identities > 1, f"identities: must be at least 2, not {identities}")
    too_many = f"identities: {identities} is more than the {len(counts)} named people with images"
    require(identities <= len(counts), f"{too_many}; lower it, or add names to {top / names}")
    people = sorted(counts, key=lambda person: (-counts[person], int(person)))[:identities]
    folder = find(top, ("img_align_celeba", "img_celeba"), "folder of images")
    chosen = set(people)
    rows = [(name, person_of[name]) for name in images if person_of[name] in chosen]
    return ImageFiles(folder, rows, people, annotations, [name_of[person] for person in people])


def _names_of_people(path: Path) -> dict[str, str]:
    names = {}
    for line in read_lines(path):
        match = re.fullmatch(r"([0-9]{1,18})[\s,;:]+(.+)", line)
        if match:
            names[match[1]] = match[2].strip().strip('"').replace("_", " ")
        elif names:  # the first line may be a header
            raise InputError(f"{path}: {line!r} is not a number and a name; fix the line")
    return names
