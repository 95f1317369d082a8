"""Evaluation tasks: each turns the features of a set into its entry in ``results.json``.

Shapes: N images, C classes, T captions, D embedding dimension.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.evaluation.accuracy import predictions
from lit_clip.evaluation.bias import bias_report
from lit_clip.evaluation.caption_choice import evaluate_choices
from lit_clip.evaluation.data import CaptionedImages, Grouped, ImageSet
from lit_clip.evaluation.few_shot import SHOTS, FewShotProbes, train_few_shot
from lit_clip.evaluation.geolocation import nearest_km, within_km
from lit_clip.evaluation.intervals import Interval, intervals, mean_interval
from lit_clip.evaluation.open_set import Fold, OpenSet
from lit_clip.evaluation.other_classes import among, penalty_metric
from lit_clip.evaluation.predictions import (
    Columns,
    class_columns,
    joined,
    predictions_entry,
    recall_intervals,
    retrieval_columns,
    unit_scores,
)
from lit_clip.evaluation.probe import MOST_PENALTIES, Probe, Split, train_probe
from lit_clip.evaluation.robustness import subset_rows, subset_top1
from lit_clip.evaluation.scores import baseline, comparable, evaluate_scores, interval, mean_over_folds
from lit_clip.evaluation.store import SetFeatures
from lit_clip.evaluation.suite import Task
from lit_clip.evaluation.targets import Targets
from lit_clip.retrieval.metrics import pair_scores, retrieval_ranks
from lit_clip.retrieval.retrieval_set import DIRECTIONS, retrieval_metrics
from lit_clip.tools.atomic import make_folder, replacing
from lit_clip.tools.console import progress
from lit_clip.tools.hardware import best_device

ERRORS = 24  # images reported, the most confidently wrong ones
CONFUSIONS = 20  # pairs of classes reported
THUMBNAIL = 160  # pixels


@dataclass(frozen=True)
class TaskOptions:
    """Options of the tasks.

    Attributes:
        shots: numbers of examples per class.
        draws: number of draws of the examples.
        seed: random seed of the draws and of held-out images.
    """

    shots: tuple[int, ...] = SHOTS
    draws: int = 3
    seed: int = 0


def needed_splits(task: Task) -> tuple[str, ...]:
    """Return the splits that a task requires."""
    return ("train", "test") if task in ("linear_probe", "few_shot", "geolocation") else ("test",)


def run_task(task: Task, opened: OpenSet, options: TaskOptions, folder: Path) -> dict[str, Any]:
    """Run a task and return its result.

    Predictions, and images that the report shows, are saved below ``folder``.
    """
    if task == "zero_shot":
        return _zero_shot(opened, folder)
    if task == "linear_probe":
        return _linear_probe(opened, options, folder)
    if task == "few_shot":
        return _few_shot(opened, options)
    if task == "retrieval":
        return _retrieval(opened, folder)
    if task == "geolocation":
        return _geolocation(opened, folder)
    if task == "caption_choice":
        return _caption_choice(opened)
    return _bias(opened)


def _embeddings(features: SetFeatures) -> Tensor:
    return torch.from_numpy(np.array(features.after))


def _targets(opened: OpenSet, fold: Fold, split: str) -> Targets:
    return Targets.of(fold.images[split], fold.features[split].rows, _class_count(opened, fold, split))


def _class_count(opened: OpenSet, fold: Fold, split: str) -> int | None:
    """Return the number of class names in use, which may differ from a set's own; None: the set's own."""
    of_another_set = fold.classes is not None and split != "test"
    return len(opened.prompts.names) if opened.prompts and not of_another_set else None


def _scores(opened: OpenSet, fold: Fold, classifier: Tensor | None) -> Tensor:
    """Return the logits ``[N, C]`` of the test split."""
    assert classifier is not None
    return opened.scale * (_embeddings(fold.features["test"]) @ classifier.cpu().float())


def _keys(fold: Fold) -> list[str]:
    """Return the keys of the test images, in the order of their features."""
    return [fold.images["test"].key(row) for row in fold.features["test"].rows]


@dataclass
class _Scored:
    """A fold's classification: metrics with their intervals, and the rows of the file of predictions."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]
    columns: Columns


def _score(opened: OpenSet, number: int, scores: Tensor, targets: Targets) -> _Scored:
    metric, keys = opened.entry.metric, _keys(opened.folds[number])
    metrics, units = evaluate_scores(metric, scores, targets), unit_scores(metric, scores, targets)
    return _Scored(metrics, intervals(units), class_columns(metric, keys, scores, targets, units, number))


def _classification_result(opened: OpenSet, task: Task, scored: Sequence[_Scored], folder: Path) -> dict[str, Any]:
    """Return the entries that all classification tasks share, averaged over folds, and save the predictions."""
    mean, targets = mean_over_folds([fold.metrics for fold in scored]), _targets(opened, opened.folds[0], "test")
    columns = joined([fold.columns for fold in scored])
    judged = zip(*(columns[name].tolist() for name in ("fold", "key", "truth")), strict=True)
    return {
        "value": mean[opened.entry.metric],
        "metrics": mean,
        "intervals": {
            name: mean_interval([fold.intervals[name] for fold in scored])
            for name in scored[0].intervals
            if all(name in fold.intervals for fold in scored)
        },
        "baseline": baseline(opened.entry.metric, targets),
        "images": len(targets.labels),
        **predictions_entry(folder, opened.name, task, columns, judged),
    }


