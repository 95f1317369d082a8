"""Metrics of the paper's evaluation, pure functions of class scores and targets; sums are float64.

Shapes: N images, C classes. All values are fractions, 0 to 1. Ties and NaN are judged as in ``accuracy``, or against
the model. torchmetrics has neither these rules nor the definitions of VOC2007, RareAct, WILDS and DataComp.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TypeVar

import torch
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.accuracy import (
    accuracies,
    baseline_accuracies,
    classification_counts,
    predictions,
    ranks_of_labels,
)
from lit_clip.evaluation.overlap import clopper_pearson
from lit_clip.evaluation.suite import CHOICE_METRICS, Metric
from lit_clip.evaluation.targets import Targets

SAMPLINGS = 100  # draws of one clip per film for RareAct's mWSAP
Knowledge = TypeVar("Knowledge")


def evaluate_scores(metric: Metric, scores: Tensor, targets: Targets) -> dict[str, float]:
    """Compute a set's metric and the other metrics that its labels allow, from class scores ``[N, C]``.

    Returns:
        ``metric`` first; ``top1``, ``top5`` (with more than 5 classes) and ``mean_per_class`` if every image has one
        class; ``pm0`` and ``pm10`` with ``pm``, their mean; ``mwsap`` with ``mwap``.
    """
    require(metric in _METRICS, f"metric: {metric} is not computed from class scores")
    require(len(targets) > 0, f"{metric}: there are no images")
    if scores.shape != (len(targets), targets.classes):
        shape = " x ".join(map(str, scores.shape))
        raise InputError(
            f"{metric}: scores are {shape}, but there are {len(targets)} images and {targets.classes} classes"
        )
    scores = scores.detach()
    found = _METRICS[metric](scores, targets)
    if bool((targets.labels >= 0).all()):
        found |= {name: value for name, value in _accuracies(scores, targets).items() if name not in found}
    return {metric: found[metric], **found}


def comparable(metric: Metric, logits: Tensor) -> Tensor:
    """Return the scores that a zero-shot classifier ranks by, from its logits ``[N, C]``, cosines times scale.

    VOC2007 ranks images within a class, and logits of different images cannot be compared: a softmax over the classes
    is what brought the paper's figures within reach (openai/CLIP, issue 153; here in float64, as many probabilities are
    nearly 1). The other metrics compare the classes of one image and keep the logits.
    """
    return logits.double().softmax(dim=1) if metric == "map11" else logits


def baselines(metric: Metric, targets: Targets) -> dict[str, float]:
    """Return the :func:`baseline` of ``metric`` and of the accuracies that :func:`evaluate_scores` returns with it."""
    value = baseline(metric, targets)
    found = {} if value is None else {metric: value}
    return found | (_baseline_accuracies(targets) if bool((targets.labels >= 0).all()) else {})


def baseline(metric: Metric, targets: Targets) -> float | None:
    """Return the best value of an answer without looking at the images; None for a metric without a defined one.

    That answer is always the same class; for average precision and ROC AUC always the same score; for ``lexicon`` one
    of the image's candidates at random.
    """
    if metric in ("within_km", "recall@1", "worst_group_top5", *CHOICE_METRICS):
        return None
    if metric == "lexicon":
        return sum(1 / len(set(words)) for words in _known(targets.candidates, metric)) / len(targets)
    if metric == "pm":
        return _baseline_pm(targets)
    if metric in ("macro_f1", "worst_group_top1"):
        return _best_single_class(metric, targets)
    if metric in ("map11", "roc_auc", "mwap"):
        return evaluate_scores(metric, torch.zeros(len(targets), targets.classes), targets)[metric]
    _require_labels(targets, metric)
    return _with_mean_top1_top5(_baseline_accuracies(targets))[metric]


def mean_over_folds(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the folds of a set."""
    return {name: fmean(fold[name] for fold in metrics) for name in metrics[0]}


