"""FairFace and CelebA."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest

from datamodules.evaluation import CelebAIdentities, FairFace
from lit_clip.evaluation.data import MissingData
from tests.helpers.coloured_sets import message_of, paint_shade, shade


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
