"""Sets of table 9 whose images are rows of one file (an array, a table, HDF5), in torchvision's layout on disk.

Labels are read on construction. Pixels stay in the file, which each process opens when it first reads an image.
"""

import math
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.evaluation.annotation_files import (
    AGAIN,
    ArrayUnpickler,
    import_optional,
    own_dataset,
    read_text,
    refuse_missing,
    whole_number,
)
from datamodules.evaluation.image_files import (
    TrainTest,
    TrainValTest,
)
from lit_clip.errors import BadSample, InputError, require
from lit_clip.evaluation.data import LabelledImages
from lit_clip.tools.hashing import hex_digest, stamp_of_files
from lit_clip.tools.reading import reading

STL10_CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
MOST_IMAGES = 1_000_000  # of PatchCamelyon, which has 262,144 to train on


class ImageArrays(LabelledImages):
    """Images that are rows of a file.

    Args:
        path: the file.
        labels: each image's class.
        class_names: in label order.
        rows: each image's row in the file; None: all rows, in order.
    """

    def __init__(
        self, path: Path, labels: Sequence[int], class_names: Sequence[str], rows: Sequence[int] | None = None
    ) -> None:
        self.path, self.class_names = path, list(class_names)
        self._labels = [int(label) for label in labels]
        self.rows = range(len(self._labels)) if rows is None else [int(row) for row in rows]
        self._opened: tuple[int, Any] | None = None
        wrong = next((label for label in self._labels if not 0 <= label < len(self.class_names)), None)
        if not self._labels or wrong is not None:
            problem = "no images" if wrong is None else f"label {wrong} is none of the {len(self.class_names)} classes"
            raise InputError(f"{path}: {problem}; get the files again")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        where = f"{self.path} row {self.rows[index]}"
        try:
            return self.image(self._pixels(), self.rows[index]), self._labels[index]
        except InputError:
            raise
        except Exception as error:  # numpy and h5py raise anything for damaged pixels
            raise BadSample(where, "broken image", f"cannot read its pixels ({error}); get the file again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # each data worker opens the file itself

    def _pixels(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():  # HDF5 files do not survive a fork
            self._opened = (os.getpid(), self.open())
        return self._opened[1]

    @abstractmethod
    def open(self) -> Any:
        """Open the file and return its pixels, to be indexed by row."""

    def image(self, pixels: Any, row: int) -> Image.Image:
        """Return a row of what :meth:`open` returned as an image."""
        return Image.fromarray(np.asarray(pixels[row]))

    def labels(self) -> list[int]:
        return list(self._labels)

    def image_paths(self) -> list[Path]:
        return [self.path]

    def key(self, index: int) -> str:
        return str(self.rows[index])

    def stamp(self) -> str:
        rows = hex_digest(self.rows)
        return f"{stamp_of_files([self.path])}-{rows}"


class _CIFAR(ImageArrays):
    """Pickled batches of ``uint8 [N, 3072]``: 32 x 32 pixels, one channel after the other."""

    FOLDER: str
    PARTS: dict[str, list[str]]
    META: tuple[str, str]
    LABELS: str

    def __init__(self, root: str, split: TrainTest = "test") -> None:
        folder = Path(root) / self.FOLDER
        self.paths = [folder / name for name in self.PARTS[split]]
        refuse_missing(*self.paths, folder / self.META[0])
        batches = [_unpickle(path, "data", self.LABELS) for path in self.paths]
        labels = [label for batch in batches for label in batch[self.LABELS]]
        names = _unpickle(folder / self.META[0], self.META[1])[self.META[1]]
        super().__init__(self.paths[0], labels, [name.replace("_", " ") for name in names])
        self.annotation_paths = [folder / self.META[0]]
        self._opened = (os.getpid(), np.concatenate([batch["data"] for batch in batches]))

    def open(self) -> Any:
        return np.concatenate([_unpickle(path, "data", self.LABELS)["data"] for path in self.paths])

    def image(self, pixels: Any, row: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(pixels[row].reshape(3, 32, 32).transpose(1, 2, 0)))

    def image_paths(self) -> list[Path]:
        return self.paths

    def stamp(self) -> str:
        return stamp_of_files(self.paths)


class CIFAR10(_CIFAR):
    """CIFAR-10: ``cifar-10-batches-py``."""

    FOLDER = "cifar-10-batches-py"
    PARTS = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
    META = ("batches.meta", "label_names")
    LABELS = "labels"


class CIFAR100(_CIFAR):
    """CIFAR-100 with its 100 fine classes: ``cifar-100-python``."""

    FOLDER = "cifar-100-python"
    PARTS = {"train": ["train"], "test": ["test"]}
    META = ("meta", "fine_label_names")
    LABELS = "fine_labels"


def _unpickle(path: Path, *keys: str) -> dict[str, Any]:
    with reading(path, "batch of CIFAR", hint=AGAIN), path.open("rb") as file:
        content = ArrayUnpickler(file, encoding="latin1").load()
        values = {key: content[key] for key in keys}
        pixels, listed = values.get("data"), values[keys[-1]]
        if pixels is not None and (pixels.shape != (len(listed), 3072) or pixels.dtype != np.uint8):
            raise ValueError(f"pixels of shape {pixels.shape} and type {pixels.dtype}")
        if not isinstance(listed, list) or not all(type(each) is (str if pixels is None else int) for each in listed):
            raise ValueError(f"{keys[-1]} is no list of {'names' if pixels is None else 'numbers'}")
        return values


def _idx_size(path: Path, dimensions: int) -> tuple[int, ...]:
    """Read the array shape from an IDX file's header: 0, 0, 8 (bytes), the number of dimensions, 4 bytes for each."""
    with reading(path, "IDX file", hint=AGAIN), path.open("rb") as file:
        header = file.read(4 + 4 * dimensions)
    sizes = tuple(int.from_bytes(header[start : start + 4], "big") for start in range(4, len(header), 4))
    if header[:4] != bytes([0, 0, 8, dimensions]) or path.stat().st_size != len(header) + math.prod(sizes):
        raise InputError(f"{path}: not a complete IDX file of bytes in {dimensions} dimensions; get it again")
    return sizes


class MNIST(ImageArrays):
    """MNIST: grey digits of 28 x 28 pixels in unpacked IDX files, ``MNIST/raw``."""

    def __init__(self, root: str, split: TrainTest = "test") -> None:
        start = str(Path(root) / "MNIST" / "raw" / ("train" if split == "train" else "t10k"))
        images, labels = Path(f"{start}-images-idx3-ubyte"), Path(f"{start}-labels-idx1-ubyte")
        refuse_missing(images, labels)
        self.shape = _idx_size(images, 3)
        if _idx_size(labels, 1)[0] != self.shape[0]:
            raise InputError(f"{labels}: fewer or more labels than images in {images.name}; get both again")
        super().__init__(images, np.fromfile(labels, np.uint8, offset=8).tolist(), [str(digit) for digit in range(10)])
        self.annotation_paths = [labels]

    def open(self) -> Any:
        return np.memmap(self.path, np.uint8, "r", offset=16, shape=self.shape)


class STL10(ImageArrays):
    """STL-10: 96 x 96 pixels, stored channel by channel and column by column; ``stl10_binary``.

    Args:
        root: the folder with ``stl10_binary``.
        split: ``train`` or ``test``.
        fold: one of the ten folds of 1,000 training images; None: all 5,000. ``test`` is the same for all folds.
    """

    def __init__(self, root: str, split: TrainTest = "test", fold: int | None = None) -> None:
        folder = Path(root) / "stl10_binary"
        pixels, labels = folder / f"{split}_X.bin", folder / f"{split}_y.bin"
        refuse_missing(pixels, labels)
        with reading(labels, "file of labels", hint=AGAIN):
            classes = np.fromfile(labels, np.uint8).astype(int) - 1
        if pixels.stat().st_size != len(classes) * 3 * 96 * 96:
            raise InputError(
                f"{pixels}: not {len(classes)} images, the number of labels in {labels.name}; get both again"
            )
        rows, annotations = list(range(len(classes))), [labels]
        if split == "train" and fold is not None:
            rows, annotations = _fold(folder, fold, len(classes)), [labels, folder / "fold_indices.txt"]
        super().__init__(pixels, classes[rows].tolist(), STL10_CLASSES, None if len(rows) == len(classes) else rows)
        self.annotation_paths = annotations
        self.count = len(classes)

    def open(self) -> Any:
        return np.memmap(self.path, np.uint8, "r", shape=(self.count, 3, 96, 96))

    def image(self, pixels: Any, row: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(pixels[row].transpose(2, 1, 0)))


def _fold(folder: Path, fold: int, count: int) -> list[int]:
    path = folder / "fold_indices.txt"
    lines = read_text(path).splitlines()
    if not 0 <= fold < len(lines):
        raise InputError(f"{path}: fold must be between 0 and {len(lines) - 1}, not {fold}")
    numbers = [whole_number(word) for word in lines[fold].split()]
    rows = [number for number in numbers if number is not None and number < count]
    if not rows or len(rows) < len(numbers):
        raise InputError(f"{path} line {fold + 1}: not indices of the {count} images; get the file again")
    return rows


class PCam(ImageArrays):
    """PatchCamelyon: images of lymph nodes, 96 x 96 pixels, in HDF5 files."""

    def __init__(self, root: str, split: TrainValTest = "test") -> None:
        part = {"train": "train", "val": "valid", "test": "test"}[split]
        start = f"camelyonpatch_level_2_split_{part}"
        pixels, labels = (Path(root) / "pcam" / f"{start}_{array}.h5" for array in "xy")
        refuse_missing(pixels, labels)
        shape, stored = _dataset(pixels, "x").shape, _dataset(labels, "y")
        count = shape[0] if shape else 0
        require(shape == (count, 96, 96, 3), f"{pixels}: pixels of shape {shape}, not [N, 96, 96, 3]; get it again")
        if count != stored.size:
            raise InputError(f"{pixels}: {count} images for the {stored.size} labels of {labels.name}; get both again")
        require(count <= MOST_IMAGES, f"{pixels}: {count} images are more than PatchCamelyon has; get it again")
        with reading(labels, "file of labels", hint=AGAIN):
            classes = np.asarray(stored).reshape(-1)
        names = ["lymph node", "lymph node containing metastatic tumor tissue"]
        super().__init__(pixels, classes.tolist(), names)
        self.annotation_paths = [labels]

    def open(self) -> Any:
        return _dataset(self.path, "x")


def _dataset(path: Path, name: str) -> Any:
    h5py = import_optional("h5py", "h5py", path)
    with reading(path, f"HDF5 file with {name!r}", hint=AGAIN):
        file = h5py.File(path, "r")
    dataset = own_dataset(file, path, name)
    require(dataset.dtype.kind in "iu", f"{path}: {name} has values of type {dataset.dtype}; {AGAIN}")
    return dataset
