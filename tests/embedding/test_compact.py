"""Fewer dimensions and 8-bit integers, against a plain loop and against sentence-transformers' ranges."""

import json

import numpy as np
import pytest

from lit_clip.embedding.compact import INT8_SCALE, Int8Scale, truncated


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


FEATURES = unit(np.random.default_rng(0).standard_normal((200, 24)).astype(np.float32))


def test_every_number_becomes_its_nearest_of_256_levels_between_the_ends_of_its_dimension() -> None:
    scale = Int8Scale.of(FEATURES)
    codes = scale.encode(FEATURES)
    assert codes.dtype == np.int8
    assert (codes.min(axis=0) == -128).all()
    assert (codes.max(axis=0) == 127).all()
    for column in range(24):
        values = FEATURES[:, column].astype(np.float64)
        levels = np.linspace(values.min(), values.max(), 256)
        nearest = np.abs(values[:, None] - levels).argmin(axis=1) - 128
        assert (np.abs(nearest - codes[:, column]) <= 1).all()
        assert (nearest == codes[:, column]).mean() > 0.98  # the others are half-way, where float32 decides
    decoded = scale.decode(codes)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, unit(scale.start + scale.step * (codes.astype(np.float64) + 128)), atol=1e-6)
    assert np.abs(decoded - FEATURES).max() < 0.01


def test_a_dimension_that_never_changes_is_kept_and_what_is_outside_of_the_range_becomes_its_end() -> None:
    constant = FEATURES.copy()
    constant[:, 3] = 0.25
    scale = Int8Scale.of(constant)
    back = scale.decode(scale.encode(constant))
    np.testing.assert_allclose(back[:, 3], unit(constant)[:, 3], atol=1e-2)
    far = scale.encode(np.stack([np.full(24, 9, np.float32), np.full(24, -9, np.float32)]))
    assert far[0, 0] == 127
    assert far[1, 0] == -128


def test_truncated_features_are_the_first_dimensions_of_unit_length() -> None:
    for width in (1, 7, 23):
        np.testing.assert_allclose(truncated(FEATURES, width), unit(FEATURES[:, :width]), atol=1e-6)
    assert truncated(FEATURES, 24) is FEATURES


@pytest.mark.parametrize(
    "text",
    [
        None,
        "[]",
        "{}",
        '{"start": [1], "step": [1]}',
        '{"start": [1, 2], "step": [1, 0]}',
        '{"start": "ab", "step": [1, 1]}',
        '{"start": [1, {}], "step": [1, 1]}',
        '{"start": [1, 2], "step": [1, NaN]}',
        '{"start": [1, 1e999], "step": [1, 1]}',
    ],
)
def test_a_missing_or_damaged_scale_is_refused(text: str | None) -> None:
    with pytest.raises(ValueError, match=INT8_SCALE):
        Int8Scale.from_metadata({} if text is None else {INT8_SCALE: text}, 2)
    scale = Int8Scale.from_metadata({INT8_SCALE: json.dumps({"start": [0, 1], "step": [1, 2]})}, 2)
    assert Int8Scale.from_metadata({INT8_SCALE: scale.to_text()}, 2).start.tolist() == [0, 1]
