"""Exact nearest-neighbour search in an index."""

import numpy as np
import pytest

from lit_clip.embedding import index
from lit_clip.embedding.index import nearest


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
