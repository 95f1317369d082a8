"""Captioned images for retrieval: Flickr30k, COCO, and any source of training pairs."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import CaptionedImages, MissingData
from lit_clip.tools.hashing import hash64, stamp_of_files
from lit_clip.tools.reading import reading
from ..open_source import open_source
from ..pairs.columns import ColumnPairs
from ..pairs.source import Columns, PairSource
from .annotation_files import AGAIN, find, read_json, read_lines, read_table, read_text
from .image_files import CaptionedFiles

HUB_TABLE = "flickr_annotations_30k.csv"
LINE = re.compile(r"(?P<name>[^,|#\t]+\.jpe?g)(?:,|\|\s*\d+\s*\|?|#\d+\t)(?P<caption>.*\S)", re.IGNORECASE)


class CaptionedPairs(CaptionedImages):
    """Any source of pairs (a table, a folder, COCO's or Karpathy's JSON, parquet, tar shards) as a retrieval set.

    Rows with the same image path are one image with all their captions. Where the source contains the images
    themselves, each row is an image. Without ``split``, a source with splits gives ``test``; what else is None is
    detected automatically; see :func:`datamodules.open_source.open_source`.
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        split: str | None = None,
        group: str | None = None,
    ) -> None:
        if "://" not in path and not any(mark in path for mark in "{*") and not Path(path).exists():
            raise MissingData(f"{path}: no such file or folder")
        columns = Columns(image_column, caption_column, group, root=root)
        self.source: PairSource = open_source(path, default_split="test", columns=columns, split=split)
        self.source.prepare()
        self._path = Path(path)
        self.annotation_paths = [self._path] if self._path.is_file() else []
        self._names = _image_names(self.source)
        self._rows = _rows_of_images(self._names, len(self.source))

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, index: int) -> list[Image.Image]:
        return [self.source.load(self._rows[index][0], None).image]

    def whole_file(self, index: int) -> Path | None:
        root = getattr(self.source, "root", None)
        return Path(root) / self.key(index) if self._names is not None and isinstance(root, str | Path) else None

    def captions(self, index: int) -> list[str]:
        return [caption for row in self._rows[index] for caption in self.source.captions(row)]

    def group(self, index: int) -> str:
        """Return the group that an image's first row names, empty for none."""
        return self.source.text(self._rows[index][0], None).group

    def key(self, index: int) -> str:
        row = self._rows[index][0]
        return str(row) if self._names is None else self._names[row]

    def image_paths(self) -> list[Path]:
        files = [*self._path.rglob("*"), *map(Path, getattr(self.source, "urls", ()))]
        root = getattr(self.source, "root", None)
        if self._names is not None and root is not None:
            files += [Path(root) / name for name in self._names]
        return sorted({file for file in files if os.path.isfile(file)})

    def stamp(self) -> str:
        keys = hash64(repr([self.key(index) for index in range(len(self))])).hex()
        return f"{stamp_of_files({*self.annotation_paths, *self.image_paths()})}-{keys}"


def _image_names(source: PairSource) -> list[str] | None:
    """Return each row's image path as written; None if the images are not separate files."""
    if not isinstance(source, ColumnPairs):
        return None
    paths = source.image_names()
    if paths is None:
        return None
    with reading(source.path, "table of image paths"):
        names = paths.to_pylist()
    return [str(name).strip() for name in names] if all(isinstance(name, str) for name in names) else None


def _rows_of_images(names: Sequence[str] | None, rows: int) -> list[np.ndarray]:
    """Group rows by image, in order of appearance."""
    if names is None:
        return [np.array([row]) for row in range(rows)]
    found: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        found.setdefault(name, []).append(row)
    return [np.array(rows_of_image) for rows_of_image in found.values()]


VAL2017 = "captions_val2017.json"


class COCO(CaptionedPairs):
    """COCO's captions: one of Karpathy's splits, or COCO's own ``val2017``.

    Results in the literature are on the 5,000 images of Karpathy's test split, which are not the 5,000 of val2017. His
    splits are read from his ``dataset_coco.json`` or from CLIP_benchmark's ``coco_test_karpathy.json``, and ``val2017``
    from ``captions_val2017.json``; each in ``root`` or in ``root/annotations``.

    Args:
        root: the folder, with the images in ``val2014``, ``train2014`` or ``val2017``.
        split: ``test``, ``val`` or ``train`` (Karpathy's), or ``val2017``.
    """

    def __init__(self, root: str, split: str = "test") -> None:
        top, self._folder = Path(root), ""
        of_split = f"coco_{split}_karpathy.json"
        # COCO's own file has other images than Karpathy's test split, so that it is read for its own split alone.
        names = [VAL2017] if split == "val2017" else ["dataset_coco.json", of_split]
        places = [f"{folder}{name}" for name in names for folder in ("", "annotations/")]
        path = find(top, places, f"file of captions for split {split} ({VAL2017} is split val2017)")
        if path.name == of_split:  # whose images are named without their folder
            self._folder = "train2014" if split == "train" else "val2014"
            super().__init__(str(path), root=str(find(top, [self._folder], "folder of images")))
        else:
            super().__init__(str(path), split=split if path.name != VAL2017 else None)

    def key(self, index: int) -> str:
        return (PurePosixPath(self._folder) / super().key(index)).as_posix()


