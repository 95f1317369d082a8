"""Sets in tar files, in the layout of CLIP_benchmark's ``wds`` data sets (its README and ``webdataset_builder.py``).

A folder with ``classnames.txt``, ``zeroshot_classification_templates.txt`` and ``dataset_type.txt``, and one subfolder
per split with ``nshards.txt`` and ``0.tar``, ``1.tar``, ... A sample is an image and its target: a ``.cls``, ``.npy``
or ``.txt`` file of the same name.
"""

import io
import os
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image

from lit_clip.errors import BadSample, InputError, require
from lit_clip.evaluation.data import CaptionedImages, ImageSet, Truth, numbered
from lit_clip.tools.hashing import stamp_of_files
from lit_clip.tools.images import IN_TARS, image_for_model
from lit_clip.tools.reading import reading
from ..shards.index import split_name, tar_members
from .annotation_files import AGAIN, read_text, refuse_missing, whole_number
from .image_files import KnownLabels

LARGEST_TARGET = 1 << 20  # bytes


class ImageSpan(NamedTuple):
    """The tar of an image, and the image's offset and size there in bytes."""

    tar: int
    offset: int
    size: int


@dataclass
class TarSample:
    """Position of a sample's image, and the content of its target file."""

    image: ImageSpan | None = None
    target: bytes | None = None


def scan_tar(path: Path, number: int, target_suffix: str) -> dict[str, TarSample]:
    """List the samples of a tar in order; read only headers and target files."""
    samples: dict[str, TarSample] = {}
    refuse_missing(path)
    with reading(path, "tar", hint=AGAIN), path.open("rb") as file:
        for member, tar in tar_members(file, os.path.getsize(path)):
            key, suffix = split_name(member.name)
            sample = samples.setdefault(key, TarSample())
            if f".{suffix}" in IN_TARS:
                require(sample.image is None, f"{path} sample {key}: two images; write the tar again")
                sample.image = ImageSpan(number, member.offset_data, member.size)
            elif suffix == target_suffix:
                require(member.size <= LARGEST_TARGET, f"{path} sample {key}: its .{suffix} has {member.size:,} bytes")
                content = tar.extractfile(member)
                sample.target = content.read() if content is not None else None
    return {key: sample for key, sample in samples.items() if key and (sample.image or sample.target is not None)}


class TarImages(ImageSet):
    """Images in tar files: the name of each sample, and the position of its image, if it has one."""

    tars: list[Path]
    keys: list[str]
    spans: list[ImageSpan | None]

    @abstractmethod
    def where(self, index: int) -> str:
        """Name a sample in error messages."""

    def image(self, index: int) -> Image.Image:
        """Decode the image of a sample."""
        span = self.spans[index]
        if span is None:
            raise BadSample(self.where(index), "missing image", "no image; fix the set")
        with self.tars[span.tar].open("rb") as file:  # takes microseconds, and data workers keep no file open
            file.seek(span.offset)
            return image_for_model(io.BytesIO(file.read(span.size)), self.where(index))

    def images(self, index: int) -> list[Image.Image]:
        return [self.image(index)]

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        return self.keys[index]

    def image_paths(self) -> list[Path]:
        return self.tars


class _Tars(TarImages):
    """Images in the tar files of a split; the split is a subfolder of the set's folder.

    Attributes:
        templates: the set's own prompt templates, with ``{}`` for the class name; empty if it has no file of them.
        targets: the content of each sample's ``.cls``, ``.npy`` or ``.txt`` file.
    """

    kind: ClassVar[str]  # in dataset_type.txt
    suffix: ClassVar[str]  # of targets

    def __init__(self, root: str, split: str = "test") -> None:
        self.root, self.split = Path(root), split
        lines = self._lines("dataset_type.txt")
        kind = lines[0].lower() if lines else "classification"
        if kind != self.kind:
            raise InputError(f"{root}: dataset_type.txt says {kind}, but {type(self).__name__} reads {self.kind}")
        self.templates = [line.replace("{c}", "{}") for line in self._lines("zeroshot_classification_templates.txt")]
        count = read_text(self.root / split / "nshards.txt").strip()
        shards = whole_number(count)
        if shards is None:
            raise InputError(f"{self.root / split / 'nshards.txt'}: {count[:20]!r} must be the number of tar files")
        lists = ("dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt", f"{split}/nshards.txt")
        self.annotation_paths = [self.root / name for name in lists if (self.root / name).exists()]
        self.tars, self.keys, self.spans = [], [], []
        self.targets: list[bytes] = []
        for number in range(shards):  # if the count is too large, the first missing tar ends this
            path = self.root / split / f"{number}.tar"
            self.tars.append(path)
            for key, sample in scan_tar(path, number, self.suffix).items():
                if sample.target is None:
                    raise InputError(f"{path} sample {key}: an image without {key}.{self.suffix}; fix the set")
                self.keys.append(f"{path.stem}/{key}")
                self.spans.append(sample.image)
                self.targets.append(sample.target)
        require(bool(self.keys), f"{self.root / split}: no samples in its {count} tar files")

    def _lines(self, name: str) -> list[str]:
        """Return the lines of one of the set's files, without trailing empty lines; [] if it does not exist."""
        path = self.root / name
        lines = [line.strip() for line in read_text(path).splitlines()] if path.exists() else []
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def _target_text(self, index: int) -> str:
        try:
            return self.targets[index].decode("utf-8")
        except UnicodeDecodeError as error:
            problem = f"its .{self.suffix} is not UTF-8 text (byte {error.start})"
            raise InputError(f"{self.where(index)}: {problem}; write the file again") from error

    def where(self, index: int) -> str:
        """Name a sample in error messages."""
        tar, _, key = self.keys[index].partition("/")
        return f"{self.root / self.split / tar}.tar sample {key}"

    def stamp(self) -> str:
        return f"{self.split}-{len(self)}-{stamp_of_files(self.tars)}"