def _zero_shot(opened: OpenSet, folder: Path) -> dict[str, Any]:
    scored, first = [], None
    for number, fold in enumerate(opened.folds):
        scores, targets = _scores(opened, fold, opened.classifier), _targets(opened, fold, "test")
        scored.append(_score(opened, number, comparable(opened.entry.metric, scores), targets))
        first = first or (scores, targets)
    assert first is not None
    scores, targets = first
    result = _classification_result(opened, "zero_shot", scored, folder)
    if bool((targets.labels >= 0).all()):
        result["confusions"] = _confusions(opened, scores, targets)
        result["errors"] = _errors(opened, scores, targets, folder)
    return result


def used_splits(task: Task) -> tuple[str, ...]:
    """Return the splits that a task's result depends on."""
    return ("train", "val", "test") if task in ("linear_probe", "few_shot") else needed_splits(task)


def target_digests(opened: OpenSet) -> dict[tuple[int, str], str]:
    """Hash the labels and annotations by fold and split; results depend on them as well as on features and prompts."""
    return {
        (number, split): Targets.of(images, None, _class_count(opened, fold, split)).digest()
        for number, fold in enumerate(opened.folds)
        for split, images in fold.images.items()
    }


def top1_among(opened: OpenSet, classes: Sequence[int]) -> tuple[float, Interval]:
    """Return the zero-shot accuracy among some of the classes, see :func:`subset_top1`, and its interval."""
    fold = opened.folds[0]
    labels = _targets(opened, fold, "test").labels
    value = subset_top1(_scores(opened, fold, opened.classifier), labels, classes)
    return value, interval(value, len(subset_rows(labels, classes)))


