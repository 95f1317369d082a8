"""Exact nearest-neighbour search in an index."""

import numpy as np
import pytest

from lit_clip.embedding import index
from lit_clip.embedding.index import nearest, nearest_others


@pytest.mark.parametrize("k", [1, 10, 53, 100])
def test_search_in_chunks_equals_a_full_sort(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    random = np.random.default_rng(1)
    features, queries = (random.standard_normal((n, 16)).astype(np.float32) for n in (53, 3))
    monkeypatch.setattr(index, "CHUNK", 7)
    scores, rows = nearest(features, queries, k)
    everything = queries @ features.T
    expected = np.argsort(-everything, axis=1)[:, :k]
    assert np.array_equal(rows, expected)
    assert np.allclose(scores, np.take_along_axis(everything, expected, axis=1), atol=1e-5)


@pytest.mark.parametrize(("rows", "k"), [(600, 32), (257, 40), (2, 32), (1, 3)])
def test_the_nearest_others_are_those_of_a_plain_loop_in_float64(rows: int, k: int) -> None:
    features = np.random.default_rng(rows).normal(size=(rows, 8)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features.astype(np.float64) @ features.T.astype(np.float64)
    np.fill_diagonal(cosines, -2)
    expected = np.argsort(-cosines, axis=1)[:, : min(k, rows - 1)]
    assert np.array_equal(nearest_others(features, k), expected)
