"""A task's predictions for each image, in one file per set and task, and the confusions between classes.

Shapes: N images, C classes, E distinct image-caption pairs. A prediction of -1, of an image whose scores are not
numbers, is in no column of a confusion matrix.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_clip.errors import InputError
from lit_clip.evaluation.intervals import Interval, UnitScores
from lit_clip.evaluation.overlap import clopper_pearson
from lit_clip.evaluation.scores import METRICS
from lit_clip.evaluation.targets import Targets, predictions
from lit_clip.retrieval.metrics import PairIndices, Ranks
from lit_clip.tools.atomic import make_folder, replacing
from lit_clip.tools.hashing import hex_digest, sha256_of_file
from lit_clip.tools.images import open_image
from lit_clip.tools.reading import reading, write_csv

Columns = dict[str, Any]  # values of a file by column, all of the same length
Counts = list[tuple[int, int, int]]  # true class, predicted class, and how many images or pixels
PART = 2**22  # probabilities computed at once
WHOLE = 2**23  # probabilities; a file with at most so many has those of all classes (32 MiB), others of the top ones
TOP = 10  # classes
PAIRS = 20  # confused pairs of classes that are reported
TABLE = 20  # classes; the matrix of more is no table on a page
MATRIX = 1000  # classes; the file of more has a line for each pair of classes that has images


def class_columns(
    metric: str, keys: Sequence[str], scores: Tensor, targets: Targets, units: Mapping[str, UnitScores], fold: int
) -> Columns:
    """Return the columns of a classification: one row per image, or with ``pm`` per anchor frame.

    ``truth`` and ``prediction`` are places in ``class_names`` of the set's entry in ``results.json``, -1 for none;
    ``score`` is the image's contribution to the set's metric, absent if that is not a mean over images.
    """
    record = METRICS[metric]
    prediction = record.predictions(scores, targets) if record.predictions else predictions(scores).cpu()
    rows = record.rows(targets) if record.rows else range(len(keys))
    places = np.array(rows, dtype=np.int64)
    columns: Columns = {
        "fold": np.full(len(places), fold, dtype=np.int16),
        "key": [keys[row] for row in rows],
        "truth": targets.labels.numpy()[places].astype(np.int32),
        "prediction": np.asarray(prediction)[places].astype(np.int32),
    }
    if metric in units:
        columns["score"] = units[metric].values.astype(np.float32)
    return columns


def in_parts(probabilities: Callable[[slice], Tensor], images: int, classes: int) -> Iterator[Tensor]:
    """Yield the probabilities ``[B, C]`` of all images in parts."""
    rows = max(1, PART // max(1, classes))
    return (probabilities(slice(start, start + rows)) for start in range(0, images, rows))


def probability_columns(
    columns: Columns, probabilities: Callable[[slice], Tensor], targets: Targets, images: int
) -> Columns:
    """Return the probability columns to add to :func:`class_columns`, float32; none for anchor frames.

    ``probability`` is the predicted class's, ``truth_probability`` the true one's, each NaN without such a class. With
    ``images`` of all folds, their number times C decides between ``probabilities`` of all classes, ``[N, C]``, and
    ``top_classes`` with ``top_probabilities`` ``[N, 10]``, the highest first.
    """
    if len(columns["key"]) != len(targets):
        return {}
    whole, parts, start = images * targets.classes <= WHOLE, list[Columns](), 0
    for part in in_parts(probabilities, len(targets), targets.classes):
        rows = slice(start, start := start + len(part))
        found: Columns = {"probabilities": part.numpy()}
        for name, classes in (("probability", columns["prediction"]), ("truth_probability", columns["truth"])):
            place = torch.from_numpy(classes[rows].astype(np.int64))
            own = part.gather(1, place.clamp(min=0)[:, None])[:, 0]
            found[name] = own.masked_fill(place < 0, torch.nan).numpy()
        if not whole:
            top = part.topk(min(TOP, targets.classes), dim=1)
            del found["probabilities"]
            found |= {"top_classes": top.indices.int().numpy(), "top_probabilities": top.values.numpy()}
        parts.append(found)
    return joined(parts)


def retrieval_columns(keys: Sequence[str], pairs: PairIndices, ranks: Ranks) -> Columns:
    """Return the columns of a retrieval: one row per query; ``rank`` is its best right candidate's, 0 is best.

    Text queries are called like their image (whose ``keys`` are given) with a number, as captions have no keys.
    """
    captions: Counter[int] = Counter()
    names = []
    for image in pairs.image.repeat_interleave(pairs.rows).tolist():
        names.append(f"{keys[image]}#{captions[image]}")
        captions[image] += 1
    return {
        "direction": ["image_to_text"] * len(keys) + ["text_to_image"] * len(names),
        "key": [*keys, *names],
        "rank": torch.cat([ranks.image, ranks.pair.repeat_interleave(pairs.rows)]).numpy().astype(np.int32),
    }


def recall_intervals(metrics: Mapping[str, float], images: int, captions: int) -> dict[str, Interval]:
    """Return the intervals of recalls, as proportions of independent queries."""
    queries = {name: captions if "text_to_image" in name else images for name in metrics if "recall@" in name}
    return {name: clopper_pearson(round(metrics[name] * count), count) for name, count in queries.items()}


def joined(folds: Sequence[Columns]) -> Columns:
    """Join the rows of several folds."""
    return {name: np.concatenate([fold[name] for fold in folds]) for name in folds[0]}


def predictions_name(name: str, task: str) -> str:
    """Return the name of a file of predictions, relative to the run's folder."""
    return f"predictions/{name}/{task}.parquet"