class WebDataset(_Tars, KnownLabels):
    """Images with one class each: labels in ``.cls`` files, names in ``classnames.txt`` if it exists."""

    kind, suffix = "classification", "cls"

    def __init__(self, root: str, split: str = "test") -> None:
        super().__init__(root, split)
        self._labels = [self._label(index) for index in range(len(self))]
        self.class_names = self._lines("classnames.txt") or numbered(self._labels, str(self.root))
        for index, label in enumerate(self._labels):
            if label >= len(self.class_names):
                names = f"classnames.txt has {len(self.class_names)} names"
                raise InputError(f"{self.where(index)}: its label is {label}, but {names}; labels count from 0")

    def _label(self, index: int) -> int:
        text = self._target_text(index).strip()
        label = whole_number(text)
        if label is None:
            raise InputError(f"{self.where(index)}: its label is {text[:40]!r}, not a whole number of at least 0")
        return label


class WebDatasetGroups(WebDataset):
    """A classification set with metadata, as DataComp stores WILDS, Dollar Street and GeoDE.

    A ``.npy`` file beside each ``.cls`` file has one number per column. ``columns`` are the attributes in the first
    columns, which define groups; further columns are ignored.
    """

    def __init__(self, root: str, columns: list[str], split: str = "test") -> None:
        super().__init__(root, split)
        metadata: dict[str, bytes | None] = {}
        for number, path in enumerate(self.tars):
            metadata |= {f"{path.stem}/{key}": it.target for key, it in scan_tar(path, number, "npy").items()}
        rows = [self._numbers(index, metadata.get(key), len(columns)) for index, key in enumerate(self.keys)]
        self.truth = Truth(groups={name: [str(row[column]) for row in rows] for column, name in enumerate(columns)})

    def _numbers(self, index: int, content: bytes | None, columns: int) -> list[int]:
        if content is None:
            raise InputError(f"{self.where(index)}: no .npy file of metadata; get the set again")
        with reading(f"{self.where(index)}: its .npy", "array of numbers", hint="get the set again"):
            row = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
            numbers = [float(value) for value in row[:columns]] if row.ndim == 1 and row.dtype.kind in "iuf" else []
        if len(numbers) < columns or not all(number.is_integer() for number in numbers):
            raise InputError(
                f"{self.where(index)}: its .npy must start with {columns} whole numbers; get the set again"
            )
        return [int(number) for number in numbers]


class WebDatasetMultiLabel(_Tars, KnownLabels):
    """Images with any number of classes each; a ``.npy`` file has a 1 or a 0 for every class."""

    kind, suffix = "multilabel", "npy"

    def __init__(self, root: str, split: str = "test") -> None:
        super().__init__(root, split)
        marks = [self._marks(index) for index in range(len(self))]
        self.class_names = self._lines("classnames.txt") or [str(label) for label in range(len(marks[0]))]
        for index, mark in enumerate(marks):
            if len(mark) != len(self.class_names):
                problem = f"{len(mark)} marks for {len(self.class_names)} class names"
                raise InputError(f"{self.where(index)}: {problem}; fix classnames.txt or the set")
        self._labels, self.truth = [-1] * len(marks), Truth(relevance=torch.tensor(np.stack(marks)))

    def _marks(self, index: int) -> np.ndarray:
        target = io.BytesIO(self.targets[index])
        with reading(f"{self.where(index)}: its .npy", "array of numbers", hint="write the file again"):
            marks = np.lib.format.read_array(target, allow_pickle=False)
            good = marks.ndim == 1 and marks.dtype.kind in "biuf" and bool(np.isin(marks, (0, 1)).all())
        if not good:
            raise InputError(f"{self.where(index)}: its .npy must hold a 0 or a 1 for each class; write it again")
        return marks.astype(np.int8)


class WebDatasetCaptions(_Tars, CaptionedImages):
    """Images with captions; each line of a ``.txt`` file is a caption."""

    kind, suffix = "retrieval", "txt"

    def __init__(self, root: str, split: str = "test") -> None:
        super().__init__(root, split)
        for index in range(len(self)):
            require(bool(self.captions(index)), f"{self.where(index)}: its .txt is empty; fix the set")

    def captions(self, index: int) -> list[str]:
        # CLIP_benchmark counts an empty line as a caption, although no image can be found by it.
        return [line for line in self._target_text(index).splitlines() if line.strip()]
