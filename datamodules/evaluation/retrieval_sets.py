"""Images with captions to be found by each other: Flickr30k, COCO, and whatever can be trained on."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.evaluation.indexes import find, read_json, read_text, read_words
from datamodules.open_source import open_source
from datamodules.pairs.columns import ColumnPairs
from datamodules.pairs.source import PairSource
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import CaptionedImages, MissingData
from lit_clip.tools.hashing import hash64, stamp_of_files
from lit_clip.tools.images import open_image

LINE = re.compile(r"(?P<name>[^,|#\t]+\.jpe?g)(?:,|\|\s*\d+\s*\|?|#\d+\t)(?P<caption>.*\S)", re.IGNORECASE)


class CaptionedPairs(CaptionedImages):
    """Any source of pairs (a table, a folder, COCO's or Karpathy's JSON, parquet, tar shards) as a set for retrieval.

    Rows with the path of one image are one image with all their captions; images that lie in the table or in a
    tar themselves are one a row.

    Args:
        path: the source; see :func:`datamodules.open_source.open_source`.
        root: where relative paths of images start; None: found out.
        image_column: of a table; None: found out.
        caption_column: likewise.
        split: of sources that come in splits; None: ``test`` where there is one.

    Raises:
        MissingData: no such path.
        InputError: it cannot be read as what it is.
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        split: str | None = None,
    ) -> None:
        if "://" not in path and not any(mark in path for mark in "{*") and not Path(path).exists():
            raise MissingData(f"{path}: no such file or folder")
        options = {"root": root, "image_column": image_column, "caption_column": caption_column, "split": split}
        self.source: PairSource = open_source(path, default_split="test", **options)
        self.source.prepare()
        self._path = Path(path)
        self._names = _image_names(self.source)
        self._rows = _rows_of_images(self._names, len(self.source))

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, index: int) -> list[Image.Image]:
        return [self.source.load(self._rows[index][0], None).image]

    def captions(self, index: int) -> list[str]:
        return [caption for row in self._rows[index] for caption in self.source.captions(row)]

    def key(self, index: int) -> str:
        row = self._rows[index][0]
        return str(row) if self._names is None else self._names[row]

    def stamp(self) -> str:
        files = [self._path, *self._path.rglob("*"), *map(Path, getattr(self.source, "urls", ()))]
        root = getattr(self.source, "root", None)
        if self._names is not None and root is not None:
            files += [Path(root) / name for name in self._names]
        keys = hash64(repr([self.key(index) for index in range(len(self))])).hex()
        return f"{stamp_of_files({file for file in files if file.is_file()})}-{keys}"


def _image_names(source: PairSource) -> list[str] | None:
    """Of each row the path of its image as written; None: images are no files of their own."""
    paths = source.image_paths() if isinstance(source, ColumnPairs) else None
    if paths is None:
        return None
    names = paths.to_pylist()
    return [str(name).strip() for name in names] if all(isinstance(name, str) for name in names) else None


def _rows_of_images(names: Sequence[str] | None, rows: int) -> list[np.ndarray]:
    """The rows of each image, in order of appearance."""
    if names is None:
        return [np.array([row]) for row in range(rows)]
    found: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        found.setdefault(name, []).append(row)
    return [np.array(mine) for mine in found.values()]


class COCO(CaptionedPairs):
    """COCO's captions: ``dataset_coco.json`` (Karpathy's splits) or ``annotations/captions_val2017.json``.

    The 5,000 images that the field tests on are Karpathy's, which are others than the 5,000 of val2017; where both
    files are there, they are taken.

    Args:
        root: the folder of the file, with the images in ``val2014``, ``train2014`` or ``val2017``.
        split: of Karpathy's; val2017 is one.

    Raises:
        MissingData: no such folder or file.
    """

    def __init__(self, root: str, split: str = "test") -> None:
        names = ("dataset_coco.json", "annotations/dataset_coco.json")
        others = ("annotations/captions_val2017.json", "captions_val2017.json")
        path = find(Path(root), (*names, *others), "file of captions")
        super().__init__(str(path), split=split if path.name == "dataset_coco.json" else None)


class Flickr30k(CaptionedImages):
    """Flickr30k's 1,000 images of Karpathy's test split, or another of his.

    The captions are in ``dataset_flickr30k.json`` (Karpathy), ``flickr30k_test_karpathy.txt`` (CLIP_benchmark), or in
    ``results.csv`` or ``results_20130124.token`` (the owners'), which are of all images and need the names of the
    split's beside them, one a line, in ``test.txt``.

    Args:
        root: the folder of that file, with the images in it or in ``flickr30k-images``, ``flickr30k_images`` or
            ``images``.
        split: its name.

    Raises:
        MissingData: no such folder or file.
        InputError: a line that cannot be read, or no image of the split.
    """

    def __init__(self, root: str, split: str = "test") -> None:
        top = Path(root)
        listed = f"flickr30k_{split}_karpathy.txt"
        names = ("dataset_flickr30k.json", listed, "results.csv", "flickr30k_images/results.csv")
        path = find(top, (*names, "results_20130124.token"), "file of captions")
        if path.suffix == ".json":
            self._captions = _of_karpathy(path, split, _folder_of(top, _first_name(path)))
        else:
            self._captions = _of_lines(path)
            if path.name != listed:
                self._captions = _only(self._captions, path, find(path.parent, (f"{split}.txt",), "names of the split"))
        require(bool(self._captions), f"{path}: no captions in it; get it again")
        self._names = list(self._captions)
        self.root = _folder_of(top, self._names[0])

    def __len__(self) -> int:
        return len(self._names)

    def images(self, index: int) -> list[Image.Image]:
        path = self.root / self._names[index]
        return [open_image(path, str(path))]

    def captions(self, index: int) -> list[str]:
        return list(self._captions[self._names[index]])

    def key(self, index: int) -> str:
        return self._names[index]

    def stamp(self) -> str:
        files = stamp_of_files(path for path in (self.root / name for name in self._names) if path.is_file())
        return f"{files}-{hash64(repr(self._names)).hex()}"


def _folder_of(root: Path, name: str) -> Path:
    folders = ("flickr30k-images", "flickr30k_images", "images", "", "flickr30k_images/flickr30k_images")
    return find(root, [f"{folder}/{name}".lstrip("/") for folder in folders], "images").parent


def _first_name(path: Path) -> str:
    values = read_json(path)
    try:
        return str(values["images"][0]["filename"])
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: not Karpathy's list of images ({error!r}); get it again") from error


def _of_karpathy(path: Path, split: str, folder: Path) -> dict[str, list[str]]:
    source = open_source(path, root=str(folder), split=split)
    names = _image_names(source) or []
    return {name: source.captions(row) for row, name in enumerate(names)}


def _of_lines(path: Path) -> dict[str, list[str]]:
    """``NAME.jpg,CAPTION`` with commas in it, ``NAME.jpg| NUMBER| CAPTION`` or ``NAME.jpg#NUMBER<tab>CAPTION``."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        match = LINE.fullmatch(line.strip())
        if match:
            captions.setdefault(match["name"], []).append(match["caption"].strip())
        elif number > 1 and line.strip():  # the first is a header
            raise InputError(f"{path} line {number}: {line.strip()[:60]!r} is no image and caption; fix the line")
    return captions


def _only(captions: dict[str, list[str]], path: Path, names: Path) -> dict[str, list[str]]:
    wanted = [row[0] for row in read_words(names, 1)]
    if wrong := [name for name in wanted if name not in captions]:
        raise InputError(f"{names}: {wrong[0]} is not in {path.name}; fix the list")
    return {name: captions[name] for name in wanted}
