"""Retrieval and whole-set loss, pure functions over features; chunks keep memory linear in the number of pairs."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lit_clip.losses import contrastive_loss

CHUNK = 1024  # rows of similarities that exist at one time


def identities(values: Sequence[Hashable]) -> Tensor:
    """int64 ``[N]``: equal values get equal numbers."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values], dtype=torch.long)


def first_occurrences(ids: Tensor) -> Tensor:
    """Bool ``[N]``: whether an id appears for the first time."""
    seen: set[int] = set()
    return torch.tensor([not (i in seen or seen.add(i)) for i in ids.tolist()], dtype=torch.bool)


def positive_ranks(query_QD: Tensor, candidate_CD: Tensor, positive_QC: Tensor) -> Tensor:
    """How many wrong candidates score at least as high as the best right one: int64 ``[Q]``, 0 is best.

    A tie counts against the model, and so does NaN: features that collapse to a point retrieve nothing.
    """
    score_QC = query_QD @ candidate_CD.T
    best_Q1 = score_QC.masked_fill(~positive_QC, -torch.inf).amax(dim=1, keepdim=True)
    return (~(score_QC < best_Q1) & ~positive_QC).sum(dim=1)


def retrieval_hits(
    query_QD: Tensor, query_ids_Q2: Tensor, candidate_CD: Tensor, candidate_ids_C2: Tensor, ks: Sequence[int]
) -> Tensor:
    """For how many queries a right candidate is among the first k: float64 ``[len(ks)]``, to be summed over ranks.

    Right candidates are those of the query's image or of its caption: the same sentence twice is one answer, not a
    mistake.

    Args:
        query_QD: unit features.
        query_ids_Q2: int64, the number of each query's image and of its caption (:func:`identities`).
        candidate_CD: unit features of the other modality.
        candidate_ids_C2: likewise.
        ks: the k of recall@k.
    """
    hits = torch.zeros(len(ks), dtype=torch.float64)
    for features, ids in zip(query_QD.split(CHUNK), query_ids_Q2.split(CHUNK), strict=True):
        positive_QC = (ids[:, None] == candidate_ids_C2[None]).any(dim=-1)
        ranks = positive_ranks(features, candidate_CD, positive_QC)
        hits += torch.stack([(ranks < k).sum() for k in ks]).double().cpu()
    return hits


def whole_set_loss(image_ND: Tensor, text_ND: Tensor, scale: Tensor, rows: range) -> Tensor:
    """The contrastive loss of the pairs in ``rows``, each against all N pairs, summed: a float64 scalar.

    Summed over all rows and divided by N it is the loss of one batch that holds the whole set.
    """
    total = torch.zeros((), dtype=torch.float64)
    for start in range(rows.start, rows.stop, CHUNK):
        part = slice(start, min(start + CHUNK, rows.stop))
        loss = contrastive_loss(image_ND[part], text_ND[part], image_ND, text_ND, scale, first_row=start)
        total += loss.double().cpu() * (part.stop - part.start)
    return total
