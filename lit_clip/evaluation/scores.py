"""Metrics that can judge a set: one record each in :data:`METRICS`, which describes it completely.

Shapes: N images, C classes. All values are fractions, 0 to 1; sums are float64. Ties and NaN are judged as in
:mod:`lit_clip.evaluation.targets`, or against the model. torchmetrics has neither these rules nor the definitions of
VOC2007, RareAct, WILDS and DataComp.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.intervals import UnitScores
from lit_clip.evaluation.targets import (
    Targets,
    accuracies,
    baseline_accuracies,
    classification_counts,
    predictions,
    ranks_of_labels,
    within,
)

SAMPLINGS = 100  # draws of one clip per film for RareAct's mWSAP


@dataclass(frozen=True)
class Metric:
    """A metric; higher is better, so a rank would be one's negative.

    It can judge a set of a suite if it has ``of_scores`` or a ``task``.

    Attributes:
        words: its name in tables and charts.
        of_scores: class scores ``[N, C]`` and the truth -> its value, or values by name if others come with it.
        needs: fields of :class:`Targets` that it cannot do without; ``labels``: each image has one class.
        baseline: the truth -> the best value of an answer without looking at the images, which is always the same
            class, or always the same score; None: none is defined.
        units: class scores and the truth -> the scores of images, by name of the metric whose mean they are.
        per_class: whether that mean is over classes, of the mean of the images of each.
        task: the task that computes it in place of a classifier.
        softmax: whether it ranks images within a class: logits of different images cannot be compared, and a softmax
            over the classes is what brought the paper's figures within reach (openai/CLIP, issue 153).
        predictions: as ``of_scores`` -> the class of each image, -1 for none; None: that of the highest score.
        rows: the truth -> the images that are judged; None: all.
    """

    words: str
    of_scores: Callable[[Tensor, Targets], float | dict[str, float]] | None = None
    needs: tuple[str, ...] = ("labels",)
    baseline: Callable[[Targets], float] | None = None
    units: Callable[[Tensor, Targets], Mapping[str, np.ndarray]] | None = None
    per_class: bool = False
    task: str = ""
    softmax: bool = False
    predictions: Callable[[Tensor, Targets], Sequence[int]] | None = None
    rows: Callable[[Targets], Sequence[int]] | None = None

    @property
    def judges(self) -> bool:
        return bool(self.of_scores or self.task)


def evaluate_scores(metric: str, scores: Tensor, targets: Targets) -> dict[str, float]:
    """Compute a set's metric and other metrics that its labels allow, from class scores ``[N, C]``.

    Returns:
        ``metric`` first; ``top1``, ``top5`` (with more than 5 classes) and ``mean_per_class`` if every image has one
        class; ``pm0`` and ``pm10`` with ``pm``, their mean; ``mwsap`` with ``mwap``.
    """
    of_scores = METRICS[metric].of_scores
    if of_scores is None:
        raise InputError(f"metric: {metric} is not computed from class scores")
    require(len(targets) > 0, f"{metric}: there are no images")
    assert scores.shape == (len(targets), targets.classes)
    _check_needs(metric, targets)
    value = of_scores(scores.detach(), targets)
    found = value if isinstance(value, dict) else {metric: value}
    if targets.single:
        found |= {name: value for name, value in _accuracies(scores, targets).items() if name not in found}
    return {metric: found[metric], **found}


def unit_scores(metric: str, scores: Tensor, targets: Targets) -> dict[str, UnitScores]:
    """Return the scores that :func:`evaluate_scores` averages.

    Metrics that are not means over images, such as average precision, are left out. Arguments are as there.
    """
    found: dict[str, np.ndarray] = {}
    if targets.single:
        of_images = _right(scores, targets)
        found = of_images | {"mean_per_class": of_images["top1"]}
    units = METRICS[metric].units
    found |= units(scores, targets) if units else {}
    classes = {name: targets.labels.numpy() for name in found if METRICS[name].per_class}
    return {name: UnitScores(values, classes.get(name)) for name, values in found.items()}


def comparable(metric: str, logits: Tensor) -> Tensor:
    """Return the ranking scores of a zero-shot classifier from its logits ``[N, C]``, cosines times scale.

    A softmax is float64, as many probabilities are nearly 1.
    """
    return logits.double().softmax(dim=1) if METRICS[metric].softmax else logits


def baselines(metric: str, targets: Targets) -> dict[str, float]:
    """Return the :func:`baseline` of ``metric`` and of the accuracies that :func:`evaluate_scores` returns with it."""
    value = baseline(metric, targets)
    found = {} if value is None else {metric: value}
    return found | (_baseline_accuracies(targets) if targets.single else {})


def baseline(metric: str, targets: Targets) -> float | None:
    """Return the best value of an answer that ignores the images; None for a metric without such a value."""
    of_targets = METRICS[metric].baseline
    if of_targets is None:
        return None
    _check_needs(metric, targets)
    return of_targets(targets)


def mean_over_folds(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over a set's folds of each metric that every fold has."""
    return {name: fmean(fold[name] for fold in metrics) for name in metrics[0] if all(name in fold for fold in metrics)}


