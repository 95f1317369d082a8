"""The prompt ensemble equals open_clip's; probes that are trained on one set and tested on another."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from datamodules.evaluation import ObjectNet
from lit_clip.errors import InputError
from lit_clip.evaluation.data import ImageSet, LabelledImages
from lit_clip.evaluation.open_set import trained_classes
from lit_clip.evaluation.probe import among
from lit_clip.evaluation.suite import SuiteEntry
from lit_clip.evaluation.zero_shot import (
    imagenet_class_names,
    imagenet_templates,
    zero_shot_classifier,
)
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig
from tests.helpers.coloured_sets import write_objectnet

NAMES = ["tench", "great white shark", "crane", "a", "hand-held computer, hand-held microcomputer, in a pocket", "7"]
TEMPLATES = [
    "{}",
    "a photo of a {}.",
    "{}" + ", seen from a distance in the early morning" * 12 + ".",  # cut at 77
    "a very long sentence about things that nobody asked about, " * 4 + "and a {}.",
]


@pytest.fixture(scope="module")
def theirs_and_ours() -> tuple[open_clip.CLIP, CLIP]:
    torch.manual_seed(0)
    theirs = open_clip.CLIP(
        embed_dim=24,
        vision_cfg=open_clip.CLIPVisionCfg(image_size=32, patch_size=16, width=32, layers=1, head_width=16),
        text_cfg=open_clip.CLIPTextCfg(width=64, heads=2, layers=2),
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name in ("token_embedding.weight", "positional_embedding"):
                parameter.mul_(30)  # freshly initialised, all texts have nearly the same features
    ours = CLIP(
        CLIPConfig(
            embed_dim=24,
            image=VisionTransformerConfig(image_size=32, patch_size=16, width=32, layers=1, heads=2),
            text=TextTransformerConfig(width=64, heads=2, layers=2),
        )
    )
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("batch_size", [1, 5, 512])
def test_classifier_equals_open_clips(theirs_and_ours: tuple[open_clip.CLIP, CLIP], batch_size: int) -> None:
    theirs, ours = theirs_and_ours
    expected = open_clip.build_zero_shot_classifier(theirs, open_clip.SimpleTokenizer(), NAMES, TEMPLATES)
    classifier = zero_shot_classifier(ours, NAMES, TEMPLATES, batch_size)
    assert classifier.shape == (24, len(NAMES))
    assert not classifier.requires_grad
    torch.testing.assert_close(classifier, expected, rtol=0, atol=1e-5)
    assert (expected.T @ expected - torch.eye(len(NAMES))).max() < 0.999  # the classes differ


def test_prompts_of_similar_length_are_encoded_together_without_padding(
    theirs_and_ours: tuple[open_clip.CLIP, CLIP], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shapes = theirs_and_ours[1], []
    encode = model.encode_text
    monkeypatch.setattr(
        model, "encode_text", lambda x, normalize: shapes.append(tuple(x.shape)) or encode(x, normalize)
    )
    done: list[int] = []
    names, templates = ["cat", "great white shark", "dog"], ["a {}", "one {}", "a photo of a {}"]
    zero_shot_classifier(model, names, templates, batch_size=4, progress=done.append)
    assert shapes == [(4, 4), (4, 7), (1, 9)]  # start, words and end; three names in three templates
    assert done == [4, 8, 9]


def test_imagenet_lists_are_copies() -> None:
    imagenet_class_names().clear()
    imagenet_templates().clear()
    assert (len(imagenet_class_names()), len(imagenet_templates())) == (1000, 80)


def test_imagenet_names_and_templates_equal_the_papers() -> None:
    names, templates = imagenet_class_names(), imagenet_templates()
    assert names == list(open_clip.IMAGENET_CLASSNAMES)
    assert (len(names), len(set(names)), names[0]) == (1000, 998, "tench")
    assert [i for i, name in enumerate(names) if name == "missile"] == [657, 744]
    assert len(templates) == 80
    for ours, theirs in zip(templates, open_clip.OPENAI_IMAGENET_TEMPLATES, strict=True):
        assert ours.replace("{}", "tench") == theirs("tench")


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], TEMPLATES, "class_names: empty"),
        (NAMES, [], "templates: empty"),
        (NAMES, ["{}", "a photo"], "'a photo' has no {}"),
        (NAMES, ["a photo of a {name}."], "has no {}"),
    ],
)
def test_missing_class_names_or_templates_are_an_error(
    theirs_and_ours: tuple[open_clip.CLIP, CLIP], names: list[str], templates: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        zero_shot_classifier(theirs_and_ours[1], names, templates)


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
    with pytest.raises(InputError, match="train has no class 'dog', which test has .2 of 2"):
        trained_classes(entry, {"test": Named("0", "1"), "train": Named("0", "1")})


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
