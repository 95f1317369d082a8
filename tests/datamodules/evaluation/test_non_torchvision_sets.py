"""Sets that torchvision lacks: digits, faces, people, words, places and folders of their own layout."""

import json
import os
import pickle
import random
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat

from datamodules import evaluation as sets
from datamodules.evaluation import (
    IIIT5K,
    RESISC45,
    SUN,
    AYahoo,
    Birdsnap,
    CelebAIdentities,
    Digits,
    FairFace,
    HatefulMemes,
    LocatedImages,
    SVHNNumbers,
)
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
)
from tests.helpers.miniature_arrays import write_fer_plus
from tests.helpers.miniature_images import write_text

PROMPTS = json.loads((ROOT / "lit_clip/evaluation/paper_prompts.json").read_text(encoding="utf-8"))["sets"]


def test_birdsnap_uses_the_listed_images_that_exist(tmp_path: Path) -> None:
    root = write_birdsnap(tmp_path)
    test, train = Birdsnap(str(root), "test"), Birdsnap(str(root), "train")
    assert test.class_names == train.class_names == ["Black Vulture", "Black and white Warbler", "Coopers Hawk"]
    found = [(colour_of(test, i), test.labels()[i]) for i in range(len(test))]
    assert found == [(colour(1), 2), (colour(6), 1)]
    found = [(colour_of(train, i), train.labels()[i]) for i in range(len(train))]
    assert found == [(colour(0), 2), (colour(3), 0), (colour(4), 0), (colour(5), 0)]
    assert test.stamp() != train.stamp()
    assert_same_after_pickling(train)
    for image in (root / "download/images").rglob("*.jpg"):
        image.unlink()
    assert "no images of this split" in message_of(lambda: Birdsnap(str(root)))
    (root / "species.txt").unlink()
    assert "species.txt" in message_of(lambda: Birdsnap(str(root)), MissingData)


def test_birdsnap_folders_sort_in_the_order_of_the_papers_names() -> None:
    names = PROMPTS["Birdsnap"]["classes"]
    assert len(names) == 500
    assert sorted(name.replace(" ", "_") for name in names) == [name.replace(" ", "_") for name in names]


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


@pytest.mark.parametrize("dev", ["dev.jsonl", "dev_seen.jsonl"])
def test_hateful_memes_tests_on_the_rows_of_the_development_list(tmp_path: Path, dev: str) -> None:
    rows = [{"id": n, "img": f"img/{n:05}.png", "label": n % 2, "text": 'look, "text"'} for n in range(5)]
    for row in rows:
        paint(tmp_path / str(row["img"]), int(row["id"]))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    (tmp_path / dev).write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    images = HatefulMemes(str(tmp_path))
    assert images.labels() == [0, 1, 0]
    assert images.key(0) == "img/00002.png"
    assert len(images.class_names) == len(PROMPTS["HatefulMemes"]["classes"]) == 2
    assert [colour_of(images, i) for i in range(3)] == [colour(2), colour(3), colour(4)]
    assert HatefulMemes(str(tmp_path), "train").labels() == [0, 1]
    assert_same_after_pickling(images)
    (tmp_path / dev).write_text(json.dumps({"id": 1, "img": "img/00001.png", "text": "the hidden test list"}))
    assert "lacks label" in message_of(lambda: HatefulMemes(str(tmp_path)))
    (tmp_path / dev).write_text(json.dumps({"img": "img/00001.png", "label": 2}))
    assert f"{dev}: '2'" in message_of(lambda: HatefulMemes(str(tmp_path)))
    (tmp_path / dev).unlink()
    assert dev in message_of(lambda: HatefulMemes(str(tmp_path)), MissingData)


def test_ayahoo_lists_each_image_once_with_its_first_class(tmp_path: Path) -> None:
    attributes = " ".join("0" for _ in range(64))
    lines = [("wolf_1.jpg", "wolf"), ("bag_227.jpg", "bag"), ("bag_227.jpg", "bag"), ("zebra_3.jpg", "zebra")]
    (tmp_path / "attribute_data").mkdir()
    text = "".join(f"{name} {label} 1 2 30 40 {attributes}\n" for name, label in lines)
    (tmp_path / "attribute_data/ayahoo_test.txt").write_text(text)
    for number, (name, _) in enumerate(lines):
        paint(tmp_path / "ayahoo_test_images" / name, number)
    images = AYahoo(str(tmp_path))
    assert images.class_names == ["bag", "wolf", "zebra"]
    assert [(images.key(i), label) for i, label in enumerate(images.labels())] == [
        ("ayahoo_test_images/wolf_1.jpg", 1),
        ("ayahoo_test_images/bag_227.jpg", 0),
        ("ayahoo_test_images/zebra_3.jpg", 2),
    ]
    assert colour_of(images, 2) == colour(3)
    assert_same_after_pickling(images)
    assert "ayahoo_test.txt" in message_of(lambda: AYahoo(str(tmp_path / "nowhere")), MissingData)


