"""Compare a run with other runs: image by image where both kept predictions, and over a recipe's seeds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from lit_clip.errors import InputError, require
from lit_clip.evaluation.intervals import Interval, UnitScores, mean_interval
from lit_clip.evaluation.overview import COLUMNS, number, sets_of, tasks_of
from lit_clip.evaluation.predictions import predictions_name, read_predictions
from lit_clip.evaluation.results import read_results
from lit_clip.evaluation.scores import METRICS
from lit_clip.tools.hashing import sha256_of_file

THIS = "this"  # name of the group that the run itself belongs to
THIS_RUN = "this run"  # name of the run itself in tables and charts
NEAR_KM = 25  # the distance that geolocation is compared by
COMPARED = {  # metrics that other tasks than a classifier's are compared by
    "retrieval": ("image_to_text_recall@1", "text_to_image_recall@1"),
    "geolocation": (f"within_{NEAR_KM}km",),
    "pointing": ("accuracy",),
    "image_retrieval": ("map@10",),
    "document_retrieval": ("ndcg@10",),
}


class OtherRun(NamedTuple):
    """A run to compare with, its results, and its recipe's name: its seeds belong together (empty: none)."""

    group: str
    folder: Path
    results: dict[str, Any]


def other_runs(texts: Sequence[str], output: Path) -> dict[str, OtherRun]:
    """Read runs and return them by name; each is a ``PATH`` of a ``results.json`` or its folder, or ``NAME=PATH``.

    Runs with the same name are seeds of one recipe. ``output`` is the folder of the run that they are compared with.
    """
    found: dict[str, OtherRun] = {}
    seen: set[tuple[str, Path]] = set()  # a run can stand alone and be a seed of a recipe
    groups = [group for group, _ in map(_group_and_path, texts)]
    for group, path in map(_group_and_path, texts):
        name = f"{group}: {path}" if group == THIS or groups.count(group) > 1 and group else group or str(path)
        folder = path if path.is_dir() else path.parent
        place = group, folder.resolve()
        require(name not in found and place not in seen, f"--compare {path}: given twice")
        require(
            (group or str(folder)) != THIS_RUN,
            f"--compare {path}: {THIS_RUN!r} names the evaluated run; choose another NAME=PATH",
        )
        itself = folder.resolve() == output.resolve()
        require(not itself, f"--compare {path}: this is --output, which every run is compared with; leave it out")
        found[name] = OtherRun(group, folder, read_results(path))
        seen.add(place)
    return found


def _group_and_path(text: str) -> tuple[str, Path]:
    """Split ``NAME=PATH``; an existing path may itself contain an equals sign."""
    group, equals, path = text.partition("=")
    return (group.strip(), Path(path)) if equals and group.strip() and not Path(text).exists() else ("", Path(text))


def seed_groups(others: Mapping[str, OtherRun]) -> dict[str, list[str]]:
    """Return the run names of each recipe with several runs; the run itself belongs to :data:`THIS`."""
    groups: dict[str, list[str]] = {}
    for name, run in others.items():
        if run.group:
            groups.setdefault(run.group, []).append(name)
    return {group: names for group, names in groups.items() if len(names) > 1 or group == THIS}


@dataclass(frozen=True)
class PairedDifference:
    """A metric of this run minus the same metric of another run on the same images; fractions."""

    run: str
    set: str
    task: str
    metric: str
    images: int = 0  # number of images, or of queries
    difference: float | None = None  # None if the runs cannot be paired
    # 99.5 % bootstrap interval of the difference, over images (within classes for a mean per class); None if it has no
    # width, which would look certain: within classes, all scores differ by the same
    interval: Interval | None = None
    # exact two-sided test that the images which only one run gets right are as often one's as the other's (McNemar
    # 1947); None if images are not simply right or wrong, or the set has several folds
    p_value: float | None = None
    reason: str = ""  # why they cannot be paired


def paired_differences(
    results: Mapping[str, Any], folder: Path, others: Mapping[str, OtherRun]
) -> list[PairedDifference]:
    """Compare a run with others on each shared set and task; its own recipe's seeds are not compared."""
    found = []
    for name, other in others.items():
        theirs = dict(sets_of(other.results))
        for set_name, entry in sets_of(results) if other.group != THIS else ():
            for task, metric in _compared(entry, theirs.get(set_name, {})):
                place, other_metric = PairedDifference(name, set_name, task, metric), theirs[set_name].get("metric")
                try:
                    same = task not in COLUMNS or other_metric == metric
                    require(same, f"its metric is {metric} here and {other_metric} there")
                    runs = [(folder, entry), (other.folder, theirs[set_name])]
                    found.append(_paired(place, [_scores(where, each, place) for where, each in runs]))
                except InputError as error:
                    found.append(replace(place, reason=str(error)))
    return found


