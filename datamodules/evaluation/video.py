"""Sets of videos: UCF101, Kinetics700 and RareAct.

The paper looks at the middle frame (tables 10 and 11), or at all frames (table 15).
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from datamodules.evaluation.frames import VIDEO_SUFFIXES, WHOLE, Frames, read_frames
from datamodules.evaluation.image_folder import LabelledFiles
from datamodules.evaluation.indexes import find, number, read_table, read_words
from datamodules.pairs.source import LeftOut
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import MissingData, VerbsAndNouns
from lit_clip.tools.hashing import hash64

GONE = "video is gone"


class Videos(LabelledFiles):
    """Videos in files, or spans of them, with a class each; one looked at by several frames has their mean features.

    A class of it sets ``root``, ``files`` and ``class_names``.

    Args:
        frames: ``centre``: the frame in the middle; ``all``.

    Attributes:
        spans: of each clip the seconds from where to where; None: all of each.
        left_out: what the set names and is not on disk.
    """

    spans: list[tuple[float, float]] | None = None

    def __init__(self, frames: Frames) -> None:
        require(frames in ("centre", "all"), f"frames: {frames!r} is neither centre nor all")
        self.frames: Frames = frames
        self.several = frames == "all"
        self.left_out = LeftOut()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The frame in the middle and the label."""
        path, label = self.files[index]
        return read_frames(path, "centre", self._span(index))[0], label

    def images(self, index: int) -> list[Image.Image]:
        return read_frames(self.files[index][0], self.frames, self._span(index))

    def key(self, index: int) -> str:
        name = super().key(index)
        return name if self.spans is None else f"{name}:{self.spans[index][0]:g}-{self.spans[index][1]:g}"

    def stamp(self) -> str:
        return f"{self.frames}-{super().stamp()}"

    def _span(self, index: int) -> tuple[float, float]:
        return WHOLE if self.spans is None else self.spans[index]

    def _tell_left_out(self, of: int) -> None:
        count = self.absent = sum(self.left_out.counts.values())
        if count == of:
            raise MissingData(f"{self.root}: none of the {of} videos that the list names; get them")
        if count:
            rank_zero_info(f"{self.root}: {count} of {of} videos are not there and are left out")


