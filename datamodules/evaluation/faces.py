"""Faces and their emotions: FER2013, and the labels that FER+ gives to its images."""

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from datamodules.evaluation.annotation_files import AGAIN, find, read_table, whole_number
from datamodules.evaluation.image_files import ImageFiles, TrainValTest, in_class_folders, subfolders
from datamodules.evaluation.torchvision_arrays import ImageArrays
from lit_clip.errors import InputError
from lit_clip.evaluation.data import LabelledImages
from lit_clip.tools.reading import check_is_file, reading

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
    words = subfolders(folder / part)
    if sorted(words) != sorted(EMOTION_FOLDERS):
        raise InputError(f"{folder / part}: its folders are {', '.join(words)}, not {', '.join(EMOTION_FOLDERS)}")
    files, labels = in_class_folders(folder, [f"{part}/{name}" for name in EMOTION_FOLDERS])
    usages = [Path(file).name.partition("_")[0] for file in files]
    expected = {USAGES[each] for each in USAGES if (each == "train") == (split == "train")}
    wrong = next((file for file, usage in zip(files, usages, strict=True) if usage not in expected), None)
    if wrong is not None:
        raise InputError(f"{folder / wrong}: its name does not start with {' or '.join(sorted(expected))}; {AGAIN}")
    kept = [number for number, usage in enumerate(usages) if usage == USAGES[split]]
    return ImageFiles(folder, [files[number] for number in kept], [labels[number] for number in kept], list(EMOTIONS))


def FERPlus(root: str, split: TrainValTest = "test") -> ImageArrays:
    """FER+: FER2013's faces with eight emotions, which ten people each have voted for (arXiv 1608.01041).

    An image's label is the emotion that its authors' code takes in its mode ``majority``
    (github.com/microsoft/FERPlus, ``src/ferplus.py``): single votes do not count, and the emotion needs more than half
    of the others. Images without such an emotion are left out, and so are those whose majority is "unknown" or "not
    a face". FER+'s ``fer2013new.csv`` lies beside FER2013's table.
    """
    votes = find(Path(root), [f"{place}fer2013new.csv" for place in ("fer2013/", "")], "table of votes")
    return _faces_in_table(find(votes.parent, TABLES_OF_FACES, "table of faces"), split, votes)


def _faces_in_table(path: Path, split: TrainValTest, votes: Path | None = None) -> ImageArrays:
    """Open a split of FER2013's table, with the labels of FER+'s table of votes if there is one."""
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
    return ImageArrays(path, partial(path.open, "rb"), list(kept.values()), names, annotations, list(kept), face)


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
    """Return the label of each row of the table of faces; None: left out."""
    rows = read_table(votes, {name: (name.lower(),) for name in ("usage", "image name", *VOTES)})
    if [row["usage"] for row in rows] != usages:
        problem = f"its {len(rows)} rows are not of the same splits as the {len(usages)} of {table.name}"
        raise InputError(f"{votes}: {problem}; get both again")
    return [_majority(votes, number, row) for number, row in enumerate(rows)]


def _majority(path: Path, number: int, row: Mapping[str, str]) -> int | None:
    votes = [whole_number(row[name]) for name in VOTES]
    if None in votes:
        raise InputError(f"{path} row {number}: a vote is not a whole number; get the file again")
    counted = [vote if vote is not None and vote > 1 else 0 for vote in votes]
    most = max(counted)
    name = VOTES[counted.index(most)]
    return VOTED.index(name) if row["image name"] and 2 * most > sum(counted) and name in VOTED else None
