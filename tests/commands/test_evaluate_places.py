"""``lit-clip evaluate`` with segmentation and pointing equals plain loops, on any number of ranks, and is cached."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lit_clip import load_model, zero_shot_classifier
from lit_clip.cli.subcommands import run_command
from lit_clip.errors import InputError
from lit_clip.evaluation import store
from lit_clip.evaluation.places import PlaceTask
from tests.commands.test_evaluate import evaluate, root, words, write_suite
from tests.conftest import ROOT
from tests.helpers.miniature_masks import write_all, write_image, write_mask

__all__ = ["root"]
NAMES = ["red", "green thing", "blue", "a"]
TEMPLATES = ["a photo of {}.", "{}"]
FILES = {"root": "ADEChallengeData2016", "images": "images/validation", "masks": "annotations/validation"}
ADE = {**FILES, "classes": NAMES[:3], "background": ["white", "black"], "short_side": 32}


@pytest.fixture
def places(root: Path) -> Path:
    """A suite of five images with masks of four classes, and of grids of the labelled images."""
    for number in range(5):
        folder = root / "data/ADEChallengeData2016"
        write_image(folder / f"images/validation/{number}.jpg", number, 40 + 10 * number, 40)
        values = np.random.default_rng(number).choice([0, 1, 2, 3, 255], (40, 40 + 10 * number)).astype(np.uint8)
        (folder / "annotations/validation").mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(folder / f"annotations/validation/{number}.png")
    masks = {"data": {"class_path": "datamodules.evaluation.MaskedFiles", "init_args": ADE}, "metric": "miou"}
    folder = {"root": "test", "images": {"class_path": "datamodules.ImageFolderClasses"}, "side": 40, "columns": 3}
    grids: dict[str, Any] = {"data": {"class_path": "datamodules.evaluation.ImageGrids", "init_args": folder}}
    grids |= {"metric": "accuracy", "tasks": ["pointing", "segmentation"]}
    write_suite(root, masks={**masks, "templates": TEMPLATES}, grids={**grids, "templates": TEMPLATES})
    return root


def test_segmentation_equals_a_plain_loop(places: Path) -> None:
    """The width of each image is a whole number of the tiny model's places, so one window or two do not round it."""
    model = load_model("last.ckpt").eval()
    side = model.visual.conv1.kernel_size[0]
    names = ["white", "black", *NAMES[:3]]
    classifier = zero_shot_classifier(model, names, TEMPLATES)
    matrix = np.zeros((4, 4), dtype=int)
    for number in range(5):
        image = Image.open(f"data/ADEChallengeData2016/images/validation/{number}.jpg").convert("RGB")
        mask = np.asarray(Image.open(f"data/ADEChallengeData2016/annotations/validation/{number}.png"))
        long = round(image.width / image.height * 32 / side)
        image = image.resize((long * side, 32), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        total, count = torch.zeros(5, 32 // side, long), torch.zeros(long)
        starts = range(0, long - 32 // side, 16 // side)
        for start in [*starts, long - 32 // side]:
            crop = model.normalize(pixels[..., start * side : start * side + 32])
            with torch.no_grad():
                features = model.encode_patches(crop, normalize=True)[0]
            total[..., start : start + 32 // side] += torch.einsum("dhw,dm->mhw", features, classifier)
            count[start : start + 32 // side] += 1
        cosines = F.interpolate((total / count)[None], mask.shape, mode="bilinear")[0]
        found = torch.tensor([0, 0, 1, 2, 3])[cosines.argmax(dim=0)].numpy()
        np.add.at(matrix, (mask[mask < 255], found[mask < 255]), 1)
    both = matrix.diagonal()
    expected = np.mean(both / (matrix.sum(axis=0) + matrix.sum(axis=1) - both))
    entry = evaluate("--sets", "masks")["sets"]["masks"]
    result = entry["tasks"]["segmentation"]
    assert 0.01 < expected < 0.9
    assert result["value"] == pytest.approx(expected, abs=2e-3)  # a few pixels lie between two classes
    assert [line[0] for line in result["iou"]] == ["background", *NAMES[:3]] == entry["class_names"]
    assert [line[3] for line in result["iou"]] == matrix.sum(axis=1).tolist()
    assert entry["splits"]["test"]["images"] == 5
    assert entry["prompts"] | {"sha256": ""} == {"classes": 4, "texts": 10, "sha256": ""}
    low, high = result["intervals"]["miou"]
    assert low < result["value"] < high
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "segmentation: IoU of each class" in page
    assert "mean IoU" in page
    lines = Path("out/results.csv").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("this run,last.ckpt,masks,segmentation,,miou,") for line in lines)
    assert Path("out", result["files"][0]).read_text().startswith("truth,background,red")


def test_grids_are_compared_with_another_run_query_by_query(places: Path) -> None:
    run_command(words("--output", "first", "--sets", "grids"))
    results = evaluate("--sets", "grids", "--compare", "first")
    tasks = results["sets"]["grids"]["tasks"]
    pointing = tasks["pointing"]
    assert (pointing["images"], pointing["queries"]) == (10, 30)
    assert pointing["baseline"] == pytest.approx(1 / 3)  # the centre is in the middle image
    assert {"accuracy", "mean_per_class"} == pointing["metrics"].keys()
    assert len(tasks["segmentation"]["iou"]) == 6
    (compared,) = results["comparisons"]
    assert (compared["task"], compared["metric"], compared["images"]) == ("pointing", "accuracy", 30)
    assert (compared["difference"], compared["p_value"]) == (0, 1)
    assert "pointing, pointing accuracy" in Path("out/report.html").read_text(encoding="utf-8")


def test_records_are_kept_until_a_mask_or_a_name_changes(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate("--sets", "masks")["sets"]["masks"]["tasks"]
    computed: list[str] = []
    encode = store.encode

    def counted(model: Any, task: Any, *more: Any) -> Any:
        computed.append(task.title)
        return encode(model, task, *more)

    monkeypatch.setattr(store, "encode", counted)
    assert evaluate("--sets", "masks")["sets"]["masks"]["tasks"] == first
    assert computed == []
    write_mask(places / "data/ADEChallengeData2016/annotations/validation/0.png", [1])
    Image.new("L", (40, 40), 1).save("data/ADEChallengeData2016/annotations/validation/0.png")
    second = evaluate("--sets", "masks")["sets"]["masks"]["tasks"]
    assert second != first
    suite = Path("suite.yaml").read_text(encoding="utf-8")
    Path("suite.yaml").write_text(suite.replace("black", "grey"), encoding="utf-8")
    assert evaluate("--sets", "masks")["sets"]["masks"]["tasks"] != second
    assert computed == ["masks segmentation"] * 2


def test_an_interrupted_evaluation_resumes_with_the_images_that_are_left(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate("--sets", "masks")["sets"]["masks"]["tasks"]
    monkeypatch.setattr("lit_clip.embedding.parts.SECONDS_BETWEEN_PARTS", -1)
    rows: list[int] = []
    step = PlaceTask.step

    def fail(task: Any, batch: Any, *rest: Any) -> Any:
        if len(rows) == 3:
            raise InputError("stop")
        rows.append(batch.rows[0])
        return step(task, batch, *rest)

    monkeypatch.setattr(PlaceTask, "step", fail)
    with pytest.raises(InputError, match="stop"):
        run_command(words("--output", "again", "--sets", "masks"))
    monkeypatch.setattr(PlaceTask, "step", lambda *given: rows.append(given[1].rows[0]) or step(*given))
    run_command(words("--output", "again", "--sets", "masks"))
    again = json.loads(Path("again/results.json").read_text(encoding="utf-8"))["sets"]["masks"]
    assert again["tasks"] == expected
    assert rows == [0, 1, 2, 3, 4]
    assert [path.name for path in Path("again/cache").rglob("*.npy")] == ["values.npy"]
    assert not list(Path("again/cache").glob(".*"))  # no parts


def test_a_broken_image_or_mask_is_skipped_or_an_error(places: Path) -> None:
    Path("data/ADEChallengeData2016/annotations/validation/3.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="3.png"):
        evaluate("--sets", "masks")
    found = evaluate("--sets", "masks", "--on_error", "skip")["sets"]["masks"]
    assert found["splits"]["test"]["images"] == found["tasks"]["segmentation"]["images"] == 4
    assert found["splits"]["test"]["skipped"][0][0] == "3.jpg"


def test_sets_without_masks_or_boxes_are_refused(root: Path) -> None:
    data = {"class_path": "datamodules.ImageFolderClasses", "init_args": {"root": "test"}}
    write_suite(root, noise={"data": data, "metric": "miou"})
    with pytest.raises(InputError, match="noise: ImageFolderClasses has no masks, which segmentation needs"):
        evaluate()
    write_suite(root, noise={"data": data, "metric": "accuracy"})
    with pytest.raises(InputError, match="noise: ImageFolderClasses has no boxes or masks, which pointing needs"):
        evaluate()


def test_the_suite_runs_on_miniatures_of_its_real_sets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(root / "data")
    monkeypatch.setattr("lit_clip.evaluation.data.Localised.short_side", lambda images, size: size)
    monkeypatch.setattr("lit_clip.evaluation.prompts.imagenet_templates", lambda: ["{}"])
    suite = ROOT / "configs/evaluation/segmentation.yaml"
    classes = {"voc21": 21, "voc20": 20, "context60": 60, "context59": 59, "ade20k": 150, "coco_stuff": 171}
    classes |= {"cityscapes": 19, "voc2007_boxes": 20, "coco_boxes": 2}
    run_command([*words(), "--suite", str(suite), "--sets", *classes])
    sets = json.loads(Path("out/results.json").read_text(encoding="utf-8"))["sets"]
    assert {name: found["status"] for name, found in sets.items()} == dict.fromkeys(classes, "done")
    assert all(0 <= task["value"] <= 1 for found in sets.values() for task in found["tasks"].values())
    assert sets["voc2007_boxes"]["tasks"]["pointing"]["queries"] == 4
    assert {name: len(found["class_names"]) for name, found in sets.items()} == classes