def interval(value: float, n: int) -> tuple[float, float]:
    """99.5 % Clopper-Pearson interval of a fraction of n images, as in the paper's tables (appendix A.3)."""
    require(n > 0, "interval: there are no images")
    return clopper_pearson(round(value * n), n)


def _known(knowledge: Knowledge | None, metric: Metric) -> Knowledge:
    if knowledge is None:
        raise InputError(f"metric: {metric} needs annotations that this set does not have; choose another metric")
    return knowledge


def _require_labels(targets: Targets, metric: Metric) -> None:
    missing = (targets.labels < 0).nonzero()[:, 0]
    if len(missing):
        raise InputError(f"metric: {metric} needs one class per image, but row {int(missing[0])} has none")


def _accuracies(scores: Tensor, targets: Targets) -> dict[str, float]:
    _require_labels(targets, "top1")
    return accuracies(classification_counts(scores, targets.labels))


def _baseline_accuracies(targets: Targets) -> dict[str, float]:
    return baseline_accuracies(targets.labels.bincount(minlength=targets.classes))


def _with_mean_top1_top5(found: dict[str, float]) -> dict[str, float]:
    """Add Kinetics-700's metric; with 5 classes or fewer every image is among the top 5."""
    return found | {"mean_top1_top5": (found["top1"] + found.get("top5", 1.0)) / 2}


