"""Geolocation against the spherical law of cosines and a plain loop over neighbours."""

import math

import pytest
import torch

from lit_clip.errors import InputError
from lit_clip.evaluation import overlap
from lit_clip.evaluation.geolocation import distances_km, nearest_km, nearest_rows, within_km


def test_distances_equal_the_spherical_law_of_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ((torch.rand(50, 2, generator=generator) * 2 - 1).double() * torch.tensor([90.0, 180.0]) for _ in range(2))
    for found, (lat, lon), (lat2, lon2) in zip(distances_km(a, b).tolist(), a.tolist(), b.tolist(), strict=True):
        angle = math.sin(math.radians(lat)) * math.sin(math.radians(lat2))
        angle += math.cos(math.radians(lat)) * math.cos(math.radians(lat2)) * math.cos(math.radians(lon - lon2))
        assert found == pytest.approx(6371.0088 * math.acos(angle), rel=1e-6)
    paris, london, antipodes = torch.tensor([[48.8566, 2.3522], [51.5074, -0.1278], [-48.8566, -177.6478]])
    assert float(distances_km(paris[None], london[None])) == pytest.approx(343.6, abs=1)
    assert float(distances_km(paris[None], antipodes[None])) == pytest.approx(math.pi * 6371.0088)


def test_within_km_counts_queries_by_the_distance_to_their_nearest_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    query, reference = torch.randn(13, 8), torch.randn(101, 8) * torch.rand(101, 1)
    expected = [max(range(101), key=lambda m: float(torch.cosine_similarity(q, reference[m], dim=0))) for q in query]
    where = torch.rand(101, 2).double() * 3
    truth = where[expected]
    truth[:4, 0] += torch.tensor([0.1, 1.0, 5.0, 20.0])  # about 11, 111, 556 and 2224 km further north
    for entries in (2**24, 7):
        monkeypatch.setattr(overlap, "REFERENCES", entries)
        assert nearest_rows(query, reference).tolist() == expected
        found = within_km(nearest_km(query, reference, truth, where))
        assert [round(13 * value) for value in found.values()] == [9, 10, 11, 12, 13]
        assert list(found) == ["within_1km", "within_25km", "within_200km", "within_750km", "within_2500km"]


def test_a_tie_between_neighbours_goes_to_the_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "REFERENCES", 2)
    reference = torch.eye(4)[[3, 1, 1, 2, 1, 3]]
    assert nearest_rows(torch.eye(4)[[1, 3]], reference).tolist() == [1, 0]


def test_coordinates_that_are_not_on_earth_are_an_error() -> None:
    with pytest.raises(InputError, match="references: row 1: latitude must be between -90 and 90"):
        nearest_km(torch.eye(2), torch.eye(2), torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]))


def test_features_that_are_nan_are_right_nowhere() -> None:
    features, places = torch.eye(3), torch.tensor([[0.0, 0.0], [10.0, 10.0], [20.0, 20.0]])
    query = features.clone()
    query[2] = torch.nan
    assert nearest_km(query, features, places, places).tolist() == [0.0, 0.0, math.inf]
    assert within_km(nearest_km(query, features, places, places))["within_2500km"] == 2 / 3
