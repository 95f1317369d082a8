"""Evaluation tasks: each turns the features of a set into its entry in ``results.json``.

Shapes: N images, C classes, T captions, D embedding dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lit_clip.errors import InputError
from lit_clip.evaluation.bias import bias_report
from lit_clip.evaluation.caption_choice import evaluate_choices
from lit_clip.evaluation.classification import (
    TaskOptions,
    all_targets,
    class_names,
    classification,
    classification_metrics,
    embeddings,
    keys_of,
    logits_of,
    split_of,
    targets_of,
    trained,
)
from lit_clip.evaluation.data import CaptionedImages, Localised, Masked
from lit_clip.evaluation.document_retrieval import document_retrieval
from lit_clip.evaluation.few_shot import FewShotProbes
from lit_clip.evaluation.geolocation import nearest_km, within_km
from lit_clip.evaluation.image_retrieval import ImageRetrieval, image_retrieval
from lit_clip.evaluation.intervals import intervals
from lit_clip.evaluation.open_set import (
    EncodeTexts,
    OpenSet,
    Rows,
    bias_probe_texts,
    caption_texts,
    choice_texts,
    class_names_only,
    class_texts,
    document_texts,
    head_texts,
    place_texts,
)
from lit_clip.evaluation.overview import judging
from lit_clip.evaluation.places import Recorder
from lit_clip.evaluation.pointing import pointing, pointing_metrics, queries, regions_of
from lit_clip.evaluation.predictions import predictions_entry, predictions_name, recall_intervals, retrieval_columns
from lit_clip.evaluation.scores import interval
from lit_clip.evaluation.segmentation import mask_of, pixel_pairs, segmentation, segmentation_metrics
from lit_clip.evaluation.suite import Task
from lit_clip.retrieval.metrics import pair_scores, retrieval_ranks
from lit_clip.retrieval.retrieval_set import (
    DIRECTIONS,
    Evaluation,
    evaluate_pairs,
    retrieval_baselines,
    retrieval_metrics,
)


@dataclass(frozen=True)
class TaskParts:
    """A task, described for suites, the command and callbacks.

    Attributes:
        run: returns the result, the task's entry in ``results.json``. Predictions, and images that the report shows,
            are saved below the folder.
        texts: encodes the texts that the images are compared with, into the set; returns what identifies them.
        metrics: returns the result of a task that has no files, for evaluations during training.
        recorder: of a task that compares places of the test images, and not the features of whole images.
        needed: splits that it cannot do without.
        used: splits that its result depends on; None: the needed ones.
    """

    run: Callable[[OpenSet, TaskOptions, Path], dict[str, Any]]
    texts: Callable[[OpenSet, Rows, EncodeTexts], object] | None = None
    metrics: Callable[[OpenSet], dict[str, Any]] | None = None
    recorder: Recorder | None = None
    needed: tuple[str, ...] = ("test",)
    used: tuple[str, ...] | None = None


def encode_texts(opened: OpenSet, rows: Rows, encode: EncodeTexts) -> None:
    """Encode each distinct text that a set's tasks compare its images with."""
    for task in opened.tasks:
        if texts := PARTS[task].texts:
            opened.texts[task] = texts(opened, rows, encode)


def task_metrics(task: Task, opened: OpenSet, options: TaskOptions, stem: Path | None = None) -> Evaluation:
    """Return the metrics and baselines of a task that runs without files.

    Results of torchmetrics that are no numbers are written to files that begin with ``stem``, if there is one.
    """
    if task == "retrieval":
        assert opened.captions is not None
        return evaluate_pairs(
            embeddings(opened.folds[0].features["test"]), opened.captions.features, opened.captions.pairs
        )
    if of_task := PARTS[task].metrics:
        result = of_task(opened)
        metric = judging(opened.entry.metric, result["metrics"])
        return Evaluation(result["metrics"], {metric: result["baseline"]})
    return classification_metrics(task, opened, options, stem)


