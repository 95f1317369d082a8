"""The prompt ensemble equals open_clip's."""

import open_clip
import pytest
import torch

from lit_clip.errors import InputError
from lit_clip.evaluation.zero_shot import (
    imagenet_class_names,
    imagenet_templates,
    zero_shot_classifier,
)
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, TextTransformerConfig, VisionTransformerConfig

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


def test_classifier_of_imagenets_templates_equals_open_clips(theirs_and_ours: tuple[open_clip.CLIP, CLIP]) -> None:
    theirs, ours = theirs_and_ours
    expected = open_clip.build_zero_shot_classifier(
        theirs, open_clip.SimpleTokenizer(), NAMES[:2], open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    classifier = zero_shot_classifier(ours, NAMES[:2], imagenet_templates())
    torch.testing.assert_close(classifier, expected, rtol=0, atol=1e-5)


def test_progress_is_the_number_of_prompts_encoded(theirs_and_ours: tuple[open_clip.CLIP, CLIP]) -> None:
    done: list[int] = []
    zero_shot_classifier(theirs_and_ours[1], NAMES, TEMPLATES, batch_size=7, progress=done.append)
    assert done == [7, 14, 21, 24]


def test_prompts_of_similar_length_are_encoded_together_without_padding(
    theirs_and_ours: tuple[open_clip.CLIP, CLIP], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shapes = theirs_and_ours[1], []
    encode = model.encode_text
    monkeypatch.setattr(
        model, "encode_text", lambda x, normalize: shapes.append(tuple(x.shape)) or encode(x, normalize)
    )
    zero_shot_classifier(
        model, ["cat", "great white shark", "dog"], ["a {}", "one {}", "a photo of a {}"], batch_size=4
    )
    assert shapes == [(4, 4), (4, 7), (1, 9)]  # start, words and end; three names in three templates


def test_imagenet_names_and_templates_equal_the_papers() -> None:
    names, templates = imagenet_class_names(), imagenet_templates()
    assert names == list(open_clip.IMAGENET_CLASSNAMES)
    assert (len(names), len(set(names)), names[0]) == (1000, 998, "tench")
    assert [i for i, name in enumerate(names) if name == "missile"] == [657, 744]
    assert len(templates) == 80
    for ours, theirs in zip(templates, open_clip.OPENAI_IMAGENET_TEMPLATES, strict=True):
        assert ours.replace("{}", "tench") == theirs("tench")


def test_imagenet_lists_are_copies() -> None:
    imagenet_class_names().clear()
    imagenet_templates().clear()
    assert len(imagenet_class_names()) == 1000
    assert len(imagenet_templates()) == 80


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
