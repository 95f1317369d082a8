"""Retrieval metrics and loss of a whole set: pure functions of features, with memory linear in the number of pairs.

Shapes: I distinct images, T distinct captions, E distinct pairs of them, D embedding dimension.

Ranks may share the captions: each has all images, some captions and all pairs of these captions. Values that belong to
an image are then reduced over ranks by two functions: ``maximum`` and ``total``, both element-wise. The default is
rank-local: one rank has everything.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clip.losses.contrastive import at_least_float32

CAPTIONS, IMAGES = 1024, 4096  # a tile of similarities, 16 MiB in float32
FEWEST = 32  # rows of either side of a product; kernels for fewer sum in other orders, by size and place
Reduce = Callable[[Tensor], Tensor]  # over ranks, element-wise


class PairIndices(NamedTuple):
    """The distinct image-caption pairs of a set, each column int64 ``[E]``."""

    image: Tensor  # rows of the images' features
    text: Tensor  # rows of the captions' features, ascending
    rows: Tensor  # number of rows of the set with this pair
    earlier: Tensor  # number of rows of the set with this caption before the first row with this pair

    def to(self, device: torch.device) -> "PairIndices":
        """Copy the indices to a device."""
        return PairIndices(*(column.to(device) for column in self))


class Ranks(NamedTuple):
    """Number of wrong candidates that rank before the best right one, int64; 0 is best.

    The field's rule (CLIP_benchmark's): the candidates for an image are the captions of all rows, of which its own are
    right, and a row's caption is right for its own image alone. Merged: the candidates are the distinct captions, and a
    caption is right for all its images.

    A tie counts against the model; only copies of a caption, which no model can tell apart, rank in the order of their
    rows, as in CLIP_benchmark's recall@1. If all right candidates score NaN, or there is none, it is the number of
    candidates.
    """

    image: Tensor  # [I], rank of each image's best caption
    pair: Tensor  # [E], rank of the image of each of this process's pairs among all images
    merged_image: Tensor  # [I], rank of each image's best caption among the distinct ones
    merged_text: Tensor  # [T], rank of the best image of each of this process's captions among all images


def rank_local(local: Tensor) -> Tensor:
    """Return the tensor itself: the reduction over a single rank."""
    return local


def _spans(size: int, longest: int) -> list[slice]:
    """Divide ``size`` rows into spans of at most ``longest`` rows; their lengths differ by at most one."""
    count = -(-size // longest)
    return [slice(size * i // count, size * (i + 1) // count) for i in range(count)]


def similarities(text_TD: Tensor, image_ID: Tensor) -> Tensor:
    """Return ``[T, I]``, float32 or wider; equal float32 features score equal, in any set and on any rank."""
    texts, images = (
        F.pad(rows, (0, 0, 0, FEWEST - len(rows))) if len(rows) < FEWEST else rows for rows in (text_TD, image_ID)
    )
    return _product(at_least_float32(texts), at_least_float32(images).T)[: len(text_TD), : len(image_ID)]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices in their own precision: autocast to bfloat16 would round a count of 1,499 to 1,504."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _tiles(image_ID: Tensor, text_TD: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield all similarities: rows of captions, rows of images, and ``[captions, images]`` in float32 or wider."""
    for texts in _spans(len(text_TD), CAPTIONS):
        for images in _spans(len(image_ID), IMAGES):
            yield texts, images, similarities(text_TD[texts], image_ID[images])


@torch.no_grad()
def pair_scores(image_ID: Tensor, text_TD: Tensor, pairs: PairIndices) -> Tensor:
    """Return the similarity of each pair, ``[E]``, bit for bit equal to its entry among all similarities.

    Only tiles with a pair are computed: few, if the rows of captions and their images are close.
    """
    score_E = torch.empty(len(pairs.text), device=text_TD.device, dtype=similarities(text_TD[:0], image_ID[:0]).dtype)
    image_spans = _spans(len(image_ID), IMAGES)
    starts = torch.tensor([span.start for span in image_spans], device=text_TD.device)
    for texts in _spans(len(text_TD), CAPTIONS):
        first, last = torch.searchsorted(pairs.text, pairs.text.new_tensor([texts.start, texts.stop])).tolist()
        image_e, text_e = pairs.image[first:last], pairs.text[first:last]
        span_e = torch.searchsorted(starts, image_e, right=True) - 1
        for number in span_e.unique().tolist():
            images = image_spans[number]
            here = (span_e == number).nonzero()[:, 0]
            tile = similarities(text_TD[texts], image_ID[images])
            score_E[first + here] = tile[text_e[here] - texts.start, image_e[here] - images.start]
    return score_E


def _best(score_E: Tensor, index_E: Tensor, size: int) -> Tensor:
    """Return each query's highest score of a right candidate: infinity for NaN, -infinity without one."""
    best = score_E.new_full((size,), -torch.inf)
    return best.scatter_reduce_(0, index_E, score_E.nan_to_num(nan=torch.inf, neginf=-torch.inf), "amax")


