"""Retrieval with graded relevance; queries and documents have a text, an image or both (mteb, BEIR).

Shapes: N queries or documents, R relevant pairs of them, D embedding dimension. Metrics are those of TREC's program
(``trec_eval``) over all documents: of equal scores the document whose id sorts last ranks first.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_clip.embedding.index import combined
from lit_clip.errors import require
from lit_clip.evaluation.data import Items, JudgedDocuments
from lit_clip.evaluation.intervals import UnitScores
from lit_clip.evaluation.prompts import Prompts
from lit_clip.retrieval.metrics import judged_ranks
from lit_clip.tools.hardware import best_device

RECALLS = (1, 5, 10, 100)
GAINS = 10  # first documents that nDCG counts


class EncodedDocuments(NamedTuple):
    """A set, unit features ``[T, D]`` of its distinct texts, and each text's row there."""

    images: JudgedDocuments
    features: Tensor
    rows: dict[str, int]


def encode_documents(images: JudgedDocuments, template: str, encode: Callable[[Prompts], Tensor]) -> EncodedDocuments:
    """Encode each distinct text of queries and documents once; ``encode`` returns the classifier of prompts."""
    texts = dict.fromkeys(filter(None, [*images.queries.texts, *images.documents.texts]))
    prompts = Prompts.of(template.replace("{}", text) for text in texts)
    features = encode(prompts).T.contiguous() if texts else torch.empty(0, 1)
    return EncodedDocuments(images, features, {text: row for row, text in enumerate(texts)})


def document_retrieval(
    encoded: EncodedDocuments, image_ID: Tensor, rows: list[int], text_weight: float
) -> dict[str, UnitScores]:
    """Search the documents for each query; return the queries' scores, in their order, by metric.

    ``image_ID`` are unit features of the images that could be read, ``rows`` their rows in the set.
    """
    images, place, device = encoded.images, {row: number for number, row in enumerate(rows)}, best_device()

    def features(items: Items, order: Sequence[int]) -> Tensor:
        """Return unit features, ``[N, D]``; NaN for an item with only an unreadable image."""
        image_N = torch.tensor([place.get(items.images[row], -1) for row in order])
        text_N = torch.tensor([encoded.rows.get(items.texts[row], -1) for row in order])
        features_ND = image_ID.new_full((len(order), image_ID.shape[1]), torch.nan)
        alone, both = (text_N >= 0) & (image_N < 0), (text_N >= 0) & (image_N >= 0)
        features_ND[image_N >= 0] = image_ID[image_N[image_N >= 0]]
        features_ND[alone] = encoded.features[text_N[alone]]
        features_ND[both] = combined(features_ND[both], encoded.features[text_N[both]], text_weight)
        return features_ND.to(device)

    keys, queries = images.documents.keys, len(images.queries.keys)
    order = sorted(range(len(keys)), key=lambda row: keys[row].encode(), reverse=True)
    relevant = sorted(judged for judged in images.relevance if judged[2] > 0)
    require(bool(relevant), "document_retrieval: no document is relevant; remove it from the set's tasks")
    query_R, document_R, grade_R = np.array(relevant).T.copy()
    pairs = (torch.from_numpy(column).to(device) for column in (query_R, np.argsort(order)[document_R]))
    rank_R = judged_ranks(features(images.queries, range(queries)), features(images.documents, order), *pairs).numpy()
    spans = map(slice, *(np.searchsorted(query_R, np.arange(queries), side) for side in ("left", "right")))
    scores = [query_scores(rank_R[span], grade_R[span]) for span in spans]
    return {name: UnitScores(np.array([each[name] for each in scores])) for name in scores[0]}


def query_scores(rank_R: np.ndarray, grade_R: np.ndarray) -> dict[str, float]:
    """Return a query's nDCG@10, average precision, reciprocal rank and recall@k from its relevant documents.

    ``rank_R`` are their ranks, 1 is best, infinity if not found; ``grade_R`` their grades. Without any, all is 0.
    """
    if not len(rank_R):
        rank_R, grade_R = np.array([np.inf]), np.ones(1)
    place_R, ascending_R = np.arange(1, len(rank_R) + 1), np.sort(rank_R)
    gain = (grade_R / np.log2(1 + rank_R))[rank_R <= GAINS].sum()
    return {
        f"ndcg@{GAINS}": gain / (np.sort(grade_R)[::-1] / np.log2(1 + place_R))[:GAINS].sum(),
        "map": (place_R / ascending_R).mean(),
        "mrr": 1 / ascending_R[0],
        **{f"recall@{k}": (rank_R <= k).mean() for k in RECALLS},
    }
