"""Video sets: UCF101, Kinetics700 and RareAct.

The paper uses the middle frame (tables 10 and 11), or all frames (table 15).
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from datamodules.evaluation.annotation_files import find, number, read_table, read_words
from datamodules.evaluation.image_files import LabelledFiles, TrainTest
from datamodules.evaluation.video_frames import VIDEO_SUFFIXES, WHOLE, Frames, read_frames
from datamodules.pairs.source import SkippedRows
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import MissingData, VerbsAndNouns
from lit_clip.tools.hashing import hash64

GONE = "video is gone"  # the reason under which missing videos are counted


class Videos(LabelledFiles):
    """Labelled video files, or spans of them; the features of several frames are averaged.

    Subclasses set ``root``, ``files`` and ``class_names``.

    Args:
        frames: ``centre``: the middle frame; ``all``: every frame.

    Attributes:
        spans: each clip's start and end in seconds; None: whole files.
        left_out: videos that the set lists but that are not on disk.
    """

    spans: list[tuple[float, float]] | None = None

    def __init__(self, frames: Frames) -> None:
        require(frames in ("centre", "all"), f"frames: must be 'centre' or 'all', not {frames!r}")
        self.frames: Frames = frames
        self.several = frames == "all"
        self.left_out = SkippedRows()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return the middle frame and the label."""
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

    def _report_left_out(self, listed: int) -> None:
        count = self.absent = sum(self.left_out.counts.values())
        if count == listed:
            raise MissingData(f"{self.root}: none of the {listed} videos in the list exists; get them")
        if count:
            rank_zero_info(f"{self.root}: left out {count} of {listed} videos, which are not there")