def _curve(score: Tensor, right: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights, float64 ``[..., T]``, of the images that score at least as high as each of T distinct scores.

    Of scores ``[n]``, bool ``[n]`` and weights ``[..., n]``, they are the weights of the right images and of all, by
    descending score; a NaN score counts as the worst possible one.
    """
    score = torch.where(score.isnan(), torch.where(right, -torch.inf, torch.inf).to(score.dtype), score)
    order = score.argsort(descending=True, stable=True)
    score, weight = score[order], weight[..., order].double()
    last = torch.ones_like(right)
    last[:-1] = score[1:] != score[:-1]  # equal scores are found together, in any order
    return (weight * right[order]).cumsum(-1)[..., last], weight.cumsum(-1)[..., last]


def _map11(scores: Tensor, targets: Targets) -> dict[str, float]:
    """VOC2007's 11-point mean average precision, the mean over classes that have images.

    Average precision is the mean, over recalls 0, 0.1, ... 1, of the highest precision at that recall or more. The
    development kit compares rounded recalls; here they are compared exactly.
    """
    relevance = _known(targets.relevance, "map11").cpu()
    values = []
    for score, relevant in zip(scores.cpu().T, relevance.T, strict=True):
        counted = relevant >= 0
        right = relevant[counted] == 1
        if not bool(right.any()):
            continue
        right_T, found_T = _curve(score[counted], right, torch.ones(len(right)))
        precision = right_T / found_T
        best = [precision[10 * right_T >= level * right_T[-1]].max() for level in range(11)]
        values.append(float(torch.stack(best).mean()))
    require(bool(values), "map11: no class has an image")
    return {"map11": sum(values) / len(values)}


def _roc_auc(scores: Tensor, targets: Targets) -> dict[str, float]:
    """Probability that an image of class 1 scores higher than one of class 0; a tie counts half."""
    _require_labels(targets, "roc_auc")
    require(targets.classes == 2, f"metric: roc_auc needs 2 classes, not {targets.classes}")
    pair = scores.cpu().double()
    right = targets.labels == 1
    require(bool(right.any()) and not bool(right.all()), "roc_auc: all images are of one class")
    margin = pair[:, 1] - pair[:, 0]
    margin = torch.where(margin.isnan(), torch.where(right, -torch.inf, torch.inf).double(), margin)
    negative = margin[~right].sort().values
    below, not_above = (torch.searchsorted(negative, margin[right], right=side) for side in (False, True))
    return {"roc_auc": int((below + not_above).sum()) / (2 * len(negative) * int(right.sum()))}


def pm_right(scores: Tensor, targets: Targets) -> dict[str, list[bool]]:
    """Return which anchor frames are right: ``pm0`` alone, ``pm10`` with all their neighbours."""
    accepted = _known(targets.accepted, "pm")
    right = [predicted in classes for predicted, classes in zip(predictions(scores).tolist(), accepted, strict=True)]
    neighbours = _known(targets.neighbours, "pm")
    require(bool(neighbours), "pm: there are no anchor frames")
    return {
        "pm0": [right[anchor] for anchor, _ in neighbours],
        "pm10": [right[anchor] and all(right[row] for row in around) for anchor, around in neighbours],
    }


def _pm(scores: Tensor, targets: Targets) -> dict[str, float]:
    """Return the fractions of anchor frames that are right, and their mean."""
    found = {name: sum(right) / len(right) for name, right in pm_right(scores, targets).items()}
    return found | {"pm": (found["pm0"] + found["pm10"]) / 2}


def _baseline_pm(targets: Targets) -> float:
    accepted = _known(targets.accepted, "pm")
    counts = torch.zeros(2, targets.classes, dtype=torch.float64)
    neighbours = _known(targets.neighbours, "pm")
    for anchor, around in neighbours:
        counts[0, sorted(accepted[anchor])] += 1
        counts[1, sorted(accepted[anchor].intersection(*(accepted[row] for row in around)))] += 1
    return float((counts / len(neighbours)).mean(dim=0).max())


def lexicon_predictions(scores: Tensor, targets: Targets) -> list[int]:
    """Return the class with the highest score among each image's own candidates; -1 if one of them is NaN."""
    found, scores = [], scores.cpu()
    for row, words in enumerate(_known(targets.candidates, "lexicon")):
        candidates = torch.tensor(sorted(set(words)))
        place = int(predictions(scores[row : row + 1, candidates]))
        found.append(int(candidates[place]) if place >= 0 else -1)
    return found


def _lexicon(scores: Tensor, targets: Targets) -> dict[str, float]:
    """Top-1 accuracy among each image's own candidates."""
    _require_labels(targets, "lexicon")
    found = lexicon_predictions(scores, targets)
    return {"lexicon": sum(a == b for a, b in zip(found, targets.labels.tolist(), strict=True)) / len(targets)}


def _mwap(scores: Tensor, targets: Targets) -> dict[str, float]:
    """RareAct's mean over actions of an average precision in which every film counts once.

    An action's clips are right, hard (only its verb or only its noun occurs, or both apart) or wrong. Within each of
    these groups a clip is weighted by 1 / clips of its film (``mwap``), or one clip per film is drawn, 100 times
    (``mwsap``).
    """
    annotations = _known(targets.annotations, "mwap")
    for name in ("verb", "noun", "annotation", "video"):
        require(name in annotations, f"metric: mwap needs {name} in the set's annotations")
    verb, noun, video = (_numbers(annotations[name]) for name in ("verb", "noun", "video"))
    code = torch.as_tensor(annotations["annotation"])
    random = torch.Generator().manual_seed(0)
    values = []
    for action in targets.labels.unique().tolist():
        own, shared = targets.labels == action, (verb == verb[action]).int() + (noun == noun[action]).int()
        shared = shared[targets.labels]
        right = own & (code == 1)
        other = ~own & (code == 1)
        hard = (own & (code > 1)) | (other & (shared == 1))
        wrong = (own & (code == 0)) | (other & (shared == 0))
        if not bool(right.any()):
            continue
        rows = torch.cat([part.nonzero()[:, 0] for part in (right, hard, wrong)])
        weights = [_film_weights(video[part], random) for part in (right, hard, wrong)]
        score = scores[rows.to(scores.device), action].cpu()
        right_T, found_T = _curve(score, right[rows], torch.cat(weights, dim=1))
        precision = right_T / found_T.clamp(min=torch.finfo(torch.float64).tiny)
        gained = right_T.diff(prepend=torch.zeros_like(right_T[:, :1]))
        values.append((gained * precision).sum(dim=1) / right_T[:, -1])
    require(bool(values), "mwap: no action has a clip")
    mean = torch.stack(values).mean(dim=0)
    return {"mwap": float(mean[0]), "mwsap": float(mean[1:].mean())}


def _macro_f1(scores: Tensor, targets: Targets) -> dict[str, float]:
    """Mean over classes that have images of the F1 of their predictions, as WILDS computes it for iWildCam."""
    _require_labels(targets, "macro_f1")
    labels, predicted = targets.labels, predictions(scores).cpu()
    images = labels.bincount(minlength=targets.classes)
    right = labels[predicted == labels].bincount(minlength=targets.classes)
    found = predicted[predicted >= 0].bincount(minlength=targets.classes)
    f1 = 2 * right.double() / (images + found)  # precision and recall in one
    return {"macro_f1": float(f1[images > 0].mean())}


def _worst_group(metric: Metric, within: int, scores: Tensor, targets: Targets) -> dict[str, float]:
    """Lowest accuracy of a group that has images: DataComp's ``acc_wg`` (GeoDE, FMoW) and ``acc_top5_wg``."""
    _require_labels(targets, metric)
    right = (ranks_of_labels(scores, targets.labels) < within).cpu()
    return {metric: float(_group_means(right.double()[:, None], targets, metric).min())}


def _group_means(values: Tensor, targets: Targets, metric: Metric) -> Tensor:
    """Return the mean of float64 ``[N, K]`` in each group, ``[groups, K]``."""
    attributes = _known(targets.groups, metric)
    names = ", ".join(attributes)
    require(len(attributes) == 1, f"metric: {metric} needs groups of one kind, but the set has {names or 'none'}")
    group = _numbers(next(iter(attributes.values())))
    return torch.zeros(int(group.max()) + 1, values.shape[1], dtype=torch.float64).index_add_(
        0, group, values
    ) / group.bincount().unsqueeze(1)


def _best_single_class(metric: Metric, targets: Targets) -> float:
    """Return the highest metric of predicting one class for all images."""
    _require_labels(targets, metric)
    if metric == "worst_group_top1":
        one_hot = torch.nn.functional.one_hot(targets.labels, targets.classes).double()
        return float(_group_means(one_hot, targets, metric).amin(dim=0).max())
    images = targets.labels.bincount().double()
    return float((2 * images / (images + images.sum())).max() / (images > 0).sum())


def _numbers(values: list[str]) -> Tensor:
    place = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return torch.tensor([place[value] for value in values])


def _film_weights(video: Tensor, random: torch.Generator) -> Tensor:
    """float64 ``[1 + SAMPLINGS, n]``: first 1 / clips of the film, then 1 for one clip per film and 0 for the rest."""
    order = video.argsort(stable=True)
    films, clips = video[order].unique_consecutive(return_counts=True)
    first = clips.cumsum(0) - clips
    drawn = torch.rand(SAMPLINGS, len(films), generator=random, dtype=torch.float64)
    weight = torch.zeros(1 + SAMPLINGS, len(video), dtype=torch.float64)
    weight[0, order] = (1 / clips.double()).repeat_interleave(clips)
    weight[1:].scatter_(1, order[first + (drawn * clips).long()], 1.0)
    return weight


_METRICS: dict[Metric, Callable[[Tensor, Targets], dict[str, float]]] = {
    "top1": _accuracies,
    "mean_per_class": _accuracies,
    "mean_top1_top5": lambda scores, targets: _with_mean_top1_top5(_accuracies(scores, targets)),
    "map11": _map11,
    "roc_auc": _roc_auc,
    "pm": _pm,
    "lexicon": _lexicon,
    "mwap": _mwap,
    "macro_f1": _macro_f1,
    "worst_group_top1": partial(_worst_group, "worst_group_top1", 1),
    "worst_group_top5": partial(_worst_group, "worst_group_top5", 5),
}
