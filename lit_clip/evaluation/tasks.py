"""Evaluation tasks: each turns the features of a set into its entry in ``results.json``.

Shapes: N images, C classes, T captions, D embedding dimension.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from lit_clip.errors import InputError, require
from lit_clip.evaluation.bias import bias_report, bias_texts
from lit_clip.evaluation.caption_choice import encode_choices, evaluate_choices
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
from lit_clip.evaluation.data import CaptionChoices, CaptionedImages, JudgedDocuments, LabelledImages, Localised, Masked
from lit_clip.evaluation.document_retrieval import document_retrieval, encode_documents
from lit_clip.evaluation.few_shot import FewShotProbes
from lit_clip.evaluation.image_retrieval import image_retrieval, nearest_km, within_km
from lit_clip.evaluation.intervals import UnitScores, intervals
from lit_clip.evaluation.open_set import DistinctCaptions, Encoder, EncodeTexts, OpenSet
from lit_clip.evaluation.overview import judging
from lit_clip.evaluation.places import PlaceTexts, Recorder, place_task
from lit_clip.evaluation.predictions import predictions_entry, predictions_name, recall_intervals, retrieval_columns
from lit_clip.evaluation.prompts import Prompts, prompts_of_set
from lit_clip.evaluation.results import cache_key
from lit_clip.evaluation.segmentation import mask_of, pixel_pairs, pointing_units, queries, regions_of, segmentation
from lit_clip.evaluation.set_encoding import SetFeatures
from lit_clip.evaluation.suite import Task
from lit_clip.retrieval.metrics import pair_scores, retrieval_ranks
from lit_clip.retrieval.retrieval_set import (
    DIRECTIONS,
    Evaluation,
    distinct_pairs,
    retrieval_baselines,
    retrieval_metrics,
)


@dataclass(frozen=True)
class TaskParts:
    """A task, described for suites, the command and callbacks.

    Attributes:
        run: returns the result, the task's entry in ``results.json``. Predictions, and images that the report shows,
            are saved below the folder; during training there is none.
        texts: encodes the texts that the images are compared with, into the set; returns what identifies them.
        recorder: of a task that compares places of the test images, and not the features of whole images.
        needed: splits that it cannot do without.
        used: splits that its result depends on; None: the needed ones.
    """

    run: Callable[[OpenSet, TaskOptions, Path | None], dict[str, Any]]
    texts: Callable[[OpenSet, EncodeTexts], object] | None = None
    recorder: Recorder | None = None
    needed: tuple[str, ...] = ("test",)
    used: tuple[str, ...] | None = None


def encode_set(opened: OpenSet, encoder: Encoder, model: Any) -> None:
    """Encode the images and texts of a set for its tasks; splits with equal images are encoded once."""
    recorded: dict[Task, Recorder] = {task: recorder for task in opened.tasks if (recorder := PARTS[task].recorder)}
    for number, fold in enumerate(opened.folds, 1) if len(recorded) < len(opened.tasks) else ():
        for split, images in fold.images.items():
            title = f"{opened.name} {split}" + (f" {number}/{len(opened.folds)}" if len(opened.folds) > 1 else "")
            fold.features[split] = encoder.features(images, title)
    encode_texts(opened, encoder.classifier)
    for name, recorder in recorded.items():
        assert opened.places is not None
        assert opened.prompts is not None
        task = place_task(model, opened.test, opened.places, recorder)
        texts = f"{name} {opened.prompts.sha256} {opened.prompts.alternatives}"
        opened.records[name] = records = encoder.records(opened.test, task, texts, f"{opened.name} {name}")
        nothing = np.empty((len(records.rows), 0), np.float32)  # these tasks need no features of whole images
        features = SetFeatures(nothing, nothing, records.rows, records.skipped)
        opened.folds[0].features.setdefault("test", features)


def encode_texts(opened: OpenSet, encode: EncodeTexts) -> None:
    """Encode each distinct text that a set's tasks compare its images with."""
    for task in opened.tasks:
        if texts := PARTS[task].texts:
            opened.texts[task] = texts(opened, encode)


def task_metrics(task: Task, opened: OpenSet, options: TaskOptions, stem: Path | None = None) -> Evaluation:
    """Return the metrics and baselines of a task that runs without files.

    Results of torchmetrics that are no numbers are written to files that begin with ``stem``, if there is one.
    """
    if task in ("zero_shot", "linear_probe"):
        return classification_metrics(task, opened, options, stem)
    result = PARTS[task].run(opened, options, None)
    metric = judging(opened.entry.metric, result["metrics"])
    return Evaluation(result["metrics"], result.get("baselines") or {metric: result["baseline"]})


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


def _judged(opened: OpenSet, units: Mapping[str, UnitScores], **more: Any) -> dict[str, Any]:
    """Return an entry in ``results.json`` of metrics that are means over images or queries."""
    metrics = {name: scores.mean() for name, scores in units.items()}
    value = metrics[judging(opened.entry.metric, metrics)]
    return {"value": value, "metrics": metrics, "intervals": intervals(units), **more}


