"""Sets of table 9 whose images lie together in one file: arrays, a table, HDF5.

Files lie as torchvision lays them out. Labels are read when a set is made; pixels stay in the file, which each process
opens when it is first asked for one.
"""

import csv
import os
import pickle
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from datamodules.evaluation.indexes import read_text
from datamodules.evaluation.torchvision_sets import Halves, Thirds
from lit_clip.errors import BadSample, InputError
from lit_clip.evaluation.data import LabelledImages, MissingData
from lit_clip.tools.hashing import hex_digest, stamp_of_files

EMOTIONS = ["angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"]
STL10_CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
FACE = 48  # pixels a side


def _present(*paths: Path) -> None:
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise MissingData(f"{missing}: no such file")


class ImageArrays(LabelledImages):
    """Images in rows of a file.

    Args:
        path: the file.
        labels: of each image its class.
        class_names: in label order.
        rows: of each image its row in the file; None: all of them, in order.

    Raises:
        InputError: no labels, or one that is none of the classes.
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
            what = "no images" if wrong is None else f"label {wrong} is none of the {len(self.class_names)} classes"
            raise InputError(f"{path}: {what}; get the files again")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        where = f"{self.path} row {self.rows[index]}"
        try:
            return self.image(self._pixels(), self.rows[index]), self._labels[index]
        except (OSError, ValueError, IndexError, KeyError) as error:
            if isinstance(error, InputError):
                raise
            raise BadSample(where, "broken image", f"cannot read its pixels ({error}); get the file again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # a data worker opens its own

    def _pixels(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():  # HDF5 files do not survive a fork
            self._opened = (os.getpid(), self.open())
        return self._opened[1]

    @abstractmethod
    def open(self) -> Any:
        """The file's pixels, such that rows of them can be read."""

    def image(self, pixels: Any, row: int) -> Image.Image:
        """A row of what :meth:`open` returned as an image."""
        return Image.fromarray(np.asarray(pixels[row]))

    def labels(self) -> list[int]:
        return list(self._labels)

    def key(self, index: int) -> str:
        return str(self.rows[index])

    def stamp(self) -> str:
        rows = hex_digest(self.rows)
        return f"{stamp_of_files([self.path])}-{rows}"


class _CIFAR(ImageArrays):
    """Pickled batches of ``uint8 [N, 3072]``: 32 x 32 pixels, one colour after the other."""

    FOLDER: str
    PARTS: dict[str, list[str]]
    META: tuple[str, str]
    LABELS: str

    def __init__(self, root: str, split: Halves = "test") -> None:
        folder = Path(root) / self.FOLDER
        self.paths = [folder / name for name in self.PARTS[split]]
        _present(*self.paths, folder / self.META[0])
        batches = [_unpickled(path, "data", self.LABELS) for path in self.paths]
        labels = [label for batch in batches for label in batch[self.LABELS]]
        (names,) = (_unpickled(folder / self.META[0], self.META[1])[self.META[1]],)
        super().__init__(self.paths[0], labels, [name.replace("_", " ") for name in names])
        self._opened = (os.getpid(), np.concatenate([batch["data"] for batch in batches]))

    def open(self) -> Any:
        return np.concatenate([_unpickled(path, "data", self.LABELS)["data"] for path in self.paths])

    def image(self, pixels: Any, row: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(pixels[row].reshape(3, 32, 32).transpose(1, 2, 0)))

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


