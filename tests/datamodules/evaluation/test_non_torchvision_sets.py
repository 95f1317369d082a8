"""Sets that torchvision lacks: a table of their files, keys, images and labels; digits, votes and MATLAB files."""

import importlib
import json
import os
import pickle
import random
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat

from datamodules import evaluation as sets
from datamodules.evaluation import RESISC45, Digits, LocatedImages
from datamodules.evaluation.annotation_files import MAT_PROGRAM, read_mat
from lit_clip.errors import InputError
from lit_clip.evaluation.data import MissingData
from lit_clip.tools.workers import loader
from tests.conftest import ROOT
from tests.helpers.coloured_sets import (
    assert_same_after_pickling,
    colour,
    colour_of,
    message_of,
    paint,
    paint_shade,
    shade,
    write_birdsnap,
    write_files,
    write_objectnet,
)
from tests.helpers.miniature_arrays import write_fer_plus
from tests.helpers.miniature_images import write_text

PROMPTS = json.loads((ROOT / "lit_clip/evaluation/paper_prompts.json").read_text(encoding="utf-8"))["sets"]


def write_digit_struct(path: Path, numbers: dict[str, list[int]]) -> None:
    """Write a struct array like MATLAB 7.3: cells are references, a single value is stored directly."""
    with h5py.File(path, "w") as file:
        references = file.create_group("#refs#")
        names, boxes = [], []
        for i, (name, digits) in enumerate(numbers.items()):
            references[f"n{i}"] = np.array([[ord(letter)] for letter in name], dtype=np.uint16)
            names.append(references[f"n{i}"].ref)
            box = references.create_group(f"b{i}")
            for field in ("height", "label", "left", "top", "width"):
                values = [float(digit if field == "label" else 1) for digit in digits]
                if len(values) == 1:
                    box[field] = np.array([values])
                    continue
                cells = []
                for j, value in enumerate(values):
                    references[f"{field}{i}_{j}"] = np.array([[value]])
                    cells.append([references[f"{field}{i}_{j}"].ref])
                box.create_dataset(field, data=np.array(cells, dtype=object), dtype=h5py.ref_dtype)
            boxes.append(box.ref)
        for field, values in (("name", names), ("bbox", boxes)):
            cells = np.array([[value] for value in values], dtype=object)
            file.create_dataset(f"digitStruct/{field}", data=cells, dtype=h5py.ref_dtype)


def write_words(path: Path, variable: str, rows: Sequence[tuple[str, str, list[str], list[str]]]) -> None:
    fields = [("ImgName", object), ("GroundTruth", object), ("smallLexi", object), ("mediumLexi", object)]
    structs = np.zeros((1, len(rows)), dtype=fields)
    for i, (name, truth, small, medium) in enumerate(rows):
        lists = (np.array([words], dtype=object) for words in (small, medium))
        structs[0, i] = (name, truth, *lists)
    savemat(str(path), {variable: structs})


def write_svhn(root: Path) -> None:
    write_files(root, {f"test/{number}.png": number for number in range(1, 6)})
    numbers = {"1.png": [5], "2.png": [2, 1, 10], "3.png": [1, 10], "4.png": [5], "5.png": [10, 5]}
    write_digit_struct(root / "test/digitStruct.mat", numbers)  # 10 is the digit 0


def write_iiit5k(root: Path) -> None:
    write_files(root, {"test/1_1.png": 1, "test/1_2.png": 2})
    first = ("test/1_1.png", "PRIVATE", ["PRIVATE", "ROAD"], ["PRIVATE", "ROAD", "TAXI"])
    second = ("test/1_2.png", "Road", ["PARKING", "TAXI"], ["TAXI", "road"])  # the small list lacks its own word
    write_words(root / "testdata.mat", "testdata", [first, second])


