"""Confusions between classes: the whole matrix, and its most frequent pairs.

Shapes: N images, C classes. A prediction of -1, of an image whose scores are not numbers, is in no column.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_clip.tools.text_files import write_csv

PAIRS = 20  # confused pairs of classes that are reported
TABLE = 20  # classes; the matrix of more is no table on a page
MATRIX = 1000  # classes; the file of more has a line for each pair of classes that has images


def confusion_counts(truth_N: np.ndarray, prediction_N: np.ndarray, classes: int) -> Iterator[tuple[int, int, int]]:
    """Yield (true class, predicted class, images) for each pair with images, most frequent first.

    Equally frequent pairs are in the order of the classes. torchmetrics' matrix needs ``[C, C]``, this one O(N).
    """
    known = prediction_N >= 0
    codes, counts = np.unique(truth_N[known].astype(np.int64) * classes + prediction_N[known], return_counts=True)
    for place in (-counts).argsort(kind="stable").tolist():
        code = int(codes[place])
        yield code // classes, code % classes, int(counts[place])


def confusion_matrix(truth_N: np.ndarray, prediction_N: np.ndarray, classes: int) -> np.ndarray:
    """Return the number of images by true class (rows) and predicted class (columns), int64 ``[C, C]``."""
    return _matrix(confusion_counts(truth_N, prediction_N, classes), classes)


def _matrix(counts: Iterable[tuple[int, int, int]], classes: int) -> np.ndarray:
    matrix = np.zeros((classes, classes), dtype=np.int64)
    for truth, prediction, count in counts:
        matrix[truth, prediction] = count
    return matrix


def confusion_entries(truth_N: np.ndarray, prediction_N: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return entries for a page: the most confused pairs, and the matrix if there are few classes."""
    pairs = [each for each in confusion_counts(truth_N, prediction_N, len(names)) if each[0] != each[1]][:PAIRS]
    found: dict[str, Any] = {"confusions": [(names[truth], names[other], count) for truth, other, count in pairs]}
    if len(names) <= TABLE:
        found["confusion_matrix"] = confusion_matrix(truth_N, prediction_N, len(names)).tolist()
    return found


def write_confusions(
    path: Path, counts: Iterable[tuple[int, int, int]], names: Sequence[str], unit: str = "images"
) -> None:
    """Write the whole matrix of :func:`confusion_counts` as CSV, with one row per true class.

    Of more than :data:`MATRIX` classes it is a line for each pair that has images: truth, prediction, images.
    """
    if len(names) > MATRIX:
        pairs = ((names[truth], names[prediction], count) for truth, prediction, count in counts)
        write_csv(path, [("truth", "prediction", unit), *pairs])
    else:
        matrix = _matrix(counts, len(names)).tolist()
        write_csv(path, [("truth", *names), *((name, *row) for name, row in zip(names, matrix, strict=True))])
