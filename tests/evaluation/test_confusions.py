"""Confusion matrices equal scikit-learn's, in every form."""

import csv
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as oracle

from lit_clip.evaluation import confusions


@pytest.mark.parametrize("classes", [1, 2, 30])
def test_the_matrix_its_pairs_and_its_file_equal_scikit_learns(
    classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(classes)
    truth, prediction = random.integers(0, classes, (2, 500)).astype(np.int32)
    prediction[:9] = -1  # images whose scores are not numbers
    expected = oracle(truth[9:], prediction[9:], labels=range(classes))
    assert np.array_equal(confusions.confusion_matrix(truth, prediction, classes), expected)

    names = [f"class {c}" for c in range(classes)]
    entries = confusions.confusion_entries(truth, prediction, names)
    assert ("confusion_matrix" in entries) == (classes <= 20)
    wrong = np.array([expected[names.index(a), names.index(b)] for a, b, _ in entries["confusions"]])
    assert np.array_equal(wrong, [count for _, _, count in entries["confusions"]])
    assert len(wrong) == min(20, classes * (classes - 1))
    off_diagonal = np.sort((expected - np.diag(np.diag(expected))).ravel())[::-1]
    assert np.array_equal(wrong, off_diagonal[: len(wrong)])

    counts = list(confusions.confusion_counts(truth, prediction, len(names)))
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
