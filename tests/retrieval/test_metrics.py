"""Retrieval and whole-set loss against one-by-one counts, at sizes below and above a tile."""

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_clip.losses.contrastive import contrastive_loss, sigmoid_loss, unit
from lit_clip.retrieval.metrics import (
    CAPTIONS,
    IMAGES,
    PairIndices,
    Ranks,
    baseline_recalls,
    median_rank,
    pair_scores,
    recalls,
    retrieval_ranks,
    whole_set_loss,
)

KS = (1, 5, 10)


def make_pairs(rows: list[tuple[int, int]]) -> PairIndices:
    """Return the distinct pairs of a set whose rows are (image, caption)."""
    distinct = sorted(set(rows), key=lambda row: (row[1], row[0]))
    counts = Counter(rows)
    image, text = torch.tensor(distinct).T.contiguous()
    earlier = [sum(row[1] == pair[1] for row in rows[: rows.index(pair)]) for pair in distinct]
    return PairIndices(image, text, torch.tensor([counts[pair] for pair in distinct]), torch.tensor(earlier))


def found(image: Tensor, text: Tensor, pairs: PairIndices) -> Ranks:
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


def field_ranks_one_by_one(
    image: Tensor, text: Tensor, rows: list[tuple[int, int]], pairs: PairIndices
) -> tuple[list[int], list[int]]:
    """Rank the captions of all rows for each image, and the images for each pair, by the field's rule."""
    scores = image.double() @ text.double().T
    i_N, t_N = torch.tensor(rows).T
    place = torch.arange(len(rows))
    of_images = []
    for i in range(len(image)):
        score_N, wrong_N = scores[i, t_N], i_N != i
        before = [
            wrong_N & ((score_N > score_N[r]) | (score_N == score_N[r]) & ((t_N != t_N[r]) | (place < r)))
            for r in (~wrong_N).nonzero()[:, 0].tolist()
        ]
        of_images.append(min(int(each.sum()) for each in before))
    columns = zip(pairs.image.tolist(), pairs.text.tolist(), strict=True)
    return of_images, [int((scores[:, t] >= scores[i, t]).sum()) - 1 for i, t in columns]