def _class_prompts(opened: OpenSet) -> Prompts:
    test = opened.test_of(LabelledImages, "classes, which zero-shot needs")
    opened.prompts = opened.prompts or prompts_of_set(opened.entry, test)
    return opened.prompts


def _class_names_only(opened: OpenSet, encode: EncodeTexts) -> object:
    prompts = _class_prompts(opened)
    return prompts.names, prompts.sha256, opened.logit_bias


def _class_texts(opened: OpenSet, encode: EncodeTexts) -> object:
    opened.classifier = encode(_class_prompts(opened))
    return _class_names_only(opened, encode)


def _head_texts(opened: OpenSet, encode: EncodeTexts) -> object:
    """Encode the prompts of a set's classes, if it has any; few-shot heads start from them."""
    return _class_texts(opened, encode) if isinstance(opened.test, LabelledImages) else None


def _few_shot(opened: OpenSet, options: TaskOptions, folder: Path | None) -> dict[str, Any]:
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


def _caption_texts(opened: OpenSet, encode: EncodeTexts) -> object:
    """Encode each distinct caption once, and find its images."""
    test, template = opened.test_of(CaptionedImages, "captions, which retrieval needs"), opened.caption_template
    captions = [(image, caption) for image, row in enumerate(opened.rows) for caption in test.captions(row)]
    numbers: dict[str, int] = {}
    texts = [numbers.setdefault(template.replace("{}", caption), len(numbers)) for _, caption in captions]
    prompts, indices = Prompts.of(numbers), distinct_pairs(np.array([image for image, _ in captions]), np.array(texts))
    opened.captions = DistinctCaptions(encode(prompts).T.contiguous(), indices)
    return cache_key(prompts.sha256, [column.tolist() for column in indices])


def _retrieval(opened: OpenSet, options: TaskOptions, folder: Path | None) -> dict[str, Any]:
    assert opened.captions is not None
    fold, (text_TD, pairs) = opened.folds[0], opened.captions
    image_ID, keys = embeddings(fold.features["test"]), keys_of(fold)
    ranks = retrieval_ranks(image_ID, text_TD, pairs, pair_scores(image_ID, text_TD, pairs))
    metrics = retrieval_metrics(ranks, pairs)
    value = fmean(metrics[f"{direction}_recall@1"] for direction in DIRECTIONS)
    test = opened.test_of(CaptionedImages, "captions")
    judged = ((key, list(test.captions(row))) for key, row in zip(keys, opened.rows, strict=True))
    result = {"value": value, "metrics": metrics, "images": len(image_ID), "captions": int(pairs.rows.sum())}
    result["baselines"] = retrieval_baselines(pairs)
    result["intervals"] = recall_intervals(metrics, result["images"], result["captions"])
    columns = retrieval_columns(keys, pairs, ranks)
    return result | predictions_entry(folder, opened.name, "retrieval", columns, judged)


def _image_retrieval(opened: OpenSet, options: TaskOptions, folder: Path | None) -> dict[str, Any]:
    fold = opened.folds[0]
    labels_N, keys = targets_of(opened, fold, "test").labels, keys_of(fold)
    found = image_retrieval(embeddings(fold.features["test"]), labels_N)
    columns = {
        "key": [keys[row] for row in found.rows.tolist()],
        "score": next(iter(found.units.values())).values.astype(np.float32),
        "nearest": [str(keys[row]) for row in found.nearest.tolist()],
    }
    result = _judged(opened, found.units, baseline=found.baseline, queries=len(found.rows))
    judged = zip(keys, labels_N.tolist(), strict=True)
    return result | predictions_entry(folder, opened.name, "image_retrieval", columns, judged)


def _document_texts(opened: OpenSet, encode: EncodeTexts) -> object:
    images = opened.test_of(JudgedDocuments, "queries and documents, which document_retrieval needs")
    opened.documents = encode_documents(images, opened.caption_template, encode)
    return cache_key(images.queries, images.documents, images.relevance, opened.caption_template)


def _document_retrieval(opened: OpenSet, options: TaskOptions, folder: Path | None) -> dict[str, Any]:
    found, encoded = opened.folds[0].features["test"], opened.documents
    assert encoded is not None
    units = document_retrieval(encoded, embeddings(found), found.rows, opened.entry.text_weight)
    keys, documents = encoded.images.queries.keys, encoded.images.documents.keys
    columns = {"key": keys, "score": units["ndcg@10"].values.astype(np.float32)}
    judged = ((keys[query], documents[document], grade) for query, document, grade in encoded.images.relevance)
    result = _judged(opened, units, queries=len(keys), documents=len(documents))
    return result | predictions_entry(folder, opened.name, "document_retrieval", columns, judged)


