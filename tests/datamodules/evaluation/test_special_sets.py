"""Sets with captions, numbers, lists of words, places and people, read from small files in their own layouts."""

import json
import pickle
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from datamodules.evaluation.located_images import LocatedImages
from datamodules.evaluation.people_sets import CelebAIdentities, FairFace
from datamodules.evaluation.reading_sets import IIIT5K, SVHNNumbers
from datamodules.evaluation.retrieval_sets import COCO, CaptionedPairs, Flickr30k
from lit_clip.errors import InputError
from lit_clip.evaluation.data import CaptionedImages, MissingData


def message_of(call: Callable[[], Any], kind: type[InputError] = InputError) -> str:
    """The one line that a call fails with."""
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def paint(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (number, 50, 7)).save(path, **({"quality": 100} if path.suffix == ".jpg" else {}))
    return path


def shade(image: Image.Image) -> int:
    """The number that an image was painted with; JPEG may be off by little."""
    colour: Any = image.convert("RGB").getpixel((1, 1))
    return round(colour[0] / 10) * 10


def as_read(images: CaptionedImages) -> list[tuple[str, int, list[str]]]:
    """Key, shade and captions of every image."""
    return [(images.key(i), shade(images.images(i)[0]), images.captions(i)) for i in range(len(images))]


def test_a_tables_rows_of_one_image_are_one_image_with_all_captions(tmp_path: Path) -> None:
    for name, number in (("a.png", 10), ("b.png", 20)):
        paint(tmp_path / name, number)
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,one\nb.png,two\na.png,three\n")
    images = CaptionedPairs(str(tmp_path / "pairs.csv"))
    expected = [("a.png", 10, ["one", "three"]), ("b.png", 20, ["two"])]
    assert as_read(images) == expected
    copy = pickle.loads(pickle.dumps(images))
    assert (as_read(copy), copy.stamp()) == (expected, images.stamp())
    before = images.stamp()
    paint(tmp_path / "b.png", 200).write_bytes(b"another")
    assert CaptionedPairs(str(tmp_path / "pairs.csv")).stamp() != before


def test_other_columns_and_a_root_can_be_named(tmp_path: Path) -> None:
    paint(tmp_path / "images/a.png", 10)
    (tmp_path / "pairs.csv").write_text("where,what\na.png,one\n")
    images = CaptionedPairs(str(tmp_path / "pairs.csv"), str(tmp_path / "images"), "where", "what")
    assert as_read(images) == [("a.png", 10, ["one"])]


def test_a_folder_of_images_with_texts_is_a_set_for_retrieval(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 10)
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert as_read(CaptionedPairs(str(tmp_path))) == [("a.png", 10, ["one", "two"])]


def test_tar_shards_are_a_set_for_retrieval(tmp_path: Path) -> None:
    paint(tmp_path / "0.png", 10)
    (tmp_path / "0.txt").write_text("one")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "0.png", "0.png")
        tar.add(tmp_path / "0.txt", "0.txt")
    images = CaptionedPairs(str(tmp_path / "0.tar"))
    assert as_read(images) == [("0", 10, ["one"])]
    assert len(pickle.loads(pickle.dumps(images)).images(0)) == 1


def test_a_source_that_is_not_there_is_missing(tmp_path: Path) -> None:
    assert "nowhere.csv" in message_of(lambda: CaptionedPairs(str(tmp_path / "nowhere.csv")), MissingData)
    (tmp_path / "pairs.csv").write_text("image,words\na.png,one\n")
    assert "image, words" in message_of(lambda: CaptionedPairs(str(tmp_path / "pairs.csv")))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def of_karpathy(name: str, split: str, captions: Sequence[str], **more: str) -> dict[str, Any]:
    sentences = [{"raw": caption, "tokens": caption.split()} for caption in captions]
    return {"filename": name, "split": split, "sentences": sentences, **more}