@pytest.mark.parametrize(
    ("images", "texts"), [(1, 1), (1, 7), (7, 1), (21, 21), (20, 101), (101, 20), (97, 1500), (4099, 70)]
)
def test_ranks_equal_those_of_sorting_one_by_one(images: int, texts: int) -> None:
    image, text, rows = random_set(images, texts, seed=images)
    assert images != 4099 or images > IMAGES
    assert texts != 1500 or texts > CAPTIONS
    pairs = make_pairs(rows)
    ranks = found(image, text, pairs)
    assert all(each.dtype == torch.int64 for each in ranks)
    assert (ranks.image.tolist(), ranks.pair.tolist()) == field_ranks_one_by_one(image, text, rows, pairs)
    assert ranks.merged_image.tolist() == ranks_one_by_one(image, text, set(rows))
    assert ranks.merged_text.tolist() == ranks_one_by_one(text, image, {(t, i) for i, t in rows})
    if images > 20 and texts > 20:
        assert 0 < (ranks.merged_text == 0).sum() < texts  # neither none nor all
        assert ranks.image.tolist() != ranks.merged_image.tolist()


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recalls_with_shared_captions_equal_clip_benchmarks_to_the_last_query(k: int) -> None:
    """400 images with five captions, of which about a tenth occur with several images, as on COCO."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    generator = torch.Generator().manual_seed(k)
    rows = [(row // 5, row if row % 10 else 10 * (row % 7)) for row in range(2000)]
    image = unit(torch.randn(400, 16, generator=generator))
    text = unit(
        torch.stack([image[min(t // 5, 399)] for t in range(2000)]) + torch.randn(2000, 16, generator=generator)
    )
    pairs = make_pairs(rows)
    ranks = found(image, text, pairs)
    scores = torch.stack([image @ text[t] for _, t in rows])  # copies score equal
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(2000), torch.tensor([i for i, _ in rows])] = True
    assert (theirs.recall_at_k(scores.T, positive.T, k) > 0).tolist() == (ranks.image < k).tolist()
    rank_of = dict(zip(zip(pairs.image.tolist(), pairs.text.tolist(), strict=True), ranks.pair.tolist(), strict=True))
    assert (theirs.recall_at_k(scores, positive, k) > 0).tolist() == [rank_of[row] < k for row in rows]
    assert ranks.merged_image.tolist() != ranks.image.tolist()


@pytest.mark.parametrize("sigmoid", [False, True])
def test_autocast_rounds_no_rank_and_no_loss(sigmoid: bool) -> None:
    """A sum of 1,499 ones is 1,504 in bfloat16."""
    image, text = unit(torch.randn(300, 16)), unit(torch.randn(1500, 16))
    pairs, scale = make_pairs([(row % 300, row) for row in range(1500)]), torch.tensor(30.0)
    bias = torch.tensor(-10.0) if sigmoid else None
    ranks, loss = (
        found(image, text, pairs),
        whole_set_loss(image, text, pairs, pair_scores(image, text, pairs), scale, bias),
    )
    with torch.autocast("cpu", torch.bfloat16):
        again = found(image, text, pairs)
        assert whole_set_loss(image, text, pairs, pair_scores(image, text, pairs), scale, bias) == loss
    assert all(torch.equal(one, other) for one, other in zip(ranks, again, strict=True))
    assert all(int(each.min()) >= 0 for each in again)


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
    assert (ranks.merged_text[tied] >= plain.merged_text[tied] + 1).all()


def test_a_caption_shared_by_two_images_is_right_for_both_if_merged_and_for_its_own_by_the_fields_rule() -> None:
    # Images 0 and 1 share caption 0, which is nearer to image 1.
    image = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    one_caption = found(image, torch.tensor([[1.0, 0, 0], [0, 0, 1]]), make_pairs([(0, 0), (1, 0), (2, 1)]))
    assert one_caption.merged_text.tolist() == [0, 0]
    assert one_caption.pair.tolist() == [2, 0, 0]
    assert one_caption.image.tolist() == [1, 1, 0]  # image 0: a tie with caption 1; image 1: the copy of row 0 is first
    assert one_caption.merged_image.tolist() == [1, 0, 0]
    own_captions = found(image, torch.eye(3), make_pairs([(0, 0), (1, 1), (2, 2)]))
    assert own_captions.pair.tolist() == own_captions.merged_text.tolist() == [2, 2, 0]


def parted(image: Tensor, text: Tensor, pairs: PairIndices, world: int) -> Ranks:
    """Rank as on several ranks, each with some captions: each rank's part, reduced as the collectives do."""
    parts = []
    for rank in range(world):
        first, stop = (len(text) * each // world for each in (rank, rank + 1))
        own = PairIndices(*(column[(first <= pairs.text) & (pairs.text < stop)] for column in pairs))
        parts.append((text[first:stop], own._replace(text=own.text - first)))
    calls: list[list[Tensor]] = []  # of each reduction the locals of all ranks

    def run(known: list[Tensor]) -> list[Ranks]:
        """Run every rank; a reduction that is not known yet returns the rank's own value."""
        calls.clear()
        results = []
        for text_TD, own in parts:
            number = iter(range(99))

            def reduce(local: Tensor, number: Iterator[int] = number) -> Tensor:
                at = next(number)
                if at == len(calls):
                    calls.append([])
                calls[at].append(local.clone())
                return known[at] if at < len(known) else local

            results.append(retrieval_ranks(image, text_TD, own, pair_scores(image, text_TD, own), reduce, reduce))
        return results

    highest, known = [True, True, False, False], []  # retrieval_ranks asks for two maxima and two sums
    for is_maximum in highest:
        run(known)
        stacked = torch.stack(calls[len(known)])
        known.append(stacked.amax(dim=0) if is_maximum else stacked.sum(dim=0))
    results = run(known)
    return Ranks(
        results[0].image,
        torch.cat([each.pair for each in results]),
        results[0].merged_image,
        torch.cat([each.merged_text for each in results]),
    )


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(20, 60), marks=pytest.mark.slow)])
def test_tiny_sets_with_identical_features_rank_the_same_on_any_ranks_as_a_float64_loop(seeds: range) -> None:
    """A product of few rows is computed, and rounded, otherwise than one of many: equal features must score equal."""
    for seed in seeds:  # each size, and in all each with each number of dimensions
        generator = torch.Generator().manual_seed(seed)
        size, dimensions = 1 + seed % 20, (16, 64, 512)[seed % 3]
        of_image, of_text = (torch.randint(max(1, size // 2), (size,), generator=generator) for _ in range(2))
        points = unit(torch.randn(size, dimensions, generator=generator))
        image, text = points[of_image], points[of_text]  # bit-identical copies
        pairs = make_pairs([(i, i) for i in range(size)])
        scores = (points.double() @ points.double().T)[of_image][:, of_text]  # copies score exactly equal
        # A tie counts against the model.
        expected = [int((line >= line[i]).sum()) - 1 for i, line in enumerate(scores)]
        inverse = [int((line >= line[i]).sum()) - 1 for i, line in enumerate(scores.T)]
        for world in (1, 2, 3, 4):
            ranks = parted(image, text, pairs, world)
            assert ranks.merged_image.tolist() == ranks.image.tolist() == expected, (seed, world)
            assert ranks.merged_text.tolist() == ranks.pair.tolist() == inverse, (seed, world)


@pytest.mark.parametrize(
    ("size", "dimensions"),
    [(21, 4), (21, 512), (CAPTIONS + 1, 512), (IMAGES + 1, 4)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in ((CAPTIONS + 1, 4), (IMAGES + 1, 512))],
)
def test_collapsed_features_retrieve_nothing(size: int, dimensions: int) -> None:
    point = unit(torch.randn(dimensions, generator=torch.Generator().manual_seed(1)))
    same = point.expand(size, dimensions).contiguous()
    ranks = found(same, same, make_pairs([(i, i) for i in range(size)]))
    assert all(each.tolist() == [size - 1] * size for each in ranks)  # all wrong candidates come first


def test_nan_features_retrieve_nothing() -> None:
    pairs = make_pairs([(i, i) for i in range(5)])
    nan, fine = torch.full((5, 8), torch.nan), torch.eye(5, 8)
    for image, text in ((nan, nan), (nan, fine), (fine, nan)):
        ranks = found(image, text, pairs)
        assert all(each.tolist() == [5] * 5 for each in ranks)
        assert recalls(ranks.image, torch.ones(5, dtype=torch.long), 5, (1, 5, 10)) == [0, 0, 0]
    broken = fine.clone()
    broken[2] = torch.nan  # ranks above all right candidates, and its own query finds nothing
    ranks = found(fine, broken, pairs)
    assert ranks.image.tolist() == ranks.merged_image.tolist() == [1, 1, 5, 1, 1]
    assert ranks.pair.tolist() == ranks.merged_text.tolist() == [0, 0, 5, 0, 0]


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
    assert baseline_recalls(distinct, KS) == ([0.05, 0.25, 0.5],) * 4
    classes = make_pairs(list(enumerate([0] * 6 + [1] * 3 + [2])))
    merged = [0.6, 0.9, 1.0]
    assert baseline_recalls(classes, (1, 2, 5)) == ([0.1, 0.2, 0.5], [0.1, 0.2, 0.5], merged, merged)
    captions = make_pairs([(row // 5, row) for row in range(20)])  # 4 images with five captions each
    assert baseline_recalls(captions, (1, 2)) == ([0.25, 0.5],) * 4


def test_no_constant_answer_beats_the_baseline_recall() -> None:
    """Try every choice of k candidates as the answer to all queries."""
    rows = [(0, 0), (1, 0), (2, 1), (3, 2), (3, 3), (4, 2), (4, 2)]
    for k in (1, 2):
        baselines = [values[0] for values in baseline_recalls(make_pairs(rows), (k,))]
        rows_answered = [{image for image, _ in answer} for answer in itertools.combinations(rows, k)]
        assert baselines[0] == pytest.approx(max(map(len, rows_answered)) / 5)
        images = [*itertools.combinations(range(5), k)]
        assert baselines[1] == pytest.approx(max(sum(i in answer for i, _ in rows) for answer in images) / len(rows))
        merged_texts = [
            sum(any((image, text) in rows for text in answer) for image in range(5))
            for answer in itertools.combinations(range(4), k)
        ]
        assert baselines[2] == pytest.approx(max(merged_texts) / 5)
        merged_images = [sum(any((image, text) in rows for image in answer) for _, text in rows) for answer in images]
        assert baselines[3] >= max(merged_images) / len(rows)
