"""SVHN, IIIT5K, and images with the places where they were taken."""

import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat

from datamodules.evaluation import IIIT5K, LocatedImages, SVHNNumbers
from lit_clip.evaluation.data import MissingData
from tests.helpers.coloured_sets import message_of, paint_shade, shade


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
    assert images.candidates() == [[0, 1, 2], [1, 2]]
    assert shade(images[1][0]) == 20
    small = IIIT5K(str(tmp_path), lexicon="small")
    assert small.class_names == ["PARKING", "PRIVATE", "ROAD", "TAXI"]
    assert small.candidates() == [[1, 2], [0, 2, 3]]
    assert pickle.loads(pickle.dumps(images)).candidates() == images.candidates()
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
    assert torch.equal(images.coordinates(), torch.tensor([[48.858, 2.294], [-33.9, 151.2]], dtype=torch.float64))
    assert [(images.key(i), shade(images.images(i)[0])) for i in range(len(images))] == [
        ("photos/1.jpg", 10),
        ("photos/2.jpg", 20),
    ]
    copy = pickle.loads(pickle.dumps(images))
    assert (copy.stamp(), copy.coordinates().tolist()) == (images.stamp(), images.coordinates().tolist())
    (tmp_path / "b.csv").write_text("image,latitude,longitude\n2.jpg,1,2\n")
    assert len(LocatedImages(str(tmp_path / "b.csv"), str(tmp_path / "photos")).images(0)) == 1
    (tmp_path / "b.csv").write_text("image,latitude,longitude\n2.jpg,91,2\n")
    assert "2.jpg" in message_of(lambda: LocatedImages(str(tmp_path / "b.csv")))
    (tmp_path / "b.csv").write_text("image,latitude,longitude\n2.jpg,north,2\n")
    assert "north" in message_of(lambda: LocatedImages(str(tmp_path / "b.csv")))
    (tmp_path / "b.csv").write_text("image,latitude\n2.jpg,1\n")
    assert "longitude" in message_of(lambda: LocatedImages(str(tmp_path / "b.csv")))
    assert "c.csv" in message_of(lambda: LocatedImages(str(tmp_path / "c.csv")), MissingData)
