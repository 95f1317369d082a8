"""What is done with a set once its features are known: of each task a function to what ``results.json`` says of it.

Shapes: N images, C classes, T captions, D embedding dimension.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from lit_clip.evaluation.data import CaptionedImages, Grouped, ImageSet
from lit_clip.evaluation.few_shot import few_shot
from lit_clip.evaluation.geolocation import within_km
from lit_clip.evaluation.probe import Split, linear_probe
from lit_clip.evaluation.prompts import Prompts
from lit_clip.evaluation.retrieval import retrieval_metrics
from lit_clip.evaluation.retrieval_metrics import Pairs, pair_scores, retrieval_ranks
from lit_clip.evaluation.robustness import subset_top1
from lit_clip.evaluation.scores import PROPORTIONS, baseline, evaluate_scores, interval
from lit_clip.evaluation.store import SetFeatures
from lit_clip.evaluation.suite import SuiteEntry, Task
from lit_clip.evaluation.targets import Targets

ERRORS = 24  # images most confidently wrong that are kept
CONFUSIONS = 20  # pairs of classes
THUMBNAIL = 160  # pixels


@dataclass
class Fold:
    """One division of a set: by split what it holds and its features.

    Attributes:
        images: by split.
        features: likewise.
    """

    images: dict[str, ImageSet] = field(default_factory=dict)
    features: dict[str, SetFeatures] = field(default_factory=dict)


@dataclass
class OpenSet:
    """A set whose features are there.

    Attributes:
        name: of the set.
        entry: what the suite says of it.
        folds: at least one.
        prompts: None where no class is recognised from its name.
        classifier: ``[D, C]``, likewise.
        captions: of a retrieval set.
        bias: classifiers of the bias probe, by what they tell apart.
        scale: the model's inverse temperature.
    """

    name: str
    entry: SuiteEntry
    folds: list[Fold]
    prompts: Prompts | None = None
    classifier: Tensor | None = None
    captions: "DistinctCaptions | None" = None
    bias: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 100.0


@dataclass
class DistinctCaptions:
    """Distinct captions of a retrieval set.

    Attributes:
        features: ``[T, D]``, of unit length.
        pairs: which caption is which image's.
        digest: of the texts and the pairs.
    """

    features: Tensor
    pairs: Pairs
    digest: str


@dataclass(frozen=True)
class TaskOptions:
    """What a user may say of the tasks.

    Attributes:
        shots: examples a class.
        draws: how many times they are drawn.
        seed: of what is drawn.
    """

    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    draws: int = 3
    seed: int = 0


def needed_splits(task: Task) -> tuple[str, ...]:
    """The splits without which a task is not possible."""
    return ("train", "test") if task in ("linear_probe", "few_shot", "geolocation") else ("test",)


def run_task(task: Task, opened: OpenSet, options: TaskOptions, folder: Path) -> dict[str, Any]:
    """The result of a task; images that it wants to show go below ``folder``."""
    if task == "zero_shot":
        return _zero_shot(opened, folder)
    if task == "linear_probe":
        return _linear_probe(opened, options)
    if task == "few_shot":
        return _few_shot(opened, options)
    if task == "retrieval":
        return _retrieval(opened)
    if task == "geolocation":
        return _geolocation(opened)
    return _bias(opened)


def _after(features: SetFeatures) -> Tensor:
    return torch.from_numpy(np.array(features.after))


def _targets(opened: OpenSet, fold: Fold, split: str) -> Targets:
    classes = len(opened.prompts.names) if opened.prompts else None
    return Targets.of(fold.images[split], fold.features[split].rows, classes)


def _scores(opened: OpenSet, fold: Fold, classifier: Tensor | None) -> Tensor:
    """Logits ``[N, C]`` of the test split."""
    assert classifier is not None
    return opened.scale * (_after(fold.features["test"]) @ classifier.cpu().float())


def _mean(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(one[name] for one in metrics) for name in metrics[0]}


def _judged(opened: OpenSet, metrics: Sequence[Mapping[str, float]], targets: Targets) -> dict[str, Any]:
    """What every task with classes says: mean metrics, interval and the baseline."""
    mean, metric, images = _mean(metrics), opened.entry.metric, len(targets.labels)
    value = mean[metric]
    return {
        "value": value,
        "metrics": mean,
        "interval": interval(value, images) if metric in PROPORTIONS else None,
        "baseline": baseline(metric, targets),
        "images": images,
    }


def _zero_shot(opened: OpenSet, folder: Path) -> dict[str, Any]:
    metrics, first = [], None
    for fold in opened.folds:
        scores, targets = _scores(opened, fold, opened.classifier), _targets(opened, fold, "test")
        metrics.append(evaluate_scores(opened.entry.metric, scores, targets))
        first = first or (scores, targets)
    assert first is not None
    scores, targets = first
    result = _judged(opened, metrics, targets)
    if bool((targets.labels >= 0).all()):
        result["confusions"] = _confusions(opened, scores, targets)
        result["errors"] = _errors(opened, scores, targets, folder)
    return result


def used_splits(task: Task) -> tuple[str, ...]:
    """The splits that a task's result depends on."""
    return ("train", "val", "test") if task in ("linear_probe", "few_shot") else needed_splits(task)


def truth(opened: OpenSet) -> dict[tuple[int, str], str]:
    """What results depend on beside features and prompts: what is known of the images, by fold and split.

    Raises:
        InputError: a label that no class has.
    """
    classes = len(opened.prompts.names) if opened.prompts else None
    return {
        (number, split): Targets.of(images, None, classes).digest()
        for number, fold in enumerate(opened.folds)
        for split, images in fold.images.items()
    }


