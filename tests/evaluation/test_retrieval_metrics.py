"""Retrieval and whole-set loss against one-by-one counts, at sizes below and above a tile."""

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from lit_clip.evaluation.retrieval_metrics import (
    CAPTIONS,
    IMAGES,
    Pairs,
    Ranks,
    baseline_recalls,
    median_rank,
    pair_scores,
    recalls,
    retrieval_ranks,
    whole_set_loss,
)
from lit_clip.losses.contrastive import contrastive_loss, sigmoid_loss, unit

KS = (1, 5, 10)


def make_pairs(rows: list[tuple[int, int]]) -> Pairs:
    """Return the distinct pairs of a set whose rows are (image, caption)."""
    distinct = sorted(set(rows), key=lambda row: (row[1], row[0]))
    counts = Counter(rows)
    image, text = torch.tensor(distinct).T
    return Pairs(image.contiguous(), text.contiguous(), torch.tensor([counts[pair] for pair in distinct]))


def found(image: Tensor, text: Tensor, pairs: Pairs) -> Ranks:
    return retrieval_ranks(image, text, pairs, pair_scores(image, text, pairs))


def whole_numbers(size: int, seed: int, high: int = 7) -> Tensor:
    """Features ``[size, 6]`` of small integers: sums are exact in float32, and there are many ties."""
    return torch.randint(high, (size, 6), generator=torch.Generator().manual_seed(seed)).float() - high // 2