def test_sun_has_all_images_labelled_by_sorted_class_names(tmp_path: Path) -> None:
    folders = ["/a/abbey", "/a/apartment_building/outdoor", "/j/jail_indoor", "/j/jail_cell"]
    for number, folder in enumerate(folders):
        for image in range(1 + number):
            paint(tmp_path / f"SUN397{folder}/sun_{image}.jpg", number)
    (tmp_path / "SUN397/ClassName.txt").write_text("\n".join(folders) + "\n")
    images = SUN(str(tmp_path))
    assert images.class_names == ["abbey", "apartment building outdoor", "jail cell", "jail indoor"]
    assert Counter(images.labels()) == {0: 1, 1: 2, 2: 4, 3: 3}
    numbers = [0, 1, 3, 2]
    for index, label in enumerate(images.labels()):
        assert colour_of(images, index) == colour(numbers[label])
    assert_same_after_pickling(images)
    assert "SUN397" in message_of(lambda: SUN(str(tmp_path / "x")), MissingData)


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


def write_fairface(root: Path, split: str, rows: Sequence[tuple[str, str, str]]) -> None:
    lines = [f"{split}/{i + 1}.jpg,{age},{gender},{race},False" for i, (age, gender, race) in enumerate(rows)]
    (root / f"fairface_label_{split}.csv").write_text("\n".join(["file,age,gender,race,service_test", *lines]))
    for i in range(len(rows)):
        paint_shade(root / f"{split}/{i + 1}.jpg", 10 * i + 10)


def test_fairface_classes_are_one_attribute_and_groups_are_all_three(tmp_path: Path) -> None:
    rows = [
        ("3-9", "Male", "East Asian"),
        ("more than 70", "Female", "Latino_Hispanic"),
        ("0-2", "Female", "White"),
    ]
    write_fairface(tmp_path, "val", rows)
    write_fairface(tmp_path, "train", rows[:1])
    race, gender, age = (FairFace(str(tmp_path), name) for name in ("race", "gender", "age"))
    assert [len(images.class_names) for images in (race, gender, age)] == [7, 2, 9]
    for images, names in ((race, ["East Asian", "Latino_Hispanic", "White"]), (gender, ["Male", "Female", "Female"])):
        assert [images.class_names[label] for label in images.labels()] == names
    assert age.labels() == [1, 8, 0]
    assert race.truth.groups == {
        "race": ["East Asian", "Latino_Hispanic", "White"],
        "gender": ["Male", "Female", "Female"],
        "age": ["3-9", "more than 70", "0-2"],
    }
    assert [shade(race[i][0]) for i in range(3)] == [10, 20, 30]
    assert race.stamp() == age.stamp()  # the same images
    assert len(FairFace(str(tmp_path), "race", "train")) == 1
    assert pickle.loads(pickle.dumps(race)).truth.groups == race.truth.groups
    write_fairface(tmp_path, "val", [("3-9", "Male", "Martian")])
    assert "Martian" in message_of(lambda: FairFace(str(tmp_path)))
    assert "fairface_label_val.csv" in message_of(lambda: FairFace(str(tmp_path / "val")), MissingData)


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    """Eight images: three of person 7, two each of 11 and 5, and one of 99, who has no name."""
    people = [7, 11, 5, 7, 99, 11, 7, 5]
    parts = [0, 1, 2, 0, 2, 1, 2, 2]
    names = [f"{i + 1:06}.jpg" for i in range(len(people))]
    for file, values in (("identity_CelebA.txt", people), ("list_eval_partition.txt", parts)):
        (tmp_path / file).write_text("".join(f"{name} {value}\n" for name, value in zip(names, values, strict=True)))
    (tmp_path / "identity_names.txt").write_text("id,name\n7,Ann_Lee\n5,Bo Ek\n11,Cy Ono\n12,No Image\n")
    for i, name in enumerate(names):
        paint_shade(tmp_path / "img_align_celeba" / name, 10 * i + 10)
    return tmp_path


def test_celeba_classes_are_the_named_people_with_the_most_images(celeba: Path) -> None:
    images = CelebAIdentities(str(celeba), identities=2)
    assert images.class_names == ["Ann Lee", "Bo Ek"]  # 5 and 11 have two each: the smaller number is chosen
    assert [(images.key(i), label) for i, label in enumerate(images.labels())] == [
        ("000001.jpg", 0),
        ("000003.jpg", 1),
        ("000004.jpg", 0),
        ("000007.jpg", 0),
        ("000008.jpg", 1),
    ]
    assert shade(images[1][0]) == 30
    assert CelebAIdentities(str(celeba), identities=3).class_names == ["Ann Lee", "Bo Ek", "Cy Ono"]
    test = CelebAIdentities(str(celeba), identities=2, split="test")
    assert (test.class_names, test.labels()) == (["Bo Ek", "Ann Lee"], [0, 1, 0])
    assert pickle.loads(pickle.dumps(images)).stamp() == images.stamp() != test.stamp()


