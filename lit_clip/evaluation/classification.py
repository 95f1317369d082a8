"""Zero-shot and linear probe on a set: scores, probabilities, metrics, and entries for the report.

Shapes: N images, B some of them, C classes, D embedding dimension.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_clip.errors import InputError, listed, require
from lit_clip.evaluation.class_head import MOST_FITS
from lit_clip.evaluation.class_metrics import Computed, check_metrics, evaluate_metrics, write_array
from lit_clip.evaluation.data import ImageSet, LabelledImages
from lit_clip.evaluation.few_shot import SHOTS, train_few_shot
from lit_clip.evaluation.intervals import UnitScores, intervals, mean_interval
from lit_clip.evaluation.open_set import Fold, OpenSet
from lit_clip.evaluation.predictions import (
    Columns,
    class_columns,
    confusion_counts,
    confusion_entries,
    in_parts,
    joined,
    predictions_entry,
    predictions_name,
    probability_columns,
    write_confusions,
)
from lit_clip.evaluation.probe import MOST_PENALTIES, Probe, Split, among, train_probe
from lit_clip.evaluation.scores import baseline, baselines, comparable, evaluate_scores, mean_over_folds, unit_scores
from lit_clip.evaluation.set_encoding import SetFeatures
from lit_clip.evaluation.suite import Task
from lit_clip.evaluation.targets import Targets, predictions
from lit_clip.evaluation.thresholds import thresholds_entry
from lit_clip.retrieval.retrieval_set import Evaluation
from lit_clip.tools.atomic import make_folder, replacing
from lit_clip.tools.console import progress
from lit_clip.tools.hardware import best_device

ERRORS = 24  # images reported, the most confidently wrong ones
THUMBNAIL = 160  # pixels


class ClassHead(NamedTuple):
    """A classifier with named classes, such as a :class:`lit_clip.heads.Head`, and its hash.

    ``logits`` takes features before the projection ``[B, W]`` and unit features ``[B, D]``, and returns ``[B, C]``.
    """

    names: list[str]
    logits: Callable[[Tensor, Tensor], Tensor]
    several: bool
    sha256: str


@dataclass(frozen=True)
class TaskOptions:
    """Options of the tasks."""

    shots: tuple[int, ...] = SHOTS  # numbers of examples per class
    draws: int = 3  # of the examples
    seed: int = 0  # of the draws and of held-out images
    l2: float | None = None  # penalty of the linear probe; None: search for it
    device: torch.device | None = None  # that probes are trained on; None: the best one
    show_progress: bool = True  # while probes are trained
    metrics: Mapping[str, Any] = field(default_factory=dict)  # of torchmetrics, see class_metrics
    head: ClassHead | None = None  # that the task head evaluates


class ClassScores(NamedTuple):
    """Scores of a fold's test images: metrics compare ``ranking`` ``[N, C]``; probabilities come from ``logits``.

    Classes share a probability of 1, or with ``separate`` each has its own.
    """

    ranking: Tensor
    logits: Tensor
    separate: bool = False
    bias: float = 0.0  # a SigLIP's

    def probabilities(self, rows: slice) -> Tensor:
        """Return the probabilities of some images, float32 ``[B, C]``, on the CPU."""
        logits = self.logits[rows].cpu().double() + self.bias
        return (logits.sigmoid() if self.separate else logits.softmax(dim=1)).float()


def class_scores(task: Task, opened: OpenSet, fold: Fold, options: TaskOptions) -> ClassScores:
    """Return scores with which zero-shot, a head or a probe ranks the classes of a fold's test images."""
    if task == "zero_shot":
        logits = logits_of(opened, fold, opened.classifier)
        return ClassScores(
            comparable(opened.entry.metric, logits), logits, opened.logit_bias is not None, opened.logit_bias or 0.0
        )
    if task == "head":
        assert options.head is not None
        logits = _head_logits(options.head, fold.features["test"], class_names(opened))
        return ClassScores(logits, logits, options.head.several)
    fit = trained(task, opened, fold, options).fit
    scores = among(fit.scores(split_of(opened, fold, "test", options).features), fold.classes)
    return ClassScores(scores, scores, targets_of(opened, fold, "test").relevance is not None)


def _head_logits(head: ClassHead, features: SetFeatures, names: Sequence[str]) -> Tensor:
    """Return a head's logits ``[N, C]``, in the class order of the set."""
    own = {name.casefold().replace("_", " "): place for place, name in enumerate(head.names)}
    wanted = [name.casefold().replace("_", " ") for name in names]
    if own.keys() != set(wanted):
        lacking = [name for name, plain in zip(names, wanted, strict=True) if plain not in own]
        more = f"has the class {listed(sorted(own.keys() - set(wanted)))}, which the set has not"
        differ = f"has no class {listed(lacking)}" if lacking else more
        raise InputError(f"--head: {differ}; set class_names in the suite, or name the head's sets with --sets")
    logits = head.logits(torch.from_numpy(np.array(features.before)), embeddings(features))
    return logits[:, [own[name] for name in wanted]]