def _in_words(name: str) -> str:
    """``BlowDryHair`` -> ``Blow Dry Hair``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)


class UCF101(Videos):
    """UCF101: ``UCF-101/CLASS/v_CLASS_gXX_cYY.avi`` and the lists in ``ucfTrainTestlist``.

    Labels count the classes in the order of their folders' names, as the paper's prompts do: in ``classInd.txt``
    HammerThrow comes after Hammering, and JumpRope after JumpingJack, there it is the other way round.

    Args:
        root: the folder of both.
        split: of the official ones.
        fold: which of the three official divisions, from 1.
        frames: see :class:`Videos`.

    Raises:
        MissingData: no such folder, lists, or videos.
        InputError: a list names an unknown class.
    """

    def __init__(self, root: str, split: Literal["train", "test"], fold: int = 1, frames: Frames = "centre") -> None:
        super().__init__(frames)
        require(fold in (1, 2, 3), f"fold: {fold} is none of 1, 2 and 3")
        top = Path(root)
        lists = find(top, ("ucfTrainTestlist", "UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist"), "lists")
        self.root = find(top, ("UCF-101", "UCF101"), "folder of videos")
        names = sorted(name for _, name in read_words(lists / "classInd.txt", 2))
        label_of = {name: label for label, name in enumerate(names)}
        self.class_names = [_in_words(name) for name in names]
        self.files = []
        path = lists / f"{split}list{fold:02}.txt"
        rows = read_words(path, 1)
        for row in rows:
            name = row[0].split()[0]  # a training list has the class's number after it
            folder = name.split("/")[0]
            if folder not in label_of:
                raise InputError(f"{path}: {name} is in none of the folders that classInd.txt names; fix the line")
            if (self.root / name).is_file():
                self.files.append((self.root / name, label_of[folder]))
            else:
                self.left_out.add(name, GONE)
        self._tell_left_out(len(rows))


def videos_below(folder: Path) -> dict[str, Path]:
    """All videos in a folder and those below by name without the ending; of several of one name the first by path."""
    found: dict[str, Path] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in VIDEO_SUFFIXES and not name.startswith("."):
                found.setdefault(stem, Path(parent, name))
    return found


class Kinetics700(Videos):
    """Kinetics700: ``val/LABEL/ID_000010_000020.mp4`` (or ``ID.mp4``, in any folders) and ``annotations/val.csv``.

    Labels count the names in their order, over the tables of all splits that are there. Clips that are gone are left
    out and counted.

    Args:
        root: the folder of both.
        split: its name.
        frames: see :class:`Videos`.

    Raises:
        MissingData: no such folder or table, or none of its videos.
        InputError: the table lacks ``label`` or ``youtube_id``; ``time_start`` and ``time_end`` may be there.
    """

    def __init__(self, root: str, split: str, frames: Frames = "centre") -> None:
        super().__init__(frames)
        self.root = Path(root)
        columns = {"label": ("label",), "id": ("youtube_id",)}
        table = _kinetics_table(self.root, split)
        timed = "time_start" in table.read_text(encoding="utf-8-sig").partition("\n")[0]
        times = {"start": ("time_start",), "end": ("time_end",)} if timed else {}
        rows = read_table(table, {**columns, **times})
        self.class_names = sorted({row["label"] for row in rows} | self._labels_elsewhere(split))
        label_of = {name: label for label, name in enumerate(self.class_names)}
        found = videos_below(find(self.root, (split,), "folder of videos"))
        for name in list(found):  # of a clip with its seconds in its name also the name alone
            found.setdefault(re.sub(r"_\d{6}_\d{6}$", "", name), found[name])
        self.files = []
        for row in rows:
            path = found.get(_clip_name(row, str(table))) or found.get(row["id"])
            if path is None:
                self.left_out.add(row["id"], GONE)
            else:
                self.files.append((path, label_of[row["label"]]))
        self._tell_left_out(len(rows))

    def _labels_elsewhere(self, split: str) -> set[str]:
        names: set[str] = set()
        for other in {"train", "val", "validate"} - {split}:
            try:
                table = _kinetics_table(self.root, other)
            except MissingData:
                continue
            names |= {row["label"] for row in read_table(table, {"label": ("label",)})}
        return names


def _kinetics_table(root: Path, split: str) -> Path:
    names = (f"annotations/{split}.csv", f"{split}.csv", f"kinetics700/{split}.csv", f"kinetics_700_{split}.csv")
    return find(root, names, f"table of {split}")


def _clip_name(row: dict[str, str], table: str) -> str:
    if "start" not in row:
        return row["id"]
    start, end = (int(number(row, column, f"{table}: {row['id']}")) for column in ("start", "end"))
    return f"{row['id']}_{start:06}_{end:06}"


class RareAct(Videos, VerbsAndNouns):
    """RareAct: ``rareact.csv`` and the videos, called by their identity in any folder below.

    A row of the table is a span of a video, a class (a verb and a noun), and a code that says how much of the class is
    in the span; see :class:`lit_clip.evaluation.data.VerbsAndNouns`. Rows of videos that are gone are left out and
    counted.

    Args:
        root: the folder of both.
        frames: see :class:`Videos`.

    Raises:
        MissingData: no such folder or table, or none of its videos.
        InputError: the table lacks a column, or a class has no number of its own.
    """

    def __init__(self, root: str, frames: Frames = "all") -> None:
        super().__init__(frames)
        self.root = Path(root)
        table = find(self.root, ("rareact.csv", "RareAct/rareact.csv"), "table")
        names = ("video_id", "start", "end", "class_id", "verb", "noun", "annotation")
        rows = read_table(table, {name: (name,) for name in names})
        found = videos_below(self.root)
        self.spans, self.files = [], []
        self._codes: list[int] = []
        self._videos: list[str] = []
        words: dict[int, tuple[str, str]] = {}
        for row in rows:
            where = f"{table}: {row['video_id']}"
            label, start, end, code = (number(row, name, where) for name in ("class_id", "start", "end", "annotation"))
            require(code in range(5), f"{where}: annotation is {code:g}, none of 0 to 4")
            pair = (row["verb"], row["noun"])
            if words.setdefault(int(label), pair) != pair:
                raise InputError(f"{where}: class {label:g} is {' '.join(pair)} and {' '.join(words[int(label)])}")
            if row["video_id"] not in found:
                self.left_out.add(row["video_id"], GONE)
                continue
            self.spans.append((start, end))
            self.files.append((found[row["video_id"]], int(label)))
            self._codes.append(int(code))
            self._videos.append(row["video_id"])
        self._words = _in_order(words, table)
        self.class_names = [f"{verb} {noun}" for verb, noun in self._words]
        self._tell_left_out(len(rows))

    def annotations(self) -> dict[str, Any]:
        """Besides what every such set says, ``video``: of each clip the video that it is of."""
        verbs, nouns = (list(words) for words in zip(*self._words, strict=True))
        return {"verb": verbs, "noun": nouns, "annotation": list(self._codes), "video": list(self._videos)}

    def stamp(self) -> str:
        return f"{super().stamp()}-{hash64(repr(self.spans)).hex()}"


def _in_order(words: dict[int, tuple[str, str]], table: Path) -> Sequence[tuple[str, str]]:
    if sorted(words) != list(range(len(words))):
        raise InputError(f"{table}: its class_id are not 0 to {len(words) - 1}; get the table again")
    return [words[label] for label in range(len(words))]
