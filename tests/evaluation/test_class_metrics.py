"""Metrics by class path and thresholds equal torchmetrics and scikit-learn, and refuse in one line."""

import csv
import inspect
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, precision_recall_curve, roc_auc_score
from torchmetrics import MeanMetric
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAUROC,
    MulticlassAveragePrecision,
    MulticlassCalibrationError,
)

from callbacks import Retrieval, ZeroShot
from datamodules import NoCaptions
from lit_clip.errors import InputError
from lit_clip.evaluation.class_metrics import (
    build,
    check_metrics,
    checked,
    evaluate_metrics,
    metrics_typed,
    write_array,
)
from lit_clip.evaluation.thresholds import best_f1_threshold, fit_thresholds, macro, none_threshold
from tests.conftest import ROOT, TINY_YAML, run_lightning_ranks
from tests.helpers.small_sets import Shades, cosines, entry, make_module, make_trainer, write_suite, write_table

TORCHMETRICS = "torchmetrics.classification."


def example(images: int = 200, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(images + classes)
    labels = random.integers(0, classes, images)
    logits = random.normal(size=(images, classes)) + 1.5 * np.eye(classes)[labels]
    return torch.from_numpy(logits).softmax(dim=1).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("parts", [1, 3, 200])
def test_numbers_equal_scikit_learn_in_any_parts(parts: int) -> None:
    likely, labels = example()
    metrics = {
        "auroc": TORCHMETRICS + "MulticlassAUROC",
        "f1": {"class_path": TORCHMETRICS + "MulticlassF1Score", "init_args": {"average": "macro"}},
        "ap": MulticlassAveragePrecision,
        "ece": partial(MulticlassCalibrationError, n_bins=10),
        "accuracy": {"class_path": "torchmetrics.Accuracy", "init_args": {"task": "multiclass"}},
    }
    found = evaluate_metrics(checked(metrics, "metrics"), likely.tensor_split(parts), labels, 7).numbers
    probability, truth = likely.double().numpy(), labels.numpy()
    right = probability.argmax(axis=1) == truth
    confidence, bins = probability.max(axis=1), np.linspace(0, 1, 11)
    where = np.digitize(confidence, bins[1:-1])
    gaps = [abs(right[where == b].mean() - confidence[where == b].mean()) * (where == b).mean() for b in set(where)]
    expected = {
        "auroc": roc_auc_score(truth, probability / probability.sum(1, keepdims=True), multi_class="ovr"),
        "f1": f1_score(truth, probability.argmax(axis=1), average="macro"),
        "ap": np.mean([average_precision_score(truth == c, probability[:, c]) for c in range(7)]),
        "ece": sum(gaps),
        "accuracy": right.mean(),
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_vectors_and_matrices_are_no_numbers_and_become_files(tmp_path: Path) -> None:
    likely, labels = example(50, 3)
    metrics = {
        "matrix": TORCHMETRICS + "MulticlassConfusionMatrix",
        "each": {"class_path": TORCHMETRICS + "MulticlassAUROC", "init_args": {"average": "none"}},
        "curve": TORCHMETRICS + "MulticlassROC",
    }
    found = evaluate_metrics(metrics, [likely], labels, 3)
    assert not found.numbers
    names = ["cat", "=1+1", "a/b"]
    files = {name: write_array(tmp_path / name, value, names) for name, value in found.arrays.items()}
    assert {name: path.name for name, path in files.items()} == {
        **{"matrix": "matrix.csv", "each": "each.csv", "curve": "curve.json"}
    }
    rows = list(csv.reader(files["matrix"].open()))
    assert rows[0] == ["", "cat", "'=1+1", "a/b"]  # what a spreadsheet would compute has an apostrophe
    counted = np.array([row[1:] for row in rows[1:]], dtype=int)
    assert np.array_equal(counted, confusion_matrix(labels.numpy(), likely.argmax(dim=1).numpy()))
    each = {row[0].lstrip("'"): float(row[1]) for row in csv.reader(files["each"].open())}
    expected = [roc_auc_score((labels == c).numpy(), likely[:, c].numpy()) for c in range(3)]
    assert list(each.values()) == pytest.approx(expected, abs=1e-6)
    false_rates, right_rates, thresholds = json.loads(files["curve"].read_text())
    assert len(false_rates) == len(right_rates) == len(thresholds) == 3


def test_several_classes_per_image_and_what_is_not_counted() -> None:
    random = torch.Generator().manual_seed(0)
    likely, relevance = (
        torch.rand(80, 4, generator=random),
        torch.randint(-1, 2, (80, 4), generator=random).to(torch.int8),
    )
    found = evaluate_metrics({"f1": TORCHMETRICS + "MultilabelF1Score"}, [likely], relevance, 4).numbers["f1"]
    counted = [relevance[:, c] >= 0 for c in range(4)]
    each = [f1_score(relevance[rows, c].numpy(), (likely[rows, c] > 0.5).numpy()) for c, rows in enumerate(counted)]
    assert found == pytest.approx(np.mean(each), abs=1e-6)


def test_a_metric_that_is_given_as_an_object_is_not_changed() -> None:
    likely, labels = example()
    mine = MulticlassAUROC(num_classes=7)
    mine.update(*example(30))
    before = mine.compute()
    first = evaluate_metrics({"mine": mine}, [likely], labels, 7)
    assert first.numbers == evaluate_metrics({"mine": mine}, [likely], labels, 7).numbers
    assert mine.compute() == before


def test_probabilities_that_are_not_numbers_give_no_number() -> None:
    likely, labels = example()
    likely[3, 2] = torch.nan  # torchmetrics would take them for logits
    assert np.isnan(evaluate_metrics({"auroc": MulticlassAUROC}, [likely], labels, 7).numbers["auroc"])


def test_the_number_of_classes_is_given_only_where_the_metric_asks_for_it() -> None:
    kinds = {"many": TORCHMETRICS + "MulticlassAUROC", "labels": TORCHMETRICS + "MultilabelAUROC", "two": BinaryAUROC}
    built: dict[str, Any] = build({**kinds, "own": {"class_path": kinds["many"], "init_args": {"num_classes": 3}}}, 7)
    assert (built["many"].num_classes, built["labels"].num_labels, built["own"].num_classes) == (7, 7, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["top1=x.Y"], "--metrics: top1 is a metric of lit-clip's own; choose another name"),
        (["torchmetrics.Accuracy"], "must be NAME=CLASS_PATH, such as auroc="),
        (["a/b=x.Y"], "would be part of metric and file names"),
        (["a=x.Y", "a=x.Z"], "there are two called a"),
        (["a=3"], "a: 3 is no metric; name its class"),
        (["a={class: x}"], "is no metric"),
        (["a={"], "--metrics a: is not YAML"),
        (["a={class_path: x.Y, other: 1}"], "is no metric"),
    ],
)
def test_metrics_that_are_badly_typed_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        metrics_typed(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("no_such_module.Metric", "metrics: mine: .*No module named"),
        (TORCHMETRICS + "MulticlassAUROCK", "metrics: mine: .*no attribute 'MulticlassAUROCK'"),
        ("pathlib.Path", "metrics: mine: .*"),
        ({"class_path": TORCHMETRICS + "MulticlassAUROC", "init_args": {"averag": "none"}}, "averag"),
        ({"class_path": TORCHMETRICS + "MulticlassAUROC", "init_args": {"average": "nonsense"}}, "average"),
        ({"class_path": TORCHMETRICS + "MulticlassAUROC", "init_args": [1]}, "init_args must be a mapping"),
        ({"class_path": TORCHMETRICS + "MulticlassAUROC", "init_args": {"num_classes": 3}}, "metrics: mine: .*3"),
        (MulticlassAUROC(num_classes=3), "metrics: mine: .*"),
        ({"class_path": TORCHMETRICS + "MulticlassAUROC", "init_args": {"num_classes": 1}}, "larger than 1, but got 1"),
        ("torchmetrics.classification.MulticlassFBetaScore", "metrics: mine: .*beta"),
        ("torchmetrics.image.TotalVariation", "metrics: mine: .*arguments"),
        (partial(MulticlassAUROC, averag="none"), "averag"),
        (dict, "makes no torchmetrics.Metric"),
        (TORCHMETRICS + "MultilabelF1Score", "metrics: mine: .*"),
    ],
)
def test_a_metric_that_a_set_does_not_allow_is_one_line(metric: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_metrics(checked({"mine": metric}, "metrics"), example()[1], 7)
    assert "\n" not in str(error.value)


def test_a_bug_in_a_metric_of_ones_own_is_told_with_its_file_and_line() -> None:
    class Mine(MeanMetric):
        def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
            super().update((1, 2)[preds, target])  # pyright: ignore

    line = inspect.getsourcelines(Mine)[1] + 2
    with pytest.raises(InputError, match=rf"^metrics: mine: tuple indices must be .* \({__file__}, line {line}\)$"):
        check_metrics({"mine": Mine}, example()[1], 7)


# In callbacks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_table(tmp_path)
    write_suite(tmp_path, shades=entry(), many=entry("ManyShades", metric="map11", splits={"test": {"size": 33}}))
    return tmp_path


# Two ranks have unequal parts of the 33 images already.
@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_ranks_log_what_one_process_computes(world: int, folder: Path, ranks: Callable[..., None]) -> None:
    output = folder / "metrics.json"
    ranks("metrics", world, str(output), str(folder), str(folder / "suite.yaml"), script="ranks_callbacks.py")
    found = json.loads(output.read_text())
    module, images = make_module(), Shades("")
    scores = module.model.logit_scale.exp().item() * cosines(module, images).double()
    likely, labels = scores.softmax(dim=1), torch.tensor(images.labels())
    auroc = roc_auc_score(labels.numpy(), likely.numpy(), multi_class="ovr")
    ece = MulticlassCalibrationError(num_classes=7)(likely.float(), labels)
    assert found["zero_shot/shades/auroc"] == pytest.approx(auroc, abs=1e-6)
    assert found["zero_shot/shades/ece"] == pytest.approx(float(ece), abs=1e-6)
    assert found["zero_shot/shades/own"] == pytest.approx(float(likely.amax(dim=1).sum()), abs=1e-4)
    assert found["linear_probe/shades/auroc"] > 0.9
    matrix = np.loadtxt(folder / "csv/zero_shot_shades_matrix.csv", delimiter=",", skiprows=1, usecols=range(1, 8))
    assert np.array_equal(matrix, confusion_matrix(labels.numpy(), likely.argmax(dim=1).numpy(), labels=range(7)))
    assert not any("matrix" in name for name in found)  # a matrix is no number to log


def test_metrics_of_a_callback_are_checked_before_training_starts(folder: Path) -> None:
    suite = str(folder / "suite.yaml")
    with pytest.raises(InputError, match="ZeroShot.metrics: must be a mapping"):
        ZeroShot(suite=suite, metrics=["x"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="Retrieval.metrics: are of class probabilities"):
        Retrieval(suite, metrics={"auroc": TORCHMETRICS + "MulticlassAUROC"})
    wrong = ZeroShot(
        suite=suite, data_root=str(folder), metrics={"auroc": TORCHMETRICS + "MulticlassAUROC"}, examples=0
    )
    with pytest.raises(InputError, match="many: metrics: auroc: "):  # the set's images have several classes
        make_trainer(folder, [wrong]).validate(make_module(), NoCaptions(), verbose=False)


# What ranks log is tested above.
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_metrics_of_a_configuration_are_those_of_its_saved_form(world: int, folder: Path) -> None:
    """``validate`` with ``fit_config.yaml`` and the checkpoint finds what ``fit`` logged at its last step."""
    (folder / "my_own.py").write_text(
        "from torchmetrics import MeanMetric\n\n\nclass Confidence(MeanMetric):\n"
        "    def update(self, preds, target):\n        super().update(preds.amax(dim=1))\n"
    )
    metrics = {
        "auroc": {"class_path": TORCHMETRICS + "MulticlassAUROC", "init_args": {"average": "macro"}},
        "confidence": "my_own.Confidence",
        "matrix": TORCHMETRICS + "MulticlassConfusionMatrix",
    }
    options = {"suite": "suite.yaml", "only": ["shades"], "metrics": metrics}
    callback = {"class_path": "callbacks.ZeroShot", "init_args": options}
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    (folder / "metrics.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback, saver]}}))
    words = ["--data.train", "captions.csv", "--data.val", "captions.csv", "--data.batch_size", "2"]
    words += ["--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    words += ["--trainer.devices", str(world), "--trainer.strategy", "ddp" if world > 1 else "auto"]
    words += ["--model.architecture", TINY_YAML]
    configs = ["--config", str(ROOT / "configs/table.yaml"), "--config", "metrics.yaml"]
    log = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs", "--trainer.logger.name", "own"]
    run_lightning_ranks(world, folder, "lit-clip", "fit", *configs, *words, *log)
    run = folder / "runs/own/version_0"
    fitted = logged(run / "metrics.csv")
    assert {"zero_shot/shades/auroc", "zero_shot/shades/confidence"} <= fitted.keys()
    assert len((run / "zero_shot_shades_matrix.csv").read_text().splitlines()) == 8
    checkpoint = str(run / "checkpoints/last.ckpt")
    run_lightning_ranks(
        world, folder, "lit-clip", "validate", "--config", str(run / "fit_config.yaml"), "--ckpt_path", checkpoint
    )
    again = logged(next(folder.glob("runs/own/validate_*/metrics.csv")))
    for name in ("auroc", "confidence", "top1"):
        assert again[f"zero_shot/shades/{name}"] == pytest.approx(fitted[f"zero_shot/shades/{name}"], abs=1e-6)


def logged(path: Path) -> dict[str, float]:
    """Return the last value of each metric in a CSV logger's file."""
    rows = csv.DictReader(path.read_text().splitlines())
    return {name: float(value) for row in rows for name, value in row.items() if value}


def labelled(images: int, classes: int = 1, seed: int = 0, distinct: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores ``[N, C]``, with ties if ``distinct`` is not 0, and relevance."""
    random = np.random.default_rng(seed)
    relevance = (random.random((images, classes)) < random.uniform(0.1, 0.5, classes)).astype(np.int8)
    scores = random.normal(size=relevance.shape) + 1.3 * relevance
    scores = np.round(scores * distinct) / distinct if distinct else scores
    return torch.from_numpy(scores), torch.from_numpy(relevance)


@pytest.mark.parametrize("distinct", [0, 1, 3])
@pytest.mark.parametrize("images", [1, 2, 17, 300])
def test_no_threshold_of_scikit_learn_has_a_higher_f1(images: int, distinct: int) -> None:
    for seed in range(20):
        scores, relevance = labelled(images, seed=seed, distinct=distinct)
        score, right = scores[:, 0], relevance[:, 0] == 1
        threshold, f1 = best_f1_threshold(score, right)
        if not right.any():
            assert (threshold, f1) == (math.inf, 0.0)
            continue
        precision, recall, thresholds = precision_recall_curve(right.numpy(), score.numpy())
        curve = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
        assert f1 == pytest.approx(curve.max(), abs=1e-12)
        assert f1 == pytest.approx(f1_score(right.numpy(), (score >= threshold).numpy()), abs=1e-12)
        best = thresholds[np.isclose(curve[:-1], curve.max(), rtol=0, atol=1e-12)]
        assert threshold == best.max()  # fewest images are given the class


def test_f1_on_held_out_images_is_that_of_thresholds_fitted_without_them() -> None:
    scores, relevance = labelled(60, 4)
    relevance[::7, 1] = -1  # not counted
    relevance[:, 3] = 0  # a class without examples
    found = fit_thresholds(scores, relevance, fixed=0.5, folds=5, seed=3)
    for c, each in enumerate(found):
        counted = relevance[:, c] >= 0
        score, right = scores[counted, c].numpy(), relevance[counted, c].numpy() == 1
        assert each.examples == right.sum()
        assert each.f1_fixed == pytest.approx(f1_score(right, score >= 0.5, zero_division=0))
        assert each.f1_fitted == pytest.approx(f1_score(right, score >= each.threshold, zero_division=0))
        random, fold = torch.Generator().manual_seed(3), np.zeros(len(right), dtype=int)
        for rows in (np.flatnonzero(right), np.flatnonzero(~right)):
            fold[rows[torch.randperm(len(rows), generator=random)]] = np.arange(len(rows)) % 5
        answers = np.zeros(len(right), dtype=bool)
        for held in range(5):
            train = fold != held
            precision, recall, thresholds = precision_recall_curve(right[train], score[train])
            curve = (2 * precision * recall / np.maximum(precision + recall, 1e-300))[:-1]
            best = thresholds[np.isclose(curve, curve.max(), rtol=0, atol=1e-12)].max() if right.any() else math.inf
            answers[~train] = score[~train] >= best
        assert each.f1_held_out == pytest.approx(f1_score(right, answers, zero_division=0))
    means = macro(found)
    assert means["f1_fitted"] == pytest.approx(np.mean([each.f1_fitted for each in found[:3]]))


@pytest.mark.parametrize("error", [0.01, 0.05, 0.3])
def test_new_images_of_the_classes_are_called_none_at_most_as_often_as_stated(error: float) -> None:
    random, shares = np.random.default_rng(0), []
    for _ in range(400):
        examples, new = random.gumbel(size=120), random.gumbel(size=500)
        shares.append((new < none_threshold(torch.from_numpy(examples), error)).mean())
    assert error - 1.5 / 121 < np.mean(shares) <= error + 3 * np.std(shares) / 20


def test_too_few_examples_for_an_error_are_one_line() -> None:
    with pytest.raises(InputError, match=r"an error of 0.05 needs 19 examples, not 18; add some, or allow more"):
        none_threshold(torch.rand(18), 0.05)
    assert none_threshold(torch.arange(19.0), 0.05) == 0.0
    with pytest.raises(InputError, match="error: 1.0 must be above 0 and below 1"):
        none_threshold(torch.rand(18), 1.0)
    with pytest.raises(InputError, match="scores that are not finite"):
        fit_thresholds(torch.full((3, 1), torch.nan), torch.ones(3, 1))
