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

    A tie counts against the model, and so does NaN: features that collapse to a point retrieve nothing. A query without
    a right candidate is behind all of them, however few there are.
    """
    score_QC = query_QD @ candidate_CD.T
    best_Q1 = score_QC.masked_fill(~positive_QC, -torch.inf).amax(dim=1, keepdim=True)
    ranks_Q = (~(score_QC < best_Q1) & ~positive_QC).sum(dim=1)
    return ranks_Q.masked_fill(~positive_QC.any(dim=1), torch.iinfo(torch.int64).max)


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


def guessing_recalls(ids_N2: Tensor, ks: Sequence[int]) -> tuple[list[float], list[float]]:
    """Recall image -> text and text -> image of the best answer that looks at nothing: always the same k candidates.

    With N distinct pairs that is k / N; where captions repeat, naming the common ones gets further.

    Args:
        ids_N2: int64, the number of each pair's image and of its caption.
        ks: the k of recall@k.
    """
    ids = ids_N2.cpu()
    image_ids, text_ids = ids.T
    pairs, pair_ids, rows_of_pair = ids.unique(dim=0, return_inverse=True, return_counts=True)
    images_of_text = pairs[:, 1].bincount()  # how many images a caption is right for
    rows_of_text, rows_of_image = text_ids.bincount(), image_ids.bincount()
    first = first_occurrences(image_ids)
    # One image answers for its own captions and for those that say the same; of each caption one image is enough.
    texts_of_image = torch.zeros_like(rows_of_text)
    gain = (rows_of_image[image_ids] + rows_of_text[text_ids] - rows_of_pair[pair_ids])[first]
    texts_of_image.scatter_reduce_(0, text_ids[first], gain, reduce="amax")

    def best(gains: Tensor, queries: int, k: int) -> float:
        return min(1.0, float(gains.sort(descending=True).values[:k].sum()) / queries)

    images, N = int(first.sum()), len(ids)
    return [best(images_of_text, images, k) for k in ks], [best(texts_of_image, N, k) for k in ks]


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
