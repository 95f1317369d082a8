"""A model's fingerprint: what changes it, and that evaluation hashes fixed weights only once."""

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from lit_clip import load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.models import fingerprint as fingerprints
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig
from lit_clip.models.fingerprint import Fingerprint, fingerprint, tensors_sha256, text_sha256


def changed(before: Fingerprint, after: Fingerprint) -> list[str]:
    return [name for name in Fingerprint._fields if getattr(before, name) != getattr(after, name)]


def add_one(parameters: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1)


def test_equal_models_have_equal_fingerprints(tiny_config: CLIPConfig) -> None:
    model, other = CLIP(tiny_config), CLIP(tiny_config)
    assert changed(fingerprint(model), fingerprint(other)) == ["model", "weights", "image", "text"]
    other.load_state_dict(model.state_dict())
    assert fingerprint(model) == fingerprint(other)


def test_the_digests_of_a_part_are_those_of_the_fingerprint(tiny_config: CLIPConfig) -> None:
    model = CLIP(tiny_config)
    assert tensors_sha256(model.state_dict()) == fingerprint(model).weights
    assert text_sha256(model) == fingerprint(model).text


def test_a_fingerprint_is_never_stale_while_the_weights_train(tiny_config: CLIPConfig) -> None:
    """A callback asks again after every epoch: the same model object, other values."""
    model = CLIP(tiny_config)
    first = fingerprint(model)
    add_one([model.visual.proj])  # pyright: ignore[reportArgumentType]
    image_trained = fingerprint(model)
    assert changed(first, image_trained) == ["model", "weights", "image"]
    assert text_sha256(model) == first.text
    add_one([model.token_embedding.weight])
    assert changed(image_trained, fingerprint(model)) == ["model", "weights", "text"]
    assert text_sha256(model) != first.text


def test_swapped_or_retyped_weights_change_the_fingerprint(tiny_config: CLIPConfig) -> None:
    model = CLIP(tiny_config)
    first = fingerprint(model)
    norm = model.ln_final
    norm.weight.data, norm.bias.data = norm.bias.data, norm.weight.data
    assert fingerprint(model).weights != first.weights
    norm.weight.data, norm.bias.data = norm.bias.data, norm.weight.data
    assert fingerprint(model) == first
    assert fingerprint(model.half()).weights != first.weights


def test_evaluate_hashes_each_weight_once(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red" if name == "cat" else "blue").save(tmp_path / "data" / name / "0.png")
    shutil.copy(tiny_checkpoint, tmp_path / "last.ckpt")
    entry = {"data": {"class_path": "datamodules.ImageFolderClasses"}, "splits": {"test": {"root": "."}}}
    suite = {"sets": {"two": {**entry, "templates": ["a {}."]}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    hashed, tensor_sha256 = Counter(), fingerprints._tensor_sha256

    def counted(value: Tensor) -> str:
        hashed[value.data_ptr()] += 1
        return tensor_sha256(value)

    monkeypatch.setattr(fingerprints, "_tensor_sha256", counted)
    arguments = ["--model", "last.ckpt", "--suite", "suite.yaml", "--data_root", "data", "--output", "out"]
    run_command(["evaluate", *arguments, "--num_workers", "0", "--accelerator", "cpu", "--tasks", "zero_shot"])
    assert hashed.total() == len(load_model("last.ckpt").state_dict())
    assert set(hashed.values()) == {1}
