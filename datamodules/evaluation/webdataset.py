"""Sets in tar files, in the layout of CLIP_benchmark's ``wds`` data sets (its README and ``webdataset_builder.py``).

A folder with ``classnames.txt``, ``zeroshot_classification_templates.txt`` and ``dataset_type.txt``, and one subfolder
per split with ``nshards.txt`` and ``0.tar``, ``1.tar``, ... A sample is an image and its target: a ``.cls``, ``.npy``
or ``.txt`` file of the same name.
"""

import io
import os
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


class TarSample(NamedTuple):
    """A sample's image, by its offset and size in a tar (0: there is none), and the content of its target file."""

    tar: Path
    name: str
    offset: int = 0
    size: int = 0
    target: bytes | None = None

    @property
    def where(self) -> str:
        """The sample in messages."""
        return f"{self.tar} sample {self.name}"


def scan_tar(path: Path, target_suffix: str) -> list[TarSample]:
    """List the samples of a tar in order; read only headers and target files."""
    samples: dict[str, TarSample] = {}
    refuse_missing(path)
    with reading(path, "tar", hint=AGAIN), path.open("rb") as file:
        for member, tar in tar_members(file, os.path.getsize(path)):
            name, suffix = split_name(member.name)
            sample = samples.setdefault(name, TarSample(path, name))
            if f".{suffix}" in IN_TARS:
                require(not sample.size, f"{sample.where}: two images; write the tar again")
                samples[name] = sample._replace(offset=member.offset_data, size=member.size)
            elif suffix == target_suffix:
                require(member.size <= LARGEST_TARGET, f"{sample.where}: its .{suffix} has {member.size:,} bytes")
                content = tar.extractfile(member)
                samples[name] = sample._replace(target=content.read() if content is not None else None)
    return [each for name, each in samples.items() if name and (each.size or each.target is not None)]


class TarImages(ImageSet):
    """The images of samples in tar files."""

    tars: list[Path]
    samples: list[TarSample]

    def image(self, index: int) -> Image.Image:
        """Decode the image of a sample."""
        sample = self.samples[index]
        if not sample.size:
            raise BadSample(sample.where, "missing image", "no image; fix the set")
        with sample.tar.open("rb") as file:  # takes microseconds, and data workers keep no file open
            file.seek(sample.offset)
            return image_for_model(io.BytesIO(file.read(sample.size)), sample.where)

    def images(self, index: int) -> list[Image.Image]:
        return [self.image(index)]

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, index: int) -> str:
        return f"{self.samples[index].tar.stem}/{self.samples[index].name}"

    def image_paths(self) -> list[Path]:
        return self.tars


class _Tars(TarImages):
    """Images in the tar files of a split, a subfolder of the set's folder.

    ``templates`` are the set's own prompt templates, with ``{}`` for the class name; empty if it has no file of them.
    """

    kind: ClassVar[str]  # in dataset_type.txt
    suffix: ClassVar[str]  # of the files with targets

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
        self.tars, self.samples = [], []
        for number in range(shards):  # if the count is too large, the first missing tar ends this
            self.tars.append(self.root / split / f"{number}.tar")
            self.samples += scan_tar(self.tars[-1], self.suffix)
        require(bool(self.samples), f"{self.root / split}: no samples in its {count} tar files")
        lacking = next((sample for sample in self.samples if sample.target is None), None)
        if lacking is not None:
            raise InputError(f"{lacking.where}: an image without {lacking.name}.{self.suffix}; fix the set")

    def _lines(self, name: str) -> list[str]:
        """Return the lines of one of the set's files, without trailing empty lines; [] if it does not exist."""
        path = self.root / name
        return [line.strip() for line in read_text(path).rstrip().splitlines()] if path.exists() else []

    def _target_text(self, sample: TarSample) -> str:
        try:
            return (sample.target or b"").decode("utf-8")
        except UnicodeDecodeError as error:
            problem = f"its .{self.suffix} is not UTF-8 text (byte {error.start})"
            raise InputError(f"{sample.where}: {problem}; write the file again") from error

    def stamp(self) -> str:
        return f"{self.split}-{len(self)}-{stamp_of_files(self.tars)}"


