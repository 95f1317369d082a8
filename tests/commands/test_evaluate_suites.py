"""Suites of ``lit-clip evaluate`` equal CLIP_benchmark, scikit-learn and plain loops: choices, DataComp, languages."""

import io
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.evaluation import BabelImageNet
from datamodules.evaluation.caption_choices import Subset
from datamodules.evaluation.imagenet import imagenet_wnids
from lit_clip import image_transform, load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.embedding.encode import EncodingSettings
from lit_clip.evaluation import tasks
from lit_clip.evaluation.overview import group_means, rows
from lit_clip.evaluation.published import datacomp_groups
from lit_clip.evaluation.store import FeatureStore
from lit_clip.evaluation.suite import read_suite
from tests.commands.test_evaluate import counted_images, evaluate, noise, root, words, write_suite
from tests.conftest import ROOT
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
    pairs = [
        {"image_0": str(2 * n), "image_1": str(2 * n + 1), "caption_0": f"{n} on a hat", "caption_1": f"a hat on {n}"}
        for n in range(20)
    ]
    (root / "data/wino/examples.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    reader = "datamodules.evaluation."
    crepe = {"class_path": f"{reader}SugarCrepe", "init_args": {"root": "crepe", "subset": "add_obj"}}
    wino = {"class_path": f"{reader}Winoground", "init_args": {"root": "wino"}}
    of_crepe, of_wino = {"data": crepe, "metric": "text_score"}, {"data": wino, "metric": "group_score"}
    write_suite(root, crepe=of_crepe, wino=of_wino)
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


def test_choices_are_cached_until_a_caption_changes(choices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate()["sets"]["crepe"]["tasks"]
    calls: list[str] = []
    judged = tasks.evaluate_choices
    monkeypatch.setattr(tasks, "evaluate_choices", lambda *given: calls.append(given[0]) or judged(*given))
    monkeypatch.setattr("lit_clip.evaluation.store.encode", lambda *_: pytest.fail("images were encoded again"))
    assert evaluate()["sets"]["crepe"]["tasks"] == first
    assert calls == []
    write_captions(choices, "object")
    changed = evaluate()["sets"]["crepe"]["tasks"]
    assert calls == ["text_score"]
    assert changed["caption_choice"]["choices"] == QUESTIONS


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


@pytest.fixture
def datacomp(root: Path) -> None:
    """Write all 38 sets with the same images, none of which is of the last class."""
    texts: dict[str, Any] = {"names": "\n".join(NAMES), "templates": "a photo of a {c}.\none {c}"}
    for entry in read_suite(SUITE).values():
        folder, kind = root / "data" / entry.data["init_args"]["root"], entry.data["class_path"].rpartition(".")[2]
        if kind == "WinoGAViL":
            write_winogavil(folder)
            continue
        samples, captioned = [], kind == "WebDatasetCaptions"
        for n in range(IMAGES):
            targets = {"cls": str(n % 6).encode(), "npy": npy([n % 3 * 2, 2016, n % 6])}
            if captioned:
                targets = {"txt": f"image {n}\nagain {n}".encode()}
            image = png(noise(n, n % 6))
            samples.append({f"s{n:07}.png": image, **{f"s{n:07}.{suffix}": value for suffix, value in targets.items()}})
        write_wds(folder, samples, **({"kind": "retrieval"} if captioned else texts))


@pytest.mark.usefixtures("datacomp")
def test_sets_of_each_kind_of_datacomps_suite_are_evaluated_and_its_means_are_theirs() -> None:
    opened = {name: entry.open("test", 0, Path("data")) for name, entry in read_suite(SUITE).items()}
    assert len(opened) == 38
    (*_, everything) = datacomp_groups().values()
    others = [name for name, metric in everything.items() if metric != "top1"]
    run_command([*words(), "--suite", str(SUITE), "--sets", *others, "datacomp_imagenet1k"])
    results = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    sets = results["sets"]
    assert {name: found["status"] for name, found in sets.items()} == dict.fromkeys(sets, "done")
    value = {
        name.removeprefix("datacomp_"): next(iter(found["tasks"].values()))["value"] for name, found in sets.items()
    }
    assert value["wilds-fmow"] == value["geode"]  # the worst of the same groups
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
    sets: dict[str, Any] = {}
    for language in ("DE", "XX"):
        own = {"root": "imagenet", "language": language, **files}
        data = {"class_path": "datamodules.evaluation.BabelImageNet", "init_args": own}
        sets[f"babel_{language}"] = {"data": data}
    whole = {"class_path": "datamodules.evaluation.ImageNet", "init_args": {"root": "imagenet", "split": "val"}}
    write_suite(root, imagenet={"data": whole, "templates": ["{}"]}, **sets)
    return root


def test_languages_share_the_features_of_imagenet(babel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted_images(monkeypatch)
    sets = evaluate()["sets"]
    assert calls["images"] == 6 * (len(CLASSES) + len(OTHERS))
    german = sets["babel_DE"]
    assert (german["splits"]["test"]["images"], german["prompts"]["texts"]) == (24, 8)
    assert 0 < german["tasks"]["zero_shot"]["value"] < 1
    assert sets["babel_XX"]["splits"]["test"]["images"] == 6
    part = BabelImageNet("data/imagenet", "DE", "names.json", "prompts.json")
    model = load_model("last.ckpt")
    store = FeatureStore(model, Path("out/cache"), EncodingSettings(num_workers=0, accelerator="cpu"))
    stored = store.features(part, "babel")
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
