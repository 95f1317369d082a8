"""``lit-clip embed`` and ``lit-clip evaluate`` on a GPU give what plain loops on the CPU give."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lit_clip import load_model, zero_shot_classifier
from lit_clip.cli.subcommands import run_command
from lit_clip.tools.hardware import best_device
from tests.cuda.devices import DEVICES, OTHERS

CLASSES, TEMPLATES = ["cat", "dog", "owl"], ["a photo of a {}.", "{}"]


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a checkpoint and five noise images of each class."""
    noise = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "data/noise" / name).mkdir(parents=True)
        for number in range(5):
            pixels = noise.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data/noise" / name / f"{number}.png")
    shutil.copy(tiny_checkpoint, tmp_path / "last.ckpt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@torch.no_grad()
def image_features(files: list[Path]) -> torch.Tensor:
    model = load_model("last.ckpt")
    return torch.cat([model.encode_image(model.preprocess(Image.open(file))[None], normalize=True) for file in files])


@pytest.mark.parametrize("device", DEVICES)
def test_embedded_features_equal_those_of_a_plain_loop(device: str, folder: Path) -> None:
    words = ["--model", "last.ckpt", "--output", "features.npy", "--num_workers", "0", "--accelerator", device]
    run_command(["embed", "data", *words])
    keys = json.loads(Path("features.keys.json").read_text(encoding="utf-8"))["keys"]
    assert len(keys) == 15
    exact = image_features([folder / key for key in keys]).numpy()
    assert np.abs(np.load("features.npy") - exact).max() < 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_zero_shot_accuracy_equals_that_of_a_plain_loop(device: str, folder: Path) -> None:
    data = {"class_path": "datamodules.ImageFolderClasses"}
    suite = {"sets": {"noise": {"data": data, "splits": {"test": {"root": "noise"}}, "templates": TEMPLATES}}}
    Path("suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    words = ["--model", "last.ckpt", "--suite", "suite.yaml", "--data_root", "data", "--output", "out"]
    run_command(["evaluate", *words, "--num_workers", "0", "--tasks", "zero_shot", "--accelerator", device])
    results = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    classifier = zero_shot_classifier(load_model("last.ckpt"), CLASSES, TEMPLATES)
    files = [folder / "data/noise" / name / f"{number}.png" for name in CLASSES for number in range(5)]
    guesses = (image_features(files) @ classifier).argmax(dim=1)
    expected = float((guesses == torch.arange(15) // 5).double().mean())
    assert results["sets"]["noise"]["tasks"]["zero_shot"]["value"] == pytest.approx(expected)


@pytest.mark.parametrize("device", OTHERS)
@pytest.mark.parametrize(
    "words",
    [
        ["classify", "data/noise", "--examples", "data/noise", "--save_head", "head.safetensors", "--num_workers", "0"],
        ["classify", "data/noise", "--classes", "cat", "dog", "--num_workers", "0", "--precision", "bf16-mixed"],
        ["locate", "data/noise/cat", "a cat"],
        ["search", "data/noise", "a cat", "--num_workers", "0"],
    ],
    ids=["heads", "classify", "locate", "search"],
)
def test_commands_that_choose_the_accelerator_themselves_run_on_it(words: list[str], device: str, folder: Path) -> None:
    assert best_device().type == device
    run_command([*words, "--model", "last.ckpt"])
