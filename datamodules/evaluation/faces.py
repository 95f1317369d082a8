"""Faces and their emotions: FER2013, and the labels that FER+ gives to its images."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from datamodules.evaluation.annotation_files import AGAIN, find, read_table, whole_number
from datamodules.evaluation.image_files import ByLayout, ImageFiles, TrainValTest, in_class_folders, subfolders
from datamodules.evaluation.torchvision_arrays import ImageArrays
from lit_clip.errors import InputError
from lit_clip.tools.reading import check_is_file, reading

EMOTIONS = ("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral")
EMOTION_FOLDERS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")  # the same, as Kaggle has them
USAGES: dict[TrainValTest, str] = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
VOTED = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral", "contempt")  # in label order
# FER+'s columns, in their order, by which ties go; NF is "not a face".
VOTES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "NF")
FACE_SIDE = 48  # pixels
LONGEST_FACE = 100_000  # characters of a row; 48 x 48 pixels take ten thousand
TABLES_OF_FACES = ("fer2013.csv", "icml_face_data.csv")


class _FaceTable(ImageArrays):
    """Grey faces of 48 x 48 pixels in ``fer2013.csv`` or ``icml_face_data.csv``.

    Args:
        path: the table.
        split: the challenge's Training (``train``), PublicTest (``val``) or PrivateTest (``test``).
    """

    names = EMOTIONS

    def __init__(self, path: Path, split: TrainValTest) -> None:
        self.path = path
        listed = self._read()
        labels = self.label_rows(listed)
        rows = [row for row, (usage, _) in enumerate(listed) if usage == USAGES[split] and labels[row] is not None]
        super().__init__(path, [label for row in rows if (label := labels[row]) is not None], self.names, rows)
        self.annotation_paths = [path]

    def label_rows(self, listed: Sequence[tuple[str, int]]) -> Sequence[int | None]:
        """Return the label of each row of the table, given its ``Usage`` and ``emotion``; None: left out."""
        return [emotion for _, emotion in listed]

    def _read(self) -> list[tuple[str, int]]:
        """Read each row's ``Usage`` and ``emotion``, and note where in the file it starts."""
        listed = []
        self.starts: list[int] = []  # byte offset of every row of the table
        check_is_file(self.path)
        with self.path.open("rb") as file:
            self.columns = self._cells(file.readline())
            if sorted(self.columns) != ["Usage", "emotion", "pixels"]:
                raise InputError(f"{self.path}: its columns are {', '.join(self.columns)}, not emotion, pixels, Usage")
            for start, line in self._lines(file):
                cells = dict(zip(self.columns, self._cells(line), strict=False))
                emotion = whole_number(cells.get("emotion", ""))
                if emotion is None or "Usage" not in cells:
                    problem = "not a face and its emotion; get the file again"
                    raise InputError(f"{self.path} row {len(self.starts)}: {problem}")
                self.starts.append(start)
                listed.append((cells["Usage"], emotion))
        return listed

    @staticmethod
    def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        start = file.tell()
        while line := file.readline():
            if line.strip():
                yield start, line
            start = file.tell()

    def _cells(self, line: bytes) -> list[str]:
        with reading(self.path, "table of faces", hint=AGAIN):
            if len(line) > LONGEST_FACE:
                raise ValueError(f"a row has more than {LONGEST_FACE:,} characters")
            return [cell.strip() for cell in next(csv.reader([line.decode("utf-8-sig", "replace")]), [])]

    def open(self) -> Any:
        return self.path.open("rb")

    def image(self, pixels: Any, row: int) -> Image.Image:
        pixels.seek(self.starts[row])
        cells = dict(zip(self.columns, self._cells(pixels.readline()), strict=True))
        values = np.array(cells["pixels"].split(), dtype=np.uint8)
        return Image.fromarray(values.reshape(FACE_SIDE, FACE_SIDE))


class FER2013(ByLayout):
    """FER2013: grey faces of 48 x 48 pixels with seven emotions.

    They are in the challenge's ``fer2013.csv`` or ``icml_face_data.csv``, or in the folders of Kaggle's
    ``msambare/fer2013``, ``train/angry`` and ``test/angry`` and so on, whose test images are named by their split.

    Args:
        root: the folder with ``fer2013``, or that folder itself.
        split: the challenge's Training (``train``), PublicTest (``val``) or PrivateTest (``test``).

    Raises:
        MissingData: no such table or folders.
    """

    def __init__(self, root: str, split: TrainValTest = "test") -> None:
        places = ("fer2013/", "")
        found = find(
            Path(root),
            [f"{place}{name}" for place in places for name in (*TABLES_OF_FACES, "train/angry")],
            "table or folders of faces",
        )
        self.read_by(_FaceTable(found, split) if found.is_file() else _face_files(found.parents[1], split))


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


class FERPlus(_FaceTable):
    """FER+: FER2013's faces with eight emotions, which ten people each have voted for (arXiv 1608.01041).

    An image's label is the emotion that its authors' code takes in its mode ``majority``
    (github.com/microsoft/FERPlus, ``src/ferplus.py``): single votes do not count, and the emotion needs more than half
    of the others. Images without such an emotion are left out, and so are those whose majority is "unknown" or "not
    a face".

    Args:
        root: the folder with ``fer2013``, or that folder itself, with FER2013's table and FER+'s ``fer2013new.csv``.
        split: see :class:`FER2013`.

    Raises:
        MissingData: no such table.
    """

    names = (*EMOTIONS, "contemptuous")

    def __init__(self, root: str, split: TrainValTest = "test") -> None:
        self.votes = find(Path(root), [f"{place}fer2013new.csv" for place in ("fer2013/", "")], "table of votes")
        super().__init__(find(self.votes.parent, TABLES_OF_FACES, "table of faces"), split)
        self.annotation_paths = [self.path, self.votes]

    def label_rows(self, listed: Sequence[tuple[str, int]]) -> Sequence[int | None]:
        columns = ("usage", "image name", *VOTES)
        rows = read_table(self.votes, {name: (name.lower(),) for name in columns})
        if [row["usage"] for row in rows] != [usage for usage, _ in listed]:
            problem = f"its {len(rows)} rows are not of the same splits as the {len(listed)} of {self.path.name}"
            raise InputError(f"{self.votes}: {problem}; get both again")
        return [self._majority(number, row) for number, row in enumerate(rows)]

    def _majority(self, number: int, row: Mapping[str, str]) -> int | None:
        votes = [whole_number(row[name]) for name in VOTES]
        if None in votes:
            raise InputError(f"{self.votes} row {number}: a vote is not a whole number; get the file again")
        counted = [vote if vote is not None and vote > 1 else 0 for vote in votes]
        most = max(counted)
        name = VOTES[counted.index(most)]
        return VOTED.index(name) if row["image name"] and 2 * most > sum(counted) and name in VOTED else None