def top1_among(opened: OpenSet, classes: Sequence[int]) -> float:
    """Zero-shot accuracy where only some classes are in question, see :func:`subset_top1`."""
    fold = opened.folds[0]
    return subset_top1(_scores(opened, fold, opened.classifier), _targets(opened, fold, "test").labels, classes)


def _confusions(opened: OpenSet, scores: Tensor, targets: Targets) -> list[tuple[str, str, int]]:
    """The pairs of classes that are taken for each other most often: truth, prediction, images."""
    assert opened.prompts is not None
    prediction, labels, names = predictions(scores), targets.labels, opened.prompts.names
    wrong = (prediction != labels) & (prediction >= 0)
    codes, counts = (labels[wrong] * len(names) + prediction[wrong]).unique(return_counts=True)
    most = counts.argsort(descending=True, stable=True)[:CONFUSIONS]
    pairs = zip(codes[most].tolist(), counts[most].tolist(), strict=True)
    return [(names[code // len(names)], names[code % len(names)], count) for code, count in pairs]


def _errors(opened: OpenSet, scores: Tensor, targets: Targets, folder: Path) -> list[dict[str, Any]]:
    """The images that are most confidently taken for something else."""
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
    """A small copy of an image; its path below ``folder``."""
    path = Path("images") / name / f"{row}.jpg"
    several = images.images(row)
    image: Image.Image = several[len(several) // 2].convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    image.save(folder / path, quality=85)
    return path.as_posix()


def _split(opened: OpenSet, fold: Fold, split: str) -> Split | None:
    if split not in fold.features:
        return None
    targets = _targets(opened, fold, split)
    return Split(torch.from_numpy(np.array(fold.features[split].before)).to(_device()), targets)


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _linear_probe(opened: OpenSet, options: TaskOptions) -> dict[str, Any]:
    start, metrics, last = time.monotonic(), [], None
    for fold in opened.folds:
        train, val, test = (_split(opened, fold, split) for split in ("train", "val", "test"))
        assert train is not None
        assert test is not None
        last = linear_probe(train, val, test, opened.entry.metric, seed=options.seed)
        metrics.append(last.metrics)
    assert last is not None
    result = _judged(opened, metrics, _targets(opened, opened.folds[0], "test"))
    return result | {
        "l2": last.l2,
        "search": sorted(last.search.items()),
        "seconds": round(time.monotonic() - start, 1),
    }


def _few_shot(opened: OpenSet, options: TaskOptions) -> dict[str, Any]:
    values: dict[int, list[float]] = {}
    used: dict[int, float] = {}
    for fold in opened.folds:
        train, val, test = (_split(opened, fold, split) for split in ("train", "val", "test"))
        assert train is not None
        assert test is not None
        found = few_shot(train, val, test, opened.entry.metric, options.shots, options.draws, options.seed)
        for shots, several in found.values.items():
            values.setdefault(shots, []).extend(several)
        used |= found.l2
    shots = sorted(values)
    return {"value": fmean(values[shots[-1]]), "shots": [(n, values[n]) for n in shots], "l2": used}


def _retrieval(opened: OpenSet) -> dict[str, Any]:
    assert opened.captions is not None
    image_ID, text_TD, pairs = _after(opened.folds[0].features["test"]), opened.captions.features, opened.captions.pairs
    ranks = retrieval_ranks(image_ID, text_TD, pairs, pair_scores(image_ID, text_TD, pairs))
    metrics = retrieval_metrics(ranks.image, ranks.text, pairs)
    value = fmean(metrics[f"{direction}_recall@1"] for direction in ("image_to_text", "text_to_image"))
    return {"value": value, "metrics": metrics, "images": len(image_ID), "captions": int(pairs.rows.sum())}


def _geolocation(opened: OpenSet) -> dict[str, Any]:
    fold = opened.folds[0]
    query, reference = (_after(fold.features[split]) for split in ("test", "train"))
    where = [_targets(opened, fold, split).coordinates for split in ("test", "train")]
    if where[0] is None or where[1] is None:
        raise InputError("geolocation: the set does not know where its images were taken; leave it out of the tasks")
    metrics = within_km(query, reference, where[0], where[1])
    return {"value": metrics["within_25km"], "metrics": metrics, "images": len(query), "references": len(reference)}


def _bias(opened: OpenSet) -> dict[str, Any]:
    fold = opened.folds[0]
    test = fold.images["test"]
    if not isinstance(test, Grouped):
        raise InputError(f"{opened.name}: {type(test).__name__} tells of no groups, which the bias probe needs")
    groups = {name: [values[row] for row in fold.features["test"].rows] for name, values in test.groups().items()}
    return bias_report({name: _scores(opened, fold, classifier) for name, classifier in opened.bias.items()}, groups)


def caption_texts(images: CaptionedImages, rows: Sequence[int], template: str) -> tuple[list[str], Pairs]:
    """The distinct captions of a set, and which image (by its place in ``rows``) each is of.

    The same sentence of two images is one caption, for which both are right.
    """
    number_of: dict[str, int] = {}
    count: dict[tuple[int, int], int] = {}
    for image, row in enumerate(rows):
        for caption in images.captions(row):
            text = number_of.setdefault(template.replace("{}", caption), len(number_of))
            count[text, image] = count.get((text, image), 0) + 1
    columns = torch.tensor([(image, text, rows) for (text, image), rows in sorted(count.items())]).T.contiguous()
    return list(number_of), Pairs(*columns)
