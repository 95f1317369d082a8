"""Choose the right caption or images among alternatives (SugarCrepe, ARO, Winoground, WinoGAViL).

Shapes: I images and T captions of a question, D embedding dimension. A tie counts against the model, and so does a NaN.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import CaptionChoices, Choice
from lit_clip.evaluation.intervals import UnitScores, intervals
from lit_clip.evaluation.prompts import Prompts
from lit_clip.evaluation.scores import METRICS

MACRO = "macro_text_score"


@dataclass
class EncodedChoices:
    """Questions, unit features of their captions ``[captions, D]``, and each caption's row there."""

    choices: list[Choice]
    captions: dict[str, int]
    features: np.ndarray


def readable_choices(choices: Sequence[Choice], rows: Sequence[int]) -> list[Choice]:
    """Return the questions with all images among ``rows``, and the images' places there."""
    place = {row: number for number, row in enumerate(rows)}
    kept = [choice for choice in choices if place.keys() >= set(choice.images)]
    require(bool(kept), "caption_choice: there are no questions, or each has an image that could not be read")
    return [choice._replace(images=tuple(place[row] for row in choice.images)) for choice in kept]


def encode_choices(
    images: CaptionChoices, rows: Sequence[int], template: str, encode: Callable[[Prompts], Tensor]
) -> EncodedChoices:
    """Encode each distinct caption of a set's questions once; ``encode`` returns the classifier of prompts."""
    choices = readable_choices(images.choices(), rows)
    captions = dict.fromkeys(caption for choice in choices for caption in choice.captions)
    features = encode(Prompts.of(template.replace("{}", caption) for caption in captions)).T
    return EncodedChoices(choices, {caption: row for row, caption in enumerate(captions)}, features.numpy())


def evaluate_choices(metric: str, image_ND: np.ndarray, encoded: EncodedChoices) -> dict[str, Any]:
    """Return the task's entry in ``results.json`` from unit features of the images; see :func:`answer`.

    ``macro_text_score`` is the mean of the groups' text scores; questions without a group do not count.
    """
    judging = [name for name, each in METRICS.items() if each.task == "caption_choice"]
    require(metric in judging, f"metric: {metric} does not judge choices; {', '.join(judging)} do")
    answers = []
    for choice in encoded.choices:
        image_ID = image_ND[list(choice.images)].astype(np.float64)
        text_TD = encoded.features[[encoded.captions[caption] for caption in choice.captions]]
        # Sums in one order: the product of two matrices may round equal columns differently.
        score_IT = (image_ID[:, None] * text_TD).sum(axis=2)
        answers.append(answer(score_IT, choice.right))
    defined = [name for name in answers[0] if all(name in found for found in answers)]
    metrics = {name: fmean(found[name] for found in answers) for name in defined}
    counted = "text_score" if metric == MACRO else metric
    if counted not in metrics:
        raise InputError(f"metric: {metric} is not defined for these questions; there are {', '.join(metrics)}")
    by_group: dict[str, list[float]] = {}
    for choice, found in zip(encoded.choices, answers, strict=True):
        if choice.group:
            by_group.setdefault(choice.group, []).append(found[counted])
    units = {name: UnitScores(np.array([found[name] for found in answers])) for name in defined}
    groups = {group: {"value": fmean(values), "choices": len(values)} for group, values in sorted(by_group.items())}
    if metric == MACRO:
        require(bool(groups), f"metric: {metric} needs groups, which this set does not have; use text_score")
        metrics = {MACRO: fmean(group["value"] for group in groups.values()), **metrics}
        members = np.repeat(np.arange(len(by_group)), [len(values) for values in by_group.values()])
        units[MACRO] = UnitScores(np.concatenate(list(by_group.values())), members)
    value = metrics[metric]
    return {
        "value": value,
        "metrics": {metric: value, **metrics},
        "intervals": intervals(units),
        "baseline": fmean(chance(counted, choice) for choice in encoded.choices),
        "images": len(image_ND),
        "choices": len(answers),
        "groups": groups,
    }


def answer(score_IT: np.ndarray, right: int = 0) -> Mapping[str, float]:
    """Judge the answer to one question (see :class:`lit_clip.evaluation.data.Choice`) by similarities ``[I, T]``.

    Returns:
        Without ``right``, 1 or 0 for each score that is defined: ``text_score`` (each image is nearest to its caption;
        with several captions), ``image_score`` (each caption is nearest to its image; with several images) and
        ``group_score`` (both). With it, ``jaccard``: the nearest ``right`` images compared with the right ones.
    """
    if right:
        return {"jaccard": _jaccard(score_IT[:, 0], right)}
    images, texts = score_IT.shape
    pairs, found = range(min(images, texts)), {}
    if texts > 1 or images == 1:
        found["text_score"] = float(all(_is_highest(score_IT[i], i) for i in pairs))
    if images > 1:
        found["image_score"] = float(all(_is_highest(score_IT[:, i], i) for i in pairs))
    if images > 1 and texts > 1:
        found["group_score"] = min(found.values())
    return found


def _is_highest(scores: np.ndarray, index: int) -> bool:
    return not np.isnan(scores[index]) and bool((scores[index] > np.delete(scores, index)).all())


def _jaccard(score_I: np.ndarray, right: int) -> float:
    is_right = np.arange(len(score_I)) < right
    score_I = np.where(np.isnan(score_I), np.where(is_right, -np.inf, np.inf), score_I)
    chosen = np.lexsort((is_right, -score_I))[:right]  # among equal scores the wrong ones first
    hits = int(is_right[chosen].sum())
    return hits / (2 * right - hits)


def chance(metric: str, choice: Choice) -> float:
    """Return the expected score of random similarities, without ties."""
    images, texts, right = len(choice.images), len(choice.captions), choice.right
    if metric == "jaccard":  # the number of hits is hypergeometric
        ways = [comb(right, hits) * comb(images - right, right - hits) for hits in range(right + 1)]
        return sum(way * hits / (2 * right - hits) for hits, way in enumerate(ways)) / comb(images, right)
    if metric == "group_score":
        require((images, texts) == (2, 2), "metric: group_score needs questions of two images and two captions")
        return 1 / 6  # the two right ones of four similarities are the highest
    return (texts if metric == "text_score" else images) ** -float(min(images, texts))
