"""Retrieval and loss of a set of image-caption pairs that is distributed over the ranks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_clip import distributed
from lit_clip.losses import Contrastive, Sigmoid
from lit_clip.retrieval.metrics import (
    PairIndices,
    Ranks,
    Reduce,
    baseline_recalls,
    median_rank,
    pair_scores,
    rank_local,
    recalls,
    retrieval_ranks,
    whole_set_loss,
)
from lit_clip.tools.hashing import hash64

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
MEAN_RECALL = "mean_recall"
ALIKE = 1e-5  # a difference in every dimension of unit features below which the model cannot tell images or texts apart
BLOCK = 2**25  # bytes; blocks of this size are returned to the system when freed


def _hashes(values: Iterable[str | bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(map(hash64, values)), dtype="<i8")


def _numbered(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number distinct values in order of appearance: return each value's number ``[N]`` and first positions ``[U]``."""
    _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
    order = first.argsort()
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place[number], first[order]


class _Distinct:
    """Features ``[n, D]`` of this rank's distinct images (or captions), in order of appearance.

    They are stored in blocks, so that concatenating them never holds everything twice.
    """

    def __init__(self) -> None:
        self.hashes: list[np.ndarray] = []  # of all rows, new or not
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
        """Return all features and forget them; return ``empty``, ``[0, D]``, if there are none."""
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
    """The rank that owns each distinct image (or caption): the first on which it appears.

    ``numbers`` has each row's image, consecutive on its owner; ``counts`` how many each rank owns; ``owned`` which of
    the features on this rank it owns, ascending.
    """

    numbers: np.ndarray
    counts: list[int]
    owned: np.ndarray


