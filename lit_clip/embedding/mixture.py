"""The weight of texts in vectors of images and texts, learned from queries and what is relevant for them."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clip.embedding.index import combined

WEIGHTS = np.arange(101) / 100  # 0 is the images alone, 1 the texts alone
MOST_THINGS, MOST_QUERIES = 10_000, 2_000  # judged, as many others, and queries; of more, evenly spread ones
CHUNK = 256  # queries that are compared at once


class LearnedWeight(NamedTuple):
    """A weight, from the number of ``queries``, and the mean cross-entropies of all of :data:`WEIGHTS`."""

    text_weight: float
    queries: int
    losses: list[float]

    def __str__(self) -> str:
        images, texts = self.losses[0], self.losses[-1]
        best = f"cross-entropy {min(self.losses[1:-1]):.3f}; images alone {images:.3f}, texts alone {texts:.3f}"
        return f"--text_weight {self.text_weight:g} learned from {self.queries:,} queries ({best})"


def learn_text_weight(
    image_ND: Tensor, text_ND: Tensor, query_QD: Tensor, judged: Iterable[tuple[int, int, float]], scale: float
) -> LearnedWeight:
    """Return the weight by which queries find relevant things best: the least cross-entropy of a softmax over things.

    Args:
        image_ND: means of the images' unit features of each thing.
        text_ND: those of its texts.
        query_QD: unit features of queries.
        judged: query, thing and grade, above 0; a query's target is its things in proportion to their grades.
        scale: inverse temperature.
    """
    query_R, thing_R, grade_R = map(np.array, zip(*judged, strict=True))
    asked = np.unique(query_R)
    step = -(-len(asked) // MOST_QUERIES)
    while len(np.unique(thing_R[np.isin(query_R, asked[::step])])) > MOST_THINGS and step < len(asked):
        step *= 2
    asked = asked[::step]
    query_R, thing_R, grade_R = (column[np.isin(query_R, asked)] for column in (query_R, thing_R, grade_R))
    things = np.union1d(thing_R, np.arange(0, len(image_ND), -(-len(image_ND) // MOST_THINGS)))
    target_QN = torch.zeros(len(asked), len(things), dtype=torch.float64)
    target_QN[np.searchsorted(asked, query_R), np.searchsorted(things, thing_R)] = torch.from_numpy(grade_R).double()
    target_QN /= target_QN.sum(dim=1, keepdim=True)
    image_ND, text_ND, query_QD = image_ND[things].double(), text_ND[things].double(), query_QD[asked].double()
    losses = []
    for weight in WEIGHTS.tolist():
        mixed_ND = combined(image_ND, text_ND, weight)
        chunks = zip(query_QD.split(CHUNK), target_QN.split(CHUNK), strict=True)
        parts = [F.cross_entropy(scale * query @ mixed_ND.T, target, reduction="sum") for query, target in chunks]
        losses.append(float(sum(parts)) / len(asked))
    return LearnedWeight(float(WEIGHTS[1 + np.argmin(losses[1:-1])]), len(asked), losses)