def _npy(sample: TarSample) -> list[float]:
    """Return the numbers of a ``.npy`` file; none if it holds anything but a list of numbers."""
    with reading(f"{sample.where}: its .npy", "array of numbers", hint="write the file again"):
        array = np.lib.format.read_array(io.BytesIO(sample.target or b""), allow_pickle=False)
        return [float(value) for value in array] if array.ndim == 1 and array.dtype.kind in "biuf" else []


class WebDataset(_Tars, KnownLabels):
    """Images with one class each: labels in ``.cls`` files, names in ``classnames.txt`` if it exists."""

    kind, suffix = "classification", "cls"

    def __init__(self, root: str, split: str = "test") -> None:
        super().__init__(root, split)
        self._labels = []
        for sample in self.samples:
            text = self._target_text(sample).strip()
            label = whole_number(text)
            if label is None:
                raise InputError(f"{sample.where}: its label is {text[:40]!r}, not a whole number of at least 0")
            self._labels.append(label)
        self.class_names = self._lines("classnames.txt") or numbered(self._labels, str(self.root))
        for sample, label in zip(self.samples, self._labels, strict=True):
            if label >= len(self.class_names):
                names = f"classnames.txt has {len(self.class_names)} names"
                raise InputError(f"{sample.where}: its label is {label}, but {names}; labels count from 0")


class WebDatasetGroups(WebDataset):
    """A classification set with metadata, as DataComp stores WILDS, Dollar Street and GeoDE.

    A ``.npy`` file beside each ``.cls`` file has one number per column. ``columns`` are the attributes in the first
    columns, which define groups; further columns are ignored.
    """

    def __init__(self, root: str, columns: list[str], split: str = "test") -> None:
        super().__init__(root, split)
        metadata = {(each.tar, each.name): each for path in self.tars for each in scan_tar(path, "npy")}
        rows = [self._numbers(metadata.get((each.tar, each.name), each), len(columns)) for each in self.samples]
        self.truth = Truth(groups={name: [str(row[column]) for row in rows] for column, name in enumerate(columns)})

    def _numbers(self, sample: TarSample, columns: int) -> list[int]:
        require(sample.target is not None, f"{sample.where}: no .npy file of metadata; get the set again")
        numbers = _npy(sample)[:columns]
        whole = len(numbers) == columns and all(number.is_integer() for number in numbers)
        require(whole, f"{sample.where}: its .npy must start with {columns} whole numbers; get the set again")
        return [int(number) for number in numbers]


class WebDatasetMultiLabel(_Tars, KnownLabels):
    """Images with any number of classes each; a ``.npy`` file has a 1 or a 0 for every class."""

    kind, suffix = "multilabel", "npy"

    def __init__(self, root: str, split: str = "test") -> None:
        super().__init__(root, split)
        marks = list(map(_npy, self.samples))
        self.class_names = self._lines("classnames.txt") or [str(label) for label in range(len(marks[0]))]
        for sample, mark in zip(self.samples, marks, strict=True):
            plain = bool(mark) and {*mark} <= {0, 1}
            require(plain, f"{sample.where}: its .npy must hold a 0 or a 1 for each class; write it again")
            if len(mark) != len(self.class_names):
                problem = f"{len(mark)} marks for {len(self.class_names)} class names"
                raise InputError(f"{sample.where}: {problem}; fix classnames.txt or the set")
        self._labels, self.truth = [-1] * len(marks), Truth(relevance=torch.tensor(marks, dtype=torch.int8))


class WebDatasetCaptions(_Tars, CaptionedImages):
    """Images with captions; each line of a ``.txt`` file is a caption."""

    kind, suffix = "retrieval", "txt"

    def __init__(self, root: str, split: str = "test") -> None:
        super().__init__(root, split)
        for index, sample in enumerate(self.samples):
            require(bool(self.captions(index)), f"{sample.where}: its .txt is empty; fix the set")

    def captions(self, index: int) -> list[str]:
        # CLIP_benchmark counts an empty line as a caption, although no image can be found by it.
        return [line for line in self._target_text(self.samples[index]).splitlines() if line.strip()]