def write_predictions(folder: Path, name: str, task: str, columns: Columns) -> str:
    """Write the predictions of a set's task as Parquet; return :func:`predictions_name`.

    A key that is not UTF-8, as a file's name need not be, has its other bytes written out: keys stay distinct.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(values: Any) -> Any:
        if getattr(values, "ndim", 1) == 1:
            return values
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

    keys = [str(key).encode("utf-8", "backslashreplace").decode() for key in columns["key"]]
    path = folder / predictions_name(name, task)
    make_folder(path.parent)
    with replacing(path) as draft:
        table = pa.table({**{each: column(values) for each, values in columns.items()}, "key": keys})
        pq.write_table(table, draft, compression="zstd")
    return predictions_name(name, task)


def predictions_entry(
    folder: Path | None, name: str, task: str, columns: Columns, judged: Iterable[object]
) -> dict[str, str]:
    """Write the predictions of a set's task; return their entry in ``results.json``, which is empty without a folder.

    ``judged`` is what was right, an object with the key for each image, in any order; its hash tells whether two runs
    were judged alike, which their files alone do not.
    """
    if folder is None:
        return {}
    path = write_predictions(folder, name, task, columns)
    digest = hex_digest(sorted(map(repr, judged)))
    return {"predictions": path, "predictions_sha256": sha256_of_file(folder / path), "judged": digest}


def read_predictions(folder: Path, name: str, task: str) -> dict[str, np.ndarray]:
    """Read those columns of a predictions file that have one value per row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = _inside(folder, predictions_name(name, task))
    if path is None or not path.is_file():
        raise InputError(f"no {predictions_name(name, task)} in {folder}")
    with reading(path, "file of predictions"):
        single = [each.name for each in pq.read_schema(path) if not pa.types.is_nested(each.type)]
        table = pq.read_table(path, columns=single)
        return {column: table[column].to_numpy(zero_copy_only=False) for column in table.column_names}


def run_image(folder: Path, name: Any) -> Image.Image | None:
    """Open an image that the results name, as RGB; None if it is outside the run's folder, missing or broken."""
    try:
        path = _inside(folder, str(name))
        return open_image(path).convert("RGB") if path else None
    except (InputError, OSError, ValueError):
        return None


def _inside(folder: Path, name: str) -> Path | None:
    path, within = (Path(os.path.realpath(each)) for each in (folder / name, folder))
    return path if path.is_relative_to(within) else None


def confusion_counts(truth_N: np.ndarray, prediction_N: np.ndarray, classes: int) -> Counts:
    """Return (true class, predicted class, images) for each pair with images, most frequent first.

    Equally frequent pairs are in the order of the classes. torchmetrics' matrix needs ``[C, C]``, this one O(N).
    """
    known = prediction_N >= 0
    codes, counts = np.unique(truth_N[known].astype(np.int64) * classes + prediction_N[known], return_counts=True)
    order = (-counts).argsort(kind="stable")
    truth, prediction = np.divmod(codes[order], classes)
    return list(zip(truth.tolist(), prediction.tolist(), counts[order].tolist(), strict=True))


def confusion_matrix(counts: Counts, classes: int) -> np.ndarray:
    """Return the number of images by true class (rows) and predicted class (columns), int64 ``[C, C]``."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    for truth, prediction, count in counts:
        matrix[truth, prediction] = count
    return matrix


def confusion_entries(counts: Counts, names: Sequence[str]) -> dict[str, Any]:
    """Return entries for a page: the most confused pairs, and the matrix if there are few classes."""
    pairs = [each for each in counts if each[0] != each[1]][:PAIRS]
    found: dict[str, Any] = {"confusions": [(names[truth], names[other], count) for truth, other, count in pairs]}
    if len(names) <= TABLE:
        found["confusion_matrix"] = confusion_matrix(counts, len(names)).tolist()
    return found


def write_confusions(path: Path, counts: Counts, names: Sequence[str], unit: str = "images") -> None:
    """Write the whole matrix of :func:`confusion_counts` as CSV, with one row per true class.

    Of more than :data:`MATRIX` classes it is a line for each pair that has images: truth, prediction, images.
    """
    if len(names) > MATRIX:
        pairs = ((names[truth], names[prediction], count) for truth, prediction, count in counts)
        write_csv(path, [("truth", "prediction", unit), *pairs])
    else:
        matrix = confusion_matrix(counts, len(names)).tolist()
        write_csv(path, [("truth", *names), *((name, *row) for name, row in zip(names, matrix, strict=True))])