def test_coco_is_karpathys_test_and_else_val2017(tmp_path: Path) -> None:
    paint(tmp_path / "val2017/7.jpg", 70)
    values = {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "annotations": [{"image_id": 7, "caption": "a"}, {"image_id": 7, "caption": "b"}],
    }
    write_json(tmp_path / "annotations/captions_val2017.json", values)
    assert as_read(COCO(str(tmp_path))) == [("7.jpg", 70, ["a", "b"])]
    images = [
        of_karpathy("1.jpg", "train", ["no"], filepath="train2014"),
        of_karpathy("2.jpg", "test", ["c", "d"], filepath="val2014"),
        of_karpathy("3.jpg", "val", ["no"], filepath="val2014"),
    ]
    write_json(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    paint(tmp_path / "val2014/2.jpg", 20)
    paint(tmp_path / "val2014/3.jpg", 30)
    assert as_read(COCO(str(tmp_path))) == [("val2014/2.jpg", 20, ["c", "d"])]
    assert as_read(COCO(str(tmp_path), "val")) == [("val2014/3.jpg", 30, ["no"])]
    assert "dataset_coco.json" in message_of(lambda: COCO(str(tmp_path / "val2014")), MissingData)


LINES = {
    "flickr30k_test_karpathy.txt": "image,caption\n2.jpg,Two, with a comma .\n2.jpg,b\n1.jpg,One | or two\n",
    "results.csv": "image_name| comment_number| comment\n1.jpg| 0| One | or two\n2.jpg| 0| Two, with a comma .\n"
    "2.jpg| 1| b\n3.jpg| 0| not in the split\n3.jpg| 4   A line without its bar\n",
    "results_20130124.token": "1.jpg#0\tOne | or two\n2.jpg#0\tTwo, with a comma .\n2.jpg#1\tb\n3.jpg#0\tnot in it\n",
}


@pytest.mark.parametrize("file", ["dataset_flickr30k.json", *LINES])
@pytest.mark.parametrize("folder", ["flickr30k-images", "flickr30k_images", "."])
def test_flickr30k_is_karpathys_test_in_whatever_file(file: str, folder: str, tmp_path: Path) -> None:
    for i in (1, 2, 3):
        paint(tmp_path / folder / f"{i}.jpg", 10 * i)
    if file in LINES:
        (tmp_path / file).write_text(LINES[file])
        (tmp_path / "test.txt").write_text("2.jpg\n1.jpg\n")
    else:
        images = [
            of_karpathy("3.jpg", "train", ["no"]),
            of_karpathy("2.jpg", "test", ["Two, with a comma .", "b"]),
            of_karpathy("1.jpg", "test", ["One | or two"]),
        ]
        write_json(tmp_path / file, {"images": images, "dataset": "flickr30k"})
    images = Flickr30k(str(tmp_path))
    expected = [("2.jpg", 20, ["Two, with a comma .", "b"]), ("1.jpg", 10, ["One | or two"])]
    assert as_read(images) == expected
    copy = pickle.loads(pickle.dumps(images))
    assert (as_read(copy), copy.stamp()) == (expected, images.stamp())


def test_flickr30k_of_all_images_needs_the_names_of_the_split(tmp_path: Path) -> None:
    paint(tmp_path / "1.jpg")
    (tmp_path / "results.csv").write_text(LINES["results.csv"])
    assert "test.txt" in message_of(lambda: Flickr30k(str(tmp_path)), MissingData)
    (tmp_path / "test.txt").write_text("9.jpg\n")
    assert "9.jpg" in message_of(lambda: Flickr30k(str(tmp_path)))
    (tmp_path / "results.csv").write_text(LINES["results.csv"] + "rubbish\n")
    assert "line 7" in message_of(lambda: Flickr30k(str(tmp_path)))
    assert "nowhere" in message_of(lambda: Flickr30k(str(tmp_path / "nowhere")), MissingData)


def write_digit_struct(path: Path, numbers: dict[str, list[int]]) -> None:
    """As MATLAB 7.3 writes a struct array: cells are references, a single value stands for itself."""
    with h5py.File(path, "w") as file:
        hidden = file.create_group("#refs#")
        names, boxes = [], []
        for i, (name, digits) in enumerate(numbers.items()):
            hidden[f"n{i}"] = np.array([[ord(letter)] for letter in name], dtype=np.uint16)
            names.append(hidden[f"n{i}"].ref)
            box = hidden.create_group(f"b{i}")
            for field in ("height", "label", "left", "top", "width"):
                values = [float(digit if field == "label" else 1) for digit in digits]
                if len(values) == 1:
                    box[field] = np.array([values])
                    continue
                cells = []
                for j, value in enumerate(values):
                    hidden[f"{field}{i}_{j}"] = np.array([[value]])
                    cells.append([hidden[f"{field}{i}_{j}"].ref])
                box.create_dataset(field, data=np.array(cells, dtype=object), dtype=h5py.ref_dtype)
            boxes.append(box.ref)
        for field, values in (("name", names), ("bbox", boxes)):
            cells = np.array([[value] for value in values], dtype=object)
            file.create_dataset(f"digitStruct/{field}", data=cells, dtype=h5py.ref_dtype)


def test_svhn_has_whole_numbers_as_classes_in_which_ten_is_nought(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    numbers = {"1.png": [5], "2.png": [2, 1, 10], "3.png": [1, 10], "4.png": [5], "5.png": [10, 5]}
    write_digit_struct(tmp_path / "test/digitStruct.mat", numbers)
    for i in range(1, 6):
        paint(tmp_path / f"test/{i}.png", 10 * i)
    images = SVHNNumbers(str(tmp_path))
    assert images.class_names == ["05", "5", "10", "210"]
    assert images.labels() == [1, 3, 2, 1, 0]
    assert [(shade(images[i][0]), images.key(i)) for i in (1, 4)] == [(20, "2.png"), (50, "5.png")]
    copy = pickle.loads(pickle.dumps(images))
    assert (copy.labels(), copy.stamp()) == (images.labels(), images.stamp())
    (tmp_path / "test/3.png").unlink()
    assert "3.png" in message_of(lambda: images[2])


def test_svhn_that_is_not_there_or_broken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_iiit5k_images_have_lists_of_words_of_their_own(tmp_path: Path) -> None:
    rows = [
        ("test/1_1.png", "PRIVATE", ["PRIVATE", "ROAD"], ["PRIVATE", "ROAD", "TAXI"]),
        ("test/1_2.png", "Road", ["PARKING", "TAXI"], ["TAXI", "road"]),  # its own word is not in the small one
    ]
    write_words(tmp_path / "testdata.mat", "testdata", rows)
    for i in (1, 2):
        paint(tmp_path / f"test/1_{i}.png", 10 * i)
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


def test_places_are_read_with_the_images(tmp_path: Path) -> None:
    for i in (1, 2):
        paint(tmp_path / f"photos/{i}.jpg", 10 * i)
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


def write_fairface(root: Path, split: str, rows: Sequence[tuple[str, str, str]]) -> None:
    lines = [f"{split}/{i + 1}.jpg,{age},{gender},{race},False" for i, (age, gender, race) in enumerate(rows)]
    (root / f"fairface_label_{split}.csv").write_text("\n".join(["file,age,gender,race,service_test", *lines]))
    for i in range(len(rows)):
        paint(root / f"{split}/{i + 1}.jpg", 10 * i + 10)


def test_fairfaces_classes_are_an_attributes_values_and_its_groups_all_attributes(tmp_path: Path) -> None:
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
    assert race.groups() == {
        "race": ["East Asian", "Latino_Hispanic", "White"],
        "gender": ["Male", "Female", "Female"],
        "age": ["3-9", "more than 70", "0-2"],
    }
    assert [shade(race[i][0]) for i in range(3)] == [10, 20, 30]
    assert race.stamp() == age.stamp()  # the same images
    assert len(FairFace(str(tmp_path), "race", "train")) == 1
    assert pickle.loads(pickle.dumps(race)).groups() == race.groups()
    write_fairface(tmp_path, "val", [("3-9", "Male", "Martian")])
    assert "Martian" in message_of(lambda: FairFace(str(tmp_path)))
    assert "fairface_label_val.csv" in message_of(lambda: FairFace(str(tmp_path / "val")), MissingData)


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    """Seven images: three of 7, two of 11 and of 5, one of 99 without a name."""
    people = [7, 11, 5, 7, 99, 11, 7, 5]
    parts = [0, 1, 2, 0, 2, 1, 2, 2]
    names = [f"{i + 1:06}.jpg" for i in range(len(people))]
    for file, values in (("identity_CelebA.txt", people), ("list_eval_partition.txt", parts)):
        (tmp_path / file).write_text("".join(f"{name} {value}\n" for name, value in zip(names, values, strict=True)))
    (tmp_path / "identity_names.txt").write_text("id,name\n7,Ann_Lee\n5,Bo Ek\n11,Cy Ono\n12,No Image\n")
    for i, name in enumerate(names):
        paint(tmp_path / "img_align_celeba" / name, 10 * i + 10)
    return tmp_path


def test_celebas_classes_are_the_named_people_with_the_most_images(celeba: Path) -> None:
    images = CelebAIdentities(str(celeba), identities=2)
    assert images.class_names == ["Ann Lee", "Bo Ek"]  # of 5 and 11 with two each the smaller number
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


def test_celeba_says_what_is_wrong(celeba: Path) -> None:
    assert "3 named people" in message_of(lambda: CelebAIdentities(str(celeba)))
    (celeba / "other.txt").write_text("7 Ann Lee\nBo Ek\n")
    assert "'Bo Ek'" in message_of(lambda: CelebAIdentities(str(celeba), "other.txt"))
    assert "none.txt" in message_of(lambda: CelebAIdentities(str(celeba), "none.txt"), MissingData)
    (celeba / "identity_CelebA.txt").write_text("000001.jpg\n")
    assert "line 1" in message_of(lambda: CelebAIdentities(str(celeba)))
