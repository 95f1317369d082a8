"""Sets of table 9 with all images in one file (an array, a table, HDF5), in torchvision's layout on disk.

Labels are read on construction. Pixels stay in the file, which each process opens when it first reads an image.
"""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lit_clip.errors import BadSample, InputError, require
from lit_clip.tools.hashing import hex_digest, stamp_of_files
from lit_clip.tools.reading import reading
from .annotation_files import (
    AGAIN,
    ArrayUnpickler,
    import_optional,
    own_dataset,
    read_text,
    refuse_missing,
    whole_number,
)
from .image_files import KnownLabels, TrainTest, TrainValTest

STL10_CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
MOST_IMAGES = 1_000_000  # of PatchCamelyon, which has 262,144 to train on


def _as_stored(pixels: Any, row: int) -> Image.Image:
    return Image.fromarray(np.asarray(pixels[row]))


class ImageArrays(KnownLabels):
    """Images stored as rows of one or several files.

    ``open_pixels`` opens them, and ``image`` returns a row of the pixels; ``rows`` are the images', by default all.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        open_pixels: Callable[[], Any],
        labels: Sequence[int],
        class_names: Sequence[str],
        annotations: Sequence[Path],
        rows: Sequence[int] | None = None,
        image: Callable[[Any, int], Image.Image] = _as_stored,
    ) -> None:
        self.paths, self.class_names, self.annotation_paths = list(paths), list(class_names), annotations
        self._labels = [int(label) for label in labels]
        self.rows = range(len(self._labels)) if rows is None else [int(row) for row in rows]
        self._open_pixels, self._image = open_pixels, image
        self._opened: tuple[int, Any] | None = None
        wrong = next((label for label in self._labels if not 0 <= label < len(self.class_names)), None)
        if not self._labels or wrong is not None:
            problem = "no images" if wrong is None else f"label {wrong} is none of the {len(self.class_names)} classes"
            raise InputError(f"{paths[0]}: {problem}; get the files again")

    def image(self, index: int) -> Image.Image:
        where = f"{self.paths[0]} row {self.rows[index]}"
        try:
            return self._image(self._pixels(), self.rows[index])
        except InputError:
            raise
        except Exception as error:  # numpy and h5py raise anything for damaged pixels
            raise BadSample(where, "broken image", f"cannot read its pixels ({error}); get the file again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # each data worker opens the file itself

    def _pixels(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():  # HDF5 files do not survive a fork
            self._opened = (os.getpid(), self._open_pixels())
        return self._opened[1]

    def image_paths(self) -> list[Path]:
        return self.paths

    def key(self, index: int) -> str:
        return str(self.rows[index])

    def stamp(self) -> str:
        return f"{stamp_of_files(self.paths)}-{hex_digest(self.rows)}"


def _cifar(folder: Path, parts: Sequence[str], meta: str, names_key: str, labels_key: str) -> ImageArrays:
    """Open pickled batches of ``uint8 [N, 3072]``: 32 x 32 pixels, one channel after the other."""
    paths = [folder / part for part in parts]
    refuse_missing(*paths, folder / meta)
    labels = [label for path in paths for label in _unpickle(path, "data", labels_key)[labels_key]]
    names = [name.replace("_", " ") for name in _unpickle(folder / meta, names_key)[names_key]]
    pixels = partial(_cifar_pixels, paths, labels_key)
    return ImageArrays(paths, pixels, labels, names, [folder / meta])


def CIFAR10(root: str, split: TrainTest = "test") -> ImageArrays:
    """CIFAR-10: ``cifar-10-batches-py``."""
    parts = [f"data_batch_{number}" for number in range(1, 6)] if split == "train" else ["test_batch"]
    return _cifar(Path(root) / "cifar-10-batches-py", parts, "batches.meta", "label_names", "labels")


def CIFAR100(root: str, split: TrainTest = "test") -> ImageArrays:
    """CIFAR-100 with its 100 fine classes: ``cifar-100-python``."""
    return _cifar(Path(root) / "cifar-100-python", [split], "meta", "fine_label_names", "fine_labels")


def _cifar_pixels(paths: Sequence[Path], labels_key: str) -> np.ndarray:
    pixels = np.concatenate([_unpickle(path, "data", labels_key)["data"] for path in paths])
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


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


def MNIST(root: str, split: TrainTest = "test") -> ImageArrays:
    """MNIST: grey digits of 28 x 28 pixels in unpacked IDX files, ``MNIST/raw``."""
    start = str(Path(root) / "MNIST" / "raw" / ("train" if split == "train" else "t10k"))
    images, labels = Path(f"{start}-images-idx3-ubyte"), Path(f"{start}-labels-idx1-ubyte")
    refuse_missing(images, labels)
    shape = _idx_size(images, 3)
    equal = _idx_size(labels, 1)[0] == shape[0]
    require(equal, f"{labels}: fewer or more labels than images in {images.name}; get both again")
    classes, names = np.fromfile(labels, np.uint8, offset=8).tolist(), [str(digit) for digit in range(10)]
    return ImageArrays([images], partial(np.memmap, images, np.uint8, "r", 16, shape), classes, names, [labels])


def _idx_size(path: Path, dimensions: int) -> tuple[int, ...]:
    """Read the array shape from an IDX file's header: 0, 0, 8 (bytes), the number of dimensions, 4 bytes for each."""
    with reading(path, "IDX file", hint=AGAIN), path.open("rb") as file:
        header = file.read(4 + 4 * dimensions)
    sizes = tuple(int.from_bytes(header[start : start + 4], "big") for start in range(4, len(header), 4))
    if header[:4] != bytes([0, 0, 8, dimensions]) or path.stat().st_size != len(header) + math.prod(sizes):
        raise InputError(f"{path}: not a complete IDX file of bytes in {dimensions} dimensions; get it again")
    return sizes


