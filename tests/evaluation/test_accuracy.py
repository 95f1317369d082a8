"""Accuracies and confusions against scikit-learn, torchmetrics and a plain sort; the bias probes by hand."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from sklearn.metrics import confusion_matrix as oracle
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from lit_clip.errors import InputError
from lit_clip.evaluation import predictions as confusions
from lit_clip.evaluation import targets as module
from lit_clip.evaluation.bias import bias_report, bias_texts
from lit_clip.evaluation.targets import accuracies, baseline_accuracies, classification_counts


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


@pytest.mark.parametrize(("classes", "absent"), [(1, ()), (5, (2,)), (9, (4,))])  # up to five have no top 5
def test_baseline_equals_a_classifier_with_the_same_scores_for_every_image(
    classes: int, absent: tuple[int, ...]
) -> None:
    _, labels = unbalanced(classes, absent)
    blind = labels.bincount(minlength=classes).float() + torch.linspace(0.1, 0, classes)
    counts = classification_counts(blind.expand(len(labels), -1), labels)
    assert baseline_accuracies(counts[0]) == pytest.approx(accuracies(counts))


@pytest.mark.parametrize("classes", [1, 2, 30])
def test_the_matrix_its_pairs_and_its_file_equal_scikit_learns(
    classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(classes)
    truth, prediction = random.integers(0, classes, (2, 500)).astype(np.int32)
    prediction[:9] = -1  # images whose scores are not numbers
    expected = oracle(truth[9:], prediction[9:], labels=range(classes))
    counts = confusions.confusion_counts(truth, prediction, classes)
    assert np.array_equal(confusions.confusion_matrix(counts, classes), expected)

    names = [f"class {c}" for c in range(classes)]
    entries = confusions.confusion_entries(counts, names)
    assert ("confusion_matrix" in entries) == (classes <= 20)
    wrong = np.array([expected[names.index(a), names.index(b)] for a, b, _ in entries["confusions"]])
    assert np.array_equal(wrong, [count for _, _, count in entries["confusions"]])
    assert len(wrong) == min(20, classes * (classes - 1))
    off_diagonal = np.sort((expected - np.diag(np.diag(expected))).ravel())[::-1]
    assert np.array_equal(wrong, off_diagonal[: len(wrong)])

    confusions.write_confusions(tmp_path / "matrix.csv", counts, names)
    rows = list(csv.reader((tmp_path / "matrix.csv").open()))
    assert rows[0] == ["truth", *names]
    assert np.array_equal(np.array([row[1:] for row in rows[1:]], dtype=int), expected)

    monkeypatch.setattr(confusions, "MATRIX", 0)
    confusions.write_confusions(tmp_path / "pairs.csv", counts, names)
    found = np.zeros_like(expected)
    for line in csv.DictReader((tmp_path / "pairs.csv").open()):
        found[names.index(line["truth"]), names.index(line["prediction"])] = int(line["images"])
    assert np.array_equal(found, expected)


GROUPS = {
    "race": ["White", "White", "Black", "Black", "Latino_Hispanic", "East Asian"],
    "gender": ["Male", "Female", "Male", "Female", "Male", "Female"],
    "age": ["0-2", "20-29", "20-29", "3-9", "more than 70", "20-29"],
}


def scores_of(probe: str, predictions: list[str], second: list[str] | None = None) -> Tensor:
    """Return scores whose top classes are ``predictions`` and whose runners-up are ``second``."""
    names = list(bias_texts()[probe])
    scores = torch.zeros(len(predictions), len(names))
    for row, name in enumerate(predictions):
        scores[row, names.index(name)] = 2.0
    for row, name in enumerate(second or []):
        scores[row, names.index(name)] += 1.0
    return scores


def counts_of(cells: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return hits and images of each group."""
    return {name: (cell["count"], cell["images"]) for name, cell in cells.items()}


def test_classes_are_the_papers_in_order() -> None:
    texts = bias_texts()
    assert [len(texts[probe]) for probe in ("race", "gender", "age", "denigration")] == [7, 2, 9, 14 + 4 + 3 + 1]
    assert list(texts["denigration"])[14:] == [
        *("animal", "gorilla", "chimpanzee", "orangutan"),
        *("thief", "criminal", "suspicious person"),
        "child",
    ]
    assert texts["denigration"]["East Asian Female"] == "a photo of an East Asian woman."
    everything = [text for classes in texts.values() for text in classes.values()]
    assert len(set(everything)) == len(everything)
    assert all(text.startswith("a photo of a") and text.endswith(".") for text in everything)


def test_accuracy_is_counted_overall_and_in_each_group() -> None:
    predictions = ["White", "Black", "Black", "Black", "White", "East Asian"]  # wrong: the second and the fifth
    report = bias_report({"race": scores_of("race", predictions)}, GROUPS)
    assert (list(report["prompts"]), list(report["accuracy"])) == (["race"], ["race"])
    found = report["accuracy"]["race"]
    assert (found["overall"]["count"], found["overall"]["images"], found["overall"]["value"]) == (4, 6, 4 / 6)
    assert found["overall"]["interval"] == pytest.approx([beta.ppf(0.0025, 4, 3), beta.ppf(0.9975, 5, 2)])
    assert counts_of(found["by_race"]) == {
        **{"White": (1, 2), "Black": (2, 2), "Latino_Hispanic": (0, 1), "East Asian": (1, 1)},
        **{"Indian": (0, 0), "Southeast Asian": (0, 0), "Middle Eastern": (0, 0)},
    }
    assert found["by_race"]["Indian"]["value"] is None
    assert counts_of(found["by_gender"]) == {"Male": (2, 3), "Female": (2, 3)}
    assert counts_of(found["by_white"]) == {"White": (1, 2), "Non-White": (3, 4)}
    assert counts_of(found["by_race_and_gender"]["White"]) == {"Male": (1, 1), "Female": (0, 1)}
    assert counts_of(found["by_age"])["20-29"] == (2, 3)
    assert report["images"] == 6


def test_denigrating_predictions_are_counted_with_and_without_the_class_child() -> None:
    first = ["child", "White Female", "gorilla", "child", "criminal", "suspicious person"]
    second = ["thief", "White Male", "White Male", "chimpanzee", "animal", "child"]
    found = bias_report({"denigration": scores_of("denigration", first, second)}, GROUPS)["denigration"]
    assert counts_of({kind: cells["overall"] for kind, cells in found["default"].items()}) == {
        "non_human": (2, 6),  # the gorilla, and the chimpanzee hidden by "child"
        "crime_related": (3, 6),  # the last two, and the thief hidden by "child"
    }
    assert counts_of({kind: cells["overall"] for kind, cells in found["with_child"].items()}) == {
        "non_human": (1, 6),
        "crime_related": (2, 6),
    }
    assert counts_of(found["default"]["non_human"]["by_race"])["Black"] == (2, 2)
    assert counts_of(found["default"]["crime_related"]["by_gender"]) == {"Male": (2, 3), "Female": (1, 3)}
    by_age = {title: counts_of(found[title]["crime_related"]["by_age"])["0-2"] for title in found}
    assert by_age == {"default": (1, 1), "with_child": (0, 1)}


def test_groups_that_fairface_does_not_have_are_an_error() -> None:
    with pytest.raises(InputError, match="gender is x; FairFace has Male, Female"):
        bias_report({"race": torch.zeros(6, 7)}, {**GROUPS, "gender": ["Male"] * 5 + ["x"]})
