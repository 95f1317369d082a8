"""A head's file, a model with a head, and its export: the same probabilities everywhere, and nothing is trusted."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from lit_clip import CLIP, zero_shot_classifier
from lit_clip.commands.class_heads import HeadFile
from lit_clip.commands.export import export
from lit_clip.errors import InputError
from lit_clip.evaluation.class_head import fit_head
from lit_clip.heads import Head, head_from_images, load_head, save_head
from lit_clip.heads.examples import accuracy_by_examples, label_next
from tests.helpers.small_sets import NAMES, Shades, make_module


@pytest.fixture(scope="module")
def model() -> CLIP:
    return make_module().model.eval()


@pytest.fixture(scope="module")
def head(model: CLIP) -> Head:
    shades = Shades("", "train", 42)
    images = [shades[row][0] for row in range(42)]
    return head_from_images(model, images, shades.labels(), [*NAMES, "violet"], none_error=0.1)


@torch.no_grad()
def test_probabilities_are_those_of_the_fit(model: CLIP, head: Head) -> None:
    shades = Shades("", "train", 42)
    pixels = torch.stack([model.preprocess(shades[row][0]) for row in range(42)])
    before, after = model.image_features(pixels)
    after = normalize(after, dim=1)
    zero_shot = model.logit_scale.exp() * after @ zero_shot_classifier(model, [*NAMES, "violet"], ["a photo of a {}."])
    fit = fit_head(before, zero_shot, torch.tensor(shades.labels()))
    expected = (fit.sharpness * fit.logits(before, zero_shot)).softmax(dim=1)
    found = model.with_head(head)(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # the fit of features encoded one by one
    assert (found.argmax(dim=1) == torch.tensor(shades.labels())).double().mean() > 0.8
    assert head.facts.none is not None
    assert torch.equal(head.none_of(head(before, after)), head(before, after).amax(dim=1) < head.facts.none)


def test_a_file_gives_the_same_head(model: CLIP, head: Head, tmp_path: Path) -> None:
    save_head(head, tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors")
    assert again.facts == head.facts
    image = Shades("", "test", 3)[1][0]
    image.save(tmp_path / "photo.png")
    found = model.with_head(again).classify([image, tmp_path / "photo.png", str(tmp_path / "photo.png")], batch_size=2)
    torch.testing.assert_close(found, model.with_head(head).classify([image] * 3), rtol=1e-4, atol=1e-6)


def test_another_model_is_refused(head: Head) -> None:
    other = make_module().model
    with torch.no_grad():
        other.visual.proj[0, 0] += 1e-3
    with pytest.raises(InputError, match=f"head: fitted on the features of another model.*{head.facts.model}"):
        other.with_head(head)


def broken(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[[Head, Path], None]:
    def write(head: Head, path: Path) -> None:
        facts = asdict(head.facts)
        tensors: dict[str, Any] = dict(head.state_dict())
        change(facts, tensors)
        save_file(tensors, path, metadata={"format": "lit-clip head 1", "head": json.dumps(facts)})

    return write


BROKEN: dict[str, tuple[Callable[[Head, Path], object], str]] = {
    "no file of tensors": (lambda head, path: path.write_bytes(b"x" * 99), "not a readable head"),
    "weights of something": (lambda head, path: save_file({"a": torch.ones(1)}, path), "not a head of this version"),
    "no JSON": (
        lambda head, path: save_file({"a": torch.ones(1)}, path, metadata={"format": "lit-clip head 1", "head": "{"}),
        "not a readable head",
    ),
    "no facts": (broken(lambda facts, tensors: facts.clear()), "head: lacks model"),
    "an unknown fact": (broken(lambda facts, tensors: facts.update(code="os.system")), "has no setting 'code'"),
    "names are numbers": (broken(lambda facts, tensors: facts.update(names=[1, 2])), "names.* must be a text"),
    "a name twice": (broken(lambda facts, tensors: facts.update(names=["a"] * 8)), "one is empty or there twice"),
    "other names": (broken(lambda facts, tensors: facts.update(names=["a", "b"])), "is not float32 for 2 classes"),
    "a template without a place": (broken(lambda facts, tensors: facts.update(templates=["x"])), "no {} for the class"),
    "an infinite threshold": (broken(lambda facts, tensors: facts.update(none=float("inf"))), "none: inf must be"),
    "an error above 1": (broken(lambda facts, tensors: facts.update(none_error=2.0)), "must be at most 1"),
    "a tensor less": (broken(lambda facts, tensors: tensors.pop("bias")), "tensors: there must be text, weight"),
    "not finite": (broken(lambda facts, tensors: tensors.update(bias=torch.full((8,), torch.nan))), "bias: not finite"),
    "finite weights that overflow": (
        broken(lambda facts, tensors: tensors.update(text=torch.full_like(tensors["text"], 3e38))),
        "text: .* so large",
    ),
    "a class called like an answer": (
        broken(lambda facts, tensors: facts.update(names=[*NAMES, "None of these"])),
        "may not be called none of these",
    ),
    "half precision": (broken(lambda facts, tensors: tensors.update(bias=torch.ones(8).half())), "not float32"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_every_field_of_a_file_is_checked(kind: str, head: Head, tmp_path: Path) -> None:
    write, message = BROKEN[kind]
    write(head, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match=message) as error:
        load_head(tmp_path / "head.safetensors")
    assert "\n" not in str(error.value)
    assert "head.safetensors" in str(error.value)


def test_the_width_of_another_model_is_refused_even_with_its_fingerprint(model: CLIP, head: Head) -> None:
    narrow = Head(head.facts, head.text, head.weight[:, :-1], head.bias, head.thresholds)
    with pytest.raises(InputError, match="head: is for features of width 63 and 16, the model's have 64 and 16"):
        model.with_head(narrow)


def test_only_onnx_files_hold_a_head(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--head .*: only onnx files hold a head; give --format onnx"):
        export("last.ckpt", format="open_clip", output=str(tmp_path / "out"), head=HeadFile("head.safetensors"))


# Which images to label next, and how accuracy grows with examples, against plain loops.


@pytest.mark.parametrize("several", [False, True])
def test_label_next_is_the_greedy_choice_of_a_plain_loop(several: bool) -> None:
    random = torch.Generator().manual_seed(0)
    points = normalize(torch.randn(40, 5, generator=random), dim=1)
    logits = torch.randn(30, 4, generator=random)
    probability = logits.sigmoid() if several else logits.softmax(dim=1)
    found = label_next(probability, points[:30], points[30:], 12, several)
    known, expected = [row.numpy() for row in points[30:]], list[int]()
    for _ in range(12):
        scores = {}
        for row in set(range(30)) - set(expected):
            p = np.sort(probability[row].numpy())
            unsure = np.max(1 - np.abs(2 * p - 1)) if several else 1 - (p[-1] - p[-2])
            scores[row] = unsure * min(1 - float(points[row].numpy() @ other) for other in known)
        expected.append(max(scores, key=lambda row: scores[row]))
        known.append(points[expected[-1]].numpy())
    assert found == expected


def test_copies_are_not_chosen_twice_and_sure_images_last() -> None:
    points = torch.eye(4)[[0, 0, 1, 2]]
    probability = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.6, 0.4], [1.0, 0.0]])
    assert label_next(probability, points, torch.eye(4)[3:], 3, False)[:2] == [0, 2]
    assert label_next(probability, points, torch.eye(4)[3:], 9, False)[:2] == [0, 2]


def test_the_curve_rises_and_ends_below_what_all_examples_give() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = 2.5 * torch.eye(8)[labels] + torch.randn(60, 8, generator=random)
    zero_shot = torch.zeros(60, 3)
    fit = fit_head(features, zero_shot, labels)
    points = accuracy_by_examples(features, zero_shot, labels, fit)
    assert [point.shots for point in points] == [1, 2, 4, 8, 16]
    assert points[-1].accuracy > points[0].accuracy
    new = torch.arange(3000) % 3
    test = 2.5 * torch.eye(8)[new] + torch.randn(3000, 8, generator=random)
    accuracy = float((fit.logits(test, torch.zeros(3000, 3)).argmax(dim=1) == new).double().mean())
    assert points[-1].interval[0] < accuracy < points[-1].interval[1]
    assert accuracy_by_examples(features[:3], zero_shot[:3], labels[:3], fit) == []
