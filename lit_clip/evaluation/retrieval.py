"""The evaluation of a set of pairs that lies in parts on the ranks: its loss and retrieval in both directions."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clip import distributed
from lit_clip.evaluation.retrieval_metrics import (
    Pairs,
    baseline_recalls,
    median_rank,
    pair_scores,
    recalls,
    retrieval_ranks,
    whole_set_loss,
)
from lit_clip.tools.hashing import hash64

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
BLOCK = 2**25  # bytes; memory of this size goes back to the system when it is freed


def _hashes(values: Iterable[str | bytes]) -> np.ndarray:
    """int64 ``[N]``, see :func:`lit_clip.tools.hashing.hash64`."""
    return np.frombuffer(b"".join(map(hash64, values)), dtype="<i8")


def _numbered(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[N]`` -> which distinct value each is ``[N]``, in order of appearance, and where each appears first ``[U]``."""
    _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
    order = first.argsort()
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place[number], first[order]


class _Distinct:
    """The features ``[n, D]`` of each distinct image (or caption) that this rank has seen, in order of appearance.

    They are kept in blocks: joining those never holds everything twice.
    """

    def __init__(self) -> None:
        self.hashes: list[np.ndarray] = []  # of all that came, whether new or not
        self._seen: set[int] = set()
        self._blocks: list[Tensor] = []
        self._size = 0

    def add(self, hashes: np.ndarray, features: Tensor) -> None:
        self.hashes.append(hashes)
        new = [i for i, value in enumerate(hashes.tolist()) if not (value in self._seen or self._seen.add(value))]
        rest = features if len(new) == len(features) else features[new]
        while len(rest):
            rows = max(1, BLOCK // (rest[0].numel() * rest.element_size()))
            used = self._size % rows
            if not used:
                self._blocks.append(rest.new_empty(rows, rest.shape[1]))
            taken = rest[: rows - used]
            self._blocks[-1][used : used + len(taken)] = taken
            self._size += len(taken)
            rest = rest[len(taken) :]

    def take(self, empty: Tensor) -> Tensor:
        """All rows, which are then forgotten; ``empty`` is ``[0, D]``."""
        if not self._blocks:
            return empty
        joined, start = self._blocks[0].new_empty(self._size, self._blocks[0].shape[1]), 0
        self._blocks.reverse()
        while self._blocks:
            block = self._blocks.pop()[: self._size - start]
            joined[start : start + len(block)] = block
            start += len(block)
        return joined


class _Owners(NamedTuple):
    """Who gives which of the distinct images (or captions): the rank where each appears first.

    Attributes:
        numbers: which distinct one each row of the set is; those of a rank have consecutive numbers.
        counts: how many each rank gives.
        given: which of the ones that this rank has it gives, ascending.
    """

    numbers: np.ndarray
    counts: list[int]
    given: np.ndarray


def _owners(hash_N: np.ndarray, rank_N: np.ndarray, rank: int, world: int) -> _Owners:
    number_N, first_U = _numbered(hash_N)
    owner_U = rank_N[first_U]
    order = owner_U.argsort(kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    mine = rank_N == rank
    had = np.flatnonzero(mine)[_numbered(hash_N[mine])[1]]  # rows of the set that gave this rank its own features
    given = np.flatnonzero(np.isin(had, first_U[owner_U == rank]))
    return _Owners(place[number_N], np.bincount(owner_U, minlength=world).tolist(), given)


class Joined(NamedTuple):
    """All ranks' pairs, as far as a rank needs them to search.

    Attributes:
        image: features ``[I, D]`` of all images.
        text: features ``[T, D]`` of the captions that this rank was the first to see.
        mine: the pairs of those captions, on the same device.
        everyones: the pairs of all ranks' captions, on the CPU.
    """

    image: Tensor
    text: Tensor
    mine: Pairs
    everyones: Pairs


class Evaluation(NamedTuple):
    """What was found out.

    Attributes:
        metrics: by name, without the prefix of the stage.
        baselines: the baseline, of those metrics that can be predicted.
    """

    metrics: dict[str, float]
    baselines: dict[str, float]


class RetrievalSet:
    """Pairs as they come, batch by batch, on every rank; then the numbers of all ranks' pairs together.

    The candidates are all pairs of the set, so the numbers depend on neither batch size nor number of ranks; a rank may
    have none. Rows with one key are one image, rows with the same tokens one caption, wherever they are. Each rank has
    the features of all images and of the captions that it was the first to see.
    """

    def __init__(self) -> None:
        self._images, self._texts = _Distinct(), _Distinct()

    def add(self, image_BD: Tensor, text_BD: Tensor, keys: list[str], token_hashes: np.ndarray) -> None:
        """Unit features of some pairs, the images' keys and :func:`token_hashes` of the captions."""
        self._images.add(_hashes(keys), image_BD)
        self._texts.add(token_hashes, text_BD)

    def join(self, empty: Tensor) -> Joined | None:
        """Bring all ranks' pairs together, None if there are none; this set is empty afterwards.

        Args:
            empty: ``[0, D]``, on the device where features of a rank without pairs would be.
        """
        rank, world = distributed.rank_and_world()
        image_hash_N, text_hash_N, rank_N = self._rows(empty.device)
        if not len(rank_N):
            return None
        images = _owners(image_hash_N, rank_N, rank, world)
        texts = _owners(text_hash_N, rank_N, rank, world)
        pairs = _distinct_pairs(images, texts)
        image_ID = distributed.gather_large(_given(self._images, images, empty), images.counts)
        text_TD = _given(self._texts, texts, empty)
        first = sum(texts.counts[:rank])
        mine = (first <= pairs.text) & (pairs.text < first + len(text_TD))
        my_pairs = Pairs(pairs.image[mine], pairs.text[mine] - first, pairs.rows[mine])
        self._images, self._texts = _Distinct(), _Distinct()
        return Joined(image_ID, text_TD, my_pairs.to(empty.device), pairs)

    def evaluate(self, empty: Tensor, scale: Tensor, bias: Tensor | None) -> Evaluation:
        """Loss and retrieval; all ranks must ask at the same point. The set is empty afterwards.

        Args:
            empty: as in :meth:`join`.
            scale: inverse temperature, ``exp(logit_scale)``.
            bias: ``logit_bias`` of the sigmoid loss.
        """
        joined = self.join(empty)
        if joined is None:
            return Evaluation({}, {})
        image_ID, text_TD, mine, everyones = joined

        def total(local: Tensor) -> Tensor:
            return distributed.sum_over_ranks(local, empty.device)

        joins = (distributed.highest_over_ranks, total)
        score_E = pair_scores(image_ID, text_TD, mine)
        ranks = retrieval_ranks(image_ID, text_TD, mine, score_E, *joins)
        loss = whole_set_loss(image_ID, text_TD, mine, score_E, scale, bias, *joins)
        metrics = retrieval_metrics(ranks.image.cpu(), distributed.gather_uneven(ranks.text).cpu(), everyones)
        recalls_of_directions = zip(DIRECTIONS, baseline_recalls(everyones, RECALL_AT), strict=True)
        baselines = {
            f"{direction}_recall@{k}": fraction
            for direction, fractions in recalls_of_directions
            for k, fraction in zip(RECALL_AT, fractions, strict=True)
        }
        return Evaluation({"loss": loss, **metrics}, baselines)

    def _rows(self, device: torch.device) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all ranks' rows, in the order in which they came, the hashes of image and caption, and the rank."""
        rank = distributed.rank_and_world()[0]
        nothing = np.empty(0, dtype=np.int64)
        image, text = (np.concatenate([nothing, *part.hashes]) for part in (self._images, self._texts))
        local = np.stack([image, text, np.full(len(image), rank), np.arange(len(image))], axis=1)  # [n, 4]
        rows = distributed.gather_uneven(torch.from_numpy(local).to(device)).cpu().numpy()
        rows = rows[np.lexsort((rows[:, 2], rows[:, 3]))]
        return rows[:, 0], rows[:, 1], rows[:, 2]


def token_hashes(tokens: Tensor, context_length: int, pad_id: int) -> np.ndarray:
    """int64 ``[B, L]`` -> what identifies each caption, however far it is padded: int64 ``[B]``."""
    padded = F.pad(tokens, (0, context_length - tokens.shape[1]), value=pad_id).cpu().numpy()
    return _hashes(row.tobytes() for row in padded)


def _given(seen: _Distinct, owners: _Owners, empty: Tensor) -> Tensor:
    features = seen.take(empty)
    if len(owners.given) == len(features):
        return features
    return features[torch.from_numpy(owners.given).to(features.device)]


def _distinct_pairs(images: _Owners, texts: _Owners) -> Pairs:
    """Of all ranks, on the CPU, in the order of the captions."""
    code, rows = np.unique(texts.numbers * sum(images.counts) + images.numbers, return_counts=True)
    text, image = np.divmod(code, sum(images.counts))
    return Pairs(torch.from_numpy(image), torch.from_numpy(text), torch.from_numpy(rows))


def retrieval_metrics(image_ranks: Tensor, text_ranks: Tensor, pairs: Pairs) -> dict[str, float]:
    """Recall and median rank in both directions, of the ranks of all images ``[I]`` and of all captions ``[T]``."""
    one_each = torch.ones_like(image_ranks)  # an image with five captions asks once
    rows_T = torch.zeros_like(text_ranks).index_add_(0, pairs.text, pairs.rows)
    found = ((image_ranks, one_each, len(text_ranks)), (text_ranks, rows_T, len(image_ranks)))
    metrics: dict[str, float] = {}
    for direction, result in zip(DIRECTIONS, found, strict=True):
        fractions = zip(RECALL_AT, recalls(*result, RECALL_AT), strict=True)
        metrics |= {f"{direction}_recall@{k}": fraction for k, fraction in fractions}
    for direction, (ranks, asked, _) in zip(DIRECTIONS, found, strict=True):
        metrics[f"{direction}_median_rank"] = float(median_rank(ranks, asked))
    return metrics