def _compared(entry: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the tasks that both runs have, with the metrics to compare."""
    own = (str(entry.get("metric") or "top1"),)
    for task in filter(tasks_of(theirs).__contains__, tasks_of(entry)):
        yield from ((task, metric) for metric in (own if task in COLUMNS else COMPARED.get(task, ())))


class _Scores(NamedTuple):
    """Scores of a run's images, sorted by fold and key, and the hash of the truth that judged them."""

    fold: np.ndarray
    key: np.ndarray
    truth: np.ndarray
    value: np.ndarray
    judged: object


def _scores(folder: Path, entry: Mapping[str, Any], place: PairedDifference) -> _Scores:
    """Read the scores that average to a metric."""
    name, task, metric = place.set, place.task, place.metric
    result = tasks_of(entry)[task]
    known = number((result.get("metrics") or {}).get(metric))
    table = read_predictions(folder, name, task)
    require(task in ("retrieval", "geolocation") or "score" in table, f"{metric} is not a mean over images")
    stale = f"predictions of {name} in {folder} are not those of its results.json; evaluate it again"
    digest = result.get("predictions_sha256")  # none before there were any
    require(digest is None or digest == sha256_of_file(folder / predictions_name(name, task)), stale)
    try:
        if task == "retrieval":
            table = {
                key: column[table["direction"] == metric.removesuffix("_recall@1")] for key, column in table.items()
            }
            value = table["rank"] < 1
        else:
            value = table["km"] <= NEAR_KM if task == "geolocation" else table["score"]
        key = table["key"].astype(str)
        none = np.zeros(len(key), dtype=np.int64)
        fold, truth = (np.asarray(table.get(column, none)).astype(np.int64) for column in ("fold", "truth"))
        order = np.lexsort((key, fold))
        columns = (np.asarray(column)[order] for column in (fold, key, truth, value.astype(np.float64)))
        found = _Scores(*columns, judged=result.get("judged"))
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(stale) from error
    mean = fmean(fold.mean() for fold in _folds(found, metric)) if len(found.key) else math.nan
    require(known is not None and abs(mean - known) < 1e-5, stale)
    return found


def _folds(scores: _Scores, metric: str) -> list[UnitScores]:
    record = METRICS.get(metric)  # none of another task's
    classes = scores.truth if record and record.per_class else None
    of_fold = [scores.fold == fold for fold in np.unique(scores.fold)]
    return [UnitScores(scores.value[rows], None if classes is None else classes[rows]) for rows in of_fold]


def _paired(place: PairedDifference, both: Sequence[_Scores]) -> PairedDifference:
    ours, theirs = both
    if not (np.array_equal(ours.key, theirs.key) and np.array_equal(ours.fold, theirs.fold)):
        here, there = (set(zip(run.fold.tolist(), run.key.tolist(), strict=True)) for run in both)
        raise InputError(f"other images: {len(here - there)} only here, {len(there - here)} only there")
    require(np.array_equal(ours.truth, theirs.truth), "the same images have other labels")
    same = ours.judged == theirs.judged
    require(same, "images with the same keys have other captions, places or labels, or another version judged them")
    folds = _folds(ours._replace(value=ours.value - theirs.value), place.metric)
    low, high = mean_interval([fold.bootstrap() for fold in folds])
    binary = all(bool(np.isin(run.value, (0, 1)).all()) for run in both)
    return replace(
        place,
        images=len(ours.key),
        difference=fmean(fold.mean() for fold in folds),
        interval=(low, high) if low < high else None,
        p_value=mcnemar(ours.value, theirs.value) if binary and len(folds) == 1 else None,
    )


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return McNemar's exact two-sided p-value for two runs' 0 or 1 per image; 1 if all are equal."""
    from scipy.stats import binomtest

    only_ours, only_theirs = int((ours > theirs).sum()), int((theirs > ours).sum())
    return float(binomtest(only_ours, only_ours + only_theirs).pvalue) if only_ours + only_theirs else 1.0