def _confusions(opened: OpenSet, scores: Tensor, targets: Targets) -> list[tuple[str, str, int]]:
    """Return the most frequent confusions: true class, predicted class, number of images."""
    assert opened.prompts is not None
    prediction, labels, names = predictions(scores), targets.labels, opened.prompts.names
    wrong = (prediction != labels) & (prediction >= 0)
    codes, counts = (labels[wrong] * len(names) + prediction[wrong]).unique(return_counts=True)
    most = counts.argsort(descending=True, stable=True)[:CONFUSIONS]
    pairs = zip(codes[most].tolist(), counts[most].tolist(), strict=True)
    return [(names[code // len(names)], names[code % len(names)], count) for code, count in pairs]


def _errors(opened: OpenSet, scores: Tensor, targets: Targets, folder: Path) -> list[dict[str, Any]]:
    """Return the most confidently misclassified images."""
    assert opened.prompts is not None
    names, test, features = opened.prompts.names, opened.folds[0].images["test"], opened.folds[0].features["test"]
    probability, prediction = scores.softmax(dim=1).amax(dim=1), predictions(scores)
    wrong = ((prediction != targets.labels) & (prediction >= 0)).nonzero()[:, 0]
    errors = []
    for number in wrong[probability[wrong].argsort(descending=True, stable=True)][:ERRORS].tolist():
        row = features.rows[number]
        nearest = scores[number].softmax(dim=0).topk(min(5, len(names)))
        errors.append(
            {
                "key": test.key(row),
                "truth": names[int(targets.labels[number])],
                "prediction": names[int(prediction[number])],
                "probability": float(probability[number]),
                "image": _thumbnail(test, row, folder, opened.name),
                "nearest": [
                    (names[i], p) for i, p in zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
                ],
            }
        )
    return errors


def _thumbnail(images: ImageSet, row: int, folder: Path, name: str) -> str:
    """Save a small copy of an image and return its path relative to ``folder``."""
    path = Path("images") / name / f"{row}.jpg"
    several = images.images(row)
    image: Image.Image = several[len(several) // 2].convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    make_folder((folder / path).parent)
    with replacing(folder / path) as draft:
        image.save(draft, "JPEG", quality=85)
    return path.as_posix()


def _split(opened: OpenSet, fold: Fold, split: str) -> Split | None:
    if split not in fold.features:
        return None
    targets = _targets(opened, fold, split)
    return Split(torch.from_numpy(np.array(fold.features[split].before)).to(best_device()), targets)


def _linear_probe(opened: OpenSet, options: TaskOptions, folder: Path) -> dict[str, Any]:
    start, scored, metric, last = time.monotonic(), [], opened.entry.metric, None
    for number, fold in enumerate(opened.folds):
        by = penalty_metric(metric, fold.classes)
        key = ("linear_probe", by, fold.trained_on)
        if key not in opened.probes:
            train, val = (_split(opened, fold, split) for split in ("train", "val"))
            assert train is not None
            with progress(f"{opened.name} linear probe", MOST_PENALTIES + 1) as advance:
                opened.probes[key] = train_probe(train, val, by, seed=options.seed, advance=advance)
        probe: Probe = opened.probes[key]
        last = probe
        test = _split(opened, fold, "test")
        assert test is not None
        scored.append(_score(opened, number, among(probe.fit.scores(test.features), fold.classes), test.targets))
    assert last is not None
    result = _classification_result(opened, "linear_probe", scored, folder)
    return result | {
        "l2": last.l2,
        "search": sorted(last.search.items()),
        "seconds": round(time.monotonic() - start, 1),
    }


def _few_shot(opened: OpenSet, options: TaskOptions) -> dict[str, Any]:
    of_folds: list[dict[int, list[float]]] = []
    used: dict[int, float] = {}
    left_out: dict[int, str] = {}
    metric = opened.entry.metric
    for fold in opened.folds:
        by = penalty_metric(metric, fold.classes)
        key = ("few_shot", by, fold.trained_on)
        if key not in opened.probes:
            train, val = (_split(opened, fold, split) for split in ("train", "val"))
            assert train is not None
            most, drawn = len(options.shots) * options.draws * MOST_PENALTIES, (options.draws, options.seed)
            with progress(f"{opened.name} few-shot probes", most) as advance:
                opened.probes[key] = train_few_shot(train, val, by, options.shots, *drawn, advance=advance)
        probes: FewShotProbes = opened.probes[key]
        test = _split(opened, fold, "test")
        assert test is not None
        of_folds.append(probes.evaluate(test, metric, fold.classes))
        used |= probes.l2
        left_out |= probes.left_out
    shots = [n for n in sorted(of_folds[0]) if n not in left_out]  # those that every fold has
    if not shots:
        raise InputError(f"few_shot: {left_out[min(left_out)]} in a fold; leave few_shot out of this set's tasks")
    curve = [(n, [value for values in of_folds for value in values[n]]) for n in shots]
    return {
        "value": fmean(curve[-1][1]),
        "shots": curve,
        "l2": {n: used[n] for n in shots},
        "left_out": dict(sorted(left_out.items())),
    }


def _retrieval(opened: OpenSet, folder: Path) -> dict[str, Any]:
    assert opened.captions is not None
    image_ID, text_TD, pairs = (
        _embeddings(opened.folds[0].features["test"]),
        opened.captions.features,
        opened.captions.pairs,
    )
    ranks = retrieval_ranks(image_ID, text_TD, pairs, pair_scores(image_ID, text_TD, pairs))
    metrics = retrieval_metrics(ranks, pairs)
    value = fmean(metrics[f"{direction}_recall@1"] for direction in DIRECTIONS)
    test, keys = opened.folds[0].images["test"], _keys(opened.folds[0])
    assert isinstance(test, CaptionedImages)
    judged = (
        (key, list(test.captions(row))) for key, row in zip(keys, opened.folds[0].features["test"].rows, strict=True)
    )
    columns = retrieval_columns(keys, pairs, ranks.image, ranks.pair)
    result = {"value": value, "metrics": metrics, "images": len(image_ID), "captions": int(pairs.rows.sum())}
    return result | {
        "intervals": recall_intervals(metrics, result["images"], result["captions"]),
        **predictions_entry(folder, opened.name, "retrieval", columns, judged),
    }


def _geolocation(opened: OpenSet, folder: Path) -> dict[str, Any]:
    fold = opened.folds[0]
    query, reference = (_embeddings(fold.features[split]) for split in ("test", "train"))
    query_places, reference_places = (_targets(opened, fold, split).coordinates for split in ("test", "train"))
    if query_places is None or reference_places is None:
        raise InputError("geolocation: the set has no coordinates of its images; remove geolocation from its tasks")
    distances = nearest_km(query, reference, query_places, reference_places)
    metrics, keys = within_km(distances), _keys(fold)
    columns, judged = {"key": keys, "km": distances.numpy()}, zip(keys, query_places.tolist(), strict=True)
    return {
        "value": metrics["within_25km"],
        "metrics": metrics,
        "intervals": {name: interval(value, len(query)) for name, value in metrics.items()},
        "images": len(query),
        "references": len(reference),
        **predictions_entry(folder, opened.name, "geolocation", columns, judged),
    }


def _caption_choice(opened: OpenSet) -> dict[str, Any]:
    assert opened.choices is not None
    return evaluate_choices(opened.entry.metric, np.array(opened.folds[0].features["test"].after), opened.choices)


def _bias(opened: OpenSet) -> dict[str, Any]:
    fold = opened.folds[0]
    test = fold.images["test"]
    if not isinstance(test, Grouped):
        raise InputError(f"{opened.name}: {type(test).__name__} has no groups, which the bias probes need")
    groups = {name: [values[row] for row in fold.features["test"].rows] for name, values in test.groups().items()}
    return bias_report({name: _scores(opened, fold, classifier) for name, classifier in opened.bias.items()}, groups)
