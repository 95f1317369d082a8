"""Suites of ``lit-clip evaluate`` equal CLIP_benchmark, scikit-learn and plain loops: choices, DataComp, languages."""

import io
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score

from datamodules.evaluation import BabelImageNet
from datamodules.evaluation.caption_choices import Subset
from datamodules.evaluation.imagenet import imagenet_wnids
from lit_clip import image_transform, load_model, zero_shot_classifier
from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.encode import EncodingSettings
from lit_clip.errors import InputError
from lit_clip.evaluation import tasks
from lit_clip.evaluation.overview import group_means, rows
from lit_clip.evaluation.published import datacomp_groups
from lit_clip.evaluation.store import FeatureStore
from lit_clip.evaluation.suite import read_suite
from tests.commands.test_evaluate import counted_images, evaluate, noise, root, words, write_suite
from tests.conftest import ROOT, lit_clip_command
from tests.datamodules.evaluation.test_caption_choices import (
    write_aro,
    write_json,
    write_mmvp,
    write_sugar_crepe,
    write_winogavil,
    write_winoground,
)
from tests.helpers.coloured_sets import paint, write_wds

__all__ = ["root"]
QUESTIONS = 40


@pytest.fixture
def choices(root: Path) -> Path:
    """A suite of SugarCrepe with 20 images and Winoground with 20 pairs of them."""
    for folder in ("data/crepe/val2017", "data/wino/images"):
        (root / folder).mkdir(parents=True)
    for number in range(20):
        noise(number, number % 6).save(root / f"data/crepe/val2017/{number}.png")
    for number in range(40):
        noise(number, number % 6).save(root / f"data/wino/images/{number}.png")
    write_captions(root, "thing")
    wino = [
        {"image_0": str(2 * n), "image_1": str(2 * n + 1), "caption_0": f"{n} on a hat", "caption_1": f"a hat on {n}"}
        for n in range(20)
    ]
    (root / "data/wino/examples.jsonl").write_text("\n".join(map(json.dumps, wino)))
    reader = "datamodules.evaluation."
    write_suite(
        root,
        crepe={
            "data": {"class_path": f"{reader}SugarCrepe", "init_args": {"root": "crepe", "subset": "add_obj"}},
            "metric": "text_score",
        },
        wino={"data": {"class_path": f"{reader}Winoground", "init_args": {"root": "wino"}}, "metric": "group_score"},
    )
    return root


def write_captions(root: Path, word: str) -> None:
    rows = {
        str(n): {"filename": f"{n % 20}.png", "caption": f"{word} {n}", "negative_caption": f"no {word} {n * n % 50}"}
        for n in range(QUESTIONS)
    }
    (root / "data/crepe/add_obj.json").write_text(json.dumps(rows))


def theirs(data: Any, images: int) -> dict[str, float]:
    """CLIP_benchmark's numbers for its own reader of the same files."""
    from clip_benchmark.metrics import image_caption_selection
    from torch.utils.data import DataLoader

    model = load_model("last.ckpt")
    transform = image_transform(model.preprocessing)

    def collate(rows: list[Any]) -> tuple[torch.Tensor, list[Any]]:
        pixels = [torch.stack([transform(each) for each in (image if images > 1 else [image])]) for image, _ in rows]
        return torch.stack(pixels), [texts for _, texts in rows]

    loader = DataLoader(data, batch_size=7, collate_fn=collate)
    return image_caption_selection.evaluate(model, loader, model.tokenizer, "cpu", amp=False)


