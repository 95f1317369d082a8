"""Captioned images for retrieval: Flickr30k, COCO, XTD10, Crossmodal-3600, and any source of pairs."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image

from lit_clip.errors import InputError, listed, require
from lit_clip.evaluation.data import CaptionedImages, Items, JudgedDocuments, MissingData
from lit_clip.tools.hashing import hash64, stamp_of_files
from lit_clip.tools.reading import reading
from lit_clip.tools.untrusted import convert, entries
from ..open_source import open_source
from ..pairs.columns import ColumnPairs
from ..pairs.source import Columns, PairSource
from .annotation_files import AGAIN, find, read_json_lines, read_table, read_text
from .image_files import TEXTS, CaptionedFiles

HUB_TABLE = "flickr_annotations_30k.csv"
VAL2017 = "captions_val2017.json"
FIELDS = ("image", "caption")


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
        rows = defaultdict[object, list[int]](list)  # of each image, in order of appearance
        for row in range(len(self.source)):
            rows[row if self._names is None else self._names[row]].append(row)
        self._rows = list(rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, index: int) -> list[Image.Image]:
        return [self.source.load(self._rows[index][0], None).image]

    def _file(self, row: int) -> Path | None:
        root = getattr(self.source, "root", None)
        return Path(root) / self._names[row] if self._names is not None and isinstance(root, str | Path) else None

    def whole_file(self, index: int) -> Path | None:
        return self._file(self._rows[index][0])

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
        files += [file for row in range(len(self.source)) if (file := self._file(row)) is not None]
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

    Captions are read from ``dataset_flickr30k.json`` (Karpathy), ``flickr30k_test_karpathy.txt`` (CLIP_benchmark) or
    ``flickr_annotations_30k.csv`` (Hugging Face's ``nlphuji/flickr30k``). The images are in ``root`` or in
    ``flickr30k-images``, ``flickr30k_images`` or ``images``.
    """
    top = Path(root)
    path = find(top, ("dataset_flickr30k.json", f"flickr30k_{split}_karpathy.txt", HUB_TABLE), "file of captions")
    if path.suffix == ".json":
        source = open_source(path, columns=Columns(root=str(top)), split=split)
        captions = {name: source.captions(row) for row, name in enumerate(_image_names(source) or [])}
    else:
        captions = _read_hub_table(path, split) if path.name == HUB_TABLE else _read_lines(path)
    require(bool(captions), f"{path}: no captions in it; get it again")
    folders = ("flickr30k-images/", "flickr30k_images/", "images/", "", "flickr30k_images/flickr30k_images/")
    images = find(top, [f"{folder}{next(iter(captions))}" for folder in folders], "images").parent
    return CaptionedFiles(images, list(captions), list(captions.values()), [path])


def _read_hub_table(path: Path, split: str) -> dict[str, list[str]]:
    """Read ``raw`` (a JSON list of captions), ``split`` and ``filename``."""
    captions: dict[str, list[str]] = {}
    for row in read_table(path, {"captions": ("raw",), "split": ("split",), "name": ("filename",)}):
        if row["split"] == split:
            with reading(path, f"table: {row['name']} has no list of captions", hint=AGAIN):
                captions[row["name"]] = [text.strip() for text in convert(json.loads(row["captions"]), list[str])]
    return captions


