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
from pathlib import Path
from typing import Any

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
    message_of,
    paint,
    paint_shade,
    shade,
)
from tests.helpers.miniature_arrays import write_fer_plus
from tests.helpers.miniature_images import write_text
from tests.helpers.miniatures import MINIATURES

PROMPTS = json.loads((ROOT / "lit_clip/evaluation/paper_prompts.json").read_text(encoding="utf-8"))["sets"]


def test_classes_and_images_are_those_of_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = PROMPTS["Birdsnap"]["classes"]
    assert len(names) == 500
    assert sorted(name.replace(" ", "_") for name in names) == [name.replace(" ", "_") for name in names]
    assert len(PROMPTS["HatefulMemes"]["classes"]) == 2
    importlib.import_module("datamodules.evaluation.rules")  # must not replace a name of the package
    assert set(sets.rules.rules()) <= set(sets.__all__)  # which misspelled class paths are compared with
    assert callable(sets.Food101)
    MINIATURES["celeba"].write(tmp_path)
    assert "3 named people" in message_of(lambda: sets.CelebAIdentities(str(tmp_path)))
    MINIATURES["fairface_race"].write(tmp_path)
    race, age = sets.FairFace(str(tmp_path)), sets.FairFace(str(tmp_path), "age")
    assert (len(age.class_names), age.labels(), age.stamp()) == (9, [1, 8, 0], race.stamp())  # the same images
    MINIATURES["svhn_numbers"].write(tmp_path)
    (tmp_path / "test/3.png").unlink()
    assert "3.png" in message_of(lambda: sets.SVHNNumbers(str(tmp_path))[2])
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "pip install h5py" in message_of(lambda: sets.SVHNNumbers(str(tmp_path)))
    MINIATURES["imagenet_a"].write(tmp_path / "a")
    variant = sets.ImageNetFolders(str(tmp_path / "a"))
    assert variant.in_imagenet is not None
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