def embeddings(features: SetFeatures) -> Tensor:
    """Return the unit features ``[N, D]``."""
    return torch.from_numpy(np.array(features.after))


def all_targets(opened: OpenSet, fold: Fold, split: str) -> Targets:
    """Return the truth about all images of a split, including those without features."""
    of_another_set = fold.classes is not None and split != "test"
    in_use = len(opened.prompts.names) if opened.prompts and not of_another_set else None  # may differ from the set's
    return Targets.of(fold.images[split], in_use)


def targets_of(opened: OpenSet, fold: Fold, split: str) -> Targets:
    """Return the truth about a split's images with features."""
    return all_targets(opened, fold, split).take(fold.features[split].rows)


def class_names(opened: OpenSet) -> list[str]:
    """Return the names of the classes, in label order."""
    if opened.prompts:
        return opened.prompts.names
    return opened.test.class_names if isinstance(opened.test, LabelledImages) else []


def logits_of(opened: OpenSet, fold: Fold, classifier: Tensor | None, split: str = "test") -> Tensor:
    """Return the logits ``[N, C]`` of a split."""
    assert classifier is not None
    return opened.scale * (embeddings(fold.features[split]) @ classifier.cpu().float())


def keys_of(fold: Fold) -> list[str]:
    """Return the keys of the test images in the order of their features."""
    return [fold.images["test"].key(row) for row in fold.features["test"].rows]


def _metric_target(targets: Targets) -> Tensor:
    """Return the target of a torchmetrics metric: labels ``[N]`` or relevance ``[N, C]``."""
    one_class = bool((targets.labels >= 0).all())
    require(one_class or targets.relevance is not None, "metrics: the set's images have no classes to compare with")
    return targets.labels if targets.relevance is None else targets.relevance


def check_set_metrics(targets: Targets, metrics: Mapping[str, Any]) -> None:
    """Raise :class:`InputError`, before encoding, for metrics that do not suit a set."""
    if metrics:
        check_metrics(metrics, _metric_target(targets), targets.classes)


class _FoldResult(NamedTuple):
    """Results of a task on a fold; ``given`` has torchmetrics' numbers, and ``files`` its other results."""

    fold: Fold
    scores: ClassScores
    targets: Targets
    metrics: dict[str, float]
    given: dict[str, float]
    files: list[Path]


def _folds(
    task: Task, opened: OpenSet, options: TaskOptions, metrics: Mapping[str, Any], stem: Path | None
) -> list[_FoldResult]:
    """Return the results of each fold; with a ``stem``, write non-numeric results to ``stem_NAME``."""
    found = []
    for number, fold in enumerate(opened.folds):
        scores, targets = class_scores(task, opened, fold, options), targets_of(opened, fold, "test")
        given, files = Computed(), list[Path]()
        if metrics:
            parts = in_parts(scores.probabilities, len(targets), targets.classes)
            given = evaluate_metrics(metrics, parts, _metric_target(targets), targets.classes)
        if stem and given.arrays:
            make_folder(stem.parent)
            suffix = f"_fold_{number}" if len(opened.folds) > 1 else ""
            paths = {name: stem.with_name(f"{stem.name}_{name}{suffix}") for name in given.arrays}
            files = [write_array(path, given.arrays[name], class_names(opened)) for name, path in paths.items()]
        values = evaluate_scores(opened.entry.metric, scores.ranking, targets)
        found.append(_FoldResult(fold, scores, targets, values, given.numbers, files))
    return found


def classification_metrics(task: Task, opened: OpenSet, options: TaskOptions, stem: Path | None) -> Evaluation:
    """Return metrics and baselines, averaged over folds; see :func:`_folds`."""
    folds = _folds(task, opened, options, options.metrics, stem)
    metrics = mean_over_folds([each.metrics for each in folds]) | mean_over_folds([each.given for each in folds])
    return Evaluation(metrics, baselines(opened.entry.metric, folds[0].targets))


def _allowed(options: TaskOptions, opened: OpenSet, targets: Targets) -> tuple[dict[str, Any], list[str]]:
    """Return the metrics that suit a set, and the reasons against the others."""
    allowed, notes = dict(options.metrics), list[str]()
    for name, value in options.metrics.items():
        try:
            check_set_metrics(targets, {name: value})
        except InputError as error:
            notes.append(f"{error}; left out")
            del allowed[name]
    return allowed, notes


def _columns(metric: str, folds: Sequence[_FoldResult], units: Sequence[Mapping[str, UnitScores]]) -> Columns:
    """Return prediction columns for the images of all folds."""
    rows, images = list[Columns](), sum(len(each.targets) for each in folds)
    for number, (each, of_fold) in enumerate(zip(folds, units, strict=True)):
        columns = class_columns(metric, keys_of(each.fold), each.scores.ranking, each.targets, of_fold, number)
        rows.append(columns | probability_columns(columns, each.scores.probabilities, each.targets, images))
    return joined(rows)


