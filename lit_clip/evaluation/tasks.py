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
from lit_clip.evaluation.other_classes import among
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
from lit_clip.evaluation.robustness import subset_top1
from lit_clip.evaluation.scores import baseline, baselines, comparable, evaluate_scores, interval, mean_over_folds
from lit_clip.evaluation.store import SetFeatures
from lit_clip.evaluation.suite import Task
from lit_clip.evaluation.targets import Targets
from lit_clip.retrieval.metrics import pair_scores, retrieval_ranks
from lit_clip.retrieval.retrieval_set import DIRECTIONS, Evaluation, evaluate_pairs, retrieval_metrics
from lit_clip.tools.atomic import make_folder, replacing
from lit_clip.tools.console import progress
from lit_clip.tools.hardware import best_device

ERRORS = 24  # images reported, the most confidently wrong ones
CONFUSIONS = 20  # pairs of classes reported
THUMBNAIL = 160  # pixels


@dataclass(frozen=True)
class TaskOptions:
    """Options of the tasks."""

    shots: tuple[int, ...] = SHOTS  # numbers of examples per class
    draws: int = 3  # of the examples
    seed: int = 0  # of the draws and of held-out images
    l2: float | None = None  # penalty of the linear probe; None: search for it
    device: torch.device | None = None  # that probes are trained on; None: the best one
    show_progress: bool = True  # while probes are trained


def needed_splits(task: Task) -> tuple[str, ...]:
    """Return the splits that a task requires."""
    return ("train", "test") if task in ("linear_probe", "few_shot", "geolocation") else ("test",)


def run_task(task: Task, opened: OpenSet, options: TaskOptions, folder: Path) -> dict[str, Any]:
    """Run a task and return its result.

    Predictions, and images that the report shows, are saved below ``folder``.
    """
    if task in ("zero_shot", "linear_probe"):
        return _classification(task, opened, options, folder)
    if task == "few_shot":
        return _few_shot(opened, options)
    if task == "retrieval":
        return _retrieval(opened, folder)
    if task == "geolocation":
        return _geolocation(opened, folder)
    if task == "caption_choice":
        return _caption_choice(opened)
    return _bias(opened)


def task_metrics(task: Task, opened: OpenSet, options: TaskOptions) -> Evaluation:
    """Return the metrics and baselines of a task that has no files: zero-shot, linear probe, retrieval or choices."""
    metric, features = opened.entry.metric, opened.folds[0].features["test"]
    if task == "retrieval":
        assert opened.captions is not None
        return evaluate_pairs(_embeddings(features), opened.captions.features, opened.captions.pairs)
    if task == "caption_choice":
        result = _caption_choice(opened)
        return Evaluation(result["metrics"], {metric: result["baseline"]})
    folds = [
        evaluate_scores(metric, class_scores(task, opened, fold, options), _targets(opened, fold, "test"))
        for fold in opened.folds
    ]
    return Evaluation(mean_over_folds(folds), baselines(metric, _targets(opened, opened.folds[0], "test")))


def class_scores(task: Task, opened: OpenSet, fold: Fold, options: TaskOptions) -> Tensor:
    """Return the scores ``[N, C]`` of a fold's test images by which zero-shot or a linear probe ranks the classes."""
    if task == "zero_shot":
        return comparable(opened.entry.metric, _logits(opened, fold, opened.classifier))
    fit = _trained(task, opened, fold, options).fit
    return among(fit.scores(_split(opened, fold, "test", options).features), fold.classes)


def _embeddings(features: SetFeatures) -> Tensor:
    return torch.from_numpy(np.array(features.after))


def all_targets(opened: OpenSet, fold: Fold, split: str) -> Targets:
    """Return the truth about all images of a split, with features or without."""
    return Targets.of(fold.images[split], None, _class_count(opened, fold, split))


def _targets(opened: OpenSet, fold: Fold, split: str) -> Targets:
    return all_targets(opened, fold, split).take(fold.features[split].rows)


def _class_count(opened: OpenSet, fold: Fold, split: str) -> int | None:
    """Return the number of class names in use, which may differ from a set's own; None: the set's own."""
    of_another_set = fold.classes is not None and split != "test"
    return len(opened.prompts.names) if opened.prompts and not of_another_set else None


def _logits(opened: OpenSet, fold: Fold, classifier: Tensor | None) -> Tensor:
    """Return the logits ``[N, C]`` of the test split."""
    assert classifier is not None
    return opened.scale * (_embeddings(fold.features["test"]) @ classifier.cpu().float())


def _keys(fold: Fold) -> list[str]:
    """Return the keys of the test images, in the order of their features."""
    return [fold.images["test"].key(row) for row in fold.features["test"].rows]


