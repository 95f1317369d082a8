"""Read ``results.json`` into the rows that the terminal table, the charts and the report share."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from lit_clip.evaluation.datacomp import OTHER_METRICS, PREFIX, datacomp_means
from lit_clip.evaluation.published import (
    Published,
    canonical_set,
    measured,
    measured_name,
    measured_weights,
    nearest_model,
    papers_sets,
    published,
)

Column = Literal["zero_shot", "linear_probe", "head"]
COLUMNS: dict[Column, str] = {"zero_shot": "zero-shot", "linear_probe": "linear probe", "head": "head"}
STATUSES = {"done": "", "missing": "not on disk", "failed": "failed"}
METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "map11": "11-point mAP",
    "roc_auc": "ROC AUC",
    "mean_top1_top5": "mean of top-1 and top-5",
    "pm": "mean of PM-0 and PM-10",
    "pm0": "PM-0",
    "pm10": "PM-10",
    "lexicon": "top-1 of its lexicon",
    "mwap": "mWAP",
    "mwsap": "mWSAP",
    "macro_f1": "macro F1",
    "worst_group_top1": "top-1 of the worst group",
    "worst_group_top5": "top-5 of the worst group",
    "jaccard": "Jaccard index",
    "miou": "mean IoU",
    "accuracy": "pointing accuracy",
    "map@10": "mAP@10",
    "knn_top1": "top-1 of 20 neighbours",
}
MERGED = "merged_"  # the beginning of recalls for which equal captions are one


@dataclass(frozen=True)
class Row:
    """One metric of a set; values are fractions.

    Retrieval counts as zero-shot, geolocation (which has labelled neighbours) as linear probe. Published figures are of
    the nearest of the paper's models, measured ones of these weights, or of OpenAI's of that model.
    """

    name: str
    metric: str  # its name in results.json
    status: str  # done, missing or failed
    reason: str = ""  # why the set is missing, failed or incomplete
    paper: str = ""  # the set's name in the paper
    values: dict[Column, float] = field(default_factory=dict)
    intervals: dict[Column, tuple[float, float]] = field(default_factory=dict)  # 99.5 %
    shots: dict[int, float] = field(default_factory=dict)  # means over draws, by number of examples per class
    papers: dict[Column, Published] = field(default_factory=dict)
    measured: dict[Column, Published] = field(default_factory=dict)
    baseline: float | None = None  # value that a constant answer reaches
    images: int | None = None  # of the test split
    skipped: int = 0  # images of any split that could not be read


def number(value: Any) -> float | None:
    """Return a finite number as float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percent(value: float | None, nothing: str = "") -> str:
    """Format 0.913 as ``91.3``."""
    return nothing if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """Format 0.012 as ``+1.2``."""
    return "" if value is None else f"{100 * value:+.1f}"


