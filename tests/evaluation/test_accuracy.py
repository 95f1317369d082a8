"""Accuracies against scikit-learn, torchmetrics and a plain sort."""

from collections import defaultdict

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from lit_clip.evaluation import accuracy as module
from lit_clip.evaluation.accuracy import accuracies, baseline_accuracies, classification_counts


def sorted_ranks(scores: Tensor, labels: Tensor) -> list[int]:
    """Rank of each label when classes are sorted by score, then by number."""
    result = []
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        result.append(order.index(label))
    return result


@pytest.mark.parametrize(("N", "C"), [(1, 1), (1, 2), (7, 5), (31, 6), (101, 13), (64, 1000)])
def test_accuracies_equal_those_of_a_sort(N: int, C: int) -> None:
    scores, labels = torch.randint(4, (N, C)).float(), torch.randint(C, (N,))  # few values, so many ties
    found = accuracies(classification_counts(scores, labels))
    ranks = sorted_ranks(scores, labels)
    assert found["top1"] == pytest.approx(sum(rank < 1 for rank in ranks) / N)
    assert found.get("top5") == (pytest.approx(sum(rank < 5 for rank in ranks) / N) if C > 5 else None)
    right = defaultdict(list)
    for label, rank in zip(labels.tolist(), ranks, strict=True):
        right[label].append(rank < 1)
    assert found["mean_per_class"] == pytest.approx(sum(sum(r) / len(r) for r in right.values()) / len(right))


def test_chunk_size_does_not_change_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = torch.randint(3, (101, 11)).float(), torch.randint(11, (101,))
    whole = classification_counts(scores, labels)
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 50)
    assert torch.equal(classification_counts(scores, labels), whole)


def unbalanced(classes: int, absent: tuple[int, ...] = (), images: int = 501) -> tuple[Tensor, Tensor]:
    """Logits ``[images, classes]`` that are often right, and labels ``[images]``, the lower the more common."""
    generator = torch.Generator().manual_seed(classes)
    shares = 0.6 ** torch.arange(classes)
    shares[list(absent)] = 0
    labels = torch.multinomial(shares, images, replacement=True, generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += 1
    return logits, labels


@pytest.mark.parametrize(("classes", "absent"), [(7, ()), (9, (4,)), (13, (0, 11, 12))])
def test_accuracies_equal_scikit_learns_and_torchmetrics(classes: int, absent: tuple[int, ...]) -> None:
    logits, labels = unbalanced(classes, absent)
    result = accuracies(classification_counts(logits, labels))
    predictions = logits.argmax(dim=1)
    assert set(result) == {"top1", "top5", "mean_per_class"}
    assert result["top1"] == pytest.approx(accuracy_score(labels, predictions), abs=1e-12)
    top5 = top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
    assert result["top5"] == pytest.approx(top5, abs=1e-12)
    top5 = multiclass_accuracy(logits, labels, classes, average="micro", top_k=5)
    assert result["top5"] == pytest.approx(top5.item(), abs=1e-6)
    recalls = multiclass_accuracy(logits, labels, classes, average="none")[labels.unique()]
    assert result["mean_per_class"] == pytest.approx(recalls.mean().item(), abs=1e-6)
    assert len({round(value, 3) for value in result.values()}) == 3  # three different numbers


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_a_class_without_images_does_not_count_in_the_mean() -> None:
    logits, labels = unbalanced(9, absent=(4,))
    assert (logits.argmax(dim=1) == 4).any()  # although it is predicted
    expected = balanced_accuracy_score(labels, logits.argmax(dim=1))
    assert accuracies(classification_counts(logits, labels))["mean_per_class"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_there_is_no_top5_with_five_classes_or_fewer(classes: int) -> None:
    logits, labels = unbalanced(classes)
    counts = classification_counts(logits, labels)
    assert set(accuracies(counts)) == set(baseline_accuracies(counts[0])) == {"top1", "mean_per_class"}
    assert accuracies(counts)["top1"] == pytest.approx(accuracy_score(labels, logits.argmax(dim=1)), abs=1e-12)


def test_counts_of_batches_sum_to_the_counts_of_the_set() -> None:
    logits, labels = unbalanced(9, absent=(4,))
    whole = classification_counts(logits, labels)
    parts = zip(logits.split([1, 0, 200, 7, 293]), labels.split([1, 0, 200, 7, 293]), strict=True)
    total = sum((classification_counts(*part) for part in parts), torch.zeros(3, 9, dtype=torch.float64))
    assert whole.dtype == torch.float64
    assert torch.equal(total, whole)
    assert torch.equal(whole[0], labels.bincount(minlength=9).double())
    assert (whole[0] >= whole[2]).all()
    assert (whole[2] >= whole[1]).all()


def test_counts_of_a_batch_by_hand() -> None:
    falling, rising = [6.0, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6]
    logits = torch.tensor([falling, falling, rising, rising, rising])
    labels = torch.tensor([0, 4, 0, 4, 5])  # ranked first, fifth, sixth, second and first
    counts = classification_counts(logits, labels)
    assert counts.tolist() == [[2, 0, 0, 0, 2, 1], [1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 2, 1]]
    assert accuracies(counts) == pytest.approx({"top1": 2 / 5, "top5": 4 / 5, "mean_per_class": (1 / 2 + 0 + 1) / 3})


def test_baseline_predicts_the_most_common_classes() -> None:
    images = torch.tensor([5, 0, 3, 1, 1, 2, 8, 0])  # 20 images of 6 classes; the five largest hold 19
    assert baseline_accuracies(images) == pytest.approx({"top1": 8 / 20, "top5": 19 / 20, "mean_per_class": 1 / 6})


def test_baseline_equals_a_classifier_with_the_same_scores_for_every_image() -> None:
    _, labels = unbalanced(9, absent=(4,))
    blind = labels.bincount(minlength=9).float() + torch.linspace(0.1, 0, 9)
    counts = classification_counts(blind.expand(len(labels), -1), labels)
    assert baseline_accuracies(counts[0]) == pytest.approx(accuracies(counts))