def _classification(task: Task, opened: OpenSet, options: TaskOptions, folder: Path) -> dict[str, Any]:
    """Return the result, averaged over folds, and save the predictions."""
    start, metric, first, last = time.monotonic(), opened.entry.metric, opened.folds[0], opened.folds[-1]
    metrics: list[dict[str, float]] = []
    of_folds: list[dict[str, Interval]] = []
    rows: list[Columns] = []
    for number, fold in enumerate(opened.folds):
        scores, targets = class_scores(task, opened, fold, options), _targets(opened, fold, "test")
        units = unit_scores(metric, scores, targets)
        metrics.append(evaluate_scores(metric, scores, targets))
        of_folds.append(intervals(units))
        rows.append(class_columns(metric, _keys(fold), scores, targets, units, number))
    mean, columns, targets = mean_over_folds(metrics), joined(rows), _targets(opened, first, "test")
    known = [name for name in of_folds[0] if all(name in fold for fold in of_folds)]
    judged = zip(*(columns[name].tolist() for name in ("fold", "key", "truth")), strict=True)
    result = {
        "value": mean[metric],
        "metrics": mean,
        "intervals": {name: mean_interval([fold[name] for fold in of_folds]) for name in known},
        "baseline": baseline(metric, targets),
        "images": len(targets.labels),
        **predictions_entry(folder, opened.name, task, columns, judged),
    }
    if task == "linear_probe":
        probe: Probe = _trained(task, opened, last, options)
        seconds = round(time.monotonic() - start, 1)
        result |= {"l2": probe.l2, "search": sorted(probe.search.items()), "seconds": seconds}
    elif bool((targets.labels >= 0).all()):
        logits = _logits(opened, first, opened.classifier)
        result["confusions"] = _confusions(opened, logits, targets)
        result["errors"] = _errors(opened, logits, targets, folder)
    return result


def used_splits(task: Task) -> tuple[str, ...]:
    """Return the splits that a task's result depends on."""
    return ("train", "val", "test") if task in ("linear_probe", "few_shot") else needed_splits(task)


def target_digests(opened: OpenSet) -> dict[tuple[int, str], str]:
    """Hash the labels and annotations by fold and split; results depend on them as well as on features and prompts."""
    return {
        (number, split): all_targets(opened, fold, split).digest()
        for number, fold in enumerate(opened.folds)
        for split in fold.images
    }


def top1_among(opened: OpenSet, classes: Sequence[int]) -> tuple[float, Interval]:
    """Return the zero-shot accuracy among some of the classes, see :func:`subset_top1`, and its interval."""
    fold = opened.folds[0]
    labels = _targets(opened, fold, "test").labels
    value, images = subset_top1(_logits(opened, fold, opened.classifier), labels, classes)
    return value, interval(value, images)


def _confusions(opened: OpenSet, scores: Tensor, targets: Targets) -> list[tuple[str, str, int]]:
    """Return the most frequent true and predicted classes and their images, without torchmetrics' ``[C, C]``."""
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
        errors.append(
            {
                "key": test.key(row),
                "truth": names[int(targets.labels[number])],
                "prediction": names[int(prediction[number])],
                "probability": float(probability[number]),
                "image": _thumbnail(test, row, folder, opened.name),
                "nearest": nearest_classes(names, scores[number].softmax(dim=0)),
            }
        )
    return errors


def nearest_classes(names: list[str], score_C: Tensor) -> list[tuple[str, float]]:
    """Return up to five classes of the highest scores."""
    best = score_C.topk(min(5, len(names)))
    return [(names[i], score) for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


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


def _split(opened: OpenSet, fold: Fold, split: str, options: TaskOptions) -> Split:
    features = torch.from_numpy(np.array(fold.features[split].before)).to(options.device or best_device())
    return Split(features, _targets(opened, fold, split))


def _trained(task: Task, opened: OpenSet, fold: Fold, options: TaskOptions) -> Any:
    """Return a fold's linear probe or few-shot probes, trained once for all sets that are tested on them."""
    by = opened.entry.metric if fold.classes is None else "top1"  # another set's metric may not be defined
    key = (task, by, fold.trained_on)
    if key not in opened.probes:
        train = _split(opened, fold, "train", options)
        val = _split(opened, fold, "val", options) if "val" in fold.features else None
        name, fits = "linear probe", MOST_PENALTIES + 1
        if task == "few_shot":
            name, fits = "few-shot probes", len(options.shots) * options.draws * MOST_PENALTIES
        with progress(f"{opened.name} {name}", fits, options.show_progress) as advance:
            if task == "few_shot":
                drawn = (options.shots, options.draws, options.seed)
                opened.probes[key] = train_few_shot(train, val, by, *drawn, advance)
            else:
                opened.probes[key] = train_probe(train, val, by, options.seed, advance, options.l2)
    return opened.probes[key]


def _few_shot(opened: OpenSet, options: TaskOptions) -> dict[str, Any]:
    of_folds: list[dict[int, list[float]]] = []
    used: dict[int, float] = {}
    left_out: dict[int, str] = {}
    for fold in opened.folds:
        probes: FewShotProbes = _trained("few_shot", opened, fold, options)
        of_folds.append(probes.evaluate(_split(opened, fold, "test", options), opened.entry.metric, fold.classes))
        used |= probes.l2
        left_out |= probes.left_out
    shots = [n for n in sorted(of_folds[0]) if n not in left_out]  # in every fold
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
    fold, (text_TD, pairs, _) = opened.folds[0], opened.captions
    image_ID, test, keys = _embeddings(fold.features["test"]), fold.images["test"], _keys(fold)
    ranks = retrieval_ranks(image_ID, text_TD, pairs, pair_scores(image_ID, text_TD, pairs))
    metrics = retrieval_metrics(ranks, pairs)
    value = fmean(metrics[f"{direction}_recall@1"] for direction in DIRECTIONS)
    assert isinstance(test, CaptionedImages)
    judged = ((key, list(test.captions(row))) for key, row in zip(keys, fold.features["test"].rows, strict=True))
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
    return bias_report({name: _logits(opened, fold, classifier) for name, classifier in opened.bias.items()}, groups)