def _owners(hash_N: np.ndarray, rank_N: np.ndarray, rank: int, world: int) -> _Owners:
    number_N, first_U = _numbered(hash_N)
    owner_U = rank_N[first_U]
    order = owner_U.argsort(kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    mine = rank_N == rank
    local_first = np.flatnonzero(mine)[_numbered(hash_N[mine])[1]]  # the set's rows that this rank's features are from
    owned = np.flatnonzero(np.isin(local_first, first_U[owner_U == rank]))
    return _Owners(place[number_N], np.bincount(owner_U, minlength=world).tolist(), owned)


class Joined(NamedTuple):
    """Features of all images and of this rank's captions, these captions' pairs, and all pairs on the CPU."""

    image: Tensor
    text: Tensor
    own_pairs: PairIndices
    all_pairs: PairIndices


@dataclass
class Evaluation:
    """Metrics of a set, some with the value of a constant answer or a model without knowledge; on every rank.

    ``alike`` names what the model cannot tell apart, as all of its features are equal: images, captions or both.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    alike: str = ""


class RetrievalSet:
    """Collect pairs batch by batch on every rank, then evaluate all ranks' pairs together.

    The candidates are all pairs of the set, so the metrics depend on neither batch size nor number of ranks; a rank may
    have no pairs. Rows with the same key are one image, rows with the same tokens copies of one caption, on any rank.
    For the evaluation each rank holds the features of all images and of the captions that it owns.
    """

    def __init__(self) -> None:
        self._images, self._texts = _Distinct(), _Distinct()

    def add(self, image_BD: Tensor, text_BD: Tensor, keys: list[str], token_hashes: np.ndarray) -> None:
        """Add a batch: unit features, the images' keys and the captions' :func:`token_hashes`."""
        self._images.add(_hashes(keys), image_BD)
        self._texts.add(token_hashes, text_BD)

    def join(self, empty: Tensor) -> Joined | None:
        """Gather all ranks' pairs and empty this set; return None if there are no pairs.

        ``empty`` is ``[0, D]``, in the dtype and on the device of features, for a rank without pairs.
        """
        rank, world = distributed.rank_and_world()
        image_hash_N, text_hash_N, rank_N = self._rows(empty.device)
        if not len(rank_N):
            return None
        images = _owners(image_hash_N, rank_N, rank, world)
        texts = _owners(text_hash_N, rank_N, rank, world)
        pairs = distinct_pairs(images.numbers, texts.numbers)
        image_ID = distributed.gather_large(_owned_features(self._images, images, empty), images.counts)
        text_TD = _owned_features(self._texts, texts, empty)
        first = sum(texts.counts[:rank])
        mine = (first <= pairs.text) & (pairs.text < first + len(text_TD))
        own_pairs = PairIndices(pairs.image[mine], pairs.text[mine] - first, pairs.rows[mine], pairs.earlier[mine])
        self._images, self._texts = _Distinct(), _Distinct()
        return Joined(image_ID, text_TD, own_pairs.to(empty.device), pairs)

    def evaluate(self, empty: Tensor, scale: Tensor, bias: Tensor | None) -> Evaluation:
        """Return loss and retrieval metrics and empty this set; a collective call. See also :func:`whole_set_loss`."""
        joined = self.join(empty)
        if joined is None:
            return Evaluation()
        image_ID, text_TD, own_pairs, all_pairs = joined

        def total(local: Tensor) -> Tensor:
            return distributed.sum_over_ranks(local, empty.device)

        over_ranks = (distributed.highest_over_ranks, total)
        score_E = pair_scores(image_ID, text_TD, own_pairs)
        ranks = retrieval_ranks(image_ID, text_TD, own_pairs, score_E, *over_ranks)
        loss = whole_set_loss(image_ID, text_TD, own_pairs, score_E, scale, bias, *over_ranks)
        pair_E, text_T = (distributed.gather_uneven(each).cpu() for each in (ranks.pair, ranks.merged_text))
        ranks = Ranks(ranks.image.cpu(), pair_E, ranks.merged_image.cpu(), text_T)
        chance_loss = (Contrastive() if bias is None else Sigmoid()).chance_loss(int(all_pairs.rows.sum()))
        metrics, baselines = retrieval_metrics(ranks, all_pairs), retrieval_baselines(all_pairs)
        kinds = are_kinds(len(ranks.merged_text), len(ranks.image))
        spreads = {"images": _spread(image_ID), "captions": _spread(text_TD, distributed.highest_over_ranks)}
        return Evaluation(
            {"loss": loss, MEAN_RECALL: mean_recall(metrics, kinds), **metrics},
            {"loss": chance_loss, MEAN_RECALL: mean_recall(baselines, kinds), **baselines},
            " and ".join(name for name, spread in spreads.items() if spread < ALIKE and all_pairs.rows.sum() > 1),
        )

    def _rows(self, device: torch.device) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the image hash, caption hash and rank of all ranks' rows, in the order they were added."""
        rank = distributed.rank_and_world()[0]
        nothing = np.empty(0, dtype=np.int64)
        image, text = (np.concatenate([nothing, *part.hashes]) for part in (self._images, self._texts))
        local = np.stack([image, text, np.full(len(image), rank), np.arange(len(image))], axis=1)  # [n, 4]
        rows = distributed.gather_uneven(torch.from_numpy(local).to(device)).cpu().numpy()
        rows = rows[np.lexsort((rows[:, 2], rows[:, 3]))]
        return rows[:, 0], rows[:, 1], rows[:, 2]


def _spread(features_ND: Tensor, maximum: Reduce = rank_local) -> float:
    """Return the largest difference between two rows of any ranks in any dimension; a rank may have no rows."""
    least = features_ND.new_full(features_ND.shape[1:], -torch.inf)
    highest, lowest = (features_ND.amax(dim=0), -features_ND.amin(dim=0)) if len(features_ND) else (least, least)
    return float((maximum(highest) + maximum(lowest)).max())


def token_hashes(tokens: Tensor, context_length: int, pad_id: int) -> np.ndarray:
    """Hash the tokens ``[B, L]`` of each caption, independently of its padding: int64 ``[B]``."""
    padded = F.pad(tokens, (0, context_length - tokens.shape[1]), value=pad_id).cpu().numpy()
    return _hashes(row.tobytes() for row in padded)


def _owned_features(seen: _Distinct, owners: _Owners, empty: Tensor) -> Tensor:
    features = seen.take(empty)
    if len(owners.owned) == len(features):
        return features
    return features[torch.from_numpy(owners.owned).to(features.device)]


def distinct_pairs(image_N: np.ndarray, text_N: np.ndarray) -> PairIndices:
    """Return the pairs of a set's rows on the CPU, in caption order, from the numbers of their images and captions."""
    images = image_N.max() + 1
    code, first, rows = np.unique(text_N * images + image_N, return_index=True, return_counts=True)
    text, image = np.divmod(code, images)
    order = text_N.argsort(kind="stable")
    copies = np.empty_like(order)
    copies[order] = np.arange(len(order)) - np.searchsorted(text_N[order], text_N[order])
    return PairIndices(*map(torch.from_numpy, (image, text, rows, copies[first])))


def _names(pairs: PairIndices) -> tuple[str, ...]:
    """Return each field's metric prefix for :class:`Ranks`; without repeated captions, both rules agree."""
    copies = int(pairs.rows.sum()) > int(pairs.text[-1]) + 1
    return (*DIRECTIONS, *(f"merged_{direction}" for direction in DIRECTIONS)) if copies else DIRECTIONS


def retrieval_metrics(ranks: Ranks, pairs: PairIndices) -> dict[str, float]:
    """Return recalls and median ranks in both directions, and merged ones if captions repeat."""
    one_each = torch.ones_like(ranks.image)  # an image with five captions is one query
    rows_T = torch.zeros_like(ranks.merged_text).index_add_(0, pairs.text, pairs.rows)
    weights = (one_each, pairs.rows, one_each, rows_T)
    images, texts, rows = len(one_each), len(rows_T), int(rows_T.sum())
    names = _names(pairs)
    queries = dict(zip(names, zip(ranks, weights, (rows, images, texts, images), strict=True), strict=False))
    metrics = _recall_metrics({name: recalls(*query, RECALL_AT) for name, query in queries.items()})
    return metrics | {f"{name}_median_rank": float(median_rank(*query[:2])) for name, query in queries.items()}


def are_kinds(captions: int, images: int) -> bool:
    """Return whether captions are names of kinds: on average at least four images share one."""
    return 4 * captions <= images


def mean_recall(metrics: Mapping[str, float], kinds: bool = False) -> float:
    """Return the mean of recall@1, 5 and 10 in both directions, merged if captions repeat.

    A sixth of the sum by which Faghri et al. 2018 (VSE++) choose the best checkpoint of a run. Of ``kinds``, only image
    to text counts: one of a kind's many images is found at once, and with ten names each is a tenth of the recall.
    """
    merged = "merged_" if any(name.startswith("merged_") for name in metrics) else ""
    directions = DIRECTIONS[:1] if kinds else DIRECTIONS
    return fmean(metrics[f"{merged}{direction}_recall@{k}"] for direction in directions for k in RECALL_AT)


def retrieval_baselines(pairs: PairIndices) -> dict[str, float]:
    """Return the recalls of :func:`retrieval_metrics` for an answer without a model."""
    return _recall_metrics(dict(zip(_names(pairs), baseline_recalls(pairs, RECALL_AT), strict=False)))


def _recall_metrics(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Name the recalls at :data:`RECALL_AT` of each direction."""
    return {
        f"{name}_recall@{k}": fraction
        for name, fractions in values.items()
        for k, fraction in zip(RECALL_AT, fractions, strict=True)
    }
