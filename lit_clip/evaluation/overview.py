"""``results.json`` as rows, which the terminal, the files, the page and the charts render."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from lit_clip.evaluation.published import (
    DATACOMP,
    Published,
    canonical_set,
    datacomp_groups,
    measured,
    measured_weights,
    nearest,
    papers_sets,
    published,
)
from lit_clip.evaluation.scores import METRICS

Column = str | int  # zero_shot, linear_probe, head, or a number of shots
COLUMNS = {"zero_shot": "zero-shot", "linear_probe": "linear probe", "head": "head"}
TASKS = {**COLUMNS, "geolocation": "location of the nearest neighbour", "bias": "bias probe"}
STATUSES = {"done": "", "missing": "not on disk", "failed": "failed"}
MERGED = "merged_"  # the beginning of recalls for which equal captions are one
RECALLS = ("image_to_text_recall@1", "text_to_image_recall@1")  # by which sets of captions are compared
Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One metric of a set; values are fractions.

    Retrieval counts as zero-shot, geolocation (which has labelled neighbours) as linear probe; values of shots are
    means over draws. Published figures are of the nearest of the paper's models, measured ones of these weights, or of
    OpenAI's of that model.
    """

    name: str
    metric: str  # its name in results.json
    status: str  # done, missing or failed
    reason: str = ""  # why the set is missing, failed or incomplete
    paper: str = ""  # the set's name in the paper
    values: dict[Column, float] = field(default_factory=dict)
    intervals: dict[Column, Interval] = field(default_factory=dict)  # 99.5 %
    papers: dict[Column, Published] = field(default_factory=dict)
    measured: dict[Column, Published] = field(default_factory=dict)
    baseline: float | None = None  # value that a constant answer reaches
    images: int | None = None  # of the test split
    skipped: int = 0  # images of any split that could not be read

    @property
    def shots(self) -> list[int]:
        """Numbers of shots for which the row has values."""
        return [column for column in self.values if isinstance(column, int)]


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


def interval_of(task: Mapping[str, Any], metric: str) -> Interval | None:
    """Return the interval of a task's metric in ``results.json``; None if it has none."""
    return as_interval((task.get("intervals") or {}).get(metric))


def as_interval(ends: Any) -> Interval | None:
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
    return METRICS[metric].words if metric in METRICS else metric.replace("_", " ").replace("recall@", "R@")


def task_words(task: str, metric: str) -> str:
    """Format a task and its metric, such as ``linear probe, top-1``."""
    return f"{TASKS.get(task, task.replace('_', ' '))}, {metric_words(metric)}"


def rows(results: Mapping[str, Any]) -> list[Row]:
    """Return one row per set and metric, in the order of the results; retrieval has one row per recall."""
    model = results.get("model") or {}
    models = nearest(model).name, measured_weights(model)
    return [row for name, entry in sets_of(results) for row in _rows_of(name, entry, *models)]


def sets_of(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the names and entries of the sets."""
    return [(str(name), entry) for name, entry in (results.get("sets") or {}).items() if isinstance(entry, Mapping)]


def tasks_of(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the results of a set by task."""
    return {name: task for name, task in (entry.get("tasks") or {}).items() if isinstance(task, Mapping)}


def skipped_of(entry: Mapping[str, Any]) -> dict[str, list[Sequence[str]]]:
    """Return the unreadable images, with reasons, by split."""
    return {name: list(split.get("skipped") or []) for name, split in (entry.get("splits") or {}).items()}


def _rows_of(name: str, entry: Mapping[str, Any], model: str, weights: str) -> Iterator[Row]:
    tasks, paper = tasks_of(entry), str(entry.get("paper") or "")
    common: dict[str, Any] = {
        "name": name,
        "status": entry.get("status") or "done",
        "reason": entry.get("reason") or "",
        "paper": paper,
        "images": ((entry.get("splits") or {}).get("test") or {}).get("images"),
        "skipped": sum(map(len, skipped_of(entry).values())),
    }
    reported = list(_reported(entry, tasks))
    for metric, columns in reported:
        results = {column: tasks.get(task, {}) for column, task in columns.items()}
        row = Row(metric=metric, baseline=_baseline(results, metric, tasks), **common)
        for column, task in columns.items():
            value = number((results[column].get("metrics") or {}).get(metric, results[column].get("value")))
            interval = interval_of(results[column], metric)
            figure = published(paper, task, model).get(metric)
            others = measured(name, paper, task, weights).get(metric)
            row.values.update({} if value is None else {column: value})
            row.intervals.update({column: interval} if interval and value is not None else {})
            row.papers.update({column: figure} if figure else {})
            row.measured.update({column: others} if others else {})
        if len(columns) > 1:
            row.values.update((shots, mean) for shots, mean in shots_of(entry).items())
        yield row
    if not reported:
        yield Row(metric=", ".join(tasks) or str(entry.get("metric") or ""), **common)


def _reported(
    entry: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, dict[Column, str]]]:
    """Yield the metrics that get a row, with the task that each column shows.

    They are the set's own metric, recalls in both directions, the distance used, and what another task is judged by.
    """
    own = str(entry.get("metric") or "")
    if tasks.keys() & {*COLUMNS, "few_shot"}:
        yield own or "top1", {column: column for column in COLUMNS}
    recalls = tasks.get("retrieval", {}).get("metrics") or {}
    # The field's figures are not merged, whatever captions repeat: they are compared by recall@1.
    for metric in dict.fromkeys([*recalls_of(recalls), *RECALLS]):
        if metric in recalls:
            yield metric, {"zero_shot": "retrieval"}
    for task, result in tasks.items():
        if task not in (*COLUMNS, "few_shot", "retrieval", "geolocation") and result.get("metrics"):
            yield judging(own, result["metrics"]), {"zero_shot": task}
    if "geolocation" in tasks:
        task = tasks["geolocation"]
        metrics = task.get("metrics") or {}
        used = next((k for k, v in metrics.items() if v == task.get("value")), next(iter(metrics), ""))
        yield used, {"linear_probe": "geolocation"}