def _geolocation(opened: OpenSet, options: TaskOptions, folder: Path | None) -> dict[str, Any]:
    fold = opened.folds[0]
    query, reference = (embeddings(fold.features[split]) for split in ("test", "train"))
    query_places, reference_places = (targets_of(opened, fold, split).coordinates for split in ("test", "train"))
    if query_places is None or reference_places is None:
        raise InputError("geolocation: the set has no coordinates of its images; remove geolocation from its tasks")
    distances, keys = nearest_km(query, reference, query_places, reference_places), keys_of(fold)
    result = _judged(opened, within_km(distances), images=len(query), references=len(reference))
    result["value"] = result["metrics"]["within_25km"]
    columns, judged = {"key": keys, "km": distances.numpy()}, zip(keys, query_places.tolist(), strict=True)
    return result | predictions_entry(folder, opened.name, "geolocation", columns, judged)


def _choice_texts(opened: OpenSet, encode: EncodeTexts) -> object:
    test = opened.test_of(CaptionChoices, "questions, which caption_choice needs")
    opened.choices = encode_choices(test, opened.rows, opened.caption_template, encode)
    return cache_key(opened.choices.choices, opened.caption_template)


def _caption_choice(opened: OpenSet, options: TaskOptions, folder: Path | None) -> dict[str, Any]:
    assert opened.choices is not None
    return evaluate_choices(opened.entry.metric, np.array(opened.folds[0].features["test"].after), opened.choices)


def _bias_texts(opened: OpenSet, encode: EncodeTexts) -> None:
    for probe, texts in bias_texts().items():
        opened.bias[probe] = encode(Prompts(list(texts), [[text] for text in texts.values()]))


def _bias(opened: OpenSet, options: TaskOptions, folder: Path | None) -> dict[str, Any]:
    fold = opened.folds[0]
    groups = targets_of(opened, fold, "test").groups
    if groups is None:
        raise InputError(f"{opened.name}: {type(opened.test).__name__} has no groups, which the bias probes need")
    return bias_report({name: logits_of(opened, fold, classifier) for name, classifier in opened.bias.items()}, groups)


def _place_texts(kind: type[Localised], opened: OpenSet, encode: EncodeTexts) -> object:
    """Encode each name of a set's classes separately; the set must be of the given kind."""
    needed = "masks" if kind is Masked else "boxes or masks"
    test = opened.test_of(kind, f"{needed}, which {', '.join(opened.tasks)} needs")
    require(len(opened.folds) == 1, "folds: masks and boxes have no mean over folds; make a set of each")
    opened.prompts = opened.prompts or prompts_of_set(opened.entry, test)
    by_name, classes = opened.prompts.by_name()
    opened.places = PlaceTexts(encode(by_name), torch.tensor(classes))
    return opened.prompts.names, opened.prompts.texts, opened.prompts.alternatives, test.truth_stamp()


def _segmentation(opened: OpenSet, options: TaskOptions, folder: Path | None) -> dict[str, Any]:
    stem = predictions_name(opened.name, "segmentation").removesuffix(".parquet")
    return segmentation(opened.records["segmentation"], class_names(opened), folder, stem)


def _pointing(opened: OpenSet, options: TaskOptions, folder: Path | None) -> dict[str, Any]:
    records = opened.records["pointing"]
    row, label, hit, centre = records.values.T
    keys = {image: opened.test.key(image) for image in records.rows}
    names = [f"{keys[image]}#{of_class}" for image, of_class in zip(row.tolist(), label.tolist(), strict=True)]
    columns = {"key": names, "truth": label.astype(np.int32), "score": hit.astype(np.float32)}
    counts = {"images": len(records.rows), "queries": len(hit)}
    result = _judged(opened, pointing_units(records), baseline=float(centre.mean()), **counts)
    judged = zip(names, label.tolist(), strict=True)
    return result | predictions_entry(folder, opened.name, "pointing", columns, judged)


TRAINED = {"needed": ("train", "test"), "used": ("train", "val", "test")}
PARTS: dict[Task, TaskParts] = {
    "zero_shot": TaskParts(partial(classification, "zero_shot"), _class_texts),
    "linear_probe": TaskParts(partial(classification, "linear_probe"), **TRAINED),
    "few_shot": TaskParts(_few_shot, _head_texts, **TRAINED),
    "head": TaskParts(partial(classification, "head"), _class_names_only),
    "retrieval": TaskParts(_retrieval, _caption_texts),
    "image_retrieval": TaskParts(_image_retrieval),
    "document_retrieval": TaskParts(_document_retrieval, _document_texts),
    "geolocation": TaskParts(_geolocation, needed=("train", "test")),
    "bias": TaskParts(_bias, _bias_texts),
    "caption_choice": TaskParts(_caption_choice, _choice_texts),
    "segmentation": TaskParts(_segmentation, partial(_place_texts, Masked), Recorder(mask_of, pixel_pairs)),
    "pointing": TaskParts(_pointing, partial(_place_texts, Localised), Recorder(regions_of, queries)),
}
