"""Unchanged CLIP_benchmark with the documented adapter equals plain loops over our model."""

import json
import os
import pickle
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_clip import image_transform, load_model, zero_shot_classifier
from lit_clip.models.clip import CLIP
from tests.conftest import ROOT
from tests.helpers import forks

pytest.importorskip("clip_benchmark")
pytest.importorskip("requests")  # which it imports but does not depend on

DOCUMENT = (ROOT / "docs/clip_benchmark.md").read_text(encoding="utf-8")
CLASSES = ["ant", "bee", "cat", "dog", "emu", "fox"]
TEMPLATES = ["a photo of a {}.", "one {}, outside."]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """30 images of noise."""
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(30)]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., tuple[CLIP, Any, Any]]:
    """The documented adapter's function; the file is saved as ``benchmark.py``."""
    (tmp_path / "benchmark.py").write_text(blocks("python")[0], encoding="utf-8")
    return runpy.run_path(str(tmp_path / "benchmark.py"))["load"]


@torch.no_grad()
def plain_top1(checkpoint: Path, images: list[Image.Image], labels: list[int]) -> float:
    model = load_model(checkpoint)
    classifier = zero_shot_classifier(model, CLASSES, TEMPLATES)
    right = 0
    for image, label in zip(images, labels, strict=True):
        features = model.encode_image(model.preprocess(image)[None], normalize=True)
        right += int((features @ classifier).argmax()) == label
    return right / len(images)


def write_shards(folder: Path, images: list[Image.Image], labels: list[int] | None, captions: list[list[str]]) -> None:
    """Write the tar files that the document describes; for retrieval, with captions instead of labels."""
    import webdataset as wds

    (folder / "test").mkdir(parents=True)
    (folder / "test/nshards.txt").write_text("2")
    if labels is None:
        (folder / "dataset_type.txt").write_text("retrieval")
    else:
        (folder / "classnames.txt").write_text("\n".join(CLASSES))
        templates = "\n".join(template.replace("{}", "{c}") for template in TEMPLATES)
        (folder / "zeroshot_classification_templates.txt").write_text(templates)
    for shard, rows in enumerate((range(17), range(17, len(images)))):
        with wds.TarWriter(str(folder / f"test/{shard}.tar")) as tar:  # pyright: ignore[reportAttributeAccessIssue]  # untyped
            for row in rows:
                target = {"cls": labels[row]} if labels is not None else {"txt": "\n".join(captions[row])}
                tar.write({"__key__": f"{row:03d}", "png": images[row], **target})


def test_the_documented_command_scores_a_webdataset_like_a_plain_loop(
    load: object, tmp_path: Path, tiny_checkpoint: Path, photos: list[Image.Image]
) -> None:
    model = load_model(tiny_checkpoint)
    classifier = zero_shot_classifier(model, CLASSES, TEMPLATES)
    with torch.no_grad():  # about half of the labels are the model's predictions, so that no constant answer is right
        predictions = [int((model.encode_image(model.preprocess(p)[None]) @ classifier).argmax()) for p in photos]
    labels = [prediction if i % 2 else (prediction + i) % len(CLASSES) for i, prediction in enumerate(predictions)]
    write_shards(tmp_path / "clothes", photos, labels, [])
    (tmp_path / "last.ckpt").write_bytes(tiny_checkpoint.read_bytes())
    program, *words = shlex.split(blocks("bash")[0].replace("\\\n", " "))
    assert program == "python"
    words += ["--num_workers", "1", "--batch_size", "8"]
    (result,) = forks.run([forks.Program(forks.script, words, tmp_path, {**os.environ})], 120)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "clothes.json").read_text())["metrics"]
    expected = plain_top1(tiny_checkpoint, photos, labels)
    assert 0.4 < expected < 0.9
    assert metrics["acc1"] == pytest.approx(expected, abs=1e-9)


def test_transform_and_tokenizer_pickle_to_few_bytes_for_data_workers(
    tiny_checkpoint: Path, photos: list[Image.Image]
) -> None:
    model = load_model(tiny_checkpoint)
    transform, tokenizer = image_transform(model.preprocessing), model.tokenizer
    data = pickle.dumps((transform, tokenizer))
    assert len(data) < 100_000
    there, tokenize = pickle.loads(data)
    assert torch.equal(there(photos[0]), model.preprocess(photos[0]))
    assert torch.equal(tokenize(["a cat"]), model.tokenize(["a cat"]))
