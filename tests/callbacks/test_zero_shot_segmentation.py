"""Segmentation and pointing during training equal ``lit-clip evaluate``, on any number of ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from callbacks import ZeroShotSegmentation
from datamodules import NoCaptions
from lit_clip.cli.subcommands import run_command
from lit_clip.errors import InputError
from tests.helpers.miniature_masks import write_ade, write_image, write_voc_boxes
from tests.helpers.small_sets import data_for, entry, make_module, make_trainer, numbers, write_suite, write_table

NAMES = {"segmentation/ade/miou", "segmentation/ade/pixel_accuracy"} | {
    f"{task}/{name}/{metric}"
    for task, name, metrics in (
        ("pointing", "boxes", ("accuracy", "mean_per_class")),
        ("pointing", "grids", ("accuracy", "mean_per_class")),
        ("segmentation", "grids", ("miou", "pixel_accuracy")),
    )
    for metric in metrics
}


def part(name: str, metric: str, **options: Any) -> dict[str, Any]:
    data = {"class_path": f"datamodules.evaluation.{name}", "init_args": options}
    return {"data": data, "metric": metric, "templates": ["a {} patch."]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table of pairs, and a suite of masks, boxes, grids, and two sets that the callback leaves out."""
    write_table(tmp_path)
    write_ade(tmp_path / "ade")
    write_voc_boxes(tmp_path / "voc")
    for number in range(12):
        write_image(tmp_path / f"classes/{'abc'[number % 3]}/{number}.png", number)
    ade = {"images": "images/validation", "masks": "annotations/validation", "classes": "ade20k", "first": 1}
    grids = {"root": "classes", "images": {"class_path": "datamodules.ImageFolderClasses"}, "side": 24}
    sets = {
        "ade": part("MaskedFiles", "miou", root="ade", ignored=[0], **ade),
        "boxes": part("VOCBoxes", "accuracy", root="voc"),
        "grids": {**part("ImageGrids", "accuracy", **grids), "tasks": ["pointing", "segmentation"]},
        "gone": part("VOCBoxes", "accuracy", root="gone"),
        "shades": entry(),
    }
    write_suite(tmp_path, **sets)
    return tmp_path


def test_metrics_and_baselines_equal_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    module = make_module()
    trainer = make_trainer(folder, [ZeroShotSegmentation("suite.yaml")])
    with pytest.warns(UserWarning, match="ZeroShotSegmentation: gone is skipped"):
        trainer.validate(module, NoCaptions(), verbose=False)
    found = numbers(trainer, "segmentation/") | numbers(trainer, "pointing/")
    assert found.keys() == NAMES
    trainer.save_checkpoint("last.ckpt", weights_only=True)
    words = ["--suite", "suite.yaml", "--output", "out", "--num_workers", "0", "--accelerator", "cpu"]
    run_command(["evaluate", "--model", "last.ckpt", "--sets", "ade", "boxes", "grids", *words])
    sets = json.loads(Path("out/results.json").read_text(encoding="utf-8"))["sets"]
    for name, value in found.items():
        task, of_set, metric = name.split("/")
        assert value == pytest.approx(sets[of_set]["tasks"][task]["metrics"][metric], abs=1e-6), name
    for task, of_set, metric in (("segmentation", "ade", "miou"), ("pointing", "boxes", "accuracy")):
        assert module.baselines[f"{task}/{of_set}/{metric}"] == sets[of_set]["tasks"][task]["baseline"]
    assert module.baselines["segmentation/grids/miou"] == pytest.approx(
        1 / 9
    )  # a third of the pixels, one of three classes


def test_two_ranks_give_the_same_metrics(folder: Path, ranks: Callable[..., None]) -> None:
    suite, output = str(folder / "suite.yaml"), folder / "two.json"
    ranks("places", 2, str(output), str(folder), suite, script="ranks_callbacks.py")
    trainer = make_trainer(folder, [ZeroShotSegmentation(suite, str(folder))])
    trainer.validate(make_module(), NoCaptions(), verbose=False)
    one = numbers(trainer, "segmentation/") | numbers(trainer, "pointing/")
    assert json.loads(output.read_text(encoding="utf-8")) == one
    assert one.keys() == NAMES


def test_a_set_without_masks_and_a_broken_mask_stop_the_run(folder: Path) -> None:
    (folder / "ade/annotations/validation/two.png").write_bytes(b"no image")
    callback = ZeroShotSegmentation(str(folder / "suite.yaml"), str(folder), ["ade"])
    module = make_module()
    with pytest.raises(InputError, match=r"ade: .*two.png.*ZeroShotSegmentation.on_error to skip"):
        make_trainer(folder, [callback]).validate(module, NoCaptions(), verbose=False)
    suite = write_suite(folder, shades=entry(metric="miou"))
    trainer = make_trainer(folder, [ZeroShotSegmentation(suite, str(folder))], max_steps=1)
    with pytest.raises(InputError, match="shades: Shades has no masks, which segmentation needs"):
        trainer.fit(module, data_for(module, folder / "captions.csv"))
    assert trainer.global_step == 0
