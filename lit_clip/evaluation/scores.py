"""Metrics of the paper's evaluation, pure functions of scores and targets, in float64 where anything is added up.

Shapes: N images, C classes. All values are fractions, 0 to 1. A tie goes to the class of the lowest number, so that
nothing depends on how images are divided among ranks or chunks. An image with a NaN among its scores is wrong.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.overlap import clopper_pearson
from lit_clip.evaluation.suite import Metric
from lit_clip.evaluation.targets import Targets
from lit_clip.losses.contrastive import unit

PROPORTIONS: tuple[Metric, ...] = ("top1", "lexicon")  # of N images: those that have a Clopper-Pearson interval
WITHIN_KM = (1, 25, 200, 750, 2500)  # table 17
EARTH_RADIUS_KM = 6371.0088  # the mean one
SAMPLINGS = 100  # of RareAct's mWSAP
ENTRIES = 2**24  # of a chunk of scores
Knowledge = TypeVar("Knowledge")


def evaluate_scores(metric: Metric, scores: Tensor, targets: Targets) -> dict[str, float]:
    """A set's metric under its own name, and what else its labels allow.

    Args:
        metric: ``within_km`` and ``recall@1`` have functions of their own.
        scores: float ``[N, C]``, higher is likelier.
        targets: of the N images.

    Returns:
        ``metric`` first; ``top1``, ``top5`` (of more than 5 classes) and ``mean_per_class`` where every image has one
        class; ``pm0`` and ``pm10`` beside ``pm``, their mean; ``mwsap`` beside ``mwap``.

    Raises:
        InputError: scores of another shape, no images, or targets that the metric is not defined on.
    """
    require(metric in _METRICS, f"metric: {metric} is not one of scores of classes")
    require(len(targets) > 0, f"{metric}: there are no images")
    if scores.shape != (len(targets), targets.classes):
        shape = " x ".join(map(str, scores.shape))
        raise InputError(f"{metric}: scores {shape} of {len(targets)} images and {targets.classes} classes")
    scores = scores.detach()
    found = _METRICS[metric](scores, targets)
    if bool((targets.labels >= 0).all()):
        found |= {name: value for name, value in accuracies(scores, targets).items() if name not in found}
    return {metric: found[metric], **found}


def baseline(metric: Metric, targets: Targets) -> float | None:
    """What the best answer reaches that looks at no image.

    That is always the same class; of average precision and ROC AUC always the same score; with ``lexicon`` one of a
    image's candidates at random. None of metrics that are not of classes.
    """
    if metric in ("within_km", "recall@1"):
        return None
    if metric == "lexicon":
        return sum(1 / len(set(words)) for words in _known(targets.candidates, metric)) / len(targets)
    if metric == "pm":
        return _baseline_pm(targets)
    if metric in ("map11", "roc_auc", "mwap"):
        return evaluate_scores(metric, torch.zeros(len(targets), targets.classes), targets)[metric]
    _require_labels(targets, metric)
    counts = targets.labels.bincount(minlength=targets.classes).double()
    shares = (counts / len(targets)).sort(descending=True).values
    if metric == "mean_per_class":
        return 1 / int((shares > 0).sum())
    top1 = float(shares[0])
    return top1 if metric == "top1" else (top1 + float(shares[:5].sum())) / 2


def interval(value: float, n: int) -> tuple[float, float]:
    """The 99.5 % Clopper-Pearson interval of a fraction of n images, as in the paper's tables (appendix A.3)."""
    require(n > 0, "interval: there are no images")
    return clopper_pearson(round(value * n), n)


