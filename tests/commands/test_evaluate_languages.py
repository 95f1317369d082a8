"""Sets that are a part of another share its features, and their results equal plain loops."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from datamodules.evaluation import BabelImageNet
from datamodules.evaluation.imagenet import imagenet_wnids
from lit_clip import load_model, zero_shot_classifier
from lit_clip.embedding.encoding_task import EncodingSettings
from lit_clip.evaluation.store import FeatureStore
from tests.commands.test_evaluate import counted_images, evaluate, noise, root, write_suite

__all__ = ["root"]
CLASSES = {1: "Fisch", 3: "Hai", 500: "Haus", 998: "Mais"}
OTHERS = (0, 499, 999)
TEMPLATES = ["ein Foto: {}.", "{}"]


@pytest.fixture
def babel(root: Path) -> Path:
    """Six images of each of seven classes of ImageNet, four of which have a German name."""
    for label in (*CLASSES, *OTHERS):
        (root / "data/imagenet/val" / imagenet_wnids()[label]).mkdir(parents=True)
        for number in range(6):
            noise(number + label, label % 6).save(root / f"data/imagenet/val/{imagenet_wnids()[label]}/{number}.png")
    (root / "names.json").write_text(json.dumps({"DE": [list(CLASSES), list(CLASSES.values())], "XX": [[0], ["x"]]}))
    (root / "prompts.json").write_text(json.dumps({"DE": TEMPLATES}))
    files = {"names": "names.json", "prompts": "prompts.json"}
    sets: dict[str, Any] = {
        f"babel_{language}": {
            "data": {
                "class_path": "datamodules.evaluation.BabelImageNet",
                "init_args": {"root": "imagenet", "language": language, **files},
            }
        }
        for language in ("DE", "XX")
    }
    whole = {"class_path": "datamodules.evaluation.ImageNet", "init_args": {"root": "imagenet", "split": "val"}}
    write_suite(root, imagenet={"data": whole, "templates": ["{}"]}, **sets)
    return root


@torch.no_grad()
def german_top1() -> float:
    model = load_model("last.ckpt")
    classifier = zero_shot_classifier(model, list(CLASSES.values()), TEMPLATES)
    right = 0
    for position, label in enumerate(CLASSES):
        for path in sorted(Path("data/imagenet/val", imagenet_wnids()[label]).glob("*.png")):
            feature = model.encode_image(model.preprocess(Image.open(path))[None], normalize=True)
            right += int((feature @ classifier).argmax()) == position
    return right / (6 * len(CLASSES))


def test_languages_share_the_features_of_imagenet(babel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted_images(monkeypatch)
    sets = evaluate()["sets"]
    assert calls["images"] == 6 * (len(CLASSES) + len(OTHERS))
    german = sets["babel_DE"]
    assert (german["splits"]["test"]["images"], german["prompts"]["texts"]) == (24, 8)
    assert 0 < german["tasks"]["zero_shot"]["value"] < 1
    assert german["tasks"]["zero_shot"]["value"] == pytest.approx(german_top1(), abs=1e-9)
    assert sets["babel_XX"]["splits"]["test"]["images"] == 6
    part = BabelImageNet("data/imagenet", "DE", "names.json", "prompts.json")
    model = load_model("last.ckpt")
    stored = FeatureStore(model, Path("out/cache"), EncodingSettings(num_workers=0, accelerator="cpu")).read(part)
    with torch.no_grad():
        pixels = [model.preprocess(part[index][0]) for index in range(24)]
        expected = model.encode_image(torch.stack(pixels), normalize=True)
    assert stored.after == pytest.approx(expected.numpy(), abs=1e-5)
    assert (stored.rows, stored.skipped) == (list(range(24)), [])
    assert evaluate()["sets"] == sets


def test_an_unreadable_image_is_skipped_in_the_parts_that_have_it(babel: Path) -> None:
    (babel / f"data/imagenet/val/{imagenet_wnids()[3]}/2.png").write_bytes(b"no image")
    sets = evaluate("--on_error", "skip")["sets"]
    counts = {name: found["splits"]["test"] for name, found in sets.items() if name != "gone"}
    assert {name: each["images"] for name, each in counts.items()} == {"imagenet": 41, "babel_DE": 23, "babel_XX": 6}
    assert [each["skipped"][0][0] for each in counts.values() if each["skipped"]] == [
        f"{imagenet_wnids()[3]}/2.png"
    ] * 2
    (babel / f"data/imagenet/val/{imagenet_wnids()[3]}/2.png").unlink()
    again = evaluate()["sets"]["babel_DE"]["tasks"]["zero_shot"]
    assert again["metrics"] == sets["babel_DE"]["tasks"]["zero_shot"]["metrics"]