def fairface(split: str, *rows: str) -> dict[str, Any]:
    lines = [f"{split}/{number}.jpg,{row},False" for number, row in enumerate(rows, start=1)]
    table = "\n".join(["file,age,gender,race,service_test", *lines])
    images = {f"{split}/{number}.jpg": number for number in range(1, len(rows) + 1)}
    return {f"fairface_label_{split}.csv": table, **images}


class Case(NamedTuple):
    """A set's files and content."""

    make: Callable[[str], Any]
    files: dict[str, Any] | Callable[[Path], object]
    names: Sequence[str]
    rows: list[tuple[str, int, int]]  # key, number that the image's colour shows, and label
    mistakes: dict[str, tuple[Any, ...]]  # file: its other content and words of the error; None: it is missing
    truth: dict[str, Any] = {}


MEMES = [{"id": n, "img": f"img/{n:05}.png", "label": n % 2, "text": 'look, "text"'} for n in range(5)]
MEMES_FILES: dict[str, Any] = {"train.jsonl": MEMES[:2], **{str(row["img"]): row["id"] for row in MEMES}}
MEMES_ROWS = [("img/00002.png", 2, 0), ("img/00003.png", 3, 1), ("img/00004.png", 4, 0)]
NOT_LABELLED = ([{"img": "img/00001.png", "text": "the hidden test list"}], "lacks label")
OBJECTS = [("wolf_1.jpg", "wolf"), ("bag_227.jpg", "bag"), ("bag_227.jpg", "bag"), ("zebra_3.jpg", "zebra")]
PLACES = ["/a/abbey", "/a/apartment_building/outdoor", "/j/jail_indoor", "/j/jail_cell"]
FACES = ("3-9,Male,East Asian", "more than 70,Female,Latino_Hispanic", "0-2,Female,White")
RACES = ["White", "Black", "Indian", "East Asian", "Southeast Asian", "Middle Eastern", "Latino_Hispanic"]
GROUPS = {"race": ["East Asian", "Latino_Hispanic", "White"], "gender": ["Male", "Female", "Female"]}
GROUPS |= {"age": ["3-9", "more than 70", "0-2"]}
PEOPLE = [7, 11, 5, 7, 99, 11, 7, 5]  # 99 has no name
PHOTOS = [f"{number:06}.jpg" for number in range(1, 9)]
CELEBA: dict[str, Any] = {
    "identity_CelebA.txt": "".join(f"{name} {person}\n" for name, person in zip(PHOTOS, PEOPLE, strict=True)),
    "list_eval_partition.txt": "".join(f"{name} {part}\n" for name, part in zip(PHOTOS, "01202122", strict=True)),
    "identity_names.txt": "id,name\n7,Ann_Lee\n5,Bo Ek\n11,Cy Ono\n12,No Image\n",
    **{f"img_align_celeba/{name}": number for number, name in enumerate(PHOTOS)},
}
BIRDS = ["Black Vulture", "Black and white Warbler", "Coopers Hawk"]
CASES = {
    "memes": Case(
        sets.HatefulMemes,
        {**MEMES_FILES, "dev_seen.jsonl": MEMES[2:]},
        ["not hateful", "hateful"],
        MEMES_ROWS,
        {"dev_seen.jsonl": NOT_LABELLED},
    ),
    "memes, first release": Case(
        sets.HatefulMemes,
        {**MEMES_FILES, "dev.jsonl": MEMES[2:]},
        ["not hateful", "hateful"],
        MEMES_ROWS,
        {"dev.jsonl": ([{"img": "img/00001.png", "label": 2}], "dev.jsonl: '2'")},
    ),
    "ayahoo": Case(
        sets.AYahoo,
        {
            "attribute_data/ayahoo_test.txt": "".join(f"{a} {b} 1 2 30 40 {'0 ' * 63}0\n" for a, b in OBJECTS),
            **{f"ayahoo_test_images/{name}": number for number, (name, _) in enumerate(OBJECTS)},
        },
        ["bag", "wolf", "zebra"],
        [
            ("ayahoo_test_images/wolf_1.jpg", 0, 1),
            ("ayahoo_test_images/bag_227.jpg", 2, 0),
            ("ayahoo_test_images/zebra_3.jpg", 3, 2),
        ],
        {"attribute_data/ayahoo_test.txt": (None, "ayahoo_test.txt")},
    ),
    "sun": Case(
        sets.SUN,
        {
            "SUN397/ClassName.txt": "\n".join(PLACES) + "\n",
            **{f"SUN397{place}/sun_{i}.jpg": 10 * n + i for n, place in enumerate(PLACES) for i in range(1 + n % 2)},
        },
        ["abbey", "apartment building outdoor", "jail cell", "jail indoor"],
        [
            ("a/abbey/sun_0.jpg", 0, 0),
            ("a/apartment_building/outdoor/sun_0.jpg", 10, 1),
            ("a/apartment_building/outdoor/sun_1.jpg", 11, 1),
            ("j/jail_cell/sun_0.jpg", 30, 2),
            ("j/jail_cell/sun_1.jpg", 31, 2),
            ("j/jail_indoor/sun_0.jpg", 20, 3),
        ],
        {"SUN397/ClassName.txt": (None, "ClassName.txt")},
    ),
    "birdsnap": Case(
        sets.Birdsnap,
        write_birdsnap,
        BIRDS,
        [("download/images/Coopers_Hawk/2.jpg", 1, 2), ("download/images/Black_and_white_Warbler/9.jpg", 6, 1)],
        {"species.txt": (None, "species.txt"), "images.txt": ("path\nCoopers_Hawk/9.jpg", "no images of this split")},
    ),
    "birdsnap, train": Case(
        partial(sets.Birdsnap, split="train"),
        write_birdsnap,
        BIRDS,
        [
            ("download/images/Coopers_Hawk/1.jpg", 0, 2),
            *((f"download/images/Black_Vulture/{number}.jpg", 2 + number, 0) for number in (1, 2, 3)),
        ],
        {"images.txt": ("path\nOwl/1.jpg", "images.txt: 'Owl' is none of the 3 classes")},
    ),
    "fairface": Case(
        sets.FairFace,
        fairface("val", *FACES),
        RACES,
        [("val/1.jpg", 1, 3), ("val/2.jpg", 2, 6), ("val/3.jpg", 3, 0)],
        {"fairface_label_val.csv": ("file,age,gender,race\nval/1.jpg,3-9,Male,Martian", "Martian")},
        {"groups": GROUPS},
    ),
    "fairface, gender in train": Case(
        partial(sets.FairFace, attribute="gender", split="train"),
        fairface("train", FACES[1]),
        ["Male", "Female"],
        [("train/1.jpg", 1, 1)],
        {"fairface_label_train.csv": (None, "fairface_label_train.csv")},
    ),
    "celeba": Case(
        partial(sets.CelebAIdentities, identities=2),
        CELEBA,
        ["Ann Lee", "Bo Ek"],  # 5 and 11 have two each: the smaller number is chosen
        [(PHOTOS[number], number, int(PEOPLE[number] == 5)) for number in (0, 2, 3, 6, 7)],
        {"identity_names.txt": ("7 Ann Lee\nBo Ek\n", "'Bo Ek'"), "identity_CelebA.txt": ("000001.jpg\n", "line 1")},
    ),
    "celeba, test": Case(
        partial(sets.CelebAIdentities, identities=2, split="test"),
        CELEBA,
        ["Bo Ek", "Ann Lee"],
        [(PHOTOS[number], number, int(PEOPLE[number] == 7)) for number in (2, 6, 7)],
        {"list_eval_partition.txt": (None, "list_eval_partition.txt"), "identity_names.txt": ("1 X", "0 named people")},
    ),
    "svhn": Case(
        sets.SVHNNumbers,
        write_svhn,
        ["05", "5", "10", "210"],
        [(f"{number + 1}.png", number + 1, label) for number, label in enumerate([1, 3, 2, 1, 0])],
        {"test/digitStruct.mat": (b"no HDF5", "digitStruct.mat")},
    ),
    "iiit5k": Case(
        sets.IIIT5K,
        write_iiit5k,
        ["PRIVATE", "ROAD", "TAXI"],
        [("test/1_1.png", 1, 0), ("test/1_2.png", 2, 1)],
        {"testdata.mat": (b"no MATLAB", "testdata.mat")},
        {"candidates": [[0, 1, 2], [1, 2]]},
    ),
    "iiit5k, small lists": Case(
        partial(sets.IIIT5K, lexicon="small"),
        write_iiit5k,
        ["PARKING", "PRIVATE", "ROAD", "TAXI"],
        [("test/1_1.png", 1, 1), ("test/1_2.png", 2, 2)],
        {"testdata.mat": (None, "testdata.mat")},
        {"candidates": [[1, 2], [0, 2, 3]]},
    ),
    "imagenet_a": Case(
        partial(sets.ImageNetFolders, classes=3),
        {"n01498041/0.000_x.jpg": 6, "n12267677/1.jpg": 988, "n02206856/1.jpg": 309, "README.txt": "ImageNet-A"},
        ["stingray", "bee", "acorn"],
        [("n01498041/0.000_x.jpg", 6, 0), ("n02206856/1.jpg", 309, 1), ("n12267677/1.jpg", 988, 2)],
        {
            "n01440764/a.jpg": (1, "4 class folders instead of 3"),
            "n99999999/a.jpg": (1, "'n99999999' is none of the 1000 classes"),
            "n02206856/1.jpg": (None, "n02206856: no images"),
        },
    ),
    "objectnet": Case(
        sets.ObjectNet,
        write_objectnet,
        ["alarm clock", "t-shirt"],
        [("alarm_clock/1.png", 1, 0), ("tshirt/0.png", 0, 1)],
        {"mappings/objectnet_to_imagenet_1k.json": ('{"Unknown thing": "tench"}', "folder_to_objectnet_label.json")},
    ),
}
MISTAKES = [(case, file) for case, each in CASES.items() for file in each.mistakes]