def _read_lines(path: Path) -> dict[str, list[str]]:
    """Read lines of ``NAME.jpg,CAPTION`` after a header."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).splitlines()[1:], start=2):
        name, _, caption = map(str.strip, line.partition(","))
        if line.strip():
            require(bool(name and caption), f"{path} line {number}: not an image and a caption; {AGAIN}")
            captions.setdefault(name, []).append(caption)
    return captions


class GroupedPairs(JudgedDocuments):
    """Images with captions search other such images; right are all of the query's group, such as a product's number.

    Where an image has several captions, the first is its text. A query without a document of its group is left out.

    Args:
        root: the folder of both.
        queries: a table of pairs that were not trained on, or another source as in :class:`CaptionedPairs`.
        documents: the pairs that are searched.
        group: the column of the groups, in both.
        query_fields: what a query has: ``image``, ``caption`` or both.
    """

    def __init__(
        self,
        root: str,
        queries: str,
        documents: str,
        group: str,
        query_fields: Sequence[Literal["image", "caption"]] = FIELDS,
    ) -> None:
        known = {*query_fields} <= {*FIELDS} and bool(query_fields)
        require(known, f"query_fields is {listed(list(query_fields))}; name image, caption or both")
        self._parts = asked, searched = [
            CaptionedPairs(str(Path(root, path)), group=group) for path in (queries, documents)
        ]
        self.annotation_paths = [*asked.annotation_paths, *searched.annotation_paths]
        of_group = defaultdict[str, list[int]](list)
        for row in range(len(searched)):
            of_group[searched.group(row)].append(row)
        of_group.pop("", None)
        rows = [row for row in range(len(asked)) if asked.group(row) in of_group]
        require(bool(rows), f"{queries}: no row's {group!r} is that of a row in {documents}; correct the column")
        self._images = [(searched, row) for row in range(len(searched))]
        self.documents = Items(
            [f"document {searched.key(row)}" for _, row in self._images],
            [searched.captions(row)[0] for _, row in self._images],
            list(range(len(searched))),
        )
        images, texts = [-1] * len(rows), [""] * len(rows)
        if "image" in query_fields:
            images = list(range(len(searched), len(searched) + len(rows)))
            self._images += [(asked, row) for row in rows]
        if "caption" in query_fields:
            texts = [asked.captions(row)[0] for row in rows]
        self.queries = Items([f"query {asked.key(row)}" for row in rows], texts, images)
        groups = [of_group[asked.group(row)] for row in rows]
        self.relevance = [(query, document, 1) for query, found in enumerate(groups) for document in found]

    def __len__(self) -> int:
        return len(self._images)

    def images(self, index: int) -> list[Image.Image]:
        pairs, row = self._images[index]
        return pairs.images(row)

    def whole_file(self, index: int) -> Path | None:
        pairs, row = self._images[index]
        return pairs.whole_file(row)

    def key(self, index: int) -> str:
        pairs, row = self._images[index]
        return pairs.key(row)

    def image_paths(self) -> list[Path]:
        return list(dict.fromkeys(path for pairs in self._parts for path in pairs.image_paths()))

    def stamp(self) -> str:
        return f"{len(self._images)}-" + "-".join(pairs.stamp() for pairs in self._parts)


def XTD10(root: str, language: str) -> CaptionedFiles:
    """XTD10: 1,000 images of COCO 2014 with a caption in each of 11 languages (``en``, ``de``, ..., ``jp``, ``zh``).

    ``root`` has the authors' ``XTD10``, ``MIC`` and ``STAIR`` folders or the files in them, and the images: all in
    ``images``, or in COCO's ``train2014`` and ``val2014``.
    """
    top, folders = Path(root), ("XTD10/", "MIC/", "STAIR/", "")
    listed = find(top, [f"{folder}test_image_names.txt" for folder in folders], "list of images")
    file = f"test_1kcaptions_{language}.txt"
    path = find(top, [f"{folder}{file}" for folder in folders], f"captions in {language}")
    names = read_text(listed).split()
    captions = [[caption] for caption in read_text(path).splitlines()]
    if not names or len(captions) != len(names):
        raise InputError(f"{path}: {len(captions)} captions for {len(names)} images; {AGAIN}")
    images = find(top, ("images", "train2014", "val2014"), "images")
    folder_of = {split: "images" if images.name == "images" else split for split in ("train2014", "val2014")}
    names = [f"{folder_of['train2014' if 'train2014' in name else 'val2014']}/{name}" for name in names]
    return CaptionedFiles(top, names, captions, [listed, path])


def Crossmodal3600(root: str, language: str) -> CaptionedFiles:
    """Crossmodal-3600: 3,600 images with captions in 36 languages; the first caption is used, as in CLIP_benchmark.

    ``root`` has ``captions.jsonl`` and ``images``; the language is a code such as ``de``.
    """
    path, names, captions = find(Path(root), ("captions.jsonl",), "captions.jsonl"), [], []
    kind = entries({"image/key": str, language: entries({"caption": TEXTS}, total=True)}, total=True)
    for row in read_json_lines(path, kind):
        names.append(f"images/{row['image/key']}.jpg")
        captions.append([row[language]["caption"][0]])
    return CaptionedFiles(Path(root), names, captions, [path])
