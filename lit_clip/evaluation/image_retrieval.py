"""Image-to-image retrieval: each image of a set searches all others for images of its class.

Shapes: N images, Q queries (images whose class has another one), b of them in a block, C classes, D embedding
dimension, K results.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_clip.errors import require
from lit_clip.evaluation.intervals import UnitScores, intervals
from lit_clip.losses.contrastive import unit
from lit_clip.tools.hardware import best_device

RESULTS = 10  # of a search that are judged
RECALLS = (1, 5, 10)
NEIGHBOURS, TEMPERATURE = 20, 0.07  # that vote on a class, and how much less the farther ones count (Wu et al. 2018)
BLOCK = 2**24  # similarities that exist at once


class ImageRetrieval(NamedTuple):
    """Scores of the queries by metric, their rows, their nearest images' rows, and mAP in random order."""

    units: dict[str, UnitScores]
    rows: Tensor  # int64 [Q]
    nearest: Tensor  # int64 [Q]
    baseline: float

    def entry(self) -> dict[str, Any]:
        """Return the entry in ``results.json``, without predictions."""
        metrics = {name: scores.mean() for name, scores in self.units.items()}
        judged = {"value": next(iter(metrics.values())), "baseline": self.baseline}
        return {**judged, "metrics": metrics, "intervals": intervals(self.units), "queries": len(self.rows)}


def image_retrieval(
    features_ND: Tensor, labels_N: Tensor, results: int = RESULTS, neighbours: int = NEIGHBOURS
) -> ImageRetrieval:
    """Search a set for the class of each of its images; an image is not a result of its own search.

    ``map@K`` is the mean average precision of the first K results, divided by the number of right ones that K could
    hold (Weyand et al. 2020); ``knn_top1`` the accuracy of the neighbours' weighted vote.

    Args:
        features_ND: of the images, of any length.
        labels_N: int64, one class for each image.
        results: K.
        neighbours: that vote.
    """
    require(bool((labels_N >= 0).all()), "image_retrieval: needs images of one class each; remove it from the tasks")
    right_N = labels_N.bincount()[labels_N] - 1
    rows, others = right_N.nonzero()[:, 0], len(labels_N) - 1
    require(len(rows) > 0, "image_retrieval: no class has two images; remove it from the set's tasks")
    device, most = best_device(), min(max(results, neighbours, *RECALLS), others)
    features_ND, parts = unit(features_ND).to(device), list[dict[str, Tensor]]()
    for block in rows.split(max(1, BLOCK // len(features_ND))):
        on_device = block.to(device)
        cosine_bN = features_ND[on_device] @ features_ND.T
        cosine_bN.nan_to_num_(-torch.inf).scatter_(1, on_device[:, None], -torch.inf)
        cosine_bK, place_bK = (each.cpu() for each in cosine_bN.topk(most, dim=1))
        class_bK = labels_N[place_bK].masked_fill(cosine_bK.isinf(), -1)  # features that are NaN find nothing
        scores = _scores(cosine_bK, class_bK, labels_N[block], right_N[block], results, neighbours)
        parts.append({**scores, "nearest": place_bK[:, 0]})
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    nearest = found.pop("nearest")
    units = {name: UnitScores(values.double().numpy()) for name, values in found.items()}
    return ImageRetrieval(units, rows, nearest, _random_order(right_N[rows], others, results))


def _scores(
    cosine_bK: Tensor, class_bK: Tensor, class_b: Tensor, right_b: Tensor, results: int, neighbours: int
) -> dict[str, Tensor]:
    """Return the queries' scores ``[b]`` by metric, from the cosines and classes of their results, best first."""
    hit_bK = class_bK == class_b[:, None]
    first_bK = hit_bK[:, :results].double()
    precision_bK = first_bK.cumsum(dim=1) / torch.arange(1, first_bK.shape[1] + 1)
    vote_bC = torch.zeros(len(class_b), int(max(class_bK.max(), class_b.max())) + 2, dtype=torch.float64)
    weight_bK = (cosine_bK[:, :neighbours].double() / TEMPERATURE).exp()
    vote_bC.scatter_add_(1, class_bK[:, :neighbours] + 1, weight_bK)  # column 0: nothing found
    return {
        f"map@{results}": (precision_bK * first_bK).sum(dim=1) / right_b.clamp(max=results),
        **{f"image_to_image_recall@{k}": hit_bK[:, :k].any(dim=1) for k in RECALLS},
        "knn_top1": vote_bC.argmax(dim=1) == class_b + 1,
    }


def _random_order(right_Q: Tensor, others: int, results: int) -> float:
    """Return the expected ``map@K`` in random order, from each query's number of right images."""
    right_Q1, place_K = right_Q.double()[:, None], torch.arange(1, min(results, others) + 1).double()
    earlier_QK = (place_K - 1) * (right_Q1 - 1) / max(1, others - 1)  # right ones before a right one at a place
    precision_Q = (right_Q1 / others * (1 + earlier_QK) / place_K).sum(dim=1)
    return float((precision_Q / right_Q.clamp(max=results)).mean())
