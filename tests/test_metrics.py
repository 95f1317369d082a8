"""Retrieval and whole-set loss against one-by-one counts, at sizes below and above a chunk."""

import itertools

import pytest
import torch
from torch import Tensor

from lit_clip.losses import contrastive_loss, unit
from lit_clip.metrics import (
    CHUNK,
    first_occurrences,
    guessing_recalls,
    identities,
    retrieval_hits,
    whole_set_loss,
)

KS = (1, 5, 10)


def hits_one_by_one(
    queries: Tensor, query_ids: Tensor, candidates: Tensor, candidate_ids: Tensor, ks: tuple[int, ...]
) -> list[float]:
    """Sort the candidates of each query, of equal scores the wrong ones first, and look among the first k."""
    hits = [0.0] * len(ks)
    scores = (queries.double() @ candidates.double().T).tolist()
    for row, (image, caption) in zip(scores, query_ids.tolist(), strict=True):
        right = [i == image or c == caption for i, c in candidate_ids.tolist()]
        ranking = [is_right for _, is_right in sorted(zip((-s for s in row), right, strict=True))]
        for j, k in enumerate(ks):
            hits[j] += any(ranking[:k])
    return hits


def random_pairs(size: int, seed: int, repeats: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[size, 6]`` x 2 and ids ``[size, 2]``.

    The features are small whole numbers: every sum is exact in float32 and ties abound.
    """
    generator = torch.Generator().manual_seed(seed)

    def whole_numbers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    image = whole_numbers(7, size, 6).float() - 3
    text = (image + whole_numbers(5, size, 6) - 2).float()
    rows = torch.arange(size)
    ids = torch.stack([whole_numbers(max(1, 2 * size // 3), size), whole_numbers(2 * size, size)], 1)
    return image, text, ids if repeats else torch.stack([rows, rows], 1)


@pytest.mark.parametrize("size", [1, 21, 1500])
@pytest.mark.parametrize("repeats", [True, False])
def test_hits_are_those_of_sorting_one_by_one(size: int, repeats: bool) -> None:
    assert size != 1500 or size > CHUNK
    image, text, ids = random_pairs(size, seed=size, repeats=repeats)
    hits = retrieval_hits(image, ids, text, ids, KS)
    assert hits.dtype == torch.float64
    assert hits.tolist() == hits_one_by_one(image, ids, text, ids, KS)
    assert size == 1 or 0 < hits[0] < hits[1] < size  # neither none nor all


@pytest.mark.parametrize("images", [1, 8, 20])
def test_images_may_be_fewer_than_captions(images: int) -> None:
    image, text, ids = random_pairs(21, seed=images)
    ids[:, 0] = torch.arange(21) % images  # captions 0, images, 2 images, ... are of image 0
    image, image_ids = image[:images], ids[:images]
    to_text = retrieval_hits(image, image_ids, text, ids, KS)
    to_image = retrieval_hits(text, ids, image, image_ids, KS)
    assert to_text.tolist() == hits_one_by_one(image, image_ids, text, ids, KS)
    assert to_image.tolist() == hits_one_by_one(text, ids, image, image_ids, KS)


def test_a_query_without_a_right_candidate_is_no_hit_even_if_k_exceeds_the_candidates() -> None:
    features = torch.eye(3)
    ids, strangers = torch.tensor([[0, 0], [1, 1], [2, 2]]), torch.tensor([[7, 7], [8, 8], [2, 2]])
    assert retrieval_hits(features, strangers, features, ids, KS).tolist() == [1, 1, 1]


def test_hits_of_the_ranks_shares_sum_to_the_hits_of_all() -> None:
    image, text, ids = random_pairs(31, seed=7)
    bounds = [0, 0, 10, 11, 31]  # a rank with nothing, and one with a single row
    shares = [retrieval_hits(image[a:b], ids[a:b], text, ids, KS) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert torch.equal(sum(shares, torch.zeros(3)), retrieval_hits(image, ids, text, ids, KS))


def test_the_same_sentence_twice_is_one_answer() -> None:
    # Queries 0 and 1 carry the same caption; each prefers the other's text.
    text = torch.eye(3)
    image = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    same_caption = torch.tensor([[0, 9], [1, 9], [2, 8]])
    own_captions = torch.tensor([[0, 5], [1, 6], [2, 8]])
    assert retrieval_hits(image, same_caption, text, same_caption, (1,)).tolist() == [3]
    assert retrieval_hits(image, own_captions, text, own_captions, (1,)).tolist() == [1]


def test_collapsed_features_retrieve_nothing() -> None:
    _, _, ids = random_pairs(21, seed=8, repeats=False)
    same = unit(torch.ones(21, 4))
    assert retrieval_hits(same, ids, same, ids, KS).tolist() == [0, 0, 0]
    assert retrieval_hits(same, ids, same, ids, (20, 21)).tolist() == [0, 21]  # 20 wrong ones come first


def test_nan_features_retrieve_nothing() -> None:
    _, _, ids = random_pairs(21, seed=9, repeats=False)
    nan, fine = torch.full((21, 4), torch.nan), torch.eye(21, 4)
    assert retrieval_hits(nan, ids, nan, ids, KS).tolist() == [0, 0, 0]
    assert retrieval_hits(nan, ids, fine, ids, KS).tolist() == [0, 0, 0]
    assert retrieval_hits(fine, ids, nan, ids, KS).tolist() == [0, 0, 0]


def test_a_single_nan_candidate_stands_before_every_right_one() -> None:
    features = torch.eye(21)
    rows = torch.arange(21)
    ids = torch.stack([rows, rows], 1)
    broken = features.clone()
    broken[4] = torch.nan
    # Everyone else is second to it; query 4 has no right answer at all.
    assert retrieval_hits(features, ids, broken, ids, (1, 2, 20)).tolist() == [0, 20, 20]


@pytest.mark.parametrize("size", [1, 21, CHUNK, 1500])
def test_whole_set_loss_is_that_of_one_batch(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    image, text = (unit(x) for x in torch.randn(2, size, 8, generator=generator, dtype=torch.float64))
    scale = torch.tensor(30.0, dtype=torch.float64)
    total = whole_set_loss(image, text, scale, range(size))
    assert total.dtype == torch.float64
    expected = contrastive_loss(image, text, image, text, scale)
    torch.testing.assert_close(total / size, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_whole_set_loss_of_the_ranks_shares_sums_to_that_of_all(ranks: int) -> None:
    size = 1500
    generator = torch.Generator().manual_seed(ranks)
    image, text = (unit(x) for x in torch.randn(2, size, 8, generator=generator, dtype=torch.float64))
    scale = torch.tensor(30.0, dtype=torch.float64)
    bounds = [0, *sorted(torch.randint(size, (ranks - 2,), generator=generator).tolist()), 1100, size]
    shares = [range(a, b) for a, b in zip(sorted(bounds)[:-1], sorted(bounds)[1:], strict=True)]
    total = sum(whole_set_loss(image, text, scale, share).item() for share in shares)
    assert len(shares) == ranks
    assert total / size == pytest.approx(contrastive_loss(image, text, image, text, scale).item(), rel=1e-10)


def test_a_rank_without_rows_adds_nothing() -> None:
    image = unit(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    assert whole_set_loss(image, image, torch.tensor(10.0), range(5, 5)).item() == 0


def test_identities_number_equal_values_alike_in_order_of_appearance() -> None:
    numbers = identities(["b", "a", "b", "c", "a"])
    assert numbers.tolist() == [0, 1, 0, 2, 1]
    assert numbers.dtype == torch.int64
    assert identities([]).shape == (0,)
    assert identities([]).dtype == torch.int64


def test_first_occurrences_mark_each_id_once() -> None:
    first = first_occurrences(torch.tensor([4, 0, 4, 4, 2, 0]))
    assert first.tolist() == [True, True, False, False, True, False]
    assert first.dtype == torch.bool
    assert first_occurrences(torch.tensor([], dtype=torch.long)).shape == (0,)
    assert first_occurrences(torch.tensor([], dtype=torch.long)).dtype == torch.bool


def test_guessing_recall_is_k_of_n_for_distinct_pairs_and_more_where_captions_repeat() -> None:
    distinct = torch.arange(20)[:, None].expand(20, 2)
    assert guessing_recalls(distinct, (1, 5, 10)) == ([0.05, 0.25, 0.5], [0.05, 0.25, 0.5])
    classes = torch.tensor([[image, text] for image, text in enumerate([0] * 6 + [1] * 3 + [2])])
    assert guessing_recalls(classes, (1, 2, 5)) == ([0.6, 0.9, 1.0], [0.6, 0.9, 1.0])
    captions = torch.tensor([[row // 5, row] for row in range(20)])  # 4 images with five captions each
    assert guessing_recalls(captions, (1, 2)) == ([0.25, 0.5], [0.25, 0.5])


def test_several_rows_of_one_candidate_are_one_answer() -> None:
    """Recall among distinct captions and images, against a loop over the set of right pairs."""
    image, text, ids = random_pairs(60, seed=11)
    ids[:, 1] %= 17  # captions repeat, also ones that are not their image's first
    ids = ids[ids[:, 0].argsort()]
    image, text = image[ids[:, 0]], text[ids[:, 1]]  # equal ids, equal features
    right = {tuple(pair) for pair in ids.tolist()}
    firsts = [first_occurrences(ids[:, column]).nonzero()[:, 0].tolist() for column in (0, 1)]
    images = firsts[0]
    for query, candidate, queries, column in ((image, text, images, 1), (text, image, range(60), 0)):
        expected = [0.0, 0.0]
        for q in queries:
            scores = {int(ids[c, column]): float(query[q] @ candidate[c]) for c in firsts[column]}
            own = int(ids[q, 1 - column])
            good = [c for c in scores if ((own, c) if column else (c, own)) in right]
            ahead = sum(score >= max(scores[c] for c in good) for c, score in scores.items() if c not in good)
            for j, k in enumerate((1, 5)):
                expected[j] += ahead < k
        hits = retrieval_hits(query[list(queries)], ids[list(queries)], candidate, ids, (1, 5), distinct=column)
        assert hits.tolist() == expected
        assert 0 < expected[0] < expected[1]


def test_no_answer_that_looks_at_nothing_beats_the_guessing_recall() -> None:
    """Every query answered with the same k candidates, over all choices of them."""
    ids = torch.tensor([[0, 0], [1, 0], [2, 1], [3, 2], [3, 3], [4, 2]])
    right = {tuple(pair) for pair in ids.tolist()}
    for k in (1, 2):
        best_text = max(
            sum(any((image, text) in right for text in answer) for image in range(5))
            for answer in itertools.combinations(range(4), k)
        )
        best_image = max(
            sum(any((image, text) in right for image in answer) for text in ids[:, 1].tolist())
            for answer in itertools.combinations(range(5), k)
        )
        assert guessing_recalls(ids, (k,))[0][0] == pytest.approx(best_text / 5)
        assert guessing_recalls(ids, (k,))[1][0] >= best_image / len(ids)
