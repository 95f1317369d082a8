"""``lit-clip wise-ft``: interpolation that is exact at both ends, the choice of alpha, and the checkpoint written."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import accuracy_score

import lit_clip
from lit_clip.commands.wise_ft import InterpolatedModels, best_alpha, evaluate_line, save, wise_ft
from lit_clip.embedding.encode import Encoding
from lit_clip.errors import BadSample, InputError
from lit_clip.evaluation.zero_shot import LabelledImages, ZeroShotSet, zero_shot_classifier
from lit_clip.models.clip import CLIP
from lit_clip.models.config import CLIPConfig, Preprocessing
from lit_clip.module import LitCLIP
from lit_clip.tools.hardware import Precision

ALPHAS = [0.0, 0.25, 1.0]


class Noise(LabelledImages):
    """Noise images with random labels; reads are counted."""

    def __init__(self, size: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.noise = [Image.fromarray(generator.integers(0, 256, (40, 36, 3), np.uint8)) for _ in range(size)]
        self.numbers = generator.integers(0, 3, size).tolist()
        self.class_names = ["one", "two", "three"]
        self.read = 0

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.read += 1
        return self.noise[index], self.numbers[index]

    def labels(self) -> list[int]:
        return self.numbers


@pytest.fixture
def models(tiny_config: CLIPConfig, tmp_path: Path) -> tuple[CLIP, CLIP]:
    """Two models, also saved as ``before.ckpt`` and ``after.ckpt``."""
    pair = (LitCLIP(tiny_config).model.eval(), LitCLIP(tiny_config).model.eval())
    for name, model in zip(("before.ckpt", "after.ckpt"), pair, strict=True):
        save(model, tmp_path / name, {})
    return pair


def test_interpolation_is_exact_at_both_ends_and_linear_in_between(models: tuple[CLIP, CLIP]) -> None:
    before, after = models
    line = InterpolatedModels(before, after)
    for alpha, end in ((0, before), (1, after), (0, before)):  # and back again
        for name, value in line.at(alpha).state_dict().items():
            assert torch.equal(value, end.state_dict()[name]), name
    middle = {name: value.clone() for name, value in line.at(0.25).state_dict().items()}
    for name, value in middle.items():
        expected = 0.75 * before.state_dict()[name] + 0.25 * after.state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_accuracy_at_each_alpha_equals_a_plain_loop_and_each_image_is_read_once(
    precision: Precision, models: tuple[CLIP, CLIP]
) -> None:
    sets = {"target": ZeroShotSet(Noise(23, 0)), "other": ZeroShotSet(Noise(11, 1), ["{}", "{} again"])}
    line = InterpolatedModels(*models)
    results = evaluate_line(line, sets, ALPHAS, Encoding(batch_size=5, num_workers=0, precision=precision))
    for name, zero_shot_set in sets.items():
        images: Any = zero_shot_set.images
        assert images.read == len(images)
        for alpha in ALPHAS:
            model = line.at(alpha)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                classifier = zero_shot_classifier(model, images.class_names, zero_shot_set.templates)
                pixels = torch.stack([model.preprocess(image) for image in images.noise])
                features = model.encode_image(pixels, normalize=True).float()
            predictions = (features @ classifier).argmax(dim=1)
            expected = accuracy_score(images.labels(), predictions.numpy())
            assert results[name][alpha] == pytest.approx(expected, abs=1e-6), (name, alpha)


def test_the_alpha_with_the_best_mean_accuracy_is_chosen_and_the_smallest_on_a_tie() -> None:
    held_out = {"a": {0.0: 0.9, 0.5: 0.8, 1.0: 0.1}, "b": {0.0: 0.7, 0.5: 0.8, 1.0: 0.3}}
    assert best_alpha({"t": {0.0: 0.2, 0.5: 0.5, 1.0: 0.7}, **held_out}, "t") == 0.5
    assert best_alpha({"t": {0.0: 0.5, 0.5: 0.5, 1.0: 0.5}}, "t") == 0.0
    assert best_alpha({"t": {0.0: 0.2, 0.5: 0.5, 1.0: 0.7}}, "t") == 1.0


class Broken(Noise):
    """Noise of which some images cannot be read."""

    good: tuple[int, ...] = ()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index not in self.good:
            raise BadSample(f"image {index}", "broken")
        return super().__getitem__(index)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_skipped_images_are_told_and_do_not_count(
    batch_size: int, models: tuple[CLIP, CLIP], capsys: pytest.CaptureFixture[str]
) -> None:
    line, images, alone = InterpolatedModels(*models), Broken(7, 0), Noise(7, 0)
    images.good = (1, 2, 4)
    alone.noise, alone.numbers = ([each[place] for place in images.good] for each in (alone.noise, alone.numbers))
    settings = Encoding(batch_size, 0)
    with pytest.raises(InputError, match="a: image 0: broken.*--on_error skip"):
        evaluate_line(line, {"a": ZeroShotSet(images)}, ALPHAS, settings)
    skipping = replace(settings, on_error="skip")
    found = evaluate_line(line, {"a": ZeroShotSet(images), "b": ZeroShotSet(alone)}, ALPHAS, skipping)
    assert found["a"] == found["b"]
    assert [text.splitlines()[0] for text in capsys.readouterr().err.split("skipped: a: image ")[1:]] == [
        f"{row}: broken" for row in (0, 3, 5, 6)
    ]
    images.good = ()
    with pytest.raises(InputError, match="a: none of 7 images could be read"):
        evaluate_line(line, {"a": ZeroShotSet(images)}, ALPHAS, skipping)


def write_sets(folder: Path) -> str:
    sets = {}
    for name in ("pets", "tools"):
        for label in ("cat", "dog"):
            (folder / name / label).mkdir(parents=True)
            for i in range(3):
                Image.effect_noise((40, 36), 30 + 20 * i).convert("RGB").save(folder / name / label / f"{i}.png")
        data = {"class_path": "datamodules.ImageFolderClasses", "init_args": {"root": str(folder / name)}}
        sets[name] = {"images": data, "templates": ["a {}."]}
    (folder / "sets.yaml").write_text(yaml.safe_dump(sets, sort_keys=False))
    return str(folder / "sets.yaml")


def test_the_command_prints_a_row_per_alpha_and_writes_a_loadable_checkpoint(
    models: tuple[CLIP, CLIP], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    words = ["before.ckpt", "after.ckpt", "--sets", write_sets(tmp_path), "--alphas", "0,0.5,1"]
    result = cli("wise-ft", *words, "--output", "chosen.ckpt", "--alpha", "0.25", "--num_workers", "0")
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^│\s+([\d.]+) │\s+([\d.]+) │\s+([\d.]+) │\s+([\d.]+) │", result.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "0.25", "0.5", "1"]
    assert "pets (target)" in result.stdout
    assert "chosen: alpha 0.25" in result.stdout
    chosen = lit_clip.load_model(tmp_path / "chosen.ckpt")
    for name, value in InterpolatedModels(*models).at(0.25).state_dict().items():
        torch.testing.assert_close(chosen.state_dict()[name], value, rtol=0, atol=1e-6)
    LitCLIP.load_from_checkpoint(tmp_path / "chosen.ckpt")
    tokens, pixels = chosen.tokenize(["a cat"]), torch.randn(2, 3, 32, 32)
    for end, model in zip(("0", "1"), models, strict=True):
        ends, output = (str(tmp_path / name) for name in ("before.ckpt", "after.ckpt")), str(tmp_path / f"{end}.ckpt")
        wise_ft(*ends, sets=str(tmp_path / "sets.yaml"), output=output, alpha=float(end), alphas="0,1")
        written = lit_clip.load_model(tmp_path / f"{end}.ckpt")
        with torch.no_grad():
            torch.testing.assert_close(written.encode_image(pixels), model.encode_image(pixels), rtol=0, atol=1e-6)
            torch.testing.assert_close(written.encode_text(tokens), model.encode_text(tokens), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": "0,2"}, "2.0 must be between 0 and 1"),
        ({"alphas": "0;1"}, "must be numbers separated by commas"),
        ({"target": "cars"}, "no such set; there are pets, tools"),
        ({"output": "nowhere/x.ckpt"}, "there is no folder nowhere"),
        ({"output": "chosen.safetensors"}, "chosen.safetensors: must be a .ckpt file"),
        ({"after": "nowhere.ckpt"}, "nowhere.ckpt"),
        ({"sets": "nowhere.yaml"}, "--sets: nowhere.yaml: there is no such file"),
        ({"sets": ""}, "--sets: mine.yaml: must hold sets by name"),
        ({"sets": "[pets]"}, "--sets: mine.yaml: must hold sets by name"),
        ({"sets": "2024: {images: {}}"}, "--sets: mine.yaml: must hold sets by name"),
        ({"sets": "pets: {images: {class_path: os.system}}"}, "mine.yaml: sets.images: Import path os.system does not"),
        ({"sets": "pets: {images: {class_path: datamodules.ImageFolderClasses}, tempaltes: []}"}, ".*tempaltes"),
    ],
)
def test_invalid_arguments_are_an_error_and_nothing_is_written(
    options: dict[str, Any], message: str, models: tuple[CLIP, CLIP], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"before": "before.ckpt", "after": "after.ckpt", "sets": write_sets(tmp_path), **options}
    if "sets" in options and not options["sets"].endswith(".yaml"):
        Path("mine.yaml").write_text(options["sets"])
        arguments["sets"] = "mine.yaml"
    files = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        wise_ft(**{"output": "chosen.ckpt", **arguments})
    assert set(tmp_path.iterdir()) == files


def test_a_full_disk_is_an_error_that_names_the_checkpoint_and_keeps_the_one_before(
    models: tuple[CLIP, CLIP], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (tmp_path / "after.ckpt").read_bytes()

    def full(*_: Any) -> None:  # as torch's writer ends, which raises no OSError
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"after\.ckpt: the checkpoint cannot be written"):
        save(models[0], tmp_path / "after.ckpt", {})
    assert (tmp_path / "after.ckpt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"before.ckpt", "after.ckpt"}


def test_models_with_different_configurations_are_refused(models: tuple[CLIP, CLIP]) -> None:
    other = copy.deepcopy(models[0].config)
    other.preprocessing = Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5))
    with pytest.raises(InputError, match=r"after has another architecture than before: preprocessing.mean"):
        InterpolatedModels(models[0], CLIP(other))