def used_splits(task: Task) -> tuple[str, ...]:
    """Return the splits that a task's result depends on."""
    return PARTS[task].used or PARTS[task].needed


def target_digests(opened: OpenSet) -> dict[tuple[int, str], str]:
    """Hash the labels and annotations by fold and split; results depend on them too."""
    return {
        (number, split): all_targets(opened, fold, split).digest()
        for number, fold in enumerate(opened.folds)
        for split in fold.images
    }


def _few_shot(opened: OpenSet, options: TaskOptions, folder: Path) -> dict[str, Any]:
    of_folds: list[dict[int, list[float]]] = []
    of_heads: list[dict[int, list[float]]] = []
    used: dict[int, float] = {}
    left_out: dict[int, str] = {}
    for fold in opened.folds:
        probes: FewShotProbes = trained("few_shot", opened, fold, options)
        test = split_of(opened, fold, "test", options)
        of_folds.append(probes.evaluate(test, opened.entry.metric, fold.classes))
        of_heads.append(probes.evaluate_heads(test, opened.entry.metric))
        used |= probes.l2
        left_out |= probes.left_out
    shots = [n for n in sorted(of_folds[0]) if n not in left_out]  # in every fold
    if not shots:
        raise InputError(f"few_shot: {left_out[min(left_out)]} in a fold; leave few_shot out of this set's tasks")
    curve = [(n, [value for values in of_folds for value in values[n]]) for n in shots]
    heads = [(n, [value for values in of_heads for value in values[n]]) for n in shots if all(of_heads)]
    numbers = ", ".join(map(str, sorted(left_out)))
    notes = [f"few_shot: no result of {numbers} shots: {left_out[min(left_out)]}"] if left_out else []
    return {
        "value": fmean(curve[-1][1]),
        "shots": curve,
        "head": heads,
        "l2": {n: used[n] for n in shots},
        "left_out": dict(sorted(left_out.items())),
        "notes": notes,
    }


def _retrieval(opened: OpenSet, options: TaskOptions, folder: Path) -> dict[str, Any]:
    assert opened.captions is not None
    fold, (text_TD, pairs) = opened.folds[0], opened.captions
    image_ID, test, keys = embeddings(fold.features["test"]), fold.images["test"], keys_of(fold)
    ranks = retrieval_ranks(image_ID, text_TD, pairs, pair_scores(image_ID, text_TD, pairs))
    metrics = retrieval_metrics(ranks, pairs)
    value = fmean(metrics[f"{direction}_recall@1"] for direction in DIRECTIONS)
    assert isinstance(test, CaptionedImages)
    judged = ((key, list(test.captions(row))) for key, row in zip(keys, fold.features["test"].rows, strict=True))
    columns = retrieval_columns(keys, pairs, ranks.image, ranks.pair)
    result = {"value": value, "metrics": metrics, "images": len(image_ID), "captions": int(pairs.rows.sum())}
    return result | {
        "baselines": retrieval_baselines(pairs),
        "intervals": recall_intervals(metrics, result["images"], result["captions"]),
        **predictions_entry(folder, opened.name, "retrieval", columns, judged),
    }


def _images_found(opened: OpenSet) -> ImageRetrieval:
    fold = opened.folds[0]
    return image_retrieval(embeddings(fold.features["test"]), targets_of(opened, fold, "test").labels)


def _image_retrieval(opened: OpenSet, options: TaskOptions, folder: Path) -> dict[str, Any]:
    found, keys = _images_found(opened), keys_of(opened.folds[0])
    columns = {
        "key": [keys[row] for row in found.rows.tolist()],
        "score": next(iter(found.units.values())).values.astype(np.float32),
        "nearest": [str(keys[row]) for row in found.nearest.tolist()],
    }
    judged = zip(keys, targets_of(opened, opened.folds[0], "test").labels.tolist(), strict=True)
    return found.entry() | predictions_entry(folder, opened.name, "image_retrieval", columns, judged)


