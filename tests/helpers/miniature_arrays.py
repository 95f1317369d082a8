"""Miniatures of public data sets whose images are in arrays, in their original layouts.

Each ``write_...`` returns the expected rows of each split.
"""

import csv
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.miniature_images import Row, Rows, pixels, write_text


def python2_pickle(value: Any) -> bytes:
    """Pickle like Python 2 (protocol 2), which CIFAR's files use: strings are bytes, arrays refer to ``numpy.core``."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_opcodes(key) + _opcodes(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_opcodes, value)) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str | bytes):
        text = value.encode() if isinstance(value, str) else value
        return b"T" + struct.pack("<i", len(text)) + text
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.uint8
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(map(_opcodes, value.shape)) + b"t"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    return array + b"(K\x01" + shape + kind + b"\x89" + _opcodes(value.tobytes()) + b"tb"


CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def _write_cifar(folder: Path, batches: dict[str, list[tuple[int, int]]], labels: str, meta: tuple[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in batches.items():
        data = np.stack([pixels(number, 32, 3).transpose(2, 0, 1).reshape(-1) for _, number in items])
        batch = {"batch_label": name, labels: [label for label, _ in items], "data": data}
        (folder / name).write_bytes(python2_pickle(batch))
    (folder / meta[0]).write_bytes(python2_pickle(meta[1]))


def write_cifar10(root: Path) -> Rows:
    batches = {f"data_batch_{i}": [(i, 2 * i), (9 - i, 2 * i + 1)] for i in range(1, 6)}
    batches["test_batch"] = [(3, 50), (0, 51), (9, 52)]
    _write_cifar(root / "cifar-10-batches-py", batches, "labels", ("batches.meta", {"label_names": CIFAR10_NAMES}))
    train = [item for i in range(1, 6) for item in batches[f"data_batch_{i}"]]
    parts = {"train": train, "test": batches["test_batch"]}
    return {
        split: [Row(str(i), CIFAR10_NAMES[label], number) for i, (label, number) in enumerate(items)]
        for split, items in parts.items()
    }


def write_cifar100(root: Path) -> Rows:
    names = ["apple", "aquarium_fish", "baby"]
    batches = {"train": [(2, 1), (1, 2), (0, 3), (1, 4)], "test": [(1, 5), (0, 6)]}
    meta = {"fine_label_names": names, "coarse_label_names": ["fish", "fruit", "people"]}
    _write_cifar(root / "cifar-100-python", batches, "fine_labels", ("meta", meta))
    return {
        split: [Row(str(i), names[label].replace("_", " "), number) for i, (label, number) in enumerate(items)]
        for split, items in batches.items()
    }


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">i", size) for size in array.shape) + array.tobytes()


def write_mnist(root: Path) -> Rows:
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    rows: Rows = {}
    for split, start, labels in (("train", "train", [5, 0, 4, 1]), ("test", "t10k", [7, 2])):
        numbers = range(len(labels)) if split == "train" else range(10, 10 + len(labels))
        (folder / f"{start}-images-idx3-ubyte").write_bytes(idx(np.stack([pixels(n, 28, 1) for n in numbers])))
        (folder / f"{start}-labels-idx1-ubyte").write_bytes(idx(np.array(labels, np.uint8)))
        rows[split] = [
            Row(str(i), str(label), number) for i, (label, number) in enumerate(zip(labels, numbers, strict=True))
        ]
    return rows


FACES = [(0, "Training"), (3, "PublicTest"), (6, "Training"), (1, "PrivateTest"), (3, "PrivateTest")]


EMOTION_NAMES = {0: "angry", 1: "disgusted", 3: "happy", 6: "neutral"}


def write_fer2013(root: Path, name: str = "fer2013.csv") -> Rows:
    path = root / "fer2013" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["emotion", "pixels", "Usage"] if name == "fer2013.csv" else ["emotion", " Usage", " pixels"]
    rows: Rows = {"Training": [], "PublicTest": [], "PrivateTest": []}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for i, (emotion, usage) in enumerate(FACES):
            values = {"emotion": emotion, "Usage": usage, "pixels": " ".join(map(str, pixels(i, 48, 1).reshape(-1)))}
            writer.writerow({column: values[column.strip()] for column in columns})
            rows[usage].append(Row(str(i), EMOTION_NAMES[emotion], i))
    return {"train": rows["Training"], "val": rows["PublicTest"], "test": rows["PrivateTest"]}


VOTES = [  # on FER2013's images
    ("fer0000000.png", [4, 0, 0, 1, 3, 2, 0, 0, 0, 0]),  # no majority: 4 of 9
    ("fer0000001.png", [1, 1, 1, 1, 1, 1, 1, 3, 0, 0]),  # contempt: single votes do not count
    ("fer0000002.png", [2, 8, 0, 0, 0, 0, 0, 0, 0, 0]),
    ("fer0000003.png", [0, 0, 0, 0, 1, 9, 0, 0, 0, 0]),
    ("fer0000004.png", [0, 0, 0, 0, 0, 0, 6, 0, 4, 0]),
]


def write_fer_plus(root: Path) -> Rows:
    """Write FER2013's table and FER+'s, which has no majority for the first image."""
    write_fer2013(root)
    header = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
    lines = [",".join([usage, name, *map(str, votes)]) for (_, usage), (name, votes) in zip(FACES, VOTES, strict=True)]
    write_text(root / "fer2013/fer2013new.csv", "\n".join([header, *lines, ""]))
    return {
        "train": [Row("2", "happy", 2)],
        "val": [Row("1", "contemptuous", 1)],
        "test": [Row("3", "disgusted", 3), Row("4", "fearful", 4)],
    }


STL10_NAMES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def write_stl10(root: Path) -> Rows:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    rows: Rows = {}
    for split, labels, start in (("train", [2, 10, 7, 1], 1), ("test", [3, 8], 7)):
        numbers = range(start, start + len(labels))
        data = np.stack([pixels(number, 96, 3).transpose(2, 1, 0) for number in numbers])  # stored by columns
        (folder / f"{split}_X.bin").write_bytes(data.tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(labels))
        rows[split] = [
            Row(str(i), STL10_NAMES[label - 1], number)
            for i, (label, number) in enumerate(zip(labels, numbers, strict=True))
        ]
    write_text(folder / "fold_indices.txt", "".join(f"{i % 4} {(i + 2) % 4} \n" for i in range(10)))
    write_text(folder / "class_names.txt", "\n".join(STL10_NAMES))
    return rows


def write_pcam(root: Path) -> Rows:
    import h5py

    folder = root / "pcam"
    folder.mkdir(parents=True)
    names = ["lymph node", "lymph node containing metastatic tumor tissue"]
    rows: Rows = {}
    for split, part, labels, start in (
        ("train", "train", [1, 0, 1], 1),
        ("val", "valid", [0], 5),
        ("test", "test", [0, 1], 7),
    ):
        numbers = range(start, start + len(labels))
        stem = f"camelyonpatch_level_2_split_{part}"
        with h5py.File(folder / f"{stem}_x.h5", "w") as file:
            data = np.stack([pixels(number, 96, 3) for number in numbers])
            file.create_dataset("x", data=data, chunks=(1, 96, 96, 3), compression="gzip")
        with h5py.File(folder / f"{stem}_y.h5", "w") as file:
            file["y"] = np.array(labels, np.uint8).reshape(-1, 1, 1, 1)
        rows[split] = [
            Row(str(i), names[label], number) for i, (label, number) in enumerate(zip(labels, numbers, strict=True))
        ]
    return rows
