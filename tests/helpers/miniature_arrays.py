"""Writers of miniatures whose images are in arrays, or whose lists are in binary files, in their original layouts."""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.coloured_sets import write_files
from tests.helpers.miniature_images import Row, Rows, pixels, structs, write_mat


def stacked(rows: list[Row], side: int, channels: int) -> np.ndarray:
    return np.stack([pixels(row.number, side, channels) for row in rows])


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


def write_cifar(root: Path, batches: dict[str, list[Row]], labels: str, meta: dict[str, Any]) -> None:
    """Write batches below ``root``, with the names of the classes in the last, whose path ``meta`` has."""
    for path, rows in batches.items():
        data = stacked(rows, 32, 3).transpose(0, 3, 1, 2).reshape(len(rows), -1)
        batch = {"batch_label": path, labels: [row.label for row in rows], "data": data}
        write_files(root, {path: python2_pickle(batch)})
    write_files(root, {path: python2_pickle(names) for path, names in meta.items()})


CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_cifar10(root: Path, rows: Rows) -> None:
    folder, train = "cifar-10-batches-py", rows["train"]
    batches = {f"{folder}/data_batch_{part + 1}": train[2 * part : 2 * part + 2] for part in range(5)}
    batches[f"{folder}/test_batch"] = rows["test"]
    write_cifar(root, batches, "labels", {f"{folder}/batches.meta": {"label_names": CIFAR10_NAMES}})


def write_cifar100(root: Path, rows: Rows) -> None:
    names = {"fine_label_names": ["apple", "aquarium_fish", "baby"], "coarse_label_names": ["fish", "fruit"]}
    batches = {f"cifar-100-python/{split}": some for split, some in rows.items()}
    write_cifar(root, batches, "fine_labels", {"cifar-100-python/meta": names})


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">i", size) for size in array.shape) + array.tobytes()


def write_mnist(root: Path, rows: Rows) -> None:
    for split, start in (("train", "train"), ("test", "t10k")):
        labels = np.array([row.label for row in rows[split]], np.uint8)
        files = {"images-idx3-ubyte": idx(stacked(rows[split], 28, 1)), "labels-idx1-ubyte": idx(labels)}
        write_files(root / "MNIST/raw", {f"{start}-{name}": content for name, content in files.items()})


USAGES = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
FACES: Rows = {"train": [Row("0", 0, 0), Row("2", 6, 2)], "val": [Row("1", 3, 1)]}
FACES["test"] = [Row("3", 1, 3), Row("4", 3, 4)]


def write_fer2013(root: Path, rows: Rows, name: str = "fer2013.csv") -> None:
    """Write the challenge's table, whose columns have other places, and spaces before them, under its other name."""
    usage_of = {row: USAGES[split] for split, some in rows.items() for row in some}
    lines = ["emotion,pixels,Usage" if name == "fer2013.csv" else "emotion, Usage, pixels"]
    for row in sorted(usage_of, key=lambda row: row.number):
        cells = [" ".join(map(str, pixels(row.number, 48, 1).reshape(-1))), usage_of[row]]
        lines.append(",".join([str(row.label), *(cells if name == "fer2013.csv" else cells[::-1])]))
    write_files(root / "fer2013", {name: "\n".join(lines)})


VOTES = """Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF
Training,fer0000000.png,4,0,0,1,3,2,0,0,0,0
PublicTest,fer0000001.png,1,1,1,1,1,1,1,3,0,0
Training,fer0000002.png,2,8,0,0,0,0,0,0,0,0
PrivateTest,fer0000003.png,0,0,0,0,1,9,0,0,0,0
PrivateTest,fer0000004.png,0,0,0,0,0,0,6,0,4,0
"""


def write_fer_plus(root: Path, rows: Rows | None = None) -> None:
    """Write FER2013's table and FER+'s: no majority for the first image; single votes do not count for the second."""
    write_fer2013(root, FACES)
    write_files(root / "fer2013", {"fer2013new.csv": VOTES})