def test_celeba_errors_name_the_file_and_the_problem(celeba: Path) -> None:
    assert "3 named people" in message_of(lambda: CelebAIdentities(str(celeba)))
    (celeba / "other.txt").write_text("7 Ann Lee\nBo Ek\n")
    assert "'Bo Ek'" in message_of(lambda: CelebAIdentities(str(celeba), "other.txt"))
    assert "none.txt" in message_of(lambda: CelebAIdentities(str(celeba), "none.txt"), MissingData)
    (celeba / "identity_CelebA.txt").write_text("000001.jpg\n")
    assert "line 1" in message_of(lambda: CelebAIdentities(str(celeba)))


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


def test_svhn_classes_are_whole_numbers_with_label_ten_as_digit_zero(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    numbers = {"1.png": [5], "2.png": [2, 1, 10], "3.png": [1, 10], "4.png": [5], "5.png": [10, 5]}
    write_digit_struct(tmp_path / "test/digitStruct.mat", numbers)
    for i in range(1, 6):
        paint_shade(tmp_path / f"test/{i}.png", 10 * i)
    images = SVHNNumbers(str(tmp_path))
    assert images.class_names == ["05", "5", "10", "210"]
    assert images.labels() == [1, 3, 2, 1, 0]
    assert [(shade(images[i][0]), images.key(i)) for i in (1, 4)] == [(20, "2.png"), (50, "5.png")]
    copy = pickle.loads(pickle.dumps(images))
    assert (copy.labels(), copy.stamp()) == (images.labels(), images.stamp())
    (tmp_path / "test/3.png").unlink()
    assert "3.png" in message_of(lambda: images[2])


def test_missing_or_broken_svhn_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "test.tar.gz" in message_of(lambda: SVHNNumbers(str(tmp_path)), MissingData)
    (tmp_path / "test").mkdir()
    assert "digitStruct.mat" in message_of(lambda: SVHNNumbers(str(tmp_path)), MissingData)
    (tmp_path / "test/digitStruct.mat").write_bytes(b"no HDF5")
    assert "digitStruct.mat" in message_of(lambda: SVHNNumbers(str(tmp_path)))
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "pip install h5py" in message_of(lambda: SVHNNumbers(str(tmp_path)))


def write_words(path: Path, variable: str, rows: Sequence[tuple[str, str, list[str], list[str]]]) -> None:
    fields = [("ImgName", object), ("GroundTruth", object), ("smallLexi", object), ("mediumLexi", object)]
    structs = np.zeros((1, len(rows)), dtype=fields)
    for i, (name, truth, small, medium) in enumerate(rows):
        lists = (np.array([words], dtype=object) for words in (small, medium))
        structs[0, i] = (name, truth, *lists)
    savemat(str(path), {variable: structs})


@pytest.mark.usefixtures("_mat_read_here")
def test_each_iiit5k_image_has_its_own_list_of_words(tmp_path: Path) -> None:
    rows = [
        ("test/1_1.png", "PRIVATE", ["PRIVATE", "ROAD"], ["PRIVATE", "ROAD", "TAXI"]),
        ("test/1_2.png", "Road", ["PARKING", "TAXI"], ["TAXI", "road"]),  # the small list lacks the image's own word
    ]
    write_words(tmp_path / "testdata.mat", "testdata", rows)
    for i in (1, 2):
        paint_shade(tmp_path / f"test/1_{i}.png", 10 * i)
    images = IIIT5K(str(tmp_path))
    assert images.class_names == ["PRIVATE", "ROAD", "TAXI"]
    assert images.labels() == [0, 1]
    assert images.truth.candidates == [[0, 1, 2], [1, 2]]
    assert shade(images[1][0]) == 20
    small = IIIT5K(str(tmp_path), lexicon="small")
    assert small.class_names == ["PARKING", "PRIVATE", "ROAD", "TAXI"]
    assert small.truth.candidates == [[1, 2], [0, 2, 3]]
    assert pickle.loads(pickle.dumps(images)).truth.candidates == images.truth.candidates
    assert "traindata.mat" in message_of(lambda: IIIT5K(str(tmp_path), "train"), MissingData)
    (tmp_path / "traindata.mat").write_bytes(b"no MATLAB")
    assert "traindata.mat" in message_of(lambda: IIIT5K(str(tmp_path), "train"))


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