def test_choices_equal_clip_benchmarks(choices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer = pytest.importorskip("clip_benchmark.datasets.sugar_crepe").SugarCrepe
    sets = evaluate()["sets"]
    crepe = sets["crepe"]["tasks"]["caption_choice"]
    expected = theirs(peer("data/crepe/val2017", "data/crepe/add_obj.json"), 1)
    assert 0.1 < expected["acc"] < 0.9
    assert crepe["value"] == pytest.approx(expected["acc"], abs=1e-7)
    assert (crepe["images"], crepe["choices"], crepe["baseline"]) == (20, QUESTIONS, 0.5)
    rows = [json.loads(line) for line in Path("data/wino/examples.jsonl").read_text().splitlines()]
    pairs = [([noise(2 * n + i, (2 * n + i) % 6) for i in range(2)], n) for n in range(20)]
    data = [(images, [rows[n]["caption_0"], rows[n]["caption_1"]]) for images, n in pairs]
    expected = theirs(data, 2)
    metrics = sets["wino"]["tasks"]["caption_choice"]["metrics"]
    assert expected["text_acc"] + expected["image_acc"] > 0
    for ours, name in (("text_score", "text_acc"), ("image_score", "image_acc"), ("group_score", "acc")):
        assert metrics[ours] == pytest.approx(expected[name], abs=1e-7)
    assert sets["wino"]["tasks"]["caption_choice"]["baseline"] == pytest.approx(1 / 6)
    assert f"{100 * crepe['value']:.1f}" in capsys.readouterr().out  # in the table


@pytest.mark.slow  # test_evaluate.py has two processes for other sets
def test_two_processes_give_the_same_choices(choices: Path) -> None:
    one = evaluate()["sets"]
    result = lit_clip_command(choices, *words("--devices", "2", "--output", "two"))
    assert result.returncode == 0, result.stderr
    assert json.loads(Path("two/results.json").read_text(encoding="utf-8"))["sets"] == one


def test_choices_are_cached_until_a_caption_changes(choices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate()["sets"]["crepe"]["tasks"]
    calls: list[str] = []
    judged = tasks.evaluate_choices
    monkeypatch.setattr(tasks, "evaluate_choices", lambda *given: calls.append(given[0]) or judged(*given))
    monkeypatch.setattr(FeatureStore, "_encode", lambda *_: pytest.fail("images were encoded again"))
    assert evaluate()["sets"]["crepe"]["tasks"] == first
    assert calls == []
    write_captions(choices, "object")
    changed = evaluate()["sets"]["crepe"]["tasks"]
    assert calls == ["text_score"]
    assert changed["caption_choice"]["choices"] == QUESTIONS


def test_a_question_with_a_broken_image_is_skipped_or_an_error(choices: Path) -> None:
    (choices / "data/crepe/val2017/3.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="3.png"):
        evaluate("--sets", "crepe")
    found = evaluate("--sets", "crepe", "--on_error", "skip")["sets"]["crepe"]
    assert (found["tasks"]["caption_choice"]["choices"], found["splits"]["test"]["images"]) == (QUESTIONS - 2, 19)


def test_the_suite_runs_on_miniatures_of_all_its_sets(root: Path) -> None:
    data = root / "data"
    for subset in get_args(Subset):
        write_sugar_crepe(data / "sugar_crepe", subset)
    write_aro(data / "aro")
    for name, folder in (("coco", "val2014"), ("flickr30k", "flickr30k-images")):
        paint(data / name / folder / "1.jpg", 7)
        rows = [{"image": f"{folder}/1.jpg", "caption_options": ["a b", "b a", "a a b"]}]
        write_json(data / f"aro/{name}_order.json", rows)
    write_mmvp(data / "mmvp_vlm")
    write_winoground(data / "winoground")
    write_winogavil(data / "winogavil")
    suite = str(ROOT / "configs/evaluation/caption_choice.yaml")
    run_command([suite if word == "suite.yaml" else word for word in words()])
    sets = json.loads(Path("out/results.json").read_text(encoding="utf-8"))["sets"]
    assert {name: found["status"] for name, found in sets.items()} == dict.fromkeys(sets, "done")
    chance = {name: found["tasks"]["caption_choice"]["baseline"] for name, found in sets.items()}
    assert chance["sugar_crepe_swap_att"] == chance["aro_vg_relation"] == 0.5
    assert chance["aro_coco_order"] == pytest.approx(1 / 3)
    assert (chance["mmvp_vlm"], chance["winoground"]) == (0.25, pytest.approx(1 / 6))
    assert 0 < chance["winogavil_10_12"] < chance["winogavil_5_6"] < 0.4
    assert set(sets["mmvp_vlm"]["tasks"]["caption_choice"]["groups"]) == {"State", "Texts"}


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
    (*_, everything) = datacomp_groups().values()
    others = [name for name, metric in everything.items() if metric != "top1"]
    of_each_kind = [*others, "datacomp_imagenet1k", "datacomp_wilds-camelyon17"]
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