def _document_retrieval(opened: OpenSet, options: TaskOptions, folder: Path) -> dict[str, Any]:
    found, encoded = opened.folds[0].features["test"], opened.documents
    assert encoded is not None
    units = document_retrieval(encoded, embeddings(found), found.rows, opened.entry.text_weight)
    metrics = {name: scores.mean() for name, scores in units.items()}
    keys, documents = encoded.images.queries.keys, encoded.images.documents.keys
    columns = {"key": keys, "score": units["ndcg@10"].values.astype(np.float32)}
    judged = ((keys[query], documents[document], grade) for query, document, grade in encoded.images.relevance)
    return {
        "value": metrics[judging(opened.entry.metric, metrics)],
        "metrics": metrics,
        "intervals": intervals(units),
        "queries": len(keys),
        "documents": len(documents),
        **predictions_entry(folder, opened.name, "document_retrieval", columns, judged),
    }


def _geolocation(opened: OpenSet, options: TaskOptions, folder: Path) -> dict[str, Any]:
    fold = opened.folds[0]
    query, reference = (embeddings(fold.features[split]) for split in ("test", "train"))
    query_places, reference_places = (targets_of(opened, fold, split).coordinates for split in ("test", "train"))
    if query_places is None or reference_places is None:
        raise InputError("geolocation: the set has no coordinates of its images; remove geolocation from its tasks")
    distances = nearest_km(query, reference, query_places, reference_places)
    metrics, keys = within_km(distances), keys_of(fold)
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


def _bias(opened: OpenSet, options: TaskOptions, folder: Path) -> dict[str, Any]:
    fold = opened.folds[0]
    groups = targets_of(opened, fold, "test").groups
    if groups is None:
        kind = type(fold.images["test"]).__name__
        raise InputError(f"{opened.name}: {kind} has no groups, which the bias probes need")
    return bias_report({name: logits_of(opened, fold, classifier) for name, classifier in opened.bias.items()}, groups)


def _segmentation(opened: OpenSet, options: TaskOptions, folder: Path) -> dict[str, Any]:
    stem = predictions_name(opened.name, "segmentation").removesuffix(".parquet")
    return segmentation(opened.records["segmentation"], class_names(opened), folder, stem)


def _pointing(opened: OpenSet, options: TaskOptions, folder: Path) -> dict[str, Any]:
    records = opened.records["pointing"]
    return pointing(records, list(map(opened.folds[0].images["test"].key, records.rows)), opened.name, folder)


TRAINED = {"needed": ("train", "test"), "used": ("train", "val", "test")}
PARTS: dict[Task, TaskParts] = {
    "zero_shot": TaskParts(partial(classification, "zero_shot"), class_texts),
    "linear_probe": TaskParts(partial(classification, "linear_probe"), **TRAINED),
    "few_shot": TaskParts(_few_shot, head_texts, **TRAINED),
    "head": TaskParts(partial(classification, "head"), class_names_only),
    "retrieval": TaskParts(_retrieval, caption_texts),
    "image_retrieval": TaskParts(_image_retrieval, metrics=lambda opened: _images_found(opened).entry()),
    "document_retrieval": TaskParts(_document_retrieval, document_texts),
    "geolocation": TaskParts(_geolocation, needed=("train", "test")),
    "bias": TaskParts(_bias, bias_probe_texts),
    "caption_choice": TaskParts(lambda opened, options, folder: _caption_choice(opened), choice_texts, _caption_choice),
    "segmentation": TaskParts(
        _segmentation,
        partial(place_texts, Masked),
        lambda opened: segmentation_metrics(opened.records["segmentation"], class_names(opened)),
        Recorder(mask_of, pixel_pairs),
    ),
    "pointing": TaskParts(
        _pointing,
        partial(place_texts, Localised),
        lambda opened: pointing_metrics(opened.records["pointing"]),
        Recorder(regions_of, queries),
    ),
}
