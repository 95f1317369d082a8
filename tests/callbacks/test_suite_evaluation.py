"""The linear probe during training equals scikit-learn on the features before the projection."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from callbacks import LinearProbe, Retrieval, ZeroShotSegmentation
from datamodules import NoCaptions
from lit_clip import LitCLIP
from lit_clip.cli.subcommands import run_command
from lit_clip.errors import InputError
from lit_clip.evaluation.image_retrieval import image_retrieval
from tests.helpers.miniature_masks import write_ade, write_image, write_voc_boxes
from tests.helpers.small_sets import (
    Shades,
    captions_entry,
    data_for,
    entry,
    make_module,
    make_trainer,
    numbers,
    write_suite,
    write_table,
)

TOP1 = "linear_probe/shades/top1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_table(tmp_path)
    splits: dict[str, Any] = {"train": {"split": "train", "size": 60}, "val": {"split": "more", "size": 20}, "test": {}}
    write_suite(tmp_path, shades=entry(splits=splits), only_test=entry(splits={"test": {}}))
    return tmp_path


def probe(folder: Path, **options: Any) -> LinearProbe:
    return LinearProbe(str(folder / "suite.yaml"), str(folder), **options)


def before_projection(module: LitCLIP, images: Shades) -> np.ndarray:
    with torch.no_grad():
        pixels = torch.stack([module.model.eval().preprocess(images[row][0]) for row in range(len(images))])
        return module.model.image_features(pixels)[0].numpy()


def test_accuracy_equals_scikit_learns_on_the_features_before_the_projection(folder: Path) -> None:
    module = make_module()
    trainer = make_trainer(folder, [probe(folder, l2=10.0, batch_size=7)])
    trainer.validate(module, NoCaptions(), verbose=False)
    train, val, test = Shades("", "train", 60), Shades("", "more", 20), Shades("")
    features = np.concatenate([before_projection(module, train), before_projection(module, val)])
    assert features.shape == (80, 64)  # the width of the image tower; the embedding has 16
    sklearns = LogisticRegression(C=1 / 10.0, max_iter=1000, tol=1e-8).fit(features, train.labels() + val.labels())
    found = numbers(trainer, "linear_probe/")
    assert set(found) == {f"linear_probe/shades/{name}" for name in ("top1", "top5", "mean_per_class")}
    expected = sklearns.score(before_projection(module, test), test.labels())
    assert found[TOP1] == pytest.approx(expected, abs=1e-6)
    assert expected > 2 * module.baselines[TOP1]


def test_fit_evaluates_every_n_epochs_and_equals_validate(folder: Path) -> None:
    module, ran = make_module(), []

    class Counting(LinearProbe):
        def evaluate(self, trainer: Any, module: LitCLIP) -> Any:
            ran.append(trainer.global_step)
            return super().evaluate(trainer, module)

    callback = Counting(str(folder / "suite.yaml"), str(folder), every_n_epochs=2)
    trainer = make_trainer(folder, [callback], max_epochs=3, enable_checkpointing=False)
    trainer.fit(module, data_for(module, folder / "captions.csv"))
    assert ran == [2, 6]
    again = make_trainer(folder, [probe(folder)])
    again.validate(module, NoCaptions(), verbose=False)
    assert numbers(again, "linear_probe/") == numbers(trainer, "linear_probe/")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["only_test"]}, "LinearProbe.only: only_test does not have the task linear_probe"),
        ({"l2": 0.0}, "LinearProbe.l2: 0.0 must be above 0"),
        ({"l2": float("nan")}, "LinearProbe.l2: nan must be above 0"),
        ({"batch_size": 0}, "LinearProbe.batch_size: 0 must be at least 1"),
    ],
)
def test_invalid_options_are_an_error(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        probe(folder, **options)


SIX = {"names": 6, "size": 6}  # a seventh row has the label 6


@pytest.mark.parametrize(
    ("splits", "metric", "message"),
    [
        ({"train": {"split": "train", "size": 1}, "test": {}}, "top1", "shades: .*each class has one image"),
        ({"train": {"split": "train", "size": 0}, "test": {}}, "top1", "shades: the set is empty"),
        ({"train": {**SIX, "split": "train"}, "val": {**SIX, "size": 7}, "test": SIX}, "top1", "shades: .*6"),
        ({"train": {"split": "train"}, "test": {}}, "roc_auc", "shades: metric: roc_auc needs 2 classes"),
        ({"train": {"split": "train"}, "test": {"names": 6}}, "top1", "shades: test and train have 6 and 7 classes"),
    ],
)
def test_labels_that_cannot_be_learnt_from_are_an_error_before_the_first_step(
    folder: Path, splits: dict[str, Any], metric: str, message: str
) -> None:
    write_suite(folder, shades=entry(splits=splits, metric=metric))
    module = make_module()
    trainer = make_trainer(folder, [probe(folder)], max_epochs=1, enable_checkpointing=False)
    with pytest.raises(InputError, match=message):
        trainer.fit(module, data_for(module, folder / "captions.csv"))
    assert trainer.global_step == 0


# Retrieval on sets of a suite equals the validation of the same pairs and ``lit-clip evaluate``'s task.


@pytest.fixture
def pairs_folder(tmp_path: Path) -> Path:
    """Twenty pairs, of which two images share a caption, and a suite of them and of a set without captions."""
    table = write_table(tmp_path, 20)
    lines = table.read_text(encoding="utf-8").splitlines()
    lines[8] = lines[8].split(",")[0] + "," + lines[15].split(",")[1]
    table.write_text("\n".join(lines), encoding="utf-8")
    write_suite(tmp_path, shades=entry(), pairs=captions_entry(), gone=captions_entry("gone.csv"))
    return tmp_path


def test_metrics_and_baselines_equal_the_validation_of_the_same_pairs(pairs_folder: Path) -> None:
    module = make_module()
    callback = Retrieval(str(pairs_folder / "suite.yaml"), str(pairs_folder), batch_size=7)
    trainer = make_trainer(pairs_folder, [callback])
    with pytest.warns(UserWarning, match="Retrieval: gone is skipped"):
        trainer.validate(module, data_for(module, pairs_folder / "captions.csv"), verbose=False)
    expected = {name[4:]: value for name, value in numbers(trainer, "val/").items() if "_to_" in name}
    assert "merged_text_to_image_recall@5" in expected
    assert len({*expected.values()}) > 4
    found = numbers(trainer, "retrieval/")
    assert found == pytest.approx({f"retrieval/pairs/{name}": value for name, value in expected.items()}, abs=1e-6)
    baselines = {name[4:]: value for name, value in module.baselines.items() if name.startswith("val/")}
    del baselines["loss"], baselines["mean_recall"]  # of the validation alone
    assert {name[16:]: value for name, value in module.baselines.items() if "retrieval/" in name} == baselines
    assert baselines["merged_text_to_image_recall@1"] != baselines["text_to_image_recall@1"]


def write_questions(folder: Path, metric: str) -> list[dict[str, str]]:
    """Write a suite of pairs, and of questions about their images, and return the questions."""
    (folder / "crepe/val2017").mkdir(parents=True)
    questions = []
    for row in range(20):
        shutil.copy(folder / f"{row}.png", folder / f"crepe/val2017/{row}.png")
        captions = {"caption": f"red {row}", "negative_caption": f"blue {row * row % 7}"}
        questions.append({"filename": f"{row}.png", **captions})
    (folder / "crepe/add_obj.json").write_text(json.dumps(dict(enumerate(questions))))
    spec = {"class_path": "datamodules.evaluation.SugarCrepe", "init_args": {"root": "crepe", "subset": "add_obj"}}
    write_suite(folder, pairs=captions_entry(), crepe={"data": spec, "metric": metric})
    return questions


def test_caption_choice_equals_a_plain_loop(pairs_folder: Path) -> None:
    questions, module = write_questions(pairs_folder, "text_score"), make_module()
    trainer = make_trainer(
        pairs_folder, [Retrieval(str(pairs_folder / "suite.yaml"), str(pairs_folder), ["crepe"], batch_size=7)]
    )
    trainer.validate(module, data_for(module, pairs_folder / "captions.csv"), verbose=False)
    right, model = 0, module.model.eval()
    with torch.no_grad():
        for row, question in enumerate(questions):
            image = model.encode_image(model.preprocess(Image.open(pairs_folder / f"{row}.png"))[None], normalize=True)
            texts = model.tokenizer([question["caption"], question["negative_caption"]])
            own, other = (image @ model.encode_text(texts, normalize=True).T)[0].tolist()
            right += own > other
    assert numbers(trainer, "caption_choice/") == {"caption_choice/crepe/text_score": pytest.approx(right / 20)}
    assert 0 < right < 20
    assert module.baselines["caption_choice/crepe/text_score"] == 0.5
    assert not numbers(trainer, "retrieval/")


def test_images_are_searched_by_images_during_training(pairs_folder: Path) -> None:
    suite = write_suite(pairs_folder, shades=entry(splits={"test": {}}, tasks=["image_retrieval"]))
    module, trainer = make_module(), make_trainer(pairs_folder, [Retrieval(suite, str(pairs_folder))])
    trainer.validate(module, data_for(module, pairs_folder / "captions.csv"), verbose=False)
    shades = Shades("")
    with torch.no_grad():
        images = torch.stack([module.model.preprocess(shades[row][0]) for row in range(40)])
        expected = image_retrieval(module.model.encode_image(images), torch.tensor(shades.labels()))
    found = numbers(trainer, "image_retrieval/shades/")
    assert found["image_retrieval/shades/map@10"] == pytest.approx(expected.units["map@10"].mean(), abs=1e-6)
    assert module.baselines["image_retrieval/shades/map@10"] == pytest.approx(expected.baseline)


def test_a_metric_that_questions_do_not_have_is_refused_before_training(pairs_folder: Path) -> None:
    write_questions(pairs_folder, "image_score")
    callback, module = Retrieval(str(pairs_folder / "suite.yaml"), str(pairs_folder)), make_module()
    trainer = make_trainer(pairs_folder, [callback])
    with pytest.raises(InputError, match="crepe: metric: image_score is not defined for these questions"):
        trainer.fit(module, data_for(module, pairs_folder / "captions.csv"))
    assert trainer.global_step == 0


def test_a_suite_without_captions_is_refused(pairs_folder: Path) -> None:
    write_suite(pairs_folder, shades=entry())
    with pytest.raises(InputError, match=r"Retrieval.suite: no set has the task retrieval or caption_choice"):
        Retrieval(str(pairs_folder / "suite.yaml"))
    write_suite(pairs_folder, shades=entry(tasks=["retrieval"]))
    with pytest.raises(InputError, match="shades: Shades has no captions, which retrieval needs"):
        make_trainer(pairs_folder, [Retrieval(str(pairs_folder / "suite.yaml"), str(pairs_folder))]).validate(
            make_module(), data_for(make_module(), pairs_folder / "captions.csv"), verbose=False
        )


# Segmentation and pointing during training equal ``lit-clip evaluate``, on any number of ranks.


MASK_METRICS = {"segmentation/ade/miou", "segmentation/ade/pixel_accuracy"} | {
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
def masks_folder(tmp_path: Path) -> Path:
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


def test_metrics_and_baselines_equal_the_command(masks_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(masks_folder)
    module = make_module()
    trainer = make_trainer(masks_folder, [ZeroShotSegmentation("suite.yaml")])
    with pytest.warns(UserWarning, match="ZeroShotSegmentation: gone is skipped"):
        trainer.validate(module, NoCaptions(), verbose=False)
    found = numbers(trainer, "segmentation/") | numbers(trainer, "pointing/")
    assert found.keys() == MASK_METRICS
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


@pytest.mark.slow
def test_two_ranks_give_the_same_metrics(masks_folder: Path, ranks: Callable[..., Any]) -> None:
    suite = str(masks_folder / "suite.yaml")
    two = ranks("places", 2, masks_folder, suite, script="ranks_callbacks.py")
    trainer = make_trainer(masks_folder, [ZeroShotSegmentation(suite, str(masks_folder))])
    trainer.validate(make_module(), NoCaptions(), verbose=False)
    one = numbers(trainer, "segmentation/") | numbers(trainer, "pointing/")
    assert two == one
    assert one.keys() == MASK_METRICS


def test_a_set_without_masks_and_a_broken_mask_stop_the_run(masks_folder: Path) -> None:
    (masks_folder / "ade/annotations/validation/two.png").write_bytes(b"no image")
    callback = ZeroShotSegmentation(str(masks_folder / "suite.yaml"), str(masks_folder), ["ade"])
    module = make_module()
    with pytest.raises(InputError, match=r"ade: .*two.png.*ZeroShotSegmentation.on_error to skip"):
        make_trainer(masks_folder, [callback]).validate(module, NoCaptions(), verbose=False)
    suite = write_suite(masks_folder, shades=entry(metric="miou"))
    trainer = make_trainer(masks_folder, [ZeroShotSegmentation(suite, str(masks_folder))], max_steps=1)
    with pytest.raises(InputError, match="shades: Shades has no masks, which segmentation needs"):
        trainer.fit(module, data_for(module, masks_folder / "captions.csv"))
    assert trainer.global_step == 0