def _below(scores: Tensor, thresholds: Tensor, weights: Tensor) -> Tensor:
    """Count the entries of each column below its threshold, weighted: ``[b, columns]`` for weights ``[b, rows]``.

    A product of zeros and ones in float32 is ten times as fast as a sum of bools, and exact below 2^24 rows.
    """
    return _product(weights.to(scores.dtype), torch.lt(scores, thresholds, out=torch.empty_like(scores))).long()


@torch.no_grad()
def retrieval_ranks(
    image_ID: Tensor,
    text_TD: Tensor,
    pairs: PairIndices,
    score_E: Tensor,
    maximum: Reduce = rank_local,
    total: Reduce = rank_local,
) -> Ranks:
    """Rank the captions for each image and the images for each caption, by both rules of :class:`Ranks`.

    Features have unit length; the captions and the pairs, with their :func:`pair_scores`, are this rank's. ``maximum``
    and ``total`` reduce element-wise over ranks.
    """
    images = len(image_ID)
    best_I, best_T = maximum(_best(score_E, pairs.image, images)), _best(score_E, pairs.text, len(text_TD))
    rows_T = pairs.rows.new_zeros(len(text_TD)).index_add_(0, pairs.text, pairs.rows)
    weights_2T = torch.stack([rows_T, torch.ones_like(rows_T)])  # all rows, and the distinct captions
    several = (pairs.text.bincount(minlength=len(text_TD)) > 1)[pairs.text].nonzero()[:, 0]  # pairs that share captions
    below_2I, below_T, below_S = rows_T.new_zeros(2, images), torch.zeros_like(rows_T), torch.zeros_like(several)
    for texts, columns, score in _tiles(image_ID, text_TD):
        below_2I[:, columns] += _below(score, best_I[columns], weights_2T[:, texts])
        ones = torch.ones_like(score[:1])
        below_T[texts] += _below(score.T, best_T[texts], ones)[0]
        first, last = torch.searchsorted(pairs.text[several], several.new_tensor([texts.start, texts.stop])).tolist()
        for span in _spans(last - first, CAPTIONS):
            here = slice(first + span.start, first + span.stop)
            chosen = several[here]
            below_S[here] += _below(score[pairs.text[chosen] - texts.start].T, score_E[chosen], ones)[0]
    below_E = below_T[pairs.text].index_copy_(0, several, below_S)
    pair_E = (images - 1 - below_E).masked_fill(score_E.isnan(), images)
    right_T = ~(score_E < best_T[pairs.text])
    merged_T = (images - below_T).index_add_(0, pairs.text, right_T.long(), alpha=-1)
    # Of the captions that do not score below an image's best one, its own are right, and later copies rank after it.
    best_E = ~(score_E < best_I[pairs.image])
    ahead_2I = weights_2T.sum(dim=1, keepdim=True) - below_2I
    ahead_2I.index_add_(1, pairs.image, torch.stack([pairs.rows, torch.ones_like(pairs.rows)]) * best_E, alpha=-1)
    later_E = (rows_T[pairs.text] - pairs.rows - pairs.earlier) * best_E
    later_I = maximum(rows_T.new_zeros(images).scatter_reduce_(0, pairs.image, later_E, "amax"))
    candidates_2, ahead_2I = total(weights_2T.sum(dim=1)), total(ahead_2I)
    image_I, merged_I = torch.where(
        best_I.isinf(), candidates_2[:, None], ahead_2I - torch.stack([later_I, 0 * later_I])
    )
    return Ranks(image_I, pair_E, merged_I, merged_T.masked_fill(best_T.isinf(), images))


@torch.no_grad()
def judged_ranks(query_QD: Tensor, document_ND: Tensor, query_J: Tensor, document_J: Tensor) -> Tensor:
    """Return each judged document's rank among all for its query, 1 is best: float64 ``[J]`` on the CPU.

    Of documents that score alike the one of the lower row ranks first. A score that is NaN has rank infinity. Features
    have unit length; ``query_J`` (ascending) and ``document_J`` are rows of them, int64.
    """
    judged = PairIndices(document_J, query_J, document_J, document_J)
    score_J, ahead_J = pair_scores(document_ND, query_QD, judged), torch.zeros_like(document_J)
    for queries, documents, score in _tiles(document_ND, query_QD):
        row_N = torch.arange(documents.start, documents.stop, device=score.device)
        first, last = torch.searchsorted(query_J, query_J.new_tensor([queries.start, queries.stop])).tolist()
        for span in _spans(last - first, CAPTIONS):
            here = slice(first + span.start, first + span.stop)
            score_jN, own_j1 = score[query_J[here] - queries.start], score_J[here, None]
            earlier_jN = row_N < document_J[here, None]
            ahead_J[here] += ((score_jN > own_j1) | (score_jN == own_j1) & earlier_jN).sum(dim=1)
    return (1 + ahead_J).cpu().double().masked_fill(score_J.isnan().cpu(), torch.inf)


