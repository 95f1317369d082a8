"""Predict where an image was taken: at the location of its nearest neighbour (section E.4 and table 17 of the paper).

Shapes: N queries, M references, D embedding dimension.
"""

import torch
from torch import Tensor

from lit_clip.errors import require
from lit_clip.evaluation.overlap import nearer, nowhere
from lit_clip.losses.contrastive import unit

WITHIN_KM = (1, 25, 200, 750, 2500)  # table 17
EARTH_RADIUS_KM = 6371.0088  # mean radius


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


def within_km(distance: Tensor) -> dict[str, float]:
    """Return fractions of the queries by name, ``within_1km`` and so on, from :func:`nearest_km`."""
    return {f"within_{km}km": float((distance <= km).double().mean()) for km in WITHIN_KM}