def _check_needs(metric: str, targets: Targets) -> None:
    for name in METRICS[metric].needs:
        if name == "labels":
            missing = (targets.labels < 0).nonzero()[:, 0]
            if len(missing):
                raise InputError(f"metric: {metric} needs one class per image, but row {int(missing[0])} has none")
        elif getattr(targets, name) is None:
            raise InputError(f"metric: {metric} needs annotations that this set does not have; choose another metric")


def _accuracies(scores: Tensor, targets: Targets) -> dict[str, float]:
    return accuracies(classification_counts(scores, targets.labels))


def _right(scores: Tensor, targets: Targets) -> dict[str, np.ndarray]:
    """Return whether each image is right, for each accuracy of :func:`within`, float64 ``[N]``."""
    ranks = ranks_of_labels(scores, targets.labels).cpu().numpy()
    return {name: (ranks < places).astype(np.float64) for name, places in within(targets.classes).items()}


def _baseline_accuracies(targets: Targets) -> dict[str, float]:
    return baseline_accuracies(targets.labels.bincount(minlength=targets.classes))


def _mean_top1_top5(found: Mapping[str, Any]) -> Any:
    """Return Kinetics-700's metric, for numbers or arrays; with up to 5 classes, every image is in the top 5."""
    return (found["top1"] + found.get("top5", 1.0)) / 2