def opened(case: Case, root: Path) -> Any:
    write_files(root, case.files) if isinstance(case.files, dict) else case.files(root)
    return case.make(str(root))


@pytest.mark.usefixtures("_mat_read_here")
@pytest.mark.parametrize("name", CASES)
def test_a_set_has_its_keys_images_labels_and_names(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    images = opened(case, tmp_path / "set")
    assert images.class_names == list(case.names)
    found = [(images.key(row), colour_of(images, row), label) for row, label in enumerate(images.labels())]
    assert found == [(key, colour(number), label) for key, number, label in case.rows]
    assert {name: getattr(images.truth, name) for name in case.truth} == case.truth
    assert_same_after_pickling(images)
    assert pickle.loads(pickle.dumps(images)).truth == images.truth
    assert "nowhere" in message_of(lambda: case.make(str(tmp_path / "nowhere")), MissingData)


@pytest.mark.usefixtures("_mat_read_here")
@pytest.mark.parametrize(("name", "file"), MISTAKES)
def test_a_damaged_or_missing_file_is_an_error_that_names_it(name: str, file: str, tmp_path: Path) -> None:
    case = CASES[name]
    content, words = case.mistakes[file]
    opened(case, tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        write_files(tmp_path, {file: content})
    kind = MissingData if content is None and not file.endswith(".jpg") else InputError
    assert words in message_of(lambda: case.make(str(tmp_path)), kind)


def test_classes_and_images_are_those_of_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = PROMPTS["Birdsnap"]["classes"]
    assert len(names) == 500
    assert sorted(name.replace(" ", "_") for name in names) == [name.replace(" ", "_") for name in names]
    assert len(PROMPTS["HatefulMemes"]["classes"]) == 2
    importlib.import_module("datamodules.evaluation.rules")  # must not replace a name of the package
    assert set(sets.rules.rules()) <= set(sets.__all__)  # which misspelled class paths are compared with
    assert callable(sets.Food101)
    write_files(tmp_path, CELEBA)
    assert sets.CelebAIdentities(str(tmp_path), identities=3).class_names == ["Ann Lee", "Bo Ek", "Cy Ono"]
    assert "3 named people" in message_of(lambda: sets.CelebAIdentities(str(tmp_path)))
    write_files(tmp_path, fairface("val", *FACES))
    race, age = sets.FairFace(str(tmp_path)), sets.FairFace(str(tmp_path), "age")
    assert (len(age.class_names), age.labels(), age.stamp()) == (9, [1, 8, 0], race.stamp())  # the same images
    write_svhn(tmp_path)
    (tmp_path / "test/3.png").unlink()
    assert "3.png" in message_of(lambda: sets.SVHNNumbers(str(tmp_path))[2])
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "pip install h5py" in message_of(lambda: sets.SVHNNumbers(str(tmp_path)))
    variant = opened(CASES["imagenet_a"], tmp_path / "a")
    assert variant.in_imagenet() == [[6], [309], [988]]


def test_resisc45_trains_on_one_tenth_of_each_class_and_tests_on_eight(resisc45: Path) -> None:
    train, test = RESISC45(str(resisc45), "train"), RESISC45(str(resisc45), "test")
    assert train.class_names == test.class_names == PROMPTS["RESISC45"]["classes"]
    assert Counter(train.labels()) == {label: 2 for label in range(45)}  # in the real set 70 of 700, 3,150 in total
    assert Counter(test.labels()) == {label: 16 for label in range(45)}  # 560 of 700, 25,200 in total
    keys = [{images.key(i) for i in range(len(images))} for images in (train, test)]
    assert not keys[0] & keys[1]
    for images in (train, test):
        for index in range(0, len(images), 7):
            assert images.key(index).split("/")[0] == images.class_names[images.labels()[index]].replace(" ", "_")
    assert RESISC45(str(resisc45), "train").stamp() == train.stamp()
    assert RESISC45(str(resisc45), "train", seed=1).stamp() != train.stamp()
    # Pinned: another hash would silently give another split and other results.
    assert [train.key(0), train.key(1)] == ["airplane/airplane_007.jpg", "airplane/airplane_013.jpg"]


def test_resisc45_with_missing_classes_is_an_error(tmp_path: Path) -> None:
    paint(tmp_path / "NWPU-RESISC45/lake/1.jpg")
    assert "1 class folders instead of 45" in message_of(lambda: RESISC45(str(tmp_path)))
    assert "nowhere" in message_of(lambda: RESISC45(str(tmp_path / "nowhere")), MissingData)


def test_digits_equal_scikit_learns_in_order() -> None:
    digits: Any = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1000, 797)
    assert train.labels() + test.labels() == digits.target.tolist()
    assert test.class_names[3] == "three"
    image, label = test[5]
    assert (image.mode, image.size, label) == ("L", (8, 8), digits.target[1005])
    assert np.abs(np.asarray(image) / 255 - digits.images[1005] / 16).max() < 1 / 255
    assert (train.key(7), test.key(5)) == ("7", "1005")
    assert train.stamp() != test.stamp()
    assert_same_after_pickling(test)


def put_scipy(folder: Path, code: str) -> str:
    """Write a package of SciPy's name, and return the folder to search for it."""
    (folder / "packages/scipy").mkdir(parents=True)
    (folder / "packages/scipy/__init__.py").touch()
    (folder / "packages/scipy/io.py").write_text(code, encoding="utf-8")
    return str(folder / "packages")


class _Errors:
    """The error for each file."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> str:
        with pytest.raises(InputError) as caught:
            read_mat(self.paths[row], "trnid")
        return str(caught.value)


def test_file_that_crashes_the_reader_is_one_line_in_a_data_worker_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SciPy itself follows a number of the file to any place of the memory, and crashes or not."""
    monkeypatch.syspath_prepend(put_scipy(tmp_path, "import ctypes\nctypes.string_at(0)\n"))
    path = tmp_path / "setid.mat"
    path.touch()
    errors: Any = _Errors(path, path)
    for found in (errors[0], *loader(errors, num_workers=1)):
        assert found == f"{path}: not a readable MATLAB file (SciPy's reader was ended by SIGSEGV); get it again"


def test_arrays_are_those_of_the_file_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"-\xff \xc3\xa9.mat")
    structs = np.array([("a.png", [1, 2]), ("b.png", 3)], dtype=[("name", object), ("numbers", object)])
    savemat(os.fspath(path), {"numbers": np.arange(6).reshape(1, 2, 3), "one": 7, "structs": structs}, appendmat=False)
    numbers, one, read = read_mat(path, "numbers", "one", "structs")
    assert numbers.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert one.tolist() == [7]
    assert read["name"].tolist() == ["a.png", "b.png"]
    assert [np.atleast_1d(each).tolist() for each in read["numbers"]] == [[1, 2], [3]]
    with pytest.raises(InputError, match="no variable 'two'"):
        read_mat(path, "two")