def random_set(images: int, texts: int, seed: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Features and rows; each image and caption occurs, some repeatedly and with several others."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(i % images, i % texts) for i in range(max(images, texts))]
    extra = torch.randint(2**30, (max(images, texts) // 3, 2), generator=generator).tolist()
    rows += [(i % images, t % texts) for i, t in extra] + rows[:3]
    text = whole_numbers(texts, seed + 1)
    image = whole_numbers(images, seed + 2, 3)
    for i, t in reversed(rows[: max(images, texts)]):
        image[i] += text[t]
    return image, text, rows


def ranks_one_by_one(queries: Tensor, candidates: Tensor, right: set[tuple[int, int]]) -> list[int]:
    """Sort each query's candidates, wrong ones first in a tie, and return the place of the first right one."""
    ranks = []
    for q, row in enumerate((queries.double() @ candidates.double().T).tolist()):
        is_right = [(q, c) in right for c in range(len(row))]
        ranking = [good for _, good in sorted(zip((-score for score in row), is_right, strict=True))]
        ranks.append(ranking.index(True))
    return ranks


@pytest.mark.parametrize(
    ("images", "texts"), [(1, 1), (1, 7), (7, 1), (21, 21), (20, 101), (101, 20), (97, 1500), (4099, 70)]
)
def test_ranks_equal_those_of_sorting_one_by_one(images: int, texts: int) -> None:
    """If rows repeat images or captions, the distinct ones are the queries and candidates."""
    image, text, rows = random_set(images, texts, seed=images)
    assert images != 4099 or images > IMAGES
    assert texts != 1500 or texts > CAPTIONS
    ranks = found(image, text, make_pairs(rows))
    assert ranks.image.dtype == ranks.text.dtype == torch.int64
    assert ranks.image.tolist() == ranks_one_by_one(image, text, set(rows))
    assert ranks.text.tolist() == ranks_one_by_one(text, image, {(t, i) for i, t in rows})
    if images > 20 and texts > 20:
        assert 0 < (ranks.text == 0).sum() < texts  # neither none nor all


def test_pair_scores_equal_the_similarity_matrix_bit_for_bit() -> None:
    """Otherwise a duplicate of the right candidate could rank above or below it by rounding."""
    generator = torch.Generator().manual_seed(0)
    image, text = (unit(torch.randn(size, 512, generator=generator)) for size in (IMAGES + 3, CAPTIONS + 5))
    right = [(i % len(image), t) for t in range(len(text)) for i in (t, 4 * t + 1, 3)]
    copies = torch.cat(
        [image, image[[3, 900, 4000]]]
    )  # with other keys, so wrong candidates, with the right one's score
    ranks = found(copies, text, make_pairs(right))
    plain = found(image, text, make_pairs(right))
    best = torch.stack([image[[t, (4 * t + 1) % len(image), 3]] @ text[t] for t in range(len(text))]).argmax(dim=1)
    tied = best == 2  # the best right candidate is image 3, which has a copy
    assert tied.sum() > 100
    assert (ranks.text[tied] >= plain.text[tied] + 1).all()


def test_a_caption_shared_by_two_images_is_right_for_both() -> None:
    # Images 0 and 1 share caption 0.
    image = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    one_caption = found(image, torch.tensor([[1.0, 0, 0], [0, 0, 1]]), make_pairs([(0, 0), (1, 0), (2, 1)]))
    assert one_caption.text.tolist() == [0, 0]
    own_captions = found(image, torch.eye(3), make_pairs([(0, 0), (1, 1), (2, 2)]))
    assert own_captions.text.tolist() == [2, 2, 0]


@pytest.mark.parametrize("dimensions", [4, 512])
@pytest.mark.parametrize("size", [21, CAPTIONS + 1, IMAGES + 1])
def test_collapsed_features_retrieve_nothing(size: int, dimensions: int) -> None:
    point = unit(torch.randn(dimensions, generator=torch.Generator().manual_seed(1)))
    same = point.expand(size, dimensions).contiguous()
    ranks = found(same, same, make_pairs([(i, i) for i in range(size)]))
    assert ranks.image.tolist() == ranks.text.tolist() == [size - 1] * size  # all wrong candidates come first


def test_nan_features_retrieve_nothing() -> None:
    pairs = make_pairs([(i, i) for i in range(5)])
    nan, fine = torch.full((5, 8), torch.nan), torch.eye(5, 8)
    for image, text in ((nan, nan), (nan, fine), (fine, nan)):
        ranks = found(image, text, pairs)
        assert ranks.image.tolist() == ranks.text.tolist() == [5] * 5
        assert recalls(ranks.image, torch.ones(5, dtype=torch.long), 5, (1, 5, 10)) == [0, 0, 0]
    broken = fine.clone()
    broken[2] = torch.nan  # ranks above all right candidates, and its own query finds nothing
    ranks = found(fine, broken, pairs)
    assert ranks.image.tolist() == [1, 1, 5, 1, 1]
    assert ranks.text.tolist() == [0, 0, 5, 0, 0]


def test_a_query_without_a_right_candidate_is_a_miss_even_if_k_exceeds_the_candidates() -> None:
    ranks = found(torch.eye(3), torch.eye(3)[:2], make_pairs([(0, 0), (1, 1)]))
    assert ranks.image.tolist() == [0, 0, 2]
    assert recalls(ranks.image, torch.ones(3, dtype=torch.long), 2, (1, 10)) == pytest.approx([2 / 3, 2 / 3])


def test_recall_and_median_rank_weight_a_query_by_how_often_it_occurs() -> None:
    ranks, rows = torch.tensor([7, 0, 4, 2]), torch.tensor([3, 2, 1, 4])
    asked = [0, 0, 2, 2, 2, 2, 4, 7, 7, 7]
    assert recalls(ranks, rows, 9, KS) == [0.2, 0.7, 1.0]
    assert median_rank(ranks, rows) == 1 + sorted(asked)[4] == 3
    assert median_rank(ranks, torch.ones(4, dtype=torch.long)) == 1 + 2
    assert median_rank(torch.tensor([5]), torch.tensor([2])) == 6


@pytest.mark.parametrize("size", [1, 21, CAPTIONS, 1500])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_whole_set_loss_equals_the_loss_of_one_batch(size: int, sigmoid: bool) -> None:
    """Rows that share an image or a caption count separately, as in a batch: only the diagonal is right."""
    generator = torch.Generator().manual_seed(size)
    images, texts = max(1, size // 3), max(1, 2 * size // 3)
    image, text = (unit(torch.randn(n, 8, generator=generator, dtype=torch.float64)) for n in (images, texts))
    rows = [(i % images, i % texts) for i in range(size - size // 9)]
    rows += rows[: size - len(rows)]
    scale, bias = torch.tensor(30.0, dtype=torch.float64), torch.tensor(-8.0, dtype=torch.float64)
    pairs = make_pairs(rows)
    loss = whole_set_loss(image, text, pairs, pair_scores(image, text, pairs), scale, bias if sigmoid else None)
    image_ND, text_ND = image[[i for i, _ in rows]], text[[t for _, t in rows]]
    if sigmoid:
        expected = sigmoid_loss(image_ND, text_ND, scale, bias)
    else:
        expected = contrastive_loss(image_ND, text_ND, image_ND, text_ND, scale)
    assert loss == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)


def test_whole_set_loss_is_exact_if_exponentials_underflow() -> None:
    """At scale 100 with opposite features, exp(-200) is 0 in float32."""
    image, text = torch.tensor([[1.0, 0], [-1, 0], [1, 0]]), torch.tensor([[-1.0, 0], [1, 0], [1, 0]])
    pairs = make_pairs([(0, 0), (1, 1), (2, 2)])
    loss = whole_set_loss(image, text, pairs, pair_scores(image, text, pairs), torch.tensor(100.0))
    expected = contrastive_loss(
        image.double(), text.double(), image.double(), text.double(), torch.tensor(100.0).double()
    )
    assert expected > 100
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_nan_features_have_a_nan_loss() -> None:
    pairs = make_pairs([(0, 0), (1, 1)])
    broken = torch.eye(2, 3)
    broken[1, 1] = torch.nan
    score = pair_scores(broken, torch.eye(2, 3), pairs)
    assert torch.tensor(whole_set_loss(broken, torch.eye(2, 3), pairs, score, torch.tensor(10.0))).isnan()


def test_baseline_recall_is_k_of_n_for_distinct_pairs_and_more_if_captions_repeat() -> None:
    distinct = make_pairs([(row, row) for row in range(20)])
    assert baseline_recalls(distinct, KS) == ([0.05, 0.25, 0.5], [0.05, 0.25, 0.5])
    classes = make_pairs(list(enumerate([0] * 6 + [1] * 3 + [2])))
    assert baseline_recalls(classes, (1, 2, 5)) == ([0.6, 0.9, 1.0], [0.6, 0.9, 1.0])
    captions = make_pairs([(row // 5, row) for row in range(20)])  # 4 images with five captions each
    assert baseline_recalls(captions, (1, 2)) == ([0.25, 0.5], [0.25, 0.5])


def test_no_constant_answer_beats_the_baseline_recall() -> None:
    """Try every choice of k candidates as the answer to all queries."""
    rows = [(0, 0), (1, 0), (2, 1), (3, 2), (3, 3), (4, 2), (4, 2)]
    for k in (1, 2):
        best_text = max(
            sum(any((image, text) in rows for text in answer) for image in range(5))
            for answer in itertools.combinations(range(4), k)
        )
        best_image = max(
            sum(any((image, text) in rows for image in answer) for _, text in rows)
            for answer in itertools.combinations(range(5), k)
        )
        assert baseline_recalls(make_pairs(rows), (k,))[0][0] == pytest.approx(best_text / 5)
        assert baseline_recalls(make_pairs(rows), (k,))[1][0] >= best_image / len(rows)
