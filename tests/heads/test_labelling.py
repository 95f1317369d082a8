"""Which images to label next, and how accuracy grows with examples, against plain loops."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from lit_clip.evaluation.class_head import fit_head
from lit_clip.heads.curve import accuracy_by_examples
from lit_clip.heads.labelling import label_next


@pytest.mark.parametrize("several", [False, True])
def test_label_next_is_the_greedy_choice_of_a_plain_loop(several: bool) -> None:
    random = torch.Generator().manual_seed(0)
    points = normalize(torch.randn(40, 5, generator=random), dim=1)
    logits = torch.randn(30, 4, generator=random)
    probability = logits.sigmoid() if several else logits.softmax(dim=1)
    found = label_next(probability, points[:30], points[30:], 12, several)
    known, expected = [row.numpy() for row in points[30:]], list[int]()
    for _ in range(12):
        scores = {}
        for row in set(range(30)) - set(expected):
            p = np.sort(probability[row].numpy())
            unsure = np.max(1 - np.abs(2 * p - 1)) if several else 1 - (p[-1] - p[-2])
            scores[row] = unsure * min(1 - float(points[row].numpy() @ other) for other in known)
        expected.append(max(scores, key=lambda row: scores[row]))
        known.append(points[expected[-1]].numpy())
    assert found == expected


def test_copies_are_not_chosen_twice_and_sure_images_last() -> None:
    points = torch.eye(4)[[0, 0, 1, 2]]
    probability = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.6, 0.4], [1.0, 0.0]])
    assert label_next(probability, points, torch.eye(4)[3:], 3, False)[:2] == [0, 2]
    assert label_next(probability, points, torch.eye(4)[3:], 9, False)[:2] == [0, 2]


def test_the_curve_rises_and_ends_below_what_all_examples_give() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = 2.5 * torch.eye(8)[labels] + torch.randn(60, 8, generator=random)
    zero_shot = torch.zeros(60, 3)
    fit = fit_head(features, zero_shot, labels)
    points = accuracy_by_examples(features, zero_shot, labels, fit)
    assert [point.shots for point in points] == [1, 2, 4, 8, 16]
    assert points[-1].accuracy > points[0].accuracy
    new = torch.arange(3000) % 3
    test = 2.5 * torch.eye(8)[new] + torch.randn(3000, 8, generator=random)
    accuracy = float((fit.logits(test, torch.zeros(3000, 3)).argmax(dim=1) == new).double().mean())
    assert points[-1].interval[0] < accuracy < points[-1].interval[1]
    assert accuracy_by_examples(features[:3], zero_shot[:3], labels[:3], fit) == []