def recalls(ranks: Tensor, rows: Tensor, candidates: int, ks: Sequence[int]) -> list[float]:
    """Return recall@k for each k: the fraction of queries with a right candidate among the first k.

    ``ranks`` is a field of :class:`Ranks`, ``rows`` how often each query occurs; both int64 ``[Q]``.
    """
    return [int(rows[ranks < min(k, candidates)].sum()) / int(rows.sum()) for k in ks]


def median_rank(ranks: Tensor, rows: Tensor) -> int:
    """Return the median rank of the first right candidate, 1 is best; arguments as in :func:`recalls`."""
    order = ranks.argsort()
    queries = rows[order].cumsum(0)
    return 1 + int(ranks[order][2 * queries >= queries[-1]][0])


def baseline_recalls(pairs: PairIndices, ks: Sequence[int]) -> tuple[list[float], ...]:
    """Return the recall@k of always answering with the same k candidates, for each field of :class:`Ranks`.

    With N distinct pairs that is k / N; answering with the most frequent image, or with merged captions with the most
    frequent ones, reaches more. The pairs are those of all ranks.
    """
    image_E, text_E, rows_E, _ = pairs.to(torch.device("cpu"))
    images, rows = int(image_E.max()) + 1, int(rows_E.sum())
    images_of_text = text_E.bincount()
    rows_of_image = rows_E.new_zeros(images).index_add_(0, image_E, rows_E)
    rows_of_text = torch.zeros_like(images_of_text).index_add_(0, text_E, rows_E)
    merged_rows = rows_E.new_zeros(images)
    merged_rows.index_add_(0, image_E, rows_of_text[text_E])  # number of rows that each image is right for
    # A second image with the same caption gains nothing, so only the best image of each caption counts.
    best_image = torch.zeros_like(rows_of_text).scatter_reduce_(0, text_E, merged_rows[image_E], "amax")

    def best(gains: Tensor, queries: int) -> list[float]:
        return [min(1.0, float(gains.sort(descending=True).values[:k].sum()) / queries) for k in ks]

    own = (best(torch.ones(images), images), best(rows_of_image, rows))
    return (*own, best(images_of_text, images), best(best_image, rows))


class _LogSumExp:
    """``log(sum(weight * exp(logit)))`` of many queries, accumulated over tiles of candidates.

    Sums are float64 (except on MPS, which has none), so that the loss does not depend on the tiles.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self.peak = like.new_full((size,), -torch.inf)
        self.sum = torch.zeros(size, device=like.device, dtype=like.dtype if like.is_mps else torch.float64)

    def add(self, queries: slice, logits: Tensor, weights: Tensor) -> None:
        """Add a tile: logits ``[queries, candidates]``, weights ``[candidates]``."""
        old = self.peak[queries]
        peak = torch.maximum(old, logits.amax(dim=1))
        added = _product((logits - peak[:, None]).exp_(), weights.to(logits.dtype))
        self.sum[queries] = self.sum[queries] * (old - peak).exp() + added
        self.peak[queries] = peak

    def value(self, maximum: Reduce = rank_local, total: Reduce = rank_local) -> Tensor:
        """Return ``[size]``, reduced over all ranks' candidates."""
        peak = maximum(self.peak)
        return peak + total(self.sum * (self.peak - peak).exp()).log()


@torch.no_grad()
def whole_set_loss(
    image_ID: Tensor,
    text_TD: Tensor,
    pairs: PairIndices,
    score_E: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    maximum: Reduce = rank_local,
    total: Reduce = rank_local,
) -> float:
    """Return the training loss of one batch of the set's N rows; only a row's own caption is right for it.

    Rows with the same image and caption have the same similarities, which are computed once and weighted. ``scale`` is
    ``exp(logit_scale)``, ``bias`` the sigmoid loss's ``logit_bias``; other arguments as in :func:`retrieval_ranks`.
    """
    rows_I = total(pairs.rows.new_zeros(len(image_ID)).index_add_(0, pairs.image, pairs.rows))
    rows_T = pairs.rows.new_zeros(len(text_TD)).index_add_(0, pairs.text, pairs.rows)
    scale = scale.to(score_E.dtype)
    if bias is None:
        image, text = _LogSumExp(len(image_ID), score_E), _LogSumExp(len(text_TD), score_E)
        for texts, images, score in _tiles(image_ID, text_TD):
            logits = scale * score
            text.add(texts, logits, rows_I[images])
            image.add(images, logits.T, rows_T[texts])
        text_loss = (rows_T * text.value()).sum() - 2 * (pairs.rows * (scale * score_E)).to(text.sum.dtype).sum()
        loss = (total(text_loss) + (rows_I * image.value(maximum, total)).sum()) / 2
    else:
        bias = bias.to(score_E.dtype)
        losses = torch.zeros_like(_LogSumExp(1, score_E).sum)[0]
        losses -= (pairs.rows * (scale * score_E + bias)).sum()
        for texts, images, score in _tiles(image_ID, text_TD):
            negative = -F.logsigmoid(-(scale * score + bias))  # loss of a negative; a positive's is less the logit
            losses += (rows_T[texts] * _product(negative, rows_I[images].to(negative.dtype)).to(losses.dtype)).sum()
        loss = total(losses)
    return float(loss / rows_I.sum())