def _curve(score: Tensor, right: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight, float64 ``[..., T]``, of images that score at least each of T distinct scores.

    Of scores ``[n]``, bool ``[n]`` and weights ``[..., n]``, they are the weights of the right images and of all, by
    descending score; a NaN score counts as the worst possible one.
    """
    score = torch.where(score.isnan(), torch.where(right, -torch.inf, torch.inf).to(score.dtype), score)
    order = score.argsort(descending=True, stable=True)
    score, weight = score[order], weight[..., order].double()
    last = torch.ones_like(right)
    last[:-1] = score[1:] != score[:-1]  # equal scores are found together, in any order
    return (weight * right[order]).cumsum(-1)[..., last], weight.cumsum(-1)[..., last]


def _map11(scores: Tensor, targets: Targets) -> float:
    """Return VOC2007's 11-point mean average precision: the mean over classes with images.

    Average precision is the mean, over recalls 0, 0.1, ... 1, of the highest precision at that recall or more. The
    development kit compares rounded recalls; here they are compared exactly.
    """
    assert targets.relevance is not None
    values = []
    for score, relevant in zip(scores.cpu().T, targets.relevance.cpu().T, strict=True):
        counted = relevant >= 0
        right = relevant[counted] == 1
        if not bool(right.any()):
            continue
        right_T, found_T = _curve(score[counted], right, torch.ones(len(right)))
        precision = right_T / found_T
        best = [precision[10 * right_T >= level * right_T[-1]].max() for level in range(11)]
        values.append(float(torch.stack(best).mean()))
    require(bool(values), "map11: no class has an image")
    return sum(values) / len(values)


def _roc_auc(scores: Tensor, targets: Targets) -> float:
    """Return the probability that an image of class 1 scores higher than one of class 0; a tie counts half."""
    require(targets.classes == 2, f"metric: roc_auc needs 2 classes, not {targets.classes}")
    pair = scores.cpu().double()
    right = targets.labels == 1
    require(bool(right.any()) and not bool(right.all()), "roc_auc: all images are of one class")
    margin = pair[:, 1] - pair[:, 0]
    margin = torch.where(margin.isnan(), torch.where(right, -torch.inf, torch.inf).double(), margin)
    negative = margin[~right].sort().values
    below, not_above = (torch.searchsorted(negative, margin[right], right=side) for side in (False, True))
    return int((below + not_above).sum()) / (2 * len(negative) * int(right.sum()))


def _pm_units(scores: Tensor, targets: Targets) -> dict[str, np.ndarray]:
    """Return which anchor frames are right: ``pm0`` for the frame, ``pm10`` also for all its neighbours."""
    assert targets.accepted is not None
    predicted = predictions(scores).tolist()
    right = [one in classes for one, classes in zip(predicted, targets.accepted, strict=True)]
    require(bool(targets.neighbours), "pm: there are no anchor frames")
    of_anchors = [(right[anchor], [right[row] for row in around]) for anchor, around in targets.neighbours or ()]
    pm0 = np.array([own for own, _ in of_anchors], dtype=np.float64)
    pm10 = np.array([own and all(others) for own, others in of_anchors], dtype=np.float64)
    return {"pm0": pm0, "pm10": pm10, "pm": (pm0 + pm10) / 2}


def _pm(scores: Tensor, targets: Targets) -> dict[str, float]:
    units = _pm_units(scores, targets)
    pm0, pm10 = float(units["pm0"].mean()), float(units["pm10"].mean())
    return {"pm0": pm0, "pm10": pm10, "pm": (pm0 + pm10) / 2}


def _baseline_pm(targets: Targets) -> float:
    accepted, neighbours = targets.accepted or [], targets.neighbours or []
    counts = torch.zeros(2, targets.classes, dtype=torch.float64)
    for anchor, around in neighbours:
        counts[0, sorted(accepted[anchor])] += 1
        counts[1, sorted(accepted[anchor].intersection(*(accepted[row] for row in around)))] += 1
    return float((counts / len(neighbours)).mean(dim=0).max())


def _lexicon_predictions(scores: Tensor, targets: Targets) -> list[int]:
    """Return the best class among each image's own candidates; -1 if one of their scores is NaN."""
    found, scores = [], scores.cpu()
    for row, words in enumerate(targets.candidates or ()):
        candidates = torch.tensor(sorted(set(words)))
        place = int(predictions(scores[row : row + 1, candidates]))
        found.append(int(candidates[place]) if place >= 0 else -1)
    return found


def _lexicon_units(scores: Tensor, targets: Targets) -> dict[str, np.ndarray]:
    """Return whether each image is right among its own candidates."""
    right = np.array(_lexicon_predictions(scores, targets)) == targets.labels.numpy()
    return {"lexicon": right.astype(np.float64)}


def _lexicon_chance(targets: Targets) -> float:
    """Return the expected accuracy of drawing one of the image's candidates at random."""
    return sum(1 / len(set(words)) for words in targets.candidates or ()) / len(targets)


def _mwap(scores: Tensor, targets: Targets) -> dict[str, float]:
    """Return RareAct's metric: the mean over actions of an average precision that counts each film once.

    An action's clips are right, hard (only its verb or only its noun occurs, or both apart) or wrong. Within each of
    these groups a clip is weighted by 1 / clips of its film (``mwap``), or one clip per film is drawn, 100 times
    (``mwsap``).
    """
    annotations = targets.annotations or {}
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


def _macro_f1(scores: Tensor, targets: Targets) -> float:
    """Return the mean F1 over classes with images, as WILDS computes it for iWildCam."""
    labels, predicted = targets.labels, predictions(scores).cpu()
    images = labels.bincount(minlength=targets.classes)
    right = labels[predicted == labels].bincount(minlength=targets.classes)
    found = predicted[predicted >= 0].bincount(minlength=targets.classes)
    f1 = 2 * right.double() / (images + found)  # precision and recall in one
    return float(f1[images > 0].mean())


def _macro_f1_of_one_class(targets: Targets) -> float:
    images = targets.labels.bincount().double()
    return float((2 * images / (images + images.sum())).max() / (images > 0).sum())


def _worst_group(within: int, scores: Tensor, targets: Targets) -> float:
    """Return the lowest accuracy of a group with images: DataComp's ``acc_wg`` (GeoDE, FMoW), ``acc_top5_wg``."""
    right = (ranks_of_labels(scores, targets.labels) < within).cpu()
    return float(_group_means(right.double()[:, None], targets, f"worst_group_top{within}").min())


def _worst_group_of_one_class(targets: Targets) -> float:
    one_hot = torch.nn.functional.one_hot(targets.labels, targets.classes).double()
    return float(_group_means(one_hot, targets, "worst_group_top1").amin(dim=0).max())


def _group_means(values: Tensor, targets: Targets, metric: str) -> Tensor:
    """Return the mean of float64 ``[N, K]`` in each group, ``[groups, K]``."""
    attributes = targets.groups or {}
    names = ", ".join(attributes)
    require(len(attributes) == 1, f"metric: {metric} needs groups of one kind, but the set has {names or 'none'}")
    group = _numbers(next(iter(attributes.values())))
    return torch.zeros(int(group.max()) + 1, values.shape[1], dtype=torch.float64).index_add_(
        0, group, values
    ) / group.bincount().unsqueeze(1)


def _numbers(values: list[str]) -> Tensor:
    place = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return torch.tensor([place[value] for value in values])


def _film_weights(video: Tensor, random: torch.Generator) -> Tensor:
    """Return float64 ``[1 + SAMPLINGS, n]``: first 1 / clips of the film; then 1 for one clip per film, else 0."""
    order = video.argsort(stable=True)
    films, clips = video[order].unique_consecutive(return_counts=True)
    first = clips.cumsum(0) - clips
    drawn = torch.rand(SAMPLINGS, len(films), generator=random, dtype=torch.float64)
    weight = torch.zeros(1 + SAMPLINGS, len(video), dtype=torch.float64)
    weight[0, order] = (1 / clips.double()).repeat_interleave(clips)
    weight[1:].scatter_(1, order[first + (drawn * clips).long()], 1.0)
    return weight


def _of_equal_scores(metric: str, targets: Targets) -> float:
    return evaluate_scores(metric, torch.zeros(len(targets), targets.classes), targets)[metric]


METRICS: dict[str, Metric] = {
    "top1": Metric("top-1", _accuracies, baseline=lambda targets: _baseline_accuracies(targets)["top1"]),
    "top5": Metric("top-5"),  # words alone: targets.WITHIN has it, which is counted for every set
    "mean_per_class": Metric(
        "mean per class",
        _accuracies,
        baseline=lambda targets: _baseline_accuracies(targets)["mean_per_class"],
        per_class=True,
    ),
    "map11": Metric("11-point mAP", _map11, ("relevance",), baseline=partial(_of_equal_scores, "map11"), softmax=True),
    "roc_auc": Metric("ROC AUC", _roc_auc, baseline=partial(_of_equal_scores, "roc_auc")),
    "mean_top1_top5": Metric(
        "mean of top-1 and top-5",
        lambda scores, targets: _mean_top1_top5(_accuracies(scores, targets)),
        baseline=lambda targets: _mean_top1_top5(_baseline_accuracies(targets)),
        units=lambda scores, targets: {"mean_top1_top5": _mean_top1_top5(_right(scores, targets))},
    ),
    "pm": Metric(
        "mean of PM-0 and PM-10",
        _pm,
        ("accepted", "neighbours"),
        baseline=_baseline_pm,
        units=_pm_units,
        rows=lambda targets: [anchor for anchor, _ in targets.neighbours or ()],
    ),
    "pm0": Metric("PM-0"),
    "pm10": Metric("PM-10"),
    "lexicon": Metric(
        "top-1 of its lexicon",
        lambda scores, targets: float(_lexicon_units(scores, targets)["lexicon"].mean()),
        ("candidates", "labels"),
        baseline=_lexicon_chance,
        units=_lexicon_units,
        predictions=_lexicon_predictions,
    ),
    "mwap": Metric("mWAP", _mwap, ("annotations",), baseline=partial(_of_equal_scores, "mwap")),
    "mwsap": Metric("mWSAP"),
    "macro_f1": Metric("macro F1", _macro_f1, baseline=_macro_f1_of_one_class),
    "worst_group_top1": Metric(
        "top-1 of the worst group", partial(_worst_group, 1), ("labels", "groups"), baseline=_worst_group_of_one_class
    ),
    "worst_group_top5": Metric("top-5 of the worst group", partial(_worst_group, 5), ("labels", "groups")),
    "text_score": Metric("text score", task="caption_choice"),
    "macro_text_score": Metric("macro text score", task="caption_choice"),
    "image_score": Metric("image score", task="caption_choice"),
    "group_score": Metric("group score", task="caption_choice"),
    "jaccard": Metric("Jaccard index", task="caption_choice"),
    "miou": Metric("mean IoU", task="segmentation"),
    "accuracy": Metric("pointing accuracy", task="pointing"),
    "within_km": Metric("within km", task="geolocation"),
    "recall@1": Metric("R@1", task="retrieval"),
    "map@10": Metric("mAP@10"),
    "ndcg@10": Metric("nDCG@10", task="document_retrieval"),
    "map": Metric("mAP", task="document_retrieval"),
    "mrr": Metric("MRR", task="document_retrieval"),
    **{f"recall@{k}": Metric(f"R@{k}", task="document_retrieval") for k in (5, 10, 100)},
    "knn_top1": Metric("top-1 of 20 neighbours"),
}
