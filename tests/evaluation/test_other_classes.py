"""Probes that are trained on one set and tested on another."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.evaluation import ObjectNet
from lit_clip.errors import InputError
from lit_clip.evaluation.data import ImageSet, LabelledImages
from lit_clip.evaluation.other_classes import among, trained_classes
from lit_clip.evaluation.suite import SuiteEntry
from lit_clip.evaluation.zero_shot import imagenet_class_names
from tests.helpers.coloured_sets import write_objectnet


class Named(LabelledImages):
    def __init__(self, *names: str) -> None:
        self.class_names = list(names)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (4, 4)), 0

    def labels(self) -> list[int]:
        return [0]

    def stamp(self) -> str:
        return "named"


def crossed(train: ImageSet, test: ImageSet, **more: ImageSet) -> list[list[int]] | None:
    other = {"class_path": "x.Other"}
    entry = SuiteEntry(
        {"class_path": "x.This"}, {"test": {}, "train": other, **dict.fromkeys(more, {**other, "init_args": {"a": 1}})}
    )
    return trained_classes(entry, {"test": test, "train": train, **more})


def test_equal_names_are_the_same_classes_even_if_two_classes_share_a_name() -> None:
    assert crossed(Named("missile", "cat", "missile"), Named("missile", "cat", "missile")) == [[0], [1], [2]]


def test_other_names_are_looked_up_and_a_class_with_a_twin_takes_both() -> None:
    assert crossed(Named("a", "b", "c", "a"), Named("c", "a")) == [[2], [0, 3]]


def test_classes_that_are_only_numbers_are_matched_by_the_suites_names() -> None:
    splits = {"test": {}, "train": {"class_path": "x.Other"}}
    entry = SuiteEntry({"class_path": "x.This"}, splits, class_names=["dog", "cat"])
    assert trained_classes(entry, {"test": Named("0", "1"), "train": Named("cat", "dog")}) == [[1], [0]]
    with pytest.raises(InputError, match="train has no class 'dog'"):
        trained_classes(entry, {"test": Named("0", "1"), "train": Named("0", "1")})


def test_a_class_that_was_not_trained_is_an_error_that_names_it() -> None:
    with pytest.raises(InputError, match="train has no class 'monkey', which test has .1 of 2"):
        crossed(Named("frog", "cat"), Named("cat", "monkey"))


def test_validation_images_must_be_of_the_training_set() -> None:
    with pytest.raises(InputError, match="test and val have"):
        crossed(Named("a", "b"), Named("a"), val=Named("a"))
    entry = SuiteEntry(
        {"class_path": "x.This"}, {"test": {}, "train": {"class_path": "x.Other"}, "val": {"split": "val"}}
    )
    with pytest.raises(InputError, match="train and val must be of the same set"):
        trained_classes(entry, {"test": Named("a"), "train": Named("a"), "val": Named("a")})


def test_objectnets_classes_are_unions_of_imagenets(tmp_path: Path) -> None:
    test = ObjectNet(str(write_objectnet(tmp_path / "objectnet")))
    # analog clock 409, digital clock 530, jersey 610 (ILSVRC 2012)
    assert crossed(Named(*imagenet_class_names()), test) == [[409, 530], [610]]


def test_a_union_has_the_highest_score_of_its_classes() -> None:
    scores = torch.randn(5, 4)
    expected = np.stack([scores[:, [0, 3]].numpy().max(axis=1), scores[:, 2].numpy()], axis=1)
    assert (among(scores, [[0, 3], [2]]).numpy() == expected).all()
    assert among(scores, None) is scores
    never = among(scores, [[], [1]])
    assert (never[:, 0] == -torch.inf).all()
    assert never[:, 1].equal(scores[:, 1])
