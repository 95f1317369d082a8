"""Scores of chosen captions against plain loops, CLIP_benchmark and scikit-learn."""

from collections.abc import Sequence
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from lit_clip.errors import InputError
from lit_clip.evaluation.caption_choice import EncodedChoices, answer, chance, evaluate_choices, readable_choices
from lit_clip.evaluation.data import Choice
from lit_clip.evaluation.overlap import clopper_pearson

NAN = float("nan")


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    features = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(features, dim=1).numpy()


def encoded(choices: Sequence[Choice], seed: int = 1) -> EncodedChoices:
    captions = dict.fromkeys(caption for choice in choices for caption in choice.captions)
    numbers = {caption: number for number, caption in enumerate(captions)}
    return EncodedChoices(list(choices), numbers, unit(len(numbers), 16, seed=seed))


def winoground_scores(c0_i0: float, c0_i1: float, c1_i0: float, c1_i1: float) -> dict[str, float]:
    """The rules of the paper, with the names of its example code."""
    text = c0_i0 > c1_i0 and c1_i1 > c0_i1
    image = c0_i0 > c0_i1 and c1_i1 > c1_i0
    return {"text_score": text, "image_score": image, "group_score": text and image}


def test_pairs_follow_winogrounds_rules_for_every_order_and_for_ties() -> None:
    for s in [*permutations((0.1, 0.2, 0.3, 0.4)), (1, 1, 1, 1), (2, 1, 1, 1), (2, 1, 2, 2), (2, 2, 1, 2)]:
        score_IT = np.array([[s[0], s[2]], [s[1], s[3]]], dtype=float)
        assert answer(score_IT) == winoground_scores(*s)


def test_a_tie_and_a_nan_count_against_the_model() -> None:
    assert answer(np.array([[0.5, 0.5]])) == {"text_score": 0}
    assert answer(np.array([[0.5, 0.4]])) == {"text_score": 1}
    for row in ([NAN, 0.1], [0.5, NAN], [NAN, NAN]):
        assert answer(np.array([row])) == {"text_score": 0}
    assert answer(np.array([[NAN]])) == {"text_score": 0}
    assert answer(np.full((5, 1), 0.3), right=2) == {"jaccard": 0}
    assert answer(np.array([[0.1], [NAN], [0.3], [0.2]]), right=2) == {"jaccard": 0}


@pytest.mark.parametrize(("images", "right"), [(5, 2), (6, 3), (10, 4), (12, 6)])
def test_jaccard_equals_scikit_learns(images: int, right: int) -> None:
    truth = np.arange(images) < right
    for seed in range(20):
        score_I = np.random.default_rng(seed).normal(size=images)
        chosen = np.isin(np.arange(images), np.argsort(score_I)[-right:])  # as in DataComp's script
        assert answer(score_I[:, None], right)["jaccard"] == pytest.approx(jaccard_score(truth, chosen))


def test_chance_is_the_mean_over_all_orders_of_the_scores() -> None:
    for images, texts in ((1, 2), (1, 5), (2, 2), (3, 1)):
        answers = [
            answer(np.array(order, dtype=float).reshape(images, texts)) for order in permutations(range(images * texts))
        ]
        for metric in answers[0]:
            expected = np.mean([found[metric] for found in answers])
            assert chance(metric, Choice(tuple(range(images)), ("x",) * texts)) == pytest.approx(expected)  # pyright: ignore[reportArgumentType]
    subsets = list(combinations(range(6), 2))
    expected = np.mean([len({0, 1} & {*s}) / len({0, 1} | {*s}) for s in subsets])
    assert chance("jaccard", Choice(tuple(range(6)), ("cue",), right=2)) == pytest.approx(expected)
    with pytest.raises(InputError, match="two images"):
        chance("group_score", Choice((0, 1, 2), ("a", "b", "c")))


def test_macro_score_is_the_mean_over_groups_and_leaves_out_questions_without_one() -> None:
    groups = ["on", "on", "on", "under", "", ""]
    choices = [Choice((n,), (f"right {n}", f"wrong {n}"), group=group) for n, group in enumerate(groups)]
    questions, image_ND = encoded(choices), unit(6, 16)
    right = [
        float((image_ND[n] * (questions.features[2 * n] - questions.features[2 * n + 1])).sum() > 0) for n in range(6)
    ]
    found = evaluate_choices("macro_text_score", image_ND, questions)
    assert found["value"] == pytest.approx((np.mean(right[:3]) + right[3]) / 2)
    assert found["metrics"]["text_score"] == pytest.approx(np.mean(right))
    assert found["value"] != found["metrics"]["text_score"]
    assert found["groups"] == {
        "on": {"value": np.mean(right[:3]), "choices": 3},
        "under": {"value": right[3], "choices": 1},
    }
    assert (found["baseline"], found["choices"]) == (0.5, 6)
    assert set(found["intervals"]) == {"text_score", "macro_text_score"}
    assert found["intervals"]["text_score"] == clopper_pearson(round(6 * found["metrics"]["text_score"]), 6)
    low, high = found["intervals"]["macro_text_score"]  # of the group of one question only that one can be drawn
    assert (low, high) == (right[3] / 2, (1 + right[3]) / 2)


def test_questions_with_an_unreadable_image_are_left_out() -> None:
    choices = [Choice((0, 3), ("a", "b")), Choice((1, 2), ("c", "d")), Choice((3, 0), ("e", "f"))]
    assert readable_choices(choices, [0, 2, 3]) == [Choice((0, 2), ("a", "b")), Choice((2, 0), ("e", "f"))]
    with pytest.raises(InputError, match="could not be read"):
        readable_choices(choices, [1])


def test_a_metric_that_is_not_defined_for_the_questions_is_an_error() -> None:
    one = encoded([Choice((0,), ("a", "b"))])
    for metric, message in (("top1", "does not judge"), ("image_score", "text_score"), ("macro_text_score", "groups")):
        with pytest.raises(InputError, match=message):
            evaluate_choices(metric, unit(1, 16), one)  # pyright: ignore[reportArgumentType]
