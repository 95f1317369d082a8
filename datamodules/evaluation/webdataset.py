"""Sets in tar files, in the layout of CLIP_benchmark's ``wds`` data sets (its README and ``webdataset_builder.py``).

A folder with ``classnames.txt``, ``zeroshot_classification_templates.txt`` and ``dataset_type.txt``, and for each split
one with ``nshards.txt`` and ``0.tar``, ``1.tar``, ...; in these, of each sample an image and a ``.cls``, ``.npy`` or
``.txt`` file of the same name.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.evaluation.indexes import read_text
from datamodules.shards.index import DamagedError, split_name, tar_members
from lit_clip.errors import BadSample, InputError, require
from lit_clip.evaluation.data import (
    CaptionedImages,
    ImageSet,
    LabelledImages,
    MissingData,
    MultiLabel,
    numbered,
)
from lit_clip.tools.hashing import stamp_of_files
from lit_clip.tools.images import SUFFIXES, open_image

Kind = Literal["classification", "retrieval", "multilabel"]
ANSWERS: dict[Kind, str] = {"classification": "cls", "retrieval": "txt", "multilabel": "npy"}


class Span(NamedTuple):
    """Where in its tar an image lies, in bytes."""

    tar: int
    offset: int
    size: int


@dataclass
class _TarSample:
    """What the headers of a tar say of a sample, and what its answer file says."""

    image: Span | None = None
    answer: bytes | None = None


def _scan(path: Path, number: int, extension: str) -> dict[str, _TarSample]:
    """The samples of a tar, in order; only its headers and answers are read."""
    samples: dict[str, _TarSample] = {}
    try:
        with path.open("rb") as file:
            for member, tar in tar_members(file, os.path.getsize(path)):
                key, found = split_name(member.name)
                sample = samples.setdefault(key, _TarSample())
                if f".{found}" in SUFFIXES:
                    require(sample.image is None, f"{path} sample {key}: two images; write the file anew")
                    sample.image = Span(number, member.offset_data, member.size)
                elif found == extension:
                    content = tar.extractfile(member)
                    sample.answer = content.read() if content is not None else None
    except FileNotFoundError as error:
        raise MissingData(f"{path}: no such file") from error
    except DamagedError as error:
        raise InputError(f"{path}: {error}; get it again") from error
    except InputError:
        raise
    except Exception as error:  # tarfile answers bytes that are no tar with whatever it trips over
        what = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: no readable tar ({what}); get it again") from error
    return {key: sample for key, sample in samples.items() if key and (sample.image or sample.answer is not None)}


class _Tars(ImageSet):
    """Images in the tar files of a split.

    Args:
        root: the folder of the set.
        split: the folder in it.

    Attributes:
        templates: the set's own, with ``{}`` for the name; none if it has no file of them.
        answers: of each sample the content of its ``.cls``, ``.npy`` or ``.txt`` file.

    Raises:
        MissingData: the folder, or one of the files that it promises, is not there.
        InputError: another kind of set, a damaged tar, a sample without an answer, or no samples.
    """

    kind: ClassVar[Kind]

    def __init__(self, root: str, split: str = "test") -> None:
        self.root, self.split = Path(root), split
        said = self._lines("dataset_type.txt")
        kind = said[0].lower() if said else "classification"
        if kind != self.kind:
            raise InputError(f"{root}: dataset_type.txt says {kind}, which {type(self).__name__} does not read")
        self.templates = [line.replace("{c}", "{}") for line in self._lines("zeroshot_classification_templates.txt")]
        count = read_text(self.root / split / "nshards.txt").strip()
        if not count.isdecimal():
            raise InputError(f"{self.root / split / 'nshards.txt'}: {count[:20]!r} is no number of tar files")
        self.tars: list[Path] = []
        self.keys: list[str] = []
        self.spans: list[Span | None] = []
        self.answers: list[bytes] = []
        for number in range(int(count)):  # of a wrong count the first tar that is not there is the end
            path = self.root / split / f"{number}.tar"
            self.tars.append(path)
            self._add(path, _scan(path, number, ANSWERS[self.kind]))
        if not self.keys:
            raise InputError(f"{self.root / split}: no samples in its {count} tar files")

    def _add(self, path: Path, samples: dict[str, _TarSample]) -> None:
        for key, sample in samples.items():
            if sample.answer is None:
                raise InputError(f"{path} sample {key}: an image without {key}.{ANSWERS[self.kind]}; fix the set")
            self.keys.append(f"{path.stem}/{key}")
            self.spans.append(sample.image)
            self.answers.append(sample.answer)

    def _lines(self, name: str) -> list[str]:
        """The lines of a file of the set, or none."""
        path = self.root / name
        lines = [line.strip() for line in read_text(path).splitlines()] if path.exists() else []
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def _text(self, index: int) -> str:
        try:
            return self.answers[index].decode("utf-8")
        except UnicodeDecodeError as error:
            what = f"its .{ANSWERS[self.kind]} is not UTF-8 text"
            raise InputError(f"{self.where(index)}: {what} (byte {error.start}); write the file anew") from error

    def where(self, index: int) -> str:
        """How the user knows a sample, for errors."""
        tar, _, key = self.keys[index].partition("/")
        return f"{self.root / self.split / tar}.tar sample {key}"

    def image(self, index: int) -> Image.Image:
        """The image of a sample.

        Raises:
            BadSample: there is none, or it cannot be read.
        """
        span = self.spans[index]
        if span is None:
            raise BadSample(self.where(index), "missing image", "no image; fix the set")
        with self.tars[span.tar].open("rb") as file:  # costs microseconds, and nothing stays open in data workers
            file.seek(span.offset)
            return open_image(io.BytesIO(file.read(span.size)), self.where(index))

    def images(self, index: int) -> list[Image.Image]:
        return [self.image(index)]

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        return self.keys[index]

    def stamp(self) -> str:
        return f"{self.split}-{len(self)}-{stamp_of_files(self.tars)}"


class WebDataset(_Tars, LabelledImages):
    """Images with a class each, whose number is in a ``.cls`` file.

    Args:
        root: the folder of the set.
        split: the folder in it.

    Attributes:
        class_names: the lines of ``classnames.txt``; without it the classes' numbers.
        templates: the set's own, with ``{}`` for the name; none if it has no file of them.

    Raises:
        MissingData: the folder, or one of the files that it promises, is not there.
        InputError: a damaged tar, a label that is none of the classes, or no samples; the message names it.
    """

    kind = "classification"

    def __init__(self, root: str, split: str = "test") -> None:
        super().__init__(root, split)
        self._labels = [self._label(index) for index in range(len(self))]
        self.class_names = self._lines("classnames.txt") or numbered(self._labels, str(self.root))
        for index, label in enumerate(self._labels):
            if label >= len(self.class_names):
                where = f"classnames.txt has {len(self.class_names)} names"
                raise InputError(f"{self.where(index)}: its label is {label}, {where}; labels count from 0")

    def _label(self, index: int) -> int:
        text = self._text(index).strip()
        if not text.isdecimal():
            raise InputError(f"{self.where(index)}: its label is {text[:40]!r}, not a whole number from 0")
        return int(text)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.image(index), self._labels[index]

    def labels(self) -> list[int]:
        return list(self._labels)


class WebDatasetMultiLabel(_Tars, LabelledImages, MultiLabel):
    """Images with any number of classes each, which a ``.npy`` file marks with 1.

    Args:
        root: the folder of the set.
        split: the folder in it.

    Raises:
        MissingData: the folder, or one of the files that it promises, is not there.
        InputError: a damaged tar, marks that are not one for each class, or no samples; the message names it.
    """

    kind = "multilabel"

    def __init__(self, root: str, split: str = "test") -> None:
        super().__init__(root, split)
        marks = [self._marks(index) for index in range(len(self))]
        self.class_names = self._lines("classnames.txt") or [str(label) for label in range(len(marks[0]))]
        for index, mark in enumerate(marks):
            if len(mark) != len(self.class_names):
                names = f"there are {len(self.class_names)} class names"
                raise InputError(f"{self.where(index)}: {len(mark)} marks, {names}; fix classnames.txt or the set")
        self._relevance = torch.tensor(np.stack(marks))

    def _marks(self, index: int) -> np.ndarray:
        try:
            marks = np.load(io.BytesIO(self.answers[index]), allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"{self.where(index)}: its .npy is no array of numbers; write the file anew") from error
        if marks.ndim != 1 or not np.isin(marks, (0, 1)).all():
            raise InputError(f"{self.where(index)}: its .npy does not hold a 0 or a 1 for each class")
        return marks.astype(np.int8)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.image(index), -1

    def labels(self) -> list[int]:
        return [-1] * len(self)

    def relevance(self) -> Tensor:
        return self._relevance


class WebDatasetCaptions(_Tars, CaptionedImages):
    """Images with texts, a line of a ``.txt`` file each.

    Args:
        root: the folder of the set.
        split: the folder in it.

    Raises:
        MissingData: the folder, or one of the files that it promises, is not there.
        InputError: a damaged tar, an image without a text, or no samples; the message names it.
    """

    kind = "retrieval"

    def __init__(self, root: str, split: str = "test") -> None:
        super().__init__(root, split)
        for index in range(len(self)):
            if not self.captions(index):
                raise InputError(f"{self.where(index)}: its .txt is empty; fix the set")

    def captions(self, index: int) -> list[str]:
        # To CLIP_benchmark an empty line is a caption too, and one that no image can be found by.
        return [line for line in self._text(index).splitlines() if line.strip()]