def recalls_of(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of a retrieval's recalls; the merged recalls where captions repeat."""
    recalls = [metric for metric in metrics if "recall@" in metric]
    return [metric for metric in recalls if metric.startswith(MERGED)] or recalls


def judging(metric: str, metrics: Mapping[str, Any]) -> str:
    """Return the metric that judges a task: the set's own, or else the task's first."""
    return metric if metric in metrics else next(iter(metrics), metric)


def _baseline(
    results: Mapping[Column, Mapping[str, Any]], metric: str, tasks: Mapping[str, Mapping[str, Any]]
) -> float | None:
    """Return the metric's own baseline, or else the first baseline of a task."""
    known = [(task.get("baselines") or {}).get(metric) for task in results.values()]
    known += [task.get("baseline") for task in (tasks if len(results) > 1 else results).values()]
    return next((value for value in map(number, known) if value is not None), None)


def given_metrics(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the numbers of ``--metrics`` by name and task; they need not be fractions of images."""
    found: dict[str, dict[str, float]] = {}
    for column in COLUMNS:
        task = tasks_of(entry).get(column, {})
        for name in task.get("given") or ():
            if (value := number((task.get("metrics") or {}).get(name))) is not None:
                found.setdefault(name, {})[column] = value
    return found


class GroupMean(NamedTuple):
    """The mean over a group of sets, each by its own metric; fractions, None if a set is missing."""

    group: str
    sets: int
    missing: list[str]
    ours: float | None
    papers: float | None

    @property
    def counted(self) -> str:
        """Return a text with the number of present sets and the names of missing ones."""
        return f"{self.sets - len(self.missing)} of {self.sets}; missing: {', '.join(self.missing)}"


def group_means(table: Sequence[Row], column: Column) -> list[GroupMean]:
    """Return the mean of each group with a present set: the paper's 27 (tables 9 to 11), and DataComp's."""
    found: dict[tuple[str, str], list[Row]] = {}  # by set and metric; retrieval has a row for each direction
    for row in table if column in COLUMNS else ():
        name = row.name if row.name.startswith(DATACOMP) else canonical_set(row.paper)
        metric = "recall@1" if row.metric in RECALLS else row.metric
        if column in row.values:
            found.setdefault((name, metric), []).append(row)
    papers, means = papers_sets(), list[GroupMean]()
    groups = {f"the paper's {len(papers)} sets": papers, **(datacomp_groups() if column == "zero_shot" else {})}
    for group, sets in groups.items():
        of_sets = [rows_of for key in sets.items() if (rows_of := found.get(key))]
        missing = [name for name, metric in sets.items() if (name, metric) not in found]
        ours = [fmean({row.metric: row.values[column] for row in reversed(each)}.values()) for each in of_sets]
        theirs = [each[0].papers[column].value for each in of_sets if column in each[0].papers]
        both = [fmean(values) if len(values) == len(sets) else None for values in (ours, theirs)]
        means.append(GroupMean(group, len(sets), missing, *both))
    return [mean for mean in means if len(mean.missing) < mean.sets]


def shots_of(entry: Mapping[str, Any], of: str = "shots") -> dict[int, float]:
    """Return the mean over draws by number of shots, of probes, or of heads (``head``)."""
    return {
        shots: sum(values) / len(values) for shots, values in draws_of(tasks_of(entry).get("few_shot", {}), of).items()
    }


def draws_of(few_shot: Mapping[str, Any], of: str = "shots") -> dict[int, list[float]]:
    """Return the finite values of all draws by number of shots."""
    draws = {}
    for shots, values in few_shot.get(of) or []:
        draws[int(shots)] = [value for value in map(number, values) if value is not None]
    return {shots: values for shots, values in draws.items() if values}
