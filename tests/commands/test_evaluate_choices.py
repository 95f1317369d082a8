"""``lit-clip evaluate`` with caption choice equals CLIP_benchmark, on any number of ranks, and is cached."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from datamodules.evaluation.caption_choices import Subset
from lit_clip import image_transform, load_model
from lit_clip.cli.subcommands import run_command
from lit_clip.errors import InputError
from lit_clip.evaluation import tasks
from lit_clip.evaluation.store import FeatureStore
from tests.commands.test_evaluate import evaluate, noise, root, words, write_suite
from tests.conftest import ROOT, lit_clip_command
from tests.datamodules.evaluation.test_caption_choices import (
    write_aro,
    write_json,
    write_mmvp,
    write_sugar_crepe,
    write_winogavil,
    write_winoground,
)
from tests.helpers.coloured_sets import paint

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
