"""Video sets: UCF101, Kinetics700 and RareAct; the frames of a video.

The paper uses the middle frame (tables 10 and 11), or all frames (table 15).
"""

import os
import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from lit_clip.errors import BadSample, InputError, require
from lit_clip.evaluation.data import MissingData, Truth
from lit_clip.tools.hashing import hash64
from lit_clip.tools.reading import reason
from .annotation_files import find, import_optional, number, read_table
from .image_files import ImageFiles, TrainTest, labels_of
from .rules import list_set

Frames = Literal["centre", "all"]
VIDEO_SUFFIXES = frozenset({".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
CONTAINERS = {  # no lists of other files or addresses, such as HLS, by any file name
    "format_whitelist": "avi,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegvideo,mpegts,m4v,asf,ogg,h264,hevc",
    "protocol_whitelist": "file",
}
WHOLE = (0.0, float("inf"))  # seconds


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a container and its first video stream; errors inside the block name the file."""
    av = import_optional("av", "av", path)
    try:
        if not path.is_file():
            raise BadSample(str(path), "missing video", "no such video")
        with av.open(str(path), container_options=CONTAINERS) as container:
            if not container.streams.video:
                raise BadSample(str(path), "not a video", "no video stream in it; get it again")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # data workers already use every core
            yield container, stream
    except BadSample:
        raise
    except Exception as error:  # for a broken video anything
        raise BadSample(str(path), "broken video", f"cannot read this video ({reason(error)}); get it again") from error


def _decoded(path: Path, first: int, last: int, seek: bool) -> list[Image.Image] | None:
    """Decode the frames from timestamp ``first`` to ``last``, inclusive; None if seeking went past ``first``."""
    with _opened(path) as (container, stream):
        if seek:
            container.seek(first, stream=stream)
        images: list[Image.Image] = []
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts < first:
                continue
            if seek and not images and frame.pts > first:
                return None
            if frame.pts > last:
                break
            images.append(frame.to_image())
        return images


def read_frames(path: Path, frames: Frames, span: tuple[float, float] = WHOLE) -> list[Image.Image]:
    """Decode the frames of a video, which need timestamps, as RGB images in display order.

    The ``centre`` of an even number is the later of the two. ``span`` is in seconds from the first frame, without the
    end; :class:`BadSample` if it contains no frame.
    """
    with _opened(path) as (container, stream):  # without decoding
        stamps = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        unit = float(stream.time_base)
    times = sorted(stamp for stamp in stamps if stamp is not None)
    if len(times) < len(stamps):
        raise BadSample(str(path), "no timestamps", "frames without timestamps; convert the video to .mp4")
    times = [time for time in times if span[0] <= (time - times[0]) * unit < span[1]]
    if frames == "centre":
        times = times[len(times) // 2 :][:1]
    images = _decoded(path, times[0], times[-1], seek=True) if times else []
    if images is None:  # the file's index is wrong: decode from the start
        images = _decoded(path, times[0], times[-1], seek=False)
    if not images:
        where = "" if span == WHOLE else f" from {span[0]:g} to {span[1]:g} s"
        raise BadSample(str(path), "no frames", f"no frame{where} can be decoded; get it again")
    return images


class Videos(ImageFiles):
    """Labelled video files, or ``spans`` of them in seconds; the features of several frames are averaged.

    ``listed`` are files and classes; a file that is not there is None, and is left out and counted.
    """

    def __init__(
        self,
        root: Path,
        listed: Sequence[tuple[Path | None, Hashable]],
        classes: Sequence[Hashable],
        annotations: Sequence[Path],
        frames: Frames,
        spans: Sequence[tuple[float, float]] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        require(frames in ("centre", "all"), f"frames: must be 'centre' or 'all', not {frames!r}")
        self.frames: Frames = frames
        self.several = frames == "all"
        self.rows = [row for row, (file, _) in enumerate(listed) if file is not None]  # of the list
        self.spans = None if spans is None else [spans[row] for row in self.rows]
        self.absent = len(listed) - len(self.rows)
        if not self.rows:
            raise MissingData(f"{root}: none of the {len(listed)} videos in the list exists; get them")
        if self.absent:
            rank_zero_info(f"{root}: left out {self.absent} of {len(listed)} videos, which are not there")
        super().__init__(root, [(file, each) for file, each in listed if file is not None], classes, annotations, names)

    def check(self) -> None:
        """Do nothing: only reading the frames shows whether a file is a video."""

    def image(self, index: int) -> Image.Image:
        """Return the middle frame."""
        return read_frames(self.files[index], "centre", self._span(index))[0]

    def images(self, index: int) -> list[Image.Image]:
        return read_frames(self.files[index], self.frames, self._span(index))

    def key(self, index: int) -> str:
        name = super().key(index)
        return name if self.spans is None else f"{name}:{self.spans[index][0]:g}-{self.spans[index][1]:g}"

    def stamp(self) -> str:
        spans = "" if self.spans is None else f"-{hash64(repr(self.spans)).hex()}"
        return f"{self.frames}-{super().stamp()}{spans}"

    def _span(self, index: int) -> tuple[float, float]:
        return WHOLE if self.spans is None else self.spans[index]


def UCF101(root: str, split: TrainTest, fold: int = 1, frames: Frames = "centre") -> Videos:
    """UCF101: ``UCF-101/CLASS/v_CLASS_gXX_cYY.avi`` and the lists in ``ucfTrainTestlist``.

    Labels follow the sorted class names, like the paper's prompts: HammerThrow before Hammering, and JumpRope before
    JumpingJack. In ``classInd.txt`` it is the other way round. ``fold`` is official split 1, 2 or 3.
    """
    require(fold in (1, 2, 3), f"fold: must be 1, 2 or 3, not {fold}")
    _, rows, classes, annotations, names = list_set("UCF101", root, split, fold=fold)
    labels_of([each for _, each in rows], classes, annotations[0])  # also of videos that are not there
    folder = find(Path(root), ("UCF-101", "UCF101"), "folder of videos")
    listed = [(folder / video if os.path.isfile(folder / video) else None, each) for video, each in rows]
    return Videos(folder, listed, classes, annotations, frames, names=names)


def videos_below(folder: Path) -> dict[str, Path]:
    """Map file stems to all videos below a folder; of equal stems, keep the first path."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in VIDEO_SUFFIXES and not hidden:
            found.setdefault(path.stem, path)
    return found


def Kinetics700(root: str, split: str, frames: Frames = "centre") -> Videos:
    """Kinetics700: ``val/LABEL/ID_000010_000020.mp4`` (or ``ID.mp4``, in any folders) and ``annotations/val.csv``.

    Labels follow the sorted class names of all splits whose tables exist. Clips that are gone are left out and counted.
    """
    folder = Path(root)
    annotations = [_kinetics_table(folder, split)]
    rows = read_table(annotations[0], {"label": ("label",), "id": ("youtube_id",)})
    for other in sorted({"train", "val", "validate"} - {split}):
        with suppress(MissingData):
            annotations.append(_kinetics_table(folder, other))
    others = [row for path in annotations[1:] for row in read_table(path, {"label": ("label",)})]
    names = sorted({row["label"] for row in (*rows, *others)})
    found = videos_below(find(folder, (split,), "folder of videos"))
    for name in list(found):  # a clip's name may end with its seconds; no two clips are of one video
        found.setdefault(re.sub(r"_\d{6}_\d{6}$", "", name), found[name])
    listed = [(found.get(row["id"]), row["label"]) for row in rows]
    return Videos(folder, listed, names, annotations, frames)


def _kinetics_table(root: Path, split: str) -> Path:
    names = (f"annotations/{split}.csv", f"{split}.csv", f"kinetics700/{split}.csv", f"kinetics_700_{split}.csv")
    return find(root, names, f"table of {split}")


def RareAct(root: str, frames: Frames = "all") -> Videos:
    """RareAct: ``rareact.csv`` and the videos, named by their id, in any folder below.

    A table row is a span of a video, a class (a verb and a noun), and a code for how much of the class the span shows;
    see :class:`lit_clip.evaluation.data.Truth`. Rows of videos that are gone are left out and counted.
    """
    table = find(Path(root), ("rareact.csv", "RareAct/rareact.csv"), "table")
    names = ("video_id", "start", "end", "class_id", "verb", "noun", "annotation")
    rows = read_table(table, {name: (name,) for name in names})
    found = videos_below(Path(root))
    listed, spans, codes = [], [], []
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
        listed.append((found.get(row["video_id"]), int(label)))
        spans.append((start, end))
        codes.append(int(code))
    known = sorted(words) == list(range(len(words)))
    require(known, f"{table}: class_id must be 0 to {len(words) - 1}; get the table again")
    pairs = [words[label] for label in sorted(words)]
    videos = Videos(Path(root), listed, sorted(words), [table], frames, spans, list(map(" ".join, pairs)))
    verbs, nouns = map(list, zip(*pairs, strict=True))
    kept, films = [codes[row] for row in videos.rows], [rows[row]["video_id"] for row in videos.rows]
    videos.truth = Truth(annotations={"verb": verbs, "noun": nouns, "annotation": kept, "video": films})
    return videos
