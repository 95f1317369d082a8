"""The prompt ensemble is open_clip's, and accuracies are scikit-learn's and torchmetrics'."""

import open_clip
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from lit_clip.errors import InputError
from lit_clip.evaluation.zero_shot import (
    accuracies,
    baseline_accuracies,
    classification_counts,
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
                parameter.mul_(30)  # fresh weights give every text nearly the same feature
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
def test_classifier_is_open_clips(theirs_and_ours: tuple[open_clip.CLIP, CLIP], batch_size: int) -> None:
    theirs, ours = theirs_and_ours
    expected = open_clip.build_zero_shot_classifier(theirs, open_clip.SimpleTokenizer(), NAMES, TEMPLATES)
    classifier = zero_shot_classifier(ours, NAMES, TEMPLATES, batch_size)
    assert classifier.shape == (24, len(NAMES))
    assert not classifier.requires_grad
    torch.testing.assert_close(classifier, expected, rtol=0, atol=1e-5)
    assert (expected.T @ expected - torch.eye(len(NAMES))).max() < 0.999  # the classes are told apart


def test_classifier_for_imagenets_templates_is_open_clips(theirs_and_ours: tuple[open_clip.CLIP, CLIP]) -> None:
    theirs, ours = theirs_and_ours
    expected = open_clip.build_zero_shot_classifier(
        theirs, open_clip.SimpleTokenizer(), NAMES[:2], open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    classifier = zero_shot_classifier(ours, NAMES[:2], imagenet_templates())
    torch.testing.assert_close(classifier, expected, rtol=0, atol=1e-5)


def test_progress_reports_the_prompts_done(theirs_and_ours: tuple[open_clip.CLIP, CLIP]) -> None:
    done: list[int] = []
    zero_shot_classifier(theirs_and_ours[1], NAMES, TEMPLATES, batch_size=7, progress=done.append)
    assert done == [7, 14, 21, 24]


def test_prompts_of_like_length_are_encoded_together_and_no_further_than_they_go(
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


def test_imagenet_names_and_templates_are_the_papers() -> None:
    names, templates = imagenet_class_names(), imagenet_templates()
    assert names == list(open_clip.IMAGENET_CLASSNAMES)
    assert (len(names), len(set(names)), names[0]) == (1000, 998, "tench")
    assert [i for i, name in enumerate(names) if name == "missile"] == [657, 744]
    assert len(templates) == 80
    for ours, theirs in zip(templates, open_clip.OPENAI_IMAGENET_TEMPLATES, strict=True):
        assert ours.replace("{}", "tench") == theirs("tench")


def test_the_lists_are_copies() -> None:
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
def test_nothing_to_tell_apart_is_refused(
    theirs_and_ours: tuple[open_clip.CLIP, CLIP], names: list[str], templates: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        zero_shot_classifier(theirs_and_ours[1], names, templates)


def unbalanced(classes: int, absent: tuple[int, ...] = (), images: int = 501) -> tuple[Tensor, Tensor]:
    """Logits ``[images, classes]`` that are often right, labels ``[images]`` of which low ones are the most common."""
    generator = torch.Generator().manual_seed(classes)
    shares = 0.6 ** torch.arange(classes)
    shares[list(absent)] = 0
    labels = torch.multinomial(shares, images, replacement=True, generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += 1
    return logits, labels


@pytest.mark.parametrize(("classes", "absent"), [(7, ()), (9, (4,)), (13, (0, 11, 12))])
def test_accuracies_are_scikit_learns_and_torchmetrics(classes: int, absent: tuple[int, ...]) -> None:
    logits, labels = unbalanced(classes, absent)
    result = accuracies(classification_counts(logits, labels))
    predictions = logits.argmax(dim=1)
    assert set(result) == {"top1", "top5", "mean_per_class"}
    assert result["top1"] == pytest.approx(accuracy_score(labels, predictions), abs=1e-12)
    top5 = top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
    assert result["top5"] == pytest.approx(top5, abs=1e-12)
    top5 = multiclass_accuracy(logits, labels, classes, average="micro", top_k=5)
    assert result["top5"] == pytest.approx(top5.item(), abs=1e-6)
    recalls = multiclass_accuracy(logits, labels, classes, average="none")[labels.unique()]
    assert result["mean_per_class"] == pytest.approx(recalls.mean().item(), abs=1e-6)
    assert len({round(value, 3) for value in result.values()}) == 3  # the three are not the same number here


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_a_class_without_images_is_left_out_of_the_mean() -> None:
    logits, labels = unbalanced(9, absent=(4,))
    assert (logits.argmax(dim=1) == 4).any()  # it is predicted, though
    expected = balanced_accuracy_score(labels, logits.argmax(dim=1))
    assert accuracies(classification_counts(logits, labels))["mean_per_class"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_five_guesses_are_no_metric_with_five_classes_or_fewer(classes: int) -> None:
    logits, labels = unbalanced(classes)
    counts = classification_counts(logits, labels)
    assert set(accuracies(counts)) == set(baseline_accuracies(counts)) == {"top1", "mean_per_class"}
    assert accuracies(counts)["top1"] == pytest.approx(accuracy_score(labels, logits.argmax(dim=1)), abs=1e-12)


def test_counts_of_batches_sum_to_those_of_the_whole() -> None:
    logits, labels = unbalanced(9, absent=(4,))
    whole = classification_counts(logits, labels)
    parts = zip(logits.split([1, 0, 200, 7, 293]), labels.split([1, 0, 200, 7, 293]), strict=True)
    total = sum((classification_counts(*part) for part in parts), torch.zeros(3, 9, dtype=torch.float64))
    assert whole.dtype == torch.float64
    assert torch.equal(total, whole)
    assert torch.equal(whole[0], labels.bincount(minlength=9).double())
    assert (whole[0] >= whole[2]).all()
    assert (whole[2] >= whole[1]).all()


def test_counts_of_a_hand_made_batch() -> None:
    falling, rising = [6.0, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6]
    logits = torch.tensor([falling, falling, rising, rising, rising])
    labels = torch.tensor([0, 4, 0, 4, 5])  # the first, fifth, sixth, second and first prediction
    counts = classification_counts(logits, labels)
    assert counts.tolist() == [[2, 0, 0, 0, 2, 1], [1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 2, 1]]
    assert accuracies(counts) == pytest.approx({"top1": 2 / 5, "top5": 4 / 5, "mean_per_class": (1 / 2 + 0 + 1) / 3})


def test_baseline_names_the_most_common_classes() -> None:
    counts = torch.zeros(3, 8, dtype=torch.float64)
    counts[0] = torch.tensor([5, 0, 3, 1, 1, 2, 8, 0])  # 20 images of 6 classes; the five largest hold 19
    assert baseline_accuracies(counts) == pytest.approx({"top1": 8 / 20, "top5": 19 / 20, "mean_per_class": 1 / 6})


def test_baseline_is_what_a_blind_classifier_reaches() -> None:
    _, labels = unbalanced(9, absent=(4,))
    blind = labels.bincount(minlength=9).float() + torch.linspace(0.1, 0, 9)  # the same scores for every image
    counts = classification_counts(blind.expand(len(labels), -1), labels)
    assert baseline_accuracies(counts) == pytest.approx(accuracies(counts))
