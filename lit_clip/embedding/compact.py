"""Smaller features: fewer dimensions, and 8-bit integers."""

import json
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from lit_clip.errors import InputError, require

DType = Literal["float32", "int8"]
LEVELS = 256
INT8_SCALE = "int8_scale"  # in a file's metadata
TRUNCATED_FROM = "truncated_from"


class Int8Scale(NamedTuple):
    """The range of each dimension that 256 levels divide, as in sentence-transformers.

    Attributes:
        start: lowest value, float32 ``[D]``.
        step: between two levels, float32 ``[D]``, above 0.
    """

    start: np.ndarray
    step: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Int8Scale":
        """Return the scale from the lowest to the highest of the features ``[N, D]`` in each dimension."""
        start, stop = features.min(axis=0), features.max(axis=0)
        step = (stop - start) / np.float32(LEVELS - 1)
        return cls(start, np.where(step > 0, step, np.float32(1)))

    def encode(self, features: np.ndarray) -> np.ndarray:
        """Return the nearest level of each number, int8 ``[N, D]``; what is outside of the range becomes its end."""
        levels = np.rint((features - self.start) / self.step).clip(0, LEVELS - 1)
        return (levels - LEVELS // 2).astype(np.int8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return float32 ``[N, D]`` of unit length: start + step * (code + 128), divided by its length."""
        return _unit(self.start + self.step * (codes.astype(np.float32) + np.float32(LEVELS // 2)))

    def to_text(self) -> str:
        """Return JSON for a file's metadata."""
        return json.dumps({"start": self.start.tolist(), "step": self.step.tolist()})

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], dimensions: int) -> "Int8Scale":
        """Read what :meth:`to_text` wrote.

        Raises:
            ValueError: it is missing or damaged.
        """
        try:
            values = json.loads(metadata[INT8_SCALE])
            start, step = (np.array(values[name], dtype=np.float32) for name in ("start", "step"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no {INT8_SCALE} beside its int8 numbers, or a damaged one") from error
        whole = start.shape == step.shape == (dimensions,) and np.isfinite(start).all() and np.isfinite(step).all()
        if not whole or not (step > 0).all():
            raise ValueError(f"its {INT8_SCALE} is not {dimensions} finite numbers, or a step is not above 0")
        return cls(start, step)


def truncated(features: np.ndarray, dimensions: int) -> np.ndarray:
    """Return the first dimensions of features ``[N, D]``, of unit length again; all of them as they are."""
    return features if dimensions == features.shape[1] else _unit(features[:, :dimensions])


def _unit(features: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(lengths, np.finfo(np.float32).tiny)


def check_smaller(dimensions: int | None, embed_dim: int, dtype: DType, rows: int) -> None:
    """Raise :class:`InputError` if features cannot be stored so.

    Args:
        dimensions: to keep; None: all.
        embed_dim: the model's.
        dtype: of the stored numbers.
        rows: to be stored.
    """
    if dimensions is not None and not 1 <= dimensions < embed_dim:
        raise InputError(
            f"--dimensions {dimensions}: must be from 1 to {embed_dim - 1}; the model's features have {embed_dim}"
        )
    require(
        dtype == "float32" or rows > 1,
        "--dtype int8: the range of each dimension is that of the rows, and there is only one; leave it out",
    )