def test_reader_leaves_signals_to_its_parent_and_ends_with_it(tmp_path: Path) -> None:
    slow = put_scipy(tmp_path, "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    asked = {"path": "x.mat", "names": ["x"], "searched": [slow, *sys.path]}
    code = (
        "import json, os, subprocess, sys\n"
        "asked = json.dumps({**json.loads(sys.argv[2]), 'parent': os.getpid()})\n"
        "subprocess.run([sys.executable, '-I', sys.argv[1], asked])\n"
    )
    command = [sys.executable, "-c", code, str(MAT_PROGRAM), json.dumps(asked)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        reader = os.pidfd_open(int(parent.stdout.readline()))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.pidfd_send_signal(reader, number)
        assert not _has_ended(reader, seconds=0.5)
        parent.kill()
        assert _has_ended(reader, seconds=20)
    os.close(reader)


def _has_ended(process: int, seconds: float) -> bool:
    return bool(select.select([process], [], [], seconds)[0])


COLUMNS = ["neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "NF"]
WORDS = {
    **{"neutral": "neutral", "happiness": "happy", "surprise": "surprised", "sadness": "sad", "anger": "angry"},
    **{"disgust": "disgusted", "fear": "fearful", "contempt": "contemptuous"},
}


def label_of(votes: list[int]) -> str | None:
    """Follow ``_process_data`` of ferplus.py in its mode majority, and ``load_folders``, step by step."""
    raw = [float(vote) for vote in votes]
    for i, value in enumerate(raw):
        if value < 1.0 + 2e-16:  # its outlier removal
            raw[i] = 0.0
    emotion = [0.0] * len(raw)
    if max(raw) > 0.5 * sum(raw):
        emotion[raw.index(max(raw))] = max(raw)
    else:
        emotion[-2] = 1.0  # unknown
    place = emotion.index(max(emotion))
    return WORDS[COLUMNS[place]] if place < len(COLUMNS) - 2 else None


def test_labels_are_the_majorities_of_fer_plus_own_code(tmp_path: Path) -> None:
    """Of 300 images with ten votes each, some of which have no name because they show no face."""
    generator = random.Random(0)
    faces, votes, expected = [], [], []
    usages = ("Training", "PublicTest", "PrivateTest")
    for row in range(300):
        cast = generator.choices(range(10), weights=[generator.random() ** 4 for _ in range(10)], k=10)
        counts = [cast.count(place) for place in range(10)]
        name = f"fer{row:07}.png" if generator.random() < 0.9 else ""
        faces.append(f"{row % 7},{' '.join(['7'] * 48 * 48)},{usages[row // 100]}")
        votes.append(",".join([usages[row // 100], name, *map(str, counts)]))
        expected.append(label_of(counts) if name else None)
    write_text(tmp_path / "fer2013.csv", "\n".join(["emotion,pixels,Usage", *faces]))
    write_text(tmp_path / "fer2013new.csv", "\n".join([",".join(["Usage", "Image name", *COLUMNS]), *votes]))
    found: list[str | None] = [None] * 300
    for split, start in (("train", 0), ("val", 100), ("test", 200)):
        images = sets.FERPlus(str(tmp_path), split)  # pyright: ignore[reportArgumentType]
        for number, label in enumerate(images.labels()):
            assert start <= int(images.key(number)) < start + 100
            found[int(images.key(number))] = images.class_names[label]
    assert found == expected
    assert {None, *WORDS.values()} == set(expected)


@pytest.mark.parametrize("line", ["PrivateTest,fer0000000.png,4,0,0,1,3,2,0,0,0,0", "more"])
def test_tables_of_other_images_are_an_error(line: str, tmp_path: Path) -> None:
    """The rows of the two tables belong together by their order alone."""
    write_fer_plus(tmp_path)
    path = tmp_path / "fer2013/fer2013new.csv"
    lines = path.read_text().splitlines()
    lines = [*lines, lines[-1]] if line == "more" else [lines[0], line, *lines[2:]]
    path.write_text("\n".join(lines))
    assert "fer2013new.csv: its" in message_of(lambda: sets.FERPlus(str(tmp_path)))


def test_vote_that_is_no_number_is_an_error_naming_the_row(tmp_path: Path) -> None:
    write_fer_plus(tmp_path)
    path = tmp_path / "fer2013/fer2013new.csv"
    path.write_text(path.read_text().replace("4,0,0,1,3", "4,x,0,1,3"))
    assert "fer2013new.csv row 0: a vote" in message_of(lambda: sets.FERPlus(str(tmp_path)))


def test_located_images_have_coordinates_and_bad_rows_are_errors(tmp_path: Path) -> None:
    for i in (1, 2):
        paint_shade(tmp_path / f"photos/{i}.jpg", 10 * i)
    (tmp_path / "a.csv").write_text(
        "IMG_ID,AUTHOR,LAT,LON\nphotos/1.jpg,me,48.858,2.294\nphotos/2.jpg,you,-33.9,151.2\n"
    )
    images = LocatedImages(str(tmp_path / "a.csv"))
    assert images.truth.coordinates is not None
    assert torch.equal(images.truth.coordinates, torch.tensor([[48.858, 2.294], [-33.9, 151.2]], dtype=torch.float64))
    assert [(images.key(i), shade(images.images(i)[0])) for i in range(len(images))] == [
        ("photos/1.jpg", 10),
        ("photos/2.jpg", 20),
    ]
    copy = pickle.loads(pickle.dumps(images))
    assert (copy.stamp(), str(copy.truth.coordinates)) == (images.stamp(), str(images.truth.coordinates))
    (tmp_path / "b.csv").write_text("image,latitude,longitude\n2.jpg,1,2\n")
    assert len(LocatedImages(str(tmp_path / "b.csv"), str(tmp_path / "photos")).images(0)) == 1
    (tmp_path / "b.csv").write_text("image,latitude,longitude\n2.jpg,91,2\n")
    assert "2.jpg" in message_of(lambda: LocatedImages(str(tmp_path / "b.csv")))
    (tmp_path / "b.csv").write_text("image,latitude,longitude\n2.jpg,north,2\n")
    assert "north" in message_of(lambda: LocatedImages(str(tmp_path / "b.csv")))
    (tmp_path / "b.csv").write_text("image,latitude\n2.jpg,1\n")
    assert "longitude" in message_of(lambda: LocatedImages(str(tmp_path / "b.csv")))
    assert "c.csv" in message_of(lambda: LocatedImages(str(tmp_path / "c.csv")), MissingData)