def ranks_of_labels(scores: Tensor, labels: Tensor) -> Tensor:
    """Of each image the place of its class, 0 is first; C if one of its scores is NaN. int64 ``[N]``."""
    N, C = scores.shape
    parts = []
    for rows in torch.arange(N, device=scores.device).split(max(1, ENTRIES // C)):
        score, label = scores[rows], labels[rows, None].to(scores.device)
        own = score.gather(1, label)
        before = torch.arange(C, device=scores.device) < label
        rank = ((score > own) | ((score == own) & before)).sum(dim=1)
        parts.append(rank.masked_fill(score.isnan().any(dim=1), C))
    return torch.cat(parts)


def predictions(scores: Tensor) -> Tensor:
    """The class of each image's highest score, the lowest number of a tie, -1 if one is NaN. int64 ``[N]``."""
    return scores.argmax(dim=1).masked_fill(scores.isnan().any(dim=1), -1)


def accuracies(scores: Tensor, targets: Targets) -> dict[str, float]:
    """``top1``, ``top5`` (of more than 5 classes) and ``mean_per_class``, whose mean is over classes with images."""
    _require_labels(targets, "top1")
    ranks = ranks_of_labels(scores, targets.labels).cpu()
    right = (ranks < 1).double()
    images = targets.labels.bincount(minlength=targets.classes)
    per_class = right.new_zeros(targets.classes).index_add_(0, targets.labels, right)
    found = {"top1": float(right.mean())}
    if targets.classes > 5:
        found["top5"] = float((ranks < 5).double().mean())
    return found | {"mean_per_class": float((per_class / images)[images > 0].mean())}


def _known(knowledge: Knowledge | None, metric: Metric) -> Knowledge:
    if knowledge is None:
        raise InputError(f"metric: {metric} needs what this set does not know; choose another for it")
    return knowledge


def _require_labels(targets: Targets, metric: Metric) -> None:
    missing = (targets.labels < 0).nonzero()[:, 0]
    if len(missing):
        raise InputError(f"metric: {metric} is of images with one class each; that of row {int(missing[0])} is not")


def _mean_top1_top5(scores: Tensor, targets: Targets) -> dict[str, float]:
    found = accuracies(scores, targets)
    return found | {"mean_top1_top5": (found["top1"] + found.get("top5", 1.0)) / 2}


class _Curve(NamedTuple):
    """Counts of what scores at least as high as each of T thresholds, the distinct scores from the highest down.

    Attributes:
        right: float64 ``[..., T]``, weights of the right ones.
        found: float64 ``[..., T]``, weights of all.
    """

    right: Tensor
    found: Tensor


def _curve(score: Tensor, right: Tensor, weight: Tensor) -> _Curve:
    """Scores ``[n]``, bool ``[n]``, weights ``[..., n]``; NaN scores are as wrong as can be."""
    score = torch.where(score.isnan(), torch.where(right, -torch.inf, torch.inf).to(score.dtype), score)
    order = score.argsort(descending=True, stable=True)
    score, weight = score[order], weight[..., order].double()
    last = torch.ones_like(right)
    last[:-1] = score[1:] != score[:-1]  # what scores the same is found together, whatever its order
    return _Curve((weight * right[order]).cumsum(-1)[..., last], weight.cumsum(-1)[..., last])


def _map11(scores: Tensor, targets: Targets) -> dict[str, float]:
    """VOC2007's: at recall 0, 0.1, ... 1 the highest precision at that recall or more; their mean, and that of classes.

    The development kit compares rounded recalls; here they are compared exactly.
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
        at = [precision[10 * right_T >= level * right_T[-1]].max() for level in range(11)]
        values.append(float(torch.stack(at).mean()))
    require(bool(values), "map11: no class has an image")
    return {"map11": sum(values) / len(values)}


def _roc_auc(scores: Tensor, targets: Targets) -> dict[str, float]:
    """How often an image of class 1 scores higher than one of class 0; half where they score the same."""
    _require_labels(targets, "roc_auc")
    require(targets.classes == 2, f"metric: roc_auc is of 2 classes, not {targets.classes}")
    pair = scores.cpu().double()
    right = targets.labels == 1
    require(bool(right.any()) and not bool(right.all()), "roc_auc: all images are of one class")
    margin = pair[:, 1] - pair[:, 0]
    margin = torch.where(margin.isnan(), torch.where(right, -torch.inf, torch.inf).double(), margin)
    negative = margin[~right].sort().values
    below, not_above = (torch.searchsorted(negative, margin[right], right=side) for side in (False, True))
    return {"roc_auc": int((below + not_above).sum()) / (2 * len(negative) * int(right.sum()))}


def _pm(scores: Tensor, targets: Targets) -> dict[str, float]:
    """The anchor frames that are right, and those with which every neighbour is right too."""
    prediction = predictions(scores).tolist()
    right = [one in accepted for one, accepted in zip(prediction, _known(targets.accepted, "pm"), strict=True)]
    neighbours = _known(targets.neighbours, "pm")
    require(bool(neighbours), "pm: there are no anchor frames")
    pm0 = sum(right[anchor] for anchor, _ in neighbours) / len(neighbours)
    pm10 = sum(right[anchor] and all(right[row] for row in around) for anchor, around in neighbours) / len(neighbours)
    return {"pm0": pm0, "pm10": pm10, "pm": (pm0 + pm10) / 2}


def _baseline_pm(targets: Targets) -> float:
    accepted = _known(targets.accepted, "pm")
    counts = torch.zeros(2, targets.classes, dtype=torch.float64)
    neighbours = _known(targets.neighbours, "pm")
    for anchor, around in neighbours:
        counts[0, sorted(accepted[anchor])] += 1
        counts[1, sorted(accepted[anchor].intersection(*(accepted[row] for row in around)))] += 1
    return float((counts / len(neighbours)).mean(dim=0).max())


def _lexicon(scores: Tensor, targets: Targets) -> dict[str, float]:
    """Top-1 among each image's own candidates."""
    _require_labels(targets, "lexicon")
    right = 0
    scores = scores.cpu()
    for row, words in enumerate(_known(targets.candidates, "lexicon")):
        candidates = torch.tensor(sorted(set(words)))
        prediction = int(predictions(scores[row : row + 1, candidates]))
        right += prediction >= 0 and int(candidates[prediction]) == int(targets.labels[row])
    return {"lexicon": right / len(targets)}


def _mwap(scores: Tensor, targets: Targets) -> dict[str, float]:
    """RareAct's: mean over actions of the average precision in which every film counts once.

    Of an action's clips the right ones, the hard ones (one of its two words is right, or both apart) and the others
    are each weighted: by 1 / clips of the film (``mwap``), or by drawing one clip a film 100 times (``mwsap``).
    """
    annotations = _known(targets.annotations, "mwap")
    for name in ("verb", "noun", "annotation", "video"):
        require(name in annotations, f"metric: mwap needs {name} among the set's annotations")
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
        curve = _curve(scores[rows.to(scores.device), action].cpu(), right[rows], torch.cat(weights, dim=1))
        precision = curve.right / curve.found.clamp(min=torch.finfo(torch.float64).tiny)
        gained = curve.right.diff(prepend=torch.zeros_like(curve.right[:, :1]))
        values.append((gained * precision).sum(dim=1) / curve.right[:, -1])
    require(bool(values), "mwap: no action has a clip")
    mean = torch.stack(values).mean(dim=0)
    return {"mwap": float(mean[0]), "mwsap": float(mean[1:].mean())}


def _numbers(values: list[str]) -> Tensor:
    place = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return torch.tensor([place[value] for value in values])


def _film_weights(video: Tensor, random: torch.Generator) -> Tensor:
    """float64 ``[1 + samplings, n]``: first 1 / clips of the film, then 1 for one clip a film and 0 for its others."""
    order = video.argsort(stable=True)
    films, clips = video[order].unique_consecutive(return_counts=True)
    first = clips.cumsum(0) - clips
    drawn = torch.rand(SAMPLINGS, len(films), generator=random, dtype=torch.float64)
    weight = torch.zeros(1 + SAMPLINGS, len(video), dtype=torch.float64)
    weight[0, order] = (1 / clips.double()).repeat_interleave(clips)
    weight[1:].scatter_(1, order[first + (drawn * clips).long()], 1.0)
    return weight


def distances_km(from_N2: Tensor, to_N2: Tensor) -> Tensor:
    """Great-circle distances (haversine) of latitudes and longitudes in degrees, float64 ``[N]``."""
    (latitude, longitude), (other, far) = from_N2.double().deg2rad().T, to_N2.double().deg2rad().T
    chord = ((other - latitude) / 2).sin() ** 2 + latitude.cos() * other.cos() * ((far - longitude) / 2).sin() ** 2
    return 2 * EARTH_RADIUS_KM * chord.clamp(max=1).sqrt().asin()


@torch.no_grad()
def nearest(query: Tensor, reference: Tensor) -> Tensor:
    """Of each of ``[N, D]`` the row of ``[M, D]`` with the highest cosine, the first of a tie. int64 ``[N]``."""
    query = unit(query)
    best = query.new_full((len(query),), -torch.inf)
    row = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    start = 0
    for part in reference.split(max(1, ENTRIES // max(1, len(query)))):
        score, place = (query @ unit(part.to(query.device)).T).max(dim=1)
        closer = score > best
        best, row = torch.where(closer, score, best), torch.where(closer, start + place, row)
        start += len(part)
    return row


def within_km(
    query: Tensor, reference: Tensor, query_coordinates: Tensor, reference_coordinates: Tensor
) -> dict[str, float]:
    """Where images were taken, predicted as the place of the nearest of others (section E.4; table 17).

    Args:
        query: features ``[N, D]``.
        reference: features ``[M, D]`` of images whose place is known.
        query_coordinates: latitudes and longitudes ``[N, 2]``.
        reference_coordinates: ``[M, 2]``.

    Returns:
        ``within_1km`` and so on for 25, 200, 750 and 2500 km: fractions of the queries.

    Raises:
        InputError: there is nothing to search in or for, or a place that is none.
    """
    require(len(query) > 0 and len(reference) > 0, "within_km: there are no images, or none to compare them with")
    for name, places in (("images", query_coordinates), ("references", reference_coordinates)):
        wrong = (~(places.abs() <= places.new_tensor([90.0, 360.0])).all(dim=1)).nonzero()[:, 0]
        require(not len(wrong), f"within_km: {name}: row {int(wrong[0]) if len(wrong) else 0} is at no place on Earth")
    prediction = reference_coordinates[nearest(query, reference).to(reference_coordinates.device)]
    distance = distances_km(prediction.cpu(), query_coordinates.cpu())
    return {f"within_{km}km": float((distance <= km).double().mean()) for km in WITHIN_KM}


_METRICS: dict[Metric, Callable[[Tensor, Targets], dict[str, float]]] = {
    "top1": accuracies,
    "mean_per_class": accuracies,
    "mean_top1_top5": _mean_top1_top5,
    "map11": _map11,
    "roc_auc": _roc_auc,
    "pm": _pm,
    "lexicon": _lexicon,
    "mwap": _mwap,
}
