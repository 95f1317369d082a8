"""Image-to-image retrieval: each image of a set searches all others for images of its class.

In geolocation an image is predicted to be where its nearest neighbour was taken (section E.4 and table 17 of the
paper).

Shapes: N images, Q queries (images whose class has another one), b of them in a block, C classes, D embedding
dimension, K results; in geolocation N queries and M references.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_clip.errors import require
from lit_clip.evaluation.intervals import UnitScores
from lit_clip.evaluation.overlap import nearer, nowhere
from lit_clip.losses.contrastive import unit
from lit_clip.tools.hardware import best_device

RESULTS = 10  # of a search that are judged
RECALLS = (1, 5, 10)
NEIGHBOURS, TEMPERATURE = 20, 0.07  # that vote on a class, and how much less the farther ones count (Wu et al. 2018)
BLOCK = 2**24  # similarities that exist at once
WITHIN_KM = (1, 25, 200, 750, 2500)  # table 17
EARTH_RADIUS_KM = 6371.0088  # mean radius


class ImageRetrieval(NamedTuple):
    """Scores of the queries by metric, their rows, their nearest images' rows, and mAP in random order."""

    units: dict[str, UnitScores]
    rows: Tensor  # int64 [Q]
    nearest: Tensor  # int64 [Q]
    baseline: float


def image_retrieval(
    features_ND: Tensor, labels_N: Tensor, results: int = RESULTS, neighbours: int = NEIGHBOURS
) -> ImageRetrieval:
    """Search a set for the class of each of its images; an image is not a result of its own search.

    ``map@K`` is the mean average precision of the first K results, divided by the number of right ones that K could
    hold (Weyand et al. 2020); ``knn_top1`` the accuracy of the neighbours' weighted vote. Features may have any length.
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


def distances_km(from_N2: Tensor, to_N2: Tensor) -> Tensor:
    """Return great-circle distances (haversine) between latitudes and longitudes in degrees, float64 ``[N]``."""
    (latitude, longitude), (other_latitude, other_longitude) = from_N2.double().deg2rad().T, to_N2.double().deg2rad().T
    across = latitude.cos() * other_latitude.cos() * ((other_longitude - longitude) / 2).sin() ** 2
    chord = ((other_latitude - latitude) / 2).sin() ** 2 + across
    return 2 * EARTH_RADIUS_KM * chord.clamp(max=1).sqrt().asin()


def nearest_rows(query: Tensor, reference: Tensor) -> Tensor:
    """Return the row of ``[M, D]`` with the highest cosine to each of ``[N, D]``, the first of a tie; int64 ``[N]``."""
    start = nowhere(len(query), query.device)
    rows = torch.arange(len(reference), device=query.device)
    return nearer(start, unit(query), unit(reference.to(query.device)), rows).row


def nearest_km(query: Tensor, reference: Tensor, query_coordinates: Tensor, reference_coordinates: Tensor) -> Tensor:
    """Return the distance from each query's true place to its nearest neighbour's, float64 ``[N]`` in km.

    Features are ``[N, D]`` and ``[M, D]``, coordinates latitudes and longitudes in degrees, ``[N, 2]`` and ``[M, 2]``.
    """
    require(len(query) > 0 and len(reference) > 0, "within_km: there are no images, or none to compare them with")
    for name, coordinates in (("images", query_coordinates), ("references", reference_coordinates)):
        wrong = (~(coordinates.abs() <= coordinates.new_tensor([90.0, 360.0])).all(dim=1)).nonzero()[:, 0]
        require(
            not len(wrong),
            f"within_km: {name}: row {int(wrong[0]) if len(wrong) else 0}: latitude must be between -90 and 90, "
            "longitude between -360 and 360",
        )
    rows = nearest_rows(query, reference).cpu()  # -1 for features that are NaN, which are right nowhere
    return distances_km(reference_coordinates.cpu()[rows], query_coordinates.cpu()).masked_fill(rows < 0, torch.inf)


def within_km(distance: Tensor) -> dict[str, UnitScores]:
    """Return whether each query is near enough by name, ``within_1km`` and so on, from :func:`nearest_km`."""
    return {f"within_{km}km": UnitScores((distance <= km).double().numpy()) for km in WITHIN_KM}