def interval_of(task: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """Return the interval of a task's metric in ``results.json``; None if it has none."""
    return as_interval((task.get("intervals") or {}).get(metric))


def as_interval(ends: Any) -> tuple[float, float] | None:
    """Return two finite numbers, anything else as None."""
    known = [number(end) for end in ends] if isinstance(ends, list | tuple) else []
    return (known[0], known[1]) if len(known) == 2 and known[0] is not None and known[1] is not None else None


def papers_percent(figure: Published | None) -> str:
    """Format a published figure like :func:`percent`, with a question mark if it could not be verified."""
    return "" if figure is None else percent(figure.value) + ("" if figure.verified else "?")


def metric_words(metric: str) -> str:
    """Format ``image_to_text_recall@1`` as ``image to text R@1``."""
    if metric.startswith("within_") and metric.endswith("km"):
        return f"within {metric[7:-2]} km"
    if metric.startswith("top1/"):
        return f"top-1 among the classes of {metric[5:]}"
    return METRICS.get(metric, metric.replace("_", " ").replace("recall@", "R@"))


def rows(results: Mapping[str, Any]) -> list[Row]:
    """Return one row per set and metric, in the order of the results; retrieval has one row per recall."""
    model = results.get("model") or {}
    models = nearest_model(model), measured_weights(model)
    return [row for name, entry in sets_of(results) for row in _rows_of(name, entry, models)]


def sets_of(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the names and entries of the sets."""
    return [(str(name), entry) for name, entry in (results.get("sets") or {}).items() if isinstance(entry, Mapping)]


def tasks_of(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the results of a set by task."""
    return {name: task for name, task in (entry.get("tasks") or {}).items() if isinstance(task, Mapping)}


def skipped_of(entry: Mapping[str, Any]) -> dict[str, list[Sequence[str]]]:
    """Return the images that could not be read, with the reasons, by split."""
    return {name: list(split.get("skipped") or []) for name, split in (entry.get("splits") or {}).items()}


def _rows_of(name: str, entry: Mapping[str, Any], models: tuple[str, str]) -> Iterator[Row]:
    tasks = tasks_of(entry)
    common: dict[str, Any] = {
        "name": name,
        "status": entry.get("status") or "done",
        "reason": entry.get("reason") or "",
        "paper": str(entry.get("paper") or ""),
        "images": ((entry.get("splits") or {}).get("test") or {}).get("images"),
        "skipped": sum(map(len, skipped_of(entry).values())),
    }
    found = [_row(entry, tasks, *reported, models, common) for reported in _reported(entry, tasks)]
    yield from found or [Row(metric=", ".join(tasks) or str(entry.get("metric") or ""), **common)]


def _reported(entry: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield tasks and metrics that get a row: the set's own metric, recalls in both directions, the distance used."""
    own = str(entry.get("metric") or "")
    if tasks.keys() & {*COLUMNS, "few_shot"}:
        yield "", own or "top1"
    recalls = tasks.get("retrieval", {}).get("metrics") or {}
    merged = recalls_of(recalls)
    # The field's figures are not merged, whatever captions repeat: they are compared by recall@1.
    for metric in dict.fromkeys([*merged, *(f"{way}_recall@1" for way in ("image_to_text", "text_to_image"))]):
        if metric in recalls:
            yield "retrieval", metric
    for task, result in tasks.items():
        if task not in (*COLUMNS, "few_shot", "retrieval", "geolocation") and result.get("metrics"):
            yield task, judging(own, result["metrics"])
    if "geolocation" in tasks:
        task = tasks["geolocation"]
        metrics = task.get("metrics") or {}
        yield "geolocation", next((k for k, v in metrics.items() if v == task.get("value")), next(iter(metrics), ""))


def recalls_of(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of a retrieval's recalls, the merged ones where captions repeat."""
    recalls = [metric for metric in metrics if "recall@" in metric]
    return [metric for metric in recalls if metric.startswith(MERGED)] or recalls


def judging(metric: str, metrics: Mapping[str, Any]) -> str:
    """Return the metric that a task is judged by: the set's own, or the task's first if that judges another task."""
    return metric if metric in metrics else next(iter(metrics), metric)


def _row(
    entry: Mapping[str, Any],
    tasks: Mapping[str, Mapping[str, Any]],
    other: str,
    metric: str,
    models: tuple[str, str],
    common: Mapping[str, Any],
) -> Row:
    columns: dict[Column, str] = {"linear_probe" if other == "geolocation" else "zero_shot": other}
    if not other:
        columns = {column: column for column in COLUMNS}
    of_metric = number((tasks.get(other, {}).get("baselines") or {}).get(metric))
    baseline = baseline_of({other: tasks[other]} if other else tasks) if of_metric is None else of_metric
    row = Row(metric=metric, baseline=baseline, shots={} if other else shots_of(entry), **common)
    for column, task in columns.items():
        result = tasks.get(task, {})
        value = number((result.get("metrics") or {}).get(metric) if other else result.get("value"))
        interval = interval_of(result, metric)
        if value is not None:
            row.values[column] = value
            if interval:
                row.intervals[column] = interval
        figure = published(row.paper, task, models[0], metric)
        others = measured(measured_name(row.name, row.paper), task, models[1], metric)
        if figure:
            row.papers[column] = figure
        if others:
            row.measured[column] = others
    return row


def given_metrics(entry: Mapping[str, Any]) -> dict[str, dict[Column, float]]:
    """Return the numbers of ``--metrics``, which are no fractions of images, by name and task."""
    found: dict[str, dict[Column, float]] = {}
    for column in COLUMNS:
        for name, value in (tasks_of(entry).get(column, {}).get("metrics") or {}).items():
            if name not in METRICS and "/" not in name and number(value) is not None:
                found.setdefault(name, {})[column] = value
    return found


def baseline_of(tasks: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the baseline of the first task that has one."""
    known = (number(task.get("baseline")) for task in tasks.values())
    return next((value for value in known if value is not None), None)


@dataclass(frozen=True)
class GroupMean:
    """The mean over a group of sets, each by its own metric; fractions, None if a set is missing."""

    group: str
    sets: int
    missing: list[str]
    ours: float | None
    papers: float | None

    @property
    def counted(self) -> str:
        """Say how many of the sets there are, and which are missing."""
        return f"{self.sets - len(self.missing)} of {self.sets}; missing: {', '.join(self.missing)}"


def group_means(table: Sequence[Row], column: Column) -> list[GroupMean]:
    """Return the mean of each group of which there is a set. Every group of sets with a mean is listed here."""
    groups = [_papers_mean(table, column), *(_datacomp_means(table) if column == "zero_shot" else ())]
    return [mean for mean in groups if len(mean.missing) < mean.sets]


def _papers_mean(table: Sequence[Row], column: Column) -> GroupMean:
    """The mean over the paper's 27 sets (tables 9 to 11), by the paper's metrics."""
    sets, found = papers_sets(), dict[str, Row]()
    for row in table:
        name = canonical_set(row.paper)
        if name and column in row.values and row.metric == sets[name]:
            found.setdefault(name, row)
    missing = [name for name in sets if name not in found]
    ours = [row.values[column] for row in found.values()]
    papers = [row.papers[column].value for row in found.values() if column in row.papers]
    means = [sum(values) / len(sets) if len(values) == len(sets) else None for values in (ours, papers)]
    return GroupMean(f"the paper's {len(sets)} sets", len(sets), missing, *means)


def _datacomp_means(table: Sequence[Row]) -> Iterator[GroupMean]:
    """DataComp's means, by its metrics; a retrieval set has the mean of its two directions."""
    values: dict[str, list[float]] = {}
    for row in table:
        metric = "recall@1" if row.metric.endswith("recall@1") and not row.metric.startswith(MERGED) else row.metric
        own = row.name.startswith(PREFIX) and metric == OTHER_METRICS.get(row.name.removeprefix(PREFIX), "top1")
        if own and "zero_shot" in row.values:
            values.setdefault(row.name, []).append(row.values["zero_shot"])
    for group, mean in datacomp_means({name: fmean(of_set) for name, of_set in values.items()}).items():
        yield GroupMean(f"DataComp, {group}", mean.sets, mean.missing, mean.value, None)


def shots_of(entry: Mapping[str, Any], of: str = "shots") -> dict[int, float]:
    """Return the mean over draws by number of shots, of probes or of heads (``head``)."""
    draws = draws_of(tasks_of(entry).get("few_shot", {}), of)
    return {shots: sum(values) / len(values) for shots, values in draws.items()}


def draws_of(few_shot: Mapping[str, Any], of: str = "shots") -> dict[int, list[float]]:
    """Return the values of all draws by number of shots, as far as there are any."""
    draws = {}
    for shots, values in few_shot.get(of) or []:
        draws[int(shots)] = [value for value in map(number, values) if value is not None]
    return {shots: values for shots, values in draws.items() if values}