def _as_words(name: str) -> str:
    """Split a name at capitals: ``BlowDryHair`` -> ``Blow Dry Hair``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)


class UCF101(Videos):
    """UCF101: ``UCF-101/CLASS/v_CLASS_gXX_cYY.avi`` and the lists in ``ucfTrainTestlist``.

    Labels follow the sorted class names, like the paper's prompts: HammerThrow before Hammering, and JumpRope before
    JumpingJack. In ``classInd.txt`` it is the other way round.

    Args:
        root: the folder of both.
        split: ``train`` or ``test``.
        fold: official split 1, 2 or 3.
        frames: see :class:`Videos`.

    Raises:
        MissingData: no such folder, lists, or videos.
    """

    def __init__(self, root: str, split: TrainTest, fold: int = 1, frames: Frames = "centre") -> None:
        super().__init__(frames)
        require(fold in (1, 2, 3), f"fold: must be 1, 2 or 3, not {fold}")
        top = Path(root)
        lists = find(top, ("ucfTrainTestlist", "UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist"), "lists")
        self.root = find(top, ("UCF-101", "UCF101"), "folder of videos")
        path = lists / f"{split}list{fold:02}.txt"
        self.annotation_paths = [lists / "classInd.txt", path]
        names = sorted(name for _, name in read_words(self.annotation_paths[0], 2))
        label_of = {name: label for label, name in enumerate(names)}
        self.class_names = [_as_words(name) for name in names]
        self.files = []
        rows = read_words(path, 1)
        for row in rows:
            name = row[0].split()[0]  # a training list has the class's number after it
            folder = name.split("/")[0]
            if folder not in label_of:
                raise InputError(f"{path}: {name} is in none of the folders listed in classInd.txt; fix the line")
            if os.path.isfile(self.root / name):
                self.files.append((self.root / name, label_of[folder]))
            else:
                self.left_out.add(name, GONE)
        self._report_left_out(len(rows))


def videos_below(folder: Path) -> dict[str, Path]:
    """Map file names without suffix to all videos in a folder and below; of equal names the first by path counts."""
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

    Labels follow the sorted class names of all splits whose tables exist. Clips that are gone are left out and counted.

    Args:
        root: the folder of both.
        split: ``train``, ``val``, ...
        frames: see :class:`Videos`.

    Raises:
        MissingData: no such folder or table, or none of its videos.
    """

    def __init__(self, root: str, split: str, frames: Frames = "centre") -> None:
        super().__init__(frames)
        self.root = Path(root)
        columns = {"label": ("label",), "id": ("youtube_id",)}
        table = _kinetics_table(self.root, split)
        timed = "time_start" in table.read_text(encoding="utf-8-sig").partition("\n")[0]
        times = {"start": ("time_start",), "end": ("time_end",)} if timed else {}
        rows = read_table(table, {**columns, **times})
        self.annotation_paths = [table]
        self.class_names = sorted({row["label"] for row in rows} | self._names_in_other_splits(split))
        label_of = {name: label for label, name in enumerate(self.class_names)}
        found = videos_below(find(self.root, (split,), "folder of videos"))
        for name in list(found):  # also find a clip whose name ends with its seconds by its id
            found.setdefault(re.sub(r"_\d{6}_\d{6}$", "", name), found[name])
        self.files = []
        for row in rows:
            path = found.get(_clip_name(row, str(table))) or found.get(row["id"])
            if path is None:
                self.left_out.add(row["id"], GONE)
            else:
                self.files.append((path, label_of[row["label"]]))
        self._report_left_out(len(rows))

    def _names_in_other_splits(self, split: str) -> set[str]:
        names: set[str] = set()
        for other in sorted({"train", "val", "validate"} - {split}):
            try:
                table = _kinetics_table(self.root, other)
            except MissingData:
                continue
            self.annotation_paths = [*self.annotation_paths, table]
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
    """RareAct: ``rareact.csv`` and the videos, named by their id, in any folder below.

    A table row is a span of a video, a class (a verb and a noun), and a code for how much of the class the span shows;
    see :class:`lit_clip.evaluation.data.VerbsAndNouns`. Rows of videos that are gone are left out and counted.

    Args:
        root: the folder of both.
        frames: see :class:`Videos`.

    Raises:
        MissingData: no such folder or table, or none of its videos.
    """

    def __init__(self, root: str, frames: Frames = "all") -> None:
        super().__init__(frames)
        self.root = Path(root)
        table = find(self.root, ("rareact.csv", "RareAct/rareact.csv"), "table")
        self.annotation_paths = [table]
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
            require(code in range(5), f"{where}: annotation must be 0 to 4, not {code:g}; fix the row")
            require(label.is_integer(), f"{where}: class_id must be a whole number, not {label:g}; fix the row")
            pair = (row["verb"], row["noun"])
            if words.setdefault(int(label), pair) != pair:
                both = f"{' '.join(pair)} here and {' '.join(words[int(label)])} in another row"
                raise InputError(f"{where}: class {label:g} is {both}; fix the row")
            if row["video_id"] not in found:
                self.left_out.add(row["video_id"], GONE)
                continue
            self.spans.append((start, end))
            self.files.append((found[row["video_id"]], int(label)))
            self._codes.append(int(code))
            self._videos.append(row["video_id"])
        self._words = _sorted_by_label(words, table)
        self.class_names = [f"{verb} {noun}" for verb, noun in self._words]
        self._report_left_out(len(rows))

    def annotations(self) -> dict[str, Any]:
        """Return the verbs and nouns of the classes, and the code and the video of each clip."""
        verbs, nouns = (list(words) for words in zip(*self._words, strict=True))
        return {"verb": verbs, "noun": nouns, "annotation": list(self._codes), "video": list(self._videos)}

    def stamp(self) -> str:
        return f"{super().stamp()}-{hash64(repr(self.spans)).hex()}"


def _sorted_by_label(words: dict[int, tuple[str, str]], table: Path) -> Sequence[tuple[str, str]]:
    if sorted(words) != list(range(len(words))):
        raise InputError(f"{table}: class_id must be 0 to {len(words) - 1}; get the table again")
    return [words[label] for label in range(len(words))]