def write_stl10(root: Path, rows: Rows) -> None:
    """Write pixels by columns, labels from 1, and folds of two images."""
    files: dict[str, Any] = {"fold_indices.txt": "".join(f"{i % 4} {(i + 2) % 4} \n" for i in range(10))}
    for split, some in rows.items():
        files[f"{split}_X.bin"] = stacked(some, 96, 3).transpose(0, 3, 2, 1).tobytes()
        files[f"{split}_y.bin"] = bytes(row.label + 1 for row in some)
    write_files(root / "stl10_binary", files)


def write_pcam(root: Path, rows: Rows) -> None:
    import h5py

    (root / "pcam").mkdir(parents=True)
    for split, part in (("train", "train"), ("val", "valid"), ("test", "test")):
        start = f"{root}/pcam/camelyonpatch_level_2_split_{part}"
        with h5py.File(f"{start}_x.h5", "w") as file:
            data = stacked(rows[split], 96, 3)
            file.create_dataset("x", data=data, chunks=(1, 96, 96, 3), compression="gzip")
        with h5py.File(f"{start}_y.h5", "w") as file:
            file["y"] = np.array([row.label for row in rows[split]], np.uint8).reshape(-1, 1, 1, 1)


def write_cars(root: Path, rows: Rows) -> None:
    names = np.array([["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"]], dtype=object)
    write_mat(root / "stanford_cars/devkit/cars_meta.mat", class_names=names)
    for split, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        cars = [{"bbox_x1": 30, "class": row.label + 1, "fname": Path(row.key).name} for row in rows[split]]
        write_mat(root / "stanford_cars" / path, annotations=structs(*cars))


def write_flowers(root: Path, rows: Rows) -> None:
    label_of = {int(row.key[-9:-4]): row.label + 1 for some in rows.values() for row in some}
    labels = np.array([[label_of[number] for number in sorted(label_of)]], np.uint8)
    write_mat(root / "flowers-102/imagelabels.mat", labels=labels)
    ids = {"train": "trnid", "val": "valid", "test": "tstid"}
    numbers = {ids[split]: np.array([[int(row.key[-9:-4]) for row in some]], np.uint16) for split, some in rows.items()}
    write_mat(root / "flowers-102/setid.mat", **numbers)


def write_digit_struct(path: Path, numbers: dict[str, list[int]]) -> None:
    """Write a struct array like MATLAB 7.3: cells are references, a single value is stored directly."""
    import h5py

    with h5py.File(path, "w") as file:
        references = file.create_group("#refs#")
        cells: dict[str, list[Any]] = {"name": [], "bbox": []}
        for i, (name, digits) in enumerate(numbers.items()):
            references[f"n{i}"] = np.array([[ord(letter)] for letter in name], dtype=np.uint16)
            cells["name"].append(references[f"n{i}"].ref)
            box = references.create_group(f"b{i}")
            for j, digit in enumerate(digits):
                references[f"l{i}_{j}"] = np.array([[float(digit)]])
            if len(digits) == 1:
                box["label"] = np.array([[float(digits[0])]])
            else:
                labels = np.array([[references[f"l{i}_{j}"].ref] for j in range(len(digits))], dtype=object)
                box.create_dataset("label", data=labels, dtype=h5py.ref_dtype)
            cells["bbox"].append(box.ref)
        for field, values in cells.items():
            column = np.array([[value] for value in values], dtype=object)
            file.create_dataset(f"digitStruct/{field}", data=column, dtype=h5py.ref_dtype)


def write_svhn(root: Path, rows: Rows) -> None:
    numbers = {"1.png": [5], "2.png": [2, 1, 10], "3.png": [1, 10], "4.png": [5], "5.png": [10, 5]}
    write_digit_struct(root / "test/digitStruct.mat", numbers)  # 10 is the digit 0


def write_iiit5k(root: Path, rows: Rows) -> None:
    first = {"ImgName": "test/1_1.png", "GroundTruth": "PRIVATE", "smallLexi": ["PRIVATE", "ROAD"]}
    first |= {"mediumLexi": ["PRIVATE", "ROAD", "TAXI"]}
    second = {"ImgName": "test/1_2.png", "GroundTruth": "Road", "smallLexi": ["PARKING", "TAXI"]}  # lacks its own word
    write_mat(root / "testdata.mat", testdata=structs(first, second | {"mediumLexi": ["TAXI", "road"]}))