class _Arrays(pickle.Unpickler):
    """Unpickles lists, texts and arrays, and refuses whatever else a file would run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode") or (
            module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def _unpickled(path: Path, *keys: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="latin1").load()
        if "data" in keys and content["data"].shape != (len(content[keys[1]]), 3072):
            raise ValueError(f"pixels of shape {content['data'].shape}")
        return {key: content[key] for key in keys}
    except Exception as error:  # a broken pickle fails with whatever its bytes happen to say
        what = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a batch of CIFAR ({what}); get it again") from error


def _idx_size(path: Path, dimensions: int) -> tuple[int, ...]:
    """The sizes that an IDX file of bytes states: 0, 0, 8 (bytes), the number of dimensions, and each as 4 bytes."""
    with path.open("rb") as file:
        head = file.read(4 + 4 * dimensions)
    sizes = tuple(int.from_bytes(head[start : start + 4], "big") for start in range(4, len(head), 4))
    if head[:4] != bytes([0, 0, 8, dimensions]) or path.stat().st_size != len(head) + int(np.prod(sizes)):
        raise InputError(f"{path}: not a whole IDX file of bytes in {dimensions} dimensions; get it again")
    return sizes


class MNIST(ImageArrays):
    """MNIST: digits of 28 x 28 grey pixels in unpacked IDX files, ``MNIST/raw``."""

    def __init__(self, root: str, split: Halves = "test") -> None:
        start = str(Path(root) / "MNIST" / "raw" / ("train" if split == "train" else "t10k"))
        images, labels = Path(f"{start}-images-idx3-ubyte"), Path(f"{start}-labels-idx1-ubyte")
        _present(images, labels)
        self.shape = _idx_size(images, 3)
        if _idx_size(labels, 1)[0] != self.shape[0]:
            raise InputError(f"{labels}: not as many labels as {images.name} has images; get both again")
        super().__init__(images, np.fromfile(labels, np.uint8, offset=8).tolist(), [str(digit) for digit in range(10)])

    def open(self) -> Any:
        return np.memmap(self.path, np.uint8, "r", offset=16, shape=self.shape)


class FER2013(ImageArrays):
    """Faces of 48 x 48 grey pixels with one of seven emotions, in a table: ``fer2013.csv`` or ``icml_face_data.csv``.

    Args:
        root: the folder with ``fer2013``.
        split: ``train`` is the challenge's Training, ``val`` its PublicTest, ``test`` its PrivateTest.
    """

    def __init__(self, root: str, split: Thirds = "test") -> None:
        folder = Path(root) / "fer2013"
        places = [folder / "fer2013.csv", folder / "icml_face_data.csv"]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise MissingData(f"{folder}: neither fer2013.csv nor icml_face_data.csv in it")
        usage = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}[split]
        labels, rows = [], []
        self.starts: list[int] = []  # of every row of the table its first byte
        with path.open("rb") as file:
            self.columns = _cells(file.readline())
            if set(self.columns) != {"emotion", "pixels", "Usage"}:
                raise InputError(f"{path}: its columns are {', '.join(self.columns)}, not emotion, pixels, Usage")
            while line := self._next(file):
                if not line.strip():
                    continue
                cells = dict(zip(self.columns, _cells(line), strict=False))
                if not cells["emotion"].isdigit() or "Usage" not in cells:
                    raise InputError(
                        f"{path} row {len(self.starts) - 1}: not a face with its emotion; get the file again"
                    )
                if cells["Usage"] == usage:
                    rows.append(len(self.starts) - 1)
                    labels.append(int(cells["emotion"]))
        super().__init__(path, labels, EMOTIONS, rows)

    def _next(self, file: Any) -> bytes:
        self.starts.append(file.tell())
        return file.readline()

    def open(self) -> Any:
        return self.path.open("rb")

    def image(self, pixels: Any, row: int) -> Image.Image:
        pixels.seek(self.starts[row])
        cells = dict(zip(self.columns, _cells(pixels.readline()), strict=True))
        values = np.array(cells["pixels"].split(), dtype=np.uint8)
        return Image.fromarray(values.reshape(FACE, FACE))


def _cells(line: bytes) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line.decode("utf-8-sig", "replace")]), [])]


class STL10(ImageArrays):
    """STL-10: 96 x 96 pixels, column after column, colour after colour; ``stl10_binary``.

    Args:
        root: the folder with ``stl10_binary``.
        split: ``train`` or ``test``.
        fold: of ``train`` the 1,000 images of one of the ten folds; None: all 5,000. ``test`` is the same for all.
    """

    def __init__(self, root: str, split: Halves = "test", fold: int | None = None) -> None:
        folder = Path(root) / "stl10_binary"
        pixels, labels = folder / f"{split}_X.bin", folder / f"{split}_y.bin"
        _present(pixels, labels)
        classes = np.fromfile(labels, np.uint8).astype(int) - 1
        if pixels.stat().st_size != len(classes) * 3 * 96 * 96:
            raise InputError(f"{pixels}: not {len(classes)} images as {labels.name} has labels; get both again")
        rows = list(range(len(classes))) if split == "test" or fold is None else _fold(folder, fold, len(classes))
        super().__init__(pixels, classes[rows].tolist(), STL10_CLASSES, None if len(rows) == len(classes) else rows)
        self.count = len(classes)

    def open(self) -> Any:
        return np.memmap(self.path, np.uint8, "r", shape=(self.count, 3, 96, 96))

    def image(self, pixels: Any, row: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(pixels[row].transpose(2, 1, 0)))


def _fold(folder: Path, fold: int, count: int) -> list[int]:
    path = folder / "fold_indices.txt"
    lines = read_text(path).splitlines()
    if not 0 <= fold < len(lines):
        raise InputError(f"{path}: no fold {fold}; it has 0 to {len(lines) - 1}")
    words = lines[fold].split()
    if not words or not all(word.isdigit() and int(word) < count for word in words):
        raise InputError(f"{path} line {fold + 1}: not numbers of the {count} images; get it again")
    return [int(word) for word in words]


class PCam(ImageArrays):
    """PatchCamelyon: 96 x 96 pixels of lymph nodes, in HDF5 files."""

    def __init__(self, root: str, split: Literal["train", "val", "test"] = "test") -> None:
        part = {"train": "train", "val": "valid", "test": "test"}[split]
        start = f"camelyonpatch_level_2_split_{part}"
        pixels, labels = (Path(root) / "pcam" / f"{start}_{what}.h5" for what in "xy")
        _present(pixels, labels)
        classes = np.asarray(_dataset(labels, "y")).reshape(-1)
        count = _dataset(pixels, "x").shape[0]
        if count != len(classes):
            raise InputError(f"{pixels}: {count} images for the {len(classes)} labels of {labels.name}; get both again")
        names = ["lymph node", "lymph node containing metastatic tumor tissue"]
        super().__init__(pixels, classes.tolist(), names)

    def open(self) -> Any:
        return _dataset(self.path, "x")


def _dataset(path: Path, name: str) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: is read with h5py, which is not installed; pip install h5py") from error
    try:
        return h5py.File(path, "r")[name]
    except (OSError, KeyError) as error:
        raise InputError(f"{path}: not an HDF5 file with {name!r} ({error}); get it again") from error
