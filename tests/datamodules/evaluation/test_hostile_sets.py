"""Hostile files of evaluation sets end in a line that names the file; no code runs and no other file is read."""

import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import datamodules.evaluation as sets
from lit_clip.errors import InputError

h5py: Any = pytest.importorskip("h5py")
scipy_io: Any = pytest.importorskip("scipy.io")

PIXELS = np.zeros((2, 3072), np.uint8)
TOUCH = "touch ran"  # in the working folder, which the test looks at


class _Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (TOUCH,)


def _written(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def _tar(*members: tuple[str, bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    return write


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def _hdf5(fill: Callable[[Any], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            fill(file)

    return write


def _elsewhere(path: Path) -> Path:
    """Write a file of pixels that a set's file may not take its own from."""
    other = path.parents[1] / "other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = np.zeros((2, 96, 96, 3), np.uint8)
    return other


def _external_link(path: Path) -> None:
    other = _elsewhere(path)
    _hdf5(lambda file: file.__setitem__("x", h5py.ExternalLink(str(other), "x")))(path)


def _virtual(path: Path) -> None:
    layout = h5py.VirtualLayout((2, 96, 96, 3), np.uint8)
    layout[:] = h5py.VirtualSource(str(_elsewhere(path)), "x", (2, 96, 96, 3))
    _hdf5(lambda file: file.create_virtual_dataset("x", layout))(path)


def _raw(path: Path) -> None:
    external = [("/etc/passwd", 0, 2 * 96 * 96 * 3)]
    _hdf5(lambda file: file.create_dataset("x", (2, 96, 96, 3), np.uint8, external=external))(path)


def _cifar(batch: Any, names: Any = ("x", "y")) -> dict[str, Any]:
    content = batch if isinstance(batch, bytes) or callable(batch) else pickle.dumps(batch, protocol=2)
    folder = "cifar-10-batches-py"
    return {f"{folder}/test_batch": content, f"{folder}/batches.meta": pickle.dumps({"label_names": list(names)})}


def _pcam(pixels: Any, labels: Any = None) -> dict[str, Any]:
    start = "pcam/camelyonpatch_level_2_split_test"
    good = _hdf5(lambda file: file.__setitem__("y", np.zeros((2, 1, 1, 1), np.uint8)))
    whole = _hdf5(lambda file: file.__setitem__("x", np.zeros((2, 96, 96, 3), np.uint8)))
    return {f"{start}_x.h5": pixels or whole, f"{start}_y.h5": labels or good}


def _voc(annotation: Any) -> dict[str, Any]:
    folder = "VOCdevkit/VOC2007"
    return {f"{folder}/ImageSets/Main/test.txt": "1\n", f"{folder}/Annotations/1.xml": annotation}


def _tars(target: str, content: bytes, kind: str = "classification", shards: str = "1") -> dict[str, Any]:
    tar = _tar(("a.png", _png()), (f"a.{target}", content))
    return {"dataset_type.txt": kind, "classnames.txt": "x\ny\n", "test/nshards.txt": shards, "test/0.tar": tar}


def _marks(content: bytes) -> dict[str, Any]:
    return _tars("npy", content, "multilabel")


def _fer(row: str) -> dict[str, Any]:
    return {"fer2013/fer2013.csv": f"emotion,pixels,Usage\n{row},PrivateTest\n"}


def _clevr(scenes: Any) -> dict[str, Any]:
    return {"clevr/CLEVR_v1.0/scenes/CLEVR_val_scenes.json": scenes if isinstance(scenes, str) else json.dumps(scenes)}


def _rareact(label: str) -> dict[str, Any]:
    header = "video_id,start,end,class_id,verb,noun,annotation"
    return {"v.mp4": "junk", "rareact.csv": f"{header}\nv,0,1,{label},cut,egg,1\n"}


def _mat(**variables: Any) -> Callable[[Path], None]:
    return lambda path: scipy_io.savemat(path, variables)


LAUGHS = (
    '<!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><annotation><object><name>&b;</name></object></annotation>'
)
CAR = np.zeros((1, 1), dtype=[("fname", object), ("class", object)])
CAR[0, 0] = ("1.jpg", "x")
CARS = {
    "stanford_cars/cars_test_annos_withlabels.mat": _mat(annotations=CAR),
    "stanford_cars/devkit/cars_meta.mat": _mat(class_names=["x", "y"]),
}
KITTI = {
    "Kitti/raw/mapping/train_mapping.txt": "".join(f"2011 v{number} 1\n" for number in range(3)),
    "Kitti/raw/mapping/train_rand.txt": "-1,0",
}
MNIST = {
    "MNIST/raw/t10k-images-idx3-ubyte": b"\0\0\x08\x03" + struct.pack(">III", 2**31, 2**31, 4),
    "MNIST/raw/t10k-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\0",
}
TERABYTES = _hdf5(lambda file: file.create_dataset("y", (2**40,), np.uint8, chunks=(1024,)))
NUMBERS = _hdf5(lambda file: file.create_group("digitStruct").create_dataset("name", (1, 1)))
OBJECTS = (
    b"\x93NUMPY\x01\0v\0" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999,), }".ljust(117) + b"\n"
)
GIRAFFE = "<annotation><object><name>giraffe</name></object></annotation>"
ELEVEN = {"scenes": [{"image_filename": "a.png", "objects": [{}] * 11}]}
RUNS = {"val/a.JPEG": _png(), "meta.bin": pickle.dumps(({}, _Evil()))}
ODD = {"data": PIXELS, "labels": ["x", None]}
TWO = {"data": PIXELS, "labels": [0, 1]}
EVIL = _npy(np.array([_Evil()], dtype=object))
NOT_TEXT = {"scenes": [{"image_filename": [], "objects": []}]}

# What the set is, its files, and the error
HOSTILE: dict[str, tuple[Callable[[str], Any], dict[str, Any], str]] = {
    "CIFAR that runs code": (sets.CIFAR10, _cifar({"data": _Evil(), "labels": [0]}), "test_batch.*would run .*system"),
    "CIFAR of objects": (sets.CIFAR10, _cifar({**TWO, "data": PIXELS.astype(object)}), "test_batch: not a"),
    "CIFAR of odd labels": (sets.CIFAR10, _cifar(ODD), "test_batch.*no list of num"),
    "CIFAR of odd names": (sets.CIFAR10, _cifar(TWO, [1, 2]), "batches.meta.*no list of na"),
    "CIFAR of a third class": (sets.CIFAR10, _cifar({**TWO, "labels": [0, 2]}), "label 2 is none of the 2"),
    "CIFAR of a terabyte": (sets.CIFAR10, _cifar(b"\x80\x05\x96" + struct.pack("<Q", 2**40)), "test_batch: not a"),
    "CIFAR in a pipe": (sets.CIFAR10, _cifar(os.mkfifo), "test_batch: neither a file nor a folder"),
    "MNIST of exabytes": (sets.MNIST, MNIST, "images-idx3-ubyte: not a complete IDX file"),
    "FER2013 of a word": (sets.FER2013, _fer(f"\u00b2,{'7 ' * 48 * 48}"), "not a face"),
    "FER2013 of a long field": (
        sets.FER2013,
        _fer(f"1,{'7' * 3_000_000}"),
        "fer2013.csv: not a readable table of faces",
    ),
    "PCam in another file": (sets.PCam, _pcam(_external_link), "test_x.h5: x is no data set of its own"),
    "PCam of other files": (sets.PCam, _pcam(_virtual), "test_x.h5: x is no data set of its own"),
    "PCam of raw bytes": (sets.PCam, _pcam(_raw), "test_x.h5: x is no data set of its own"),
    "PCam of a folder": (sets.PCam, _pcam(_hdf5(lambda file: file.create_group("x"))), "x is no data set of its own"),
    "PCam of terabytes": (sets.PCam, _pcam(None, TERABYTES), "2 images for the 1099511627776 labels"),
    "SVHN of numbers": (sets.SVHNNumbers, {"test/digitStruct.mat": NUMBERS}, "digitStruct.mat: not a readable"),
    "IIIT5K of numbers": (
        sets.IIIT5K,
        {"testdata.mat": _mat(testdata=np.zeros((2, 2)))},
        "testdata.mat: not a readable file of IIIT5K's testdata",
    ),
    "Stanford Cars of words": (sets.StanfordCars, CARS, "withlabels.mat: not a readable list of cars"),
    "VOC of entities": (sets.VOC2007, _voc(LAUGHS), "1.xml: not an annotation of VOC, which has no declarations"),
    "VOC of giraffes": (sets.VOC2007, _voc(GIRAFFE), "1.xml: .*giraffe"),
    "VOC nested": (sets.VOC2007, _voc("<a>" * 100_000), "1.xml: not a readable annotation"),
    "VOC in a pipe": (sets.VOC2007, _voc(os.mkfifo), "1.xml: neither a file nor a folder"),
    "CLEVR nested": (sets.CLEVRCounts, _clevr("[" * 100_000), "scenes.json: not a readable JSON file .nested too"),
    "CLEVR of lists": (sets.CLEVRCounts, _clevr(NOT_TEXT), "scenes.json: .*image_filename: .* must be a text"),
    "CLEVR of eleven": (
        lambda root: sets.CLEVRCounts(root, test=1),
        _clevr(ELEVEN),
        "11 is none of the 8 classes",
    ),
    "KITTI counting backwards": (sets.KITTI, KITTI, "train_rand.txt: not a readable list of line numbers"),
    "Food-101 without images": (
        sets.Food101,
        {"food-101/meta/test.json": '{"apple_pie": ["apple_pie/1"]}'},
        "images/apple_pie: no such folder",
    ),
    "Food-101 of numbers": (sets.Food101, {"food-101/meta/test.json": '{"x": [3]}'}, "test.json: .* must be a text"),
    "tars with a long number": (sets.WebDataset, _tars("cls", b"9" * 5000), "sample a: its label is '9999"),
    "tars with another digit": (sets.WebDataset, _tars("cls", "\u00b2".encode()), "sample a: its label is"),
    "tars without number": (sets.WebDataset, _tars("cls", b"1", shards="9" * 5000), "nshards.txt: '9999"),
    "tar with large target": (sets.WebDataset, _tars("cls", b"1" * 2_000_000), "its .cls has 2,000,000 bytes"),
    "tars that run code": (sets.WebDatasetMultiLabel, _marks(EVIL), "its .npy: not a readable array"),
    "tars of a raw pickle": (sets.WebDatasetMultiLabel, _marks(pickle.dumps(_Evil())), ".npy: not a readable array"),
    "tars of terabytes": (sets.WebDatasetMultiLabel, _marks(OBJECTS), "its .npy: not a readable array"),
    "tars of words": (sets.WebDatasetMultiLabel, _marks(_npy(np.array(["1", "0"]))), "its .npy must hold"),
    "RareAct without a class": (sets.RareAct, _rareact("nan"), "class_id is 'nan', not a number"),
    "RareAct between classes": (sets.RareAct, _rareact("0.5"), "class_id must be a whole number, not 0.5"),
    "ImageNet that runs code": (sets.ImageNet, RUNS, "meta.bin: not a readable file of torchvision's"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_of_a_set_is_refused_in_one_line_that_names_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, files, message = HOSTILE[case]
    for name, content in files.items():
        _written(tmp_path / "set" / name, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        make(str(tmp_path / "set"))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "set") in str(error.value)
    assert len(str(error.value)) < 800
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", ["#EXTM3U\n#EXTINF:1,\nfile:{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n"]
)
def test_list_of_other_files_is_no_video(tmp_path: Path, content: str) -> None:
    pytest.importorskip("av")
    lists = {"classInd.txt": "1 A\n", "testlist01.txt": "A/v.avi\n"}
    for name, text in lists.items():
        _written(tmp_path / "ucfTrainTestlist" / name, text)
    _written(tmp_path / "UCF-101/A/v.avi", content.format(tmp_path / "secret.mp4"))
    videos = sets.UCF101(str(tmp_path), "test")
    with pytest.raises(InputError, match=r"v\.avi: cannot read this video"):
        videos.images(0)
