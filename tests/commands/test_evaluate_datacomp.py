"""DataComp's suite on miniatures in its tar format equals scikit-learn and plain loops."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score

from lit_clip import load_model, zero_shot_classifier
from lit_clip.cli.subcommands import run_command
from lit_clip.evaluation.datacomp import OTHER_METRICS
from lit_clip.evaluation.overview import group_means, rows
from lit_clip.evaluation.suite import read_suite
from tests.commands.test_evaluate import noise, root, words
from tests.conftest import ROOT
from tests.datamodules.evaluation.test_caption_choices import write_winogavil
from tests.helpers.coloured_sets import write_wds

__all__ = ["root"]
SUITE = ROOT / "configs/evaluation/datacomp.yaml"
NAMES = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu"]
IMAGES = 24


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def npy(values: list[int]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


@torch.no_grad()
def plain_scores() -> torch.Tensor:
    """Logits ``[IMAGES, 7]`` of the images that every classification set has here."""
    model = load_model("last.ckpt")
    classifier = zero_shot_classifier(model, NAMES, ["a photo of a {}.", "one {}"])
    pixels = [model.preprocess(noise(number, number % 6))[None] for number in range(IMAGES)]
    return torch.cat([model.encode_image(each, normalize=True) for each in pixels]) @ classifier


@pytest.fixture
def labels(root: Path) -> list[int]:
    """Write all 38 sets with the same images; return the labels: the predictions, for half of the images."""
    predicted = plain_scores().argmax(dim=1).tolist()
    # No image is of the last class.
    labels = [label if n % 2 else (label + n // 2) % 6 for n, label in enumerate(predicted)]
    texts: dict[str, Any] = {"names": "\n".join(NAMES), "templates": "a photo of a {c}.\none {c}"}
    for entry in read_suite(SUITE).values():
        folder, kind = root / "data" / entry.data["init_args"]["root"], entry.data["class_path"].rpartition(".")[2]
        if kind == "WinoGAViL":
            write_winogavil(folder)
            continue
        samples = []
        for n, label in enumerate(labels):
            targets = {"cls": str(label).encode(), "npy": npy([n % 3 * 2, 2016, label])}
            if kind == "WebDatasetCaptions":
                targets = {"txt": f"image {n}\nagain {n}".encode()}
            image = png(noise(n, n % 6))
            samples.append({f"s{n:07}.png": image, **{f"s{n:07}.{suffix}": value for suffix, value in targets.items()}})
        write_wds(folder, samples, **texts) if kind != "WebDatasetCaptions" else write_wds(
            folder, samples, kind="retrieval"
        )
    return labels


def worst(right: list[bool]) -> float:
    return min(sum(right[group::3]) / len(right[group::3]) for group in range(3))


def test_the_suite_has_datacomps_metrics_and_means(labels: list[int]) -> None:
    opened = {name: entry.open("test", 0, Path("data")) for name, entry in read_suite(SUITE).items()}
    assert len(opened) == 38
    of_each_kind = [f"datacomp_{name}" for name in (*OTHER_METRICS, "imagenet1k", "wilds-camelyon17")]
    run_command([*words(), "--suite", str(SUITE), "--sets", *of_each_kind])
    results = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    sets = results["sets"]
    assert {name: found["status"] for name, found in sets.items()} == dict.fromkeys(sets, "done")
    value = {
        name.removeprefix("datacomp_"): next(iter(found["tasks"].values()))["value"] for name, found in sets.items()
    }
    scores, truth = plain_scores(), torch.tensor(labels)
    predicted, first_five = scores.argmax(dim=1), scores.topk(5).indices
    right = (predicted == truth).tolist()
    assert value["imagenet1k"] == value["wilds-camelyon17"] == pytest.approx(sum(right) / IMAGES)
    f1: Any = f1_score(truth, predicted, average="macro", labels=truth.unique(), zero_division=0.0)  # pyright: ignore[reportArgumentType]
    assert value["wilds-iwildcam"] == pytest.approx(f1)
    assert value["wilds-fmow"] == value["geode"] == pytest.approx(worst(right))
    assert value["dollar_street"] == pytest.approx(worst((first_five == truth[:, None]).any(dim=1).tolist()))
    seen = torch.isin(predicted, truth)
    assert bool(seen.all())  # scikit-learn would count a class that is only predicted
    assert value["vtab-pets"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert (
        len({value[name] for name in ("imagenet1k", "wilds-iwildcam", "wilds-fmow", "dollar_street", "vtab-pets")}) == 5
    )
    means = {mean.group: mean.ours for mean in group_means(rows(results), "zero_shot")}
    assert means["DataComp, Average over 38 sets"] is None
    retrieval = [value[name] for name in ("flickr30k", "mscoco_captions", "winogavil")]
    assert means["DataComp, Retrieval"] == pytest.approx(sum(retrieval) / 3)