def Flickr30k(root: str, split: str = "test") -> CaptionedFiles:
    """Flickr30k: the 1,000 images of Karpathy's test split, or another of his splits (``train``, ``val``).

    Captions are read from ``dataset_flickr30k.json`` (Karpathy), ``flickr30k_test_karpathy.txt`` (CLIP_benchmark),
    ``flickr_annotations_30k.csv`` (Hugging Face's ``nlphuji/flickr30k``), ``results.csv`` or
    ``results_20130124.token`` (both from the set's owners). The last two cover all images and need a ``test.txt``
    beside them that lists the split's images, one per line. The images are in ``root`` or in ``flickr30k-images``,
    ``flickr30k_images`` or ``images``.
    """
    top = Path(root)
    listed = f"flickr30k_{split}_karpathy.txt"
    names = ("dataset_flickr30k.json", listed, HUB_TABLE, "results.csv", "flickr30k_images/results.csv")
    path = find(top, (*names, "results_20130124.token"), "file of captions")
    annotations = [path]
    if path.suffix == ".json":
        captions = _read_karpathy(path, split, _folder_of(top, _first_name(path)))
    elif path.name == HUB_TABLE:
        captions = _read_hub_table(path, split)
    else:
        captions = _read_lines(path)
        if path.name != listed:
            annotations.append(find(path.parent, (f"{split}.txt",), "list of the split's images"))
            captions = _restrict(captions, *annotations)
    require(bool(captions), f"{path}: no captions in it; get it again")
    folder = _folder_of(top, next(iter(captions)))
    return CaptionedFiles(folder, list(captions), list(captions.values()), annotations)


def _folder_of(root: Path, name: str) -> Path:
    folders = ("flickr30k-images/", "flickr30k_images/", "images/", "", "flickr30k_images/flickr30k_images/")
    return find(root, [f"{folder}{name}" for folder in folders], "images").parent


def _first_name(path: Path) -> str:
    values = read_json(path)
    with reading(path, "file of Karpathy's list of images", hint=AGAIN):
        return str(values["images"][0]["filename"])


def _read_karpathy(path: Path, split: str, folder: Path) -> dict[str, list[str]]:
    source = open_source(path, columns=Columns(root=str(folder)), split=split)
    names = _image_names(source) or []
    return {name: source.captions(row) for row, name in enumerate(names)}


def _read_hub_table(path: Path, split: str) -> dict[str, list[str]]:
    """Read ``raw`` (a JSON list of captions), ``split`` and ``filename``."""
    rows = read_table(path, {"captions": ("raw",), "split": ("split",), "name": ("filename",)})
    captions: dict[str, list[str]] = {}
    for row in rows:
        if row["split"] != split:
            continue
        with reading(path, f"table: {row['name']} has no list of captions", hint=AGAIN):
            listed = json.loads(row["captions"])
            if not isinstance(listed, list) or not all(isinstance(caption, str) for caption in listed):
                raise ValueError(f"{row['captions'][:40]!r} is not a list of texts")
        captions[row["name"]] = [caption.strip() for caption in listed]
    return captions


def _read_lines(path: Path) -> dict[str, list[str]]:
    """Read lines of ``NAME.jpg,CAPTION``, ``NAME.jpg| NUMBER| CAPTION`` or ``NAME.jpg#NUMBER<tab>CAPTION``."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        match = LINE.fullmatch(line.strip())
        if match:
            captions.setdefault(match["name"], []).append(match["caption"].strip())
        elif number > 1 and line.strip():  # the first line may be a header
            raise InputError(f"{path} line {number}: {line.strip()[:60]!r} is not an image and a caption; fix the line")
    return captions


def _restrict(captions: dict[str, list[str]], path: Path, names_file: Path) -> dict[str, list[str]]:
    """Keep the captions of the images that ``names_file`` lists, in the file's order."""
    wanted = read_lines(names_file)
    if unknown := [name for name in wanted if name not in captions]:
        raise InputError(f"{names_file}: {unknown[0]} is not in {path.name}; fix the list")
    return {name: captions[name] for name in wanted}
