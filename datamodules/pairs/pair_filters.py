"""Filters of pairs: which are kept, by their score, caption and image size.

They are those of DataComp's baselines (Gadre et al. 2023; mlfoundations/datacomp, ``baselines/apply_filter.py``) that
depend on the pair alone, under the names that its code gives the quantities.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lit_clip.errors import require


class Cut(NamedTuple):
    """The best pairs: all above a score, and the first few with exactly this score."""

    score: float
    ties: int


def cut_of(scores: np.ndarray, count: int) -> Cut:
    """Return the cut that keeps ``count`` (at least 1) of the scores, float32 ``[N]``."""
    score = np.partition(scores, len(scores) - count)[len(scores) - count]
    return Cut(float(score), count - int(np.count_nonzero(scores > score)))


@dataclass(frozen=True)
class PairFilters:
    """Filters; a pair is kept if it passes all that are set."""

    # the share of all pairs that have a score, best first; rounded down to whole pairs. Of pairs with the same score
    # the earlier ones are kept
    fraction: float | None = None
    threshold: float | None = None  # least score
    min_caption_words: int | None = None  # separated by white space
    min_image_dim: int | None = None  # pixels of the shorter side

    def __post_init__(self) -> None:
        share = self.fraction
        percent = f"; {share:g} % is {share / 100:g}" if share is not None and 1 < share <= 100 else ""
        require(share is None or 0 < share <= 1, f"--fraction {share}: must be above 0 and at most 1{percent}")
        require(self.fraction is None or self.threshold is None, "--threshold: give it or --fraction, not both")
        for name in ("min_caption_words", "min_image_dim"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} {value}: must be at least 1")

    def cut(self, scores: np.ndarray) -> Cut | None:
        """Return the cut of ``fraction`` for the scores of all pairs that have one, float32 ``[N]``."""
        if self.fraction is None:
            return None
        count = int(self.fraction * len(scores) + 1e-6)  # 0.29 * 100 is a little less than 29
        require(count >= 1, f"--fraction {self.fraction}: keeps none of {len(scores)} pairs; raise it")
        return cut_of(scores, count)

    def removed(self, pairs: pa.Table, cut: Cut | None) -> dict[str, np.ndarray]:
        """Return by filter which pairs, all with a score and with the columns ``SCORES``, it removes, bool ``[N]``."""
        scores = pairs["score"].to_numpy()
        found: dict[str, np.ndarray] = {}
        if cut is not None:
            tie = scores == np.float32(cut.score)
            found["clip_score"] = (scores < np.float32(cut.score)) | (tie & (np.cumsum(tie) > cut.ties))
        if self.threshold is not None:
            found["clip_score"] = scores.astype(np.float64) < self.threshold
        if self.min_caption_words is not None:
            words = [len(caption.split()) for caption in pairs["caption"].to_pylist()]
            found["caption_num_words"] = np.array(words, dtype=np.int64) < self.min_caption_words
        if self.min_image_dim is not None:
            width, height = (pairs[name].to_numpy() for name in ("width", "height"))
            found["min_image_dim"] = np.minimum(width, height) < self.min_image_dim
        return found
