"""Retrieval and whole-set loss, pure functions over features; chunks keep memory linear in the number of pairs."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from lit_clip.losses import contrastive_loss, sigmoid_loss

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

    A tie counts against the model, and so does NaN: features that collapse to a point retrieve nothing. A query without
    a right candidate is behind all of them, however few there are.
    """
    score_QC = query_QD @ candidate_CD.T
    best_Q1 = score_QC.masked_fill(~positive_QC, -torch.inf).amax(dim=1, keepdim=True)
    ranks_Q = (~(score_QC < best_Q1) & ~positive_QC).sum(dim=1)
    return ranks_Q.masked_fill(~positive_QC.any(dim=1), torch.iinfo(torch.int64).max)


def retrieval_hits(
    query_QD: Tensor,
    query_ids_Q2: Tensor,
    candidate_CD: Tensor,
    candidate_ids_C2: Tensor,
    ks: Sequence[int],
    distinct: int | None = None,
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
        distinct: the column of ``candidate_ids_C2`` whose equal numbers are one candidate, right if any of its rows is:
            0 for images, 1 for captions; None: each row is a candidate.
    """
    rows = torch.arange(len(candidate_CD), device=candidate_CD.device)
    group_C = rows if distinct is None else candidate_ids_C2[:, distinct].unique(return_inverse=True)[1]
    groups = int(group_C.max()) + 1 if len(rows) else 0
    first_G = rows.new_full((groups,), len(rows)).scatter_reduce_(0, group_C, rows, "amin")
    hits = torch.zeros(len(ks), dtype=torch.float64)
    for features, ids in zip(query_QD.split(CHUNK), query_ids_Q2.split(CHUNK), strict=True):
        positive_CQ = (candidate_ids_C2[:, None] == ids[None]).any(dim=-1).int()
        positive_GQ = positive_CQ.new_zeros(groups, len(ids)).index_add_(0, group_C, positive_CQ) > 0
        ranks = positive_ranks(features, candidate_CD[first_G], positive_GQ.T)
        hits += torch.stack([(ranks < k).sum() for k in ks]).cpu().double()
    return hits


def guessing_recalls(ids_N2: Tensor, ks: Sequence[int]) -> tuple[list[float], list[float]]:
    """Recall image -> text and text -> image of the best answer that looks at nothing: always the same k candidates.

    With N distinct pairs that is k / N; where captions repeat, naming the common ones gets further.

    Args:
        ids_N2: int64, the number of each pair's image and of its caption.
        ks: the k of recall@k.
    """
    ids = ids_N2.cpu()
    image_of, text_of = ids.unique(dim=0).T  # each distinct pair once
    images_of_text, rows_of_text = text_of.bincount(), ids[:, 1].bincount()
    rows_of_image = torch.zeros(int(image_of.max()) + 1, dtype=torch.long)
    rows_of_image.index_add_(0, image_of, rows_of_text[text_of])  # how many captions an image is right for
    # A second image with the same caption gains nothing: of each caption count the best image.
    best_image = torch.zeros_like(rows_of_text).scatter_reduce_(0, text_of, rows_of_image[image_of], "amax")
    images, N = len(image_of.unique()), len(ids)

    def best(gains: Tensor, queries: int) -> list[float]:
        return [min(1.0, float(gains.sort(descending=True).values[:k].sum()) / queries) for k in ks]

    return best(images_of_text, images), best(best_image, N)


def whole_set_loss(image_ND: Tensor, text_ND: Tensor, scale: Tensor, rows: range, bias: Tensor | None = None) -> Tensor:
    """The loss that is trained with, of the pairs in ``rows``, each against all N pairs, summed: a float64 scalar.

    Summed over all rows and divided by N it is the loss of one batch that holds the whole set. With a ``bias`` it is
    the sigmoid loss, without the contrastive one.
    """
    total = torch.zeros((), dtype=torch.float64)
    for start in range(rows.start, rows.stop, CHUNK):
        part = slice(start, min(start + CHUNK, rows.stop))
        if bias is None:
            loss = contrastive_loss(image_ND[part], text_ND[part], image_ND, text_ND, scale, first_row=start)
        else:
            loss = sigmoid_loss(image_ND[part], text_ND, scale, bias, first_row=start)
        total += loss.cpu().double() * (part.stop - part.start)
    return total
