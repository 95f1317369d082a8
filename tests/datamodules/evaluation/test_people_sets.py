"""FairFace, CelebA and FER+."""

import pickle
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from datamodules import evaluation as sets
from datamodules.evaluation import CelebAIdentities, FairFace
from lit_clip.evaluation.data import MissingData
from tests.helpers.coloured_sets import message_of, paint_shade, shade
from tests.helpers.miniature_arrays import write_fer_plus
from tests.helpers.miniature_images import write_text


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