def STL10(root: str, split: TrainTest = "test", fold: int | None = None) -> ImageArrays:
    """STL-10: 96 x 96 pixels, stored channel by channel and column by column; ``stl10_binary``.

    ``fold`` is one of the ten folds of 1,000 training images; None: all 5,000. ``test`` is the same for all folds.
    """
    folder = Path(root) / "stl10_binary"
    path, labels = folder / f"{split}_X.bin", folder / f"{split}_y.bin"
    refuse_missing(path, labels)
    with reading(labels, "file of labels", hint=AGAIN):
        classes = np.fromfile(labels, np.uint8).astype(int) - 1
    if path.stat().st_size != len(classes) * 3 * 96 * 96:
        raise InputError(f"{path}: not {len(classes)} images, the number of labels in {labels.name}; get both again")
    rows, annotations = None, [labels]
    pixels = partial(_stl10_pixels, path, len(classes))
    if split == "train" and fold is not None:
        rows, annotations = _fold(folder, fold, len(classes)), [labels, folder / "fold_indices.txt"]
        classes = classes[rows]
    return ImageArrays([path], pixels, classes.tolist(), STL10_CLASSES, annotations, rows)


def _stl10_pixels(path: Path, count: int) -> np.ndarray:
    return np.memmap(path, np.uint8, "r", 0, (count, 3, 96, 96)).transpose(0, 3, 2, 1)


def _fold(folder: Path, fold: int, count: int) -> list[int]:
    path = folder / "fold_indices.txt"
    lines = read_text(path).splitlines()
    require(fold in range(len(lines)), f"{path}: fold must be between 0 and {len(lines) - 1}, not {fold}")
    words = lines[fold].split()
    rows = [number for word in words if (number := whole_number(word)) is not None and number < count]
    whole = bool(rows) and len(rows) == len(words)
    require(whole, f"{path} line {fold + 1}: not indices of the {count} images; get the file again")
    return rows


def PCam(root: str, split: TrainValTest = "test") -> ImageArrays:
    """PatchCamelyon: images of lymph nodes, 96 x 96 pixels, in HDF5 files."""
    start = f"camelyonpatch_level_2_split_{'valid' if split == 'val' else split}"
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
    return ImageArrays([pixels], partial(_dataset, pixels, "x"), classes.tolist(), names, [labels])


def _dataset(path: Path, name: str) -> Any:
    h5py = import_optional("h5py", "h5py", path)
    with reading(path, f"HDF5 file with {name!r}", hint=AGAIN):
        file = h5py.File(path, "r")
    dataset = own_dataset(file, path, name)
    require(dataset.dtype.kind in "iu", f"{path}: {name} has values of type {dataset.dtype}; {AGAIN}")
    return dataset
