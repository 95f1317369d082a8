"""Birdsnap, RESISC45, Hateful Memes, aYahoo, SUN, the digits, and how MATLAB files are read."""

import json
import os
import select
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from datamodules.evaluation import RESISC45, SUN, AYahoo, Birdsnap, Digits, HatefulMemes
from datamodules.evaluation.annotation_files import MAT_PROGRAM, read_mat
from lit_clip.errors import InputError
from lit_clip.evaluation.data import MissingData
from lit_clip.tools.workers import loader
from tests.conftest import ROOT
from tests.helpers.coloured_sets import assert_same_after_pickling, colour, colour_of, message_of, paint, write_birdsnap

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