def classification(task: Task, opened: OpenSet, options: TaskOptions, folder: Path | None) -> dict[str, Any]:
    """Return the result of a task, averaged over folds, and save its predictions below ``folder``."""
    assert folder is not None
    start, metric, names = time.monotonic(), opened.entry.metric, class_names(opened)
    stem = (folder / predictions_name(opened.name, task)).with_suffix("")
    metrics, notes = _allowed(options, opened, targets_of(opened, opened.folds[0], "test"))
    folds = _folds(task, opened, options, metrics, stem)
    scores, targets, files = folds[0].scores, folds[0].targets, [path for each in folds for path in each.files]
    units = [unit_scores(metric, each.scores.ranking, each.targets) for each in folds]
    mean, columns = mean_over_folds([each.metrics for each in folds]), _columns(metric, folds, units)
    of_folds = list(map(intervals, units))
    everything = mean_over_folds([each.given for each in folds])
    given = {name: value for name, value in everything.items() if math.isfinite(value)}
    known = [name for name in of_folds[0] if all(name in each for each in of_folds)]
    judged = zip(*(columns[name].tolist() for name in ("fold", "key", "truth")), strict=True)
    result = {
        "value": mean[metric],
        "metrics": mean | given,
        "intervals": {name: mean_interval([each[name] for each in of_folds]) for name in known},
        "baseline": baseline(metric, targets),
        "images": len(targets.labels),
        **predictions_entry(folder, opened.name, task, columns, judged),
    }
    if bool((columns["truth"] >= 0).all()):
        path = stem.with_name(f"{stem.name}_confusions.csv")
        counts = confusion_counts(columns["truth"], columns["prediction"], len(names))
        write_confusions(path, counts, names)
        files.append(path)
        result |= confusion_entries(counts, names)
        if task == "zero_shot":
            result["errors"] = _errors(opened, scores, targets, folder)
    elif targets.relevance is not None and bool((targets.relevance == 1).any()):
        probability_NC = scores.probabilities(slice(None))
        if bool(probability_NC.isfinite().all()):
            result["thresholds"] = thresholds_entry(probability_NC, targets.relevance, names)
    if task == "linear_probe":
        probe: Probe = trained(task, opened, opened.folds[-1], options)
        seconds = round(time.monotonic() - start, 1)
        result |= {"l2": probe.l2, "search": sorted(probe.search.items()), "seconds": seconds}
    if options.metrics:
        result |= {"given": list(given), "notes": notes}
    return result | {"files": [path.relative_to(folder).as_posix() for path in files]}


def _errors(opened: OpenSet, scores: ClassScores, targets: Targets, folder: Path) -> list[dict[str, Any]]:
    """Return the most confidently misclassified images."""
    names, test, rows = class_names(opened), opened.test, opened.rows
    prediction = predictions(scores.logits).cpu()
    wrong = ((prediction != targets.labels) & (prediction >= 0)).nonzero()[:, 0]
    probability = torch.cat([each.amax(dim=1) for each in in_parts(scores.probabilities, len(prediction), len(names))])
    errors = []
    for number in wrong[probability[wrong].argsort(descending=True, stable=True)][:ERRORS].tolist():
        row = rows[number]
        errors.append(
            {
                "key": test.key(row),
                "truth": names[int(targets.labels[number])],
                "prediction": names[int(prediction[number])],
                "probability": float(probability[number]),
                "image": _thumbnail(test, row, folder, opened.name),
                "nearest": nearest_classes(names, scores.probabilities(slice(number, number + 1))[0]),
            }
        )
    return errors


def nearest_classes(names: list[str], score_C: Tensor) -> list[tuple[str, float]]:
    """Return up to five classes with the highest scores."""
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


def split_of(opened: OpenSet, fold: Fold, split: str, options: TaskOptions) -> Split:
    """Return a split in the form that probes and heads are trained and tested on."""
    features = torch.from_numpy(np.array(fold.features[split].before)).to(options.device or best_device())
    of_classes = opened.classifier is not None and fold.classes is None
    zero_shot = logits_of(opened, fold, opened.classifier, split) if of_classes else None
    return Split(features, targets_of(opened, fold, split), zero_shot)


def trained(task: Task, opened: OpenSet, fold: Fold, options: TaskOptions) -> Any:
    """Return a fold's linear probe or few-shot probes, trained once for all sets that test them."""
    by = opened.entry.metric if fold.classes is None else "top1"  # another set's metric may not be defined
    key = (task, by, fold.trained_on)
    if key not in opened.probes:
        train = split_of(opened, fold, "train", options)
        val = split_of(opened, fold, "val", options) if "val" in fold.features else None
        name, fits = "linear probe", MOST_PENALTIES + 1
        if task == "few_shot":
            each = MOST_PENALTIES + (MOST_FITS if train.zero_shot is not None else 0)
            name, fits = "few-shot probes", len(options.shots) * options.draws * each
        with progress(f"{opened.name} {name}", fits, options.show_progress) as advance:
            if task == "few_shot":
                drawn = (options.shots, options.draws, options.seed)
                images = fold.images["train"]
                names = images.class_names if isinstance(images, LabelledImages) else ()
                opened.probes[key] = train_few_shot(train, val, by, *drawn, advance, names)
            else:
                opened.probes[key] = train_probe(train, val, by, options.seed, advance, options.l2)
    return opened.probes[key]
