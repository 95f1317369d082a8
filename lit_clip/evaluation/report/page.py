"""An evaluation as one HTML file: tables, charts, and images that the model got wrong.

Everything on the page comes from ``results.json``; only the images are read from the run's folder.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_clip.evaluation.comparison import THIS_RUN, PairedDifference
from lit_clip.evaluation.overview import (
    STATUSES,
    TASKS,
    Row,
    as_interval,
    draws_of,
    interval_of,
    metric_words,
    number,
    papers_percent,
    percent,
    points,
    rows,
    sets_of,
    skipped_of,
    task_words,
    tasks_of,
)
from lit_clip.evaluation.predictions import run_image
from lit_clip.evaluation.published import (
    PAPER,
    NearestModel,
    Published,
    disagreements,
    measured,
    measured_weights,
    nearest,
    papers_name,
    peers,
    published,
)
from lit_clip.evaluation.report.charts import few_shot, run_name, svg
from lit_clip.evaluation.report.results_table import (
    Groups,
    incomplete_means,
    mean_groups,
    measured_note,
    merged_note,
    result_columns,
)
from lit_clip.tools.console import plural
from lit_clip.tools.html import thumbnail, write_page

TEMPLATE = Path(__file__).parent / "templates" / "report.html"
Results = Mapping[str, Any]
CONFUSIONS = 20
F1 = ("f1_fixed", "f1_fitted", "f1_held_out")  # of thresholds
Task = Mapping[str, Any]  # of results.json


def write_report(
    results: Results,
    folder: Path,
    others: Mapping[str, Results],
    groups: Groups | None = None,
    differences: Sequence[PairedDifference] = (),
) -> None:
    """Write ``report.html``; see :func:`report_values`."""
    write_page(folder / "report.html", TEMPLATE, **report_values(results, folder, others, groups, differences))


def report_values(
    results: Results,
    folder: Path,
    others: Mapping[str, Results],
    groups: Groups | None = None,
    differences: Sequence[PairedDifference] = (),
) -> dict[str, Any]:
    """Compute the values of ``report.html`` of a run and its folder, which holds the images.

    Other runs are by path or name; ``differences`` are from them on the same images.
    """
    model = results.get("model") or {}
    near, everything = nearest(model), rows(results)
    found = [row for row in everything if row.status != "missing"]
    missing = [(name, entry) for name, entry in sets_of(results) if entry.get("status") == "missing"]
    sets = [(name, entry) for name, entry in sets_of(results) if entry.get("status") != "missing"]
    columns, weights = list(result_columns(found, others, groups)), measured_weights(model)
    return {
        "title": f"Evaluation of {model.get('name') or 'a model'}",
        "summary": _summary(everything, near),
        "rows": [(row, STATUSES.get(row.status, row.status), metric_words(row.metric)) for row in found],
        "columns": columns,
        "means": mean_groups(columns),
        "incomplete": incomplete_means(found),
        "missing": [(name, entry.get("reason") or "", entry.get("how_to_get") or "") for name, entry in missing],
        "comparisons": {name: _comparison([each for each in differences if each.run == name]) for name in others},
        "anchors": {name: f"set-{place}" for place, (name, _) in enumerate(sets)},
        "paper": PAPER,
        "measured": measured_note(model),
        "merged": merged_note(found),
        "disagreements": disagreements(),
        "few_shot": few_shot_chart(results, others),
        "provenance": list(_provenance(results, others)),
        "architecture": list(leaves(model.get("architecture"), ".")),
        "sections": [set_section(name, entry, near.name, folder, weights) for name, entry in sets],
    }


def few_shot_chart(results: Results, others: Mapping[str, Results]) -> str:
    """Return the chart of few-shot results of all runs as ``svg``; empty if this run has none."""
    figure = few_shot({THIS_RUN: results, **{run_name(path): run for path, run in others.items()}})
    return "" if figure is None else svg(figure, "few_shot")


def _comparison(differences: Sequence[PairedDifference]) -> dict[str, Any]:
    """Return lines of differences from a run, and the sets that are not compared, by reason."""
    lines, reasons = [], dict[str, list[str]]()
    for each in differences:
        if each.difference is None:
            task = TASKS.get(each.task, each.task.replace("_", " "))
            reasons.setdefault(each.reason, []).append(f"{each.set} ({task})")
            continue
        p_value = "" if each.p_value is None else "< 0.0001" if each.p_value < 1e-4 else f"{each.p_value:.4f}"
        low, high = each.interval or (0, 0)
        ends = f"{points(low)} to {points(high)}" if each.interval else ""
        cells = [each.set, task_words(each.task, each.metric), points(each.difference), ends, p_value]
        lines.append(([*cells, f"{each.images:,}"], low > 0 or high < 0))
    return {"lines": lines, "reasons": {reason: ", ".join(dict.fromkeys(sets)) for reason, sets in reasons.items()}}


def _summary(found: Sequence[Row], near: NearestModel) -> str:
    statuses = Counter({row.name: row.status for row in found}.values())
    skipped = sum({row.name: row.skipped for row in found}.values())
    counts = [f"{plural(statuses['done'], 'set')} done"]
    counts += [f"{statuses[status]} {words}" for status, words in STATUSES.items() if words and statuses[status]]
    counts += [f"{plural(skipped, 'image')} skipped"] if skipped else []
    if any(row.papers for row in found):
        counts.append(f"compared with the paper's {papers_name(near.name)} ({near.rule})")
    return "; ".join(counts)


def _provenance(results: Results, others: Mapping[str, Results]) -> Iterator[tuple[str, str]]:
    """Return everything in the results except sets and architecture, by the names in ``results.json``."""
    facts = {key: value for key, value in results.items() if key not in ("sets", "comparisons")}
    facts["model"] = {key: value for key, value in (results.get("model") or {}).items() if key != "architecture"}
    suites = results.get("suite") or []
    facts["suite"] = "; ".join(f"{suite.get('path')}, SHA-256 {suite.get('sha256')}" for suite in suites)
    models = {name: (run.get("model") or {}).get("name") for name, run in others.items()}
    facts["compared with"] = "; ".join(f"{name}: {model}" for name, model in models.items())
    for path, value in leaves(facts, ", "):
        if value not in (None, ""):
            yield path, f"{value:,}" if type(value) is int else str(value)


def set_section(
    name: str, entry: Mapping[str, Any], model: str, folder: Path, weights: str | None = None
) -> dict[str, Any]:
    """Compute the values of ``set_section.html`` from a set's entry in ``results.json``.

    The paper's figures are its ``model``'s, measured ones those of published ``weights``; None: OpenAI's of the model.
    """
    tasks = tasks_of(entry)
    classes = sorted(tasks.get("segmentation", {}).get("iou") or [], key=lambda line: -(number(line[1]) or 0))
    searched = tasks.get("linear_probe", {}).get("search") or []
    return {
        "name": name,
        "entry": entry,
        "status": STATUSES.get(entry.get("status") or "done", entry.get("status")),
        "metrics": _metrics(name, entry, tasks, model, weights or model),
        "facts": list(_facts(entry, tasks)),
        "few_shot": list(_few_shot(tasks.get("few_shot", {}))),
        "search": [(f"{l2:.3g}", percent(number(score))) for l2, score in searched],
        "confusions": list(_confusions(entry, tasks)),
        "thresholds": list(_thresholds(tasks)),
        "iou": [[name, *map(percent, map(number, shares)), f"{pixels:,}"] for name, *shares, pixels in classes],
        "errors": [_wrong_image(error, folder) for error in tasks.get("zero_shot", {}).get("errors") or []],
        "bias": [(path.replace("_", " "), _bias_value(value)) for path, value in leaves(tasks.get("bias"), " / ")],
        "skipped": {split: images for split, images in skipped_of(entry).items() if images},
    }


def _metrics(
    name: str, entry: Mapping[str, Any], tasks: Mapping[str, Task], model: str, weights: str
) -> list[list[str]]:
    """Return the head and lines of all metrics, with the paper's and others' figures."""
    paper = str(entry.get("paper") or "")
    lines = [["metric", "%", "99.5 % interval", "paper", "measured", "others in the paper"]]
    for task, result in tasks.items():
        others, numbers = peers(paper, task), _no_shares(result)
        known = published(paper, task, model), measured(name, paper, task, weights)
        shares = {metric: value for metric, value in (result.get("metrics") or {}).items() if metric not in numbers}
        for metric, value in shares.items():
            ours = task_words(task, metric), percent(number(value)), _between(interval_of(result, metric))
            figures = (of.get(metric) for of in known)
            of_peers = (f"{peer} {_with_source(of[metric])}" for peer, of in others.items() if metric in of)
            lines.append([*ours, *map(_with_source, figures), "; ".join(of_peers)])
    kept = [place for place in range(6) if any(line[place] for line in lines[1:])]
    return [[line[place] for place in kept] for line in lines]


def _no_shares(task: Task) -> dict[str, float | None]:
    """Return metrics that are not percentages: median ranks, and typed torchmetrics metrics."""
    given, metrics = task.get("given") or [], task.get("metrics") or {}
    return {name: number(value) for name, value in metrics.items() if name in given or name.endswith("median_rank")}


def _with_source(figure: Published | None) -> str:
    source = figure.source.removeprefix(f"{PAPER}, ").split(", ")[0] if figure else ""
    return f"{papers_percent(figure)} ({source})" if figure else ""


def _between(interval: tuple[float, float] | None) -> str:
    """Return ``88.1 to 90.2`` for an interval of fractions, or an empty text."""
    return " to ".join(map(percent, interval or ()))


def _facts(entry: Mapping[str, Any], tasks: Mapping[str, Task]) -> Iterator[tuple[str, str]]:
    for split, counts in (entry.get("splits") or {}).items():
        skipped, absent = len(counts.get("skipped") or []), int(counts.get("absent") or 0)
        words = [plural(int(counts.get("images") or 0), "image")]
        words += [f"{skipped:,} skipped"] if skipped else []
        words += [f"{absent:,} of its list not on disk"] if absent else []
        yield str(split), ", ".join(words)
    prompts = entry.get("prompts") or {}
    if prompts:
        yield "prompts", f"{plural(int(prompts.get('texts') or 0), 'text')} of {prompts.get('classes')} classes"
        yield "prompts' SHA-256", f"{str(prompts.get('sha256') or '')[:16]}…"
    baselines = [value for task in tasks.values() if (value := number(task.get("baseline"))) is not None]
    if baselines:
        yield "baseline", f"{percent(baselines[0])} %"
    for name, task in tasks.items():
        for key in ("captions", "references", "queries", "documents"):
            if key in task:
                yield key.replace("references", "reference images"), f"{task[key]:,}"
        for metric, value in _no_shares(task).items():
            yield task_words(name, metric), "" if value is None else f"{value:.4g}"
        if name == "linear_probe":
            yield "regularisation (l2)", f"{number(task.get('l2')) or 0:g}"


def _confusions(entry: Mapping[str, Any], tasks: Mapping[str, Task]) -> Iterator[dict[str, Any]]:
    """Return each task's confused pairs; with few classes, also the names and rows of the matrix."""
    names = [str(name) for name in entry.get("class_names") or []]
    for task, found in tasks.items():
        pairs, matrix = (found.get("confusions") or [])[:CONFUSIONS], found.get("confusion_matrix") or []
        if all(len(row) == len(names) == len(matrix) for row in matrix) and (pairs or matrix):
            yield {"task": TASKS.get(task, task), "pairs": pairs, "names": names if matrix else [], "matrix": matrix}


def _thresholds(tasks: Mapping[str, Task]) -> Iterator[dict[str, Any]]:
    """Return means and lines of each task's thresholds, for a set with several classes per image."""
    for task, result in tasks.items():
        found = result.get("thresholds") or {}
        lines = [
            [str(name), str(examples), f"{number(threshold) or 0:.3g}", *map(percent, map(number, f1))]
            for name, threshold, examples, *f1 in found.get("classes") or []
        ]
        if lines:
            means = [percent(number(found.get(name))) for name in F1]
            yield {"task": TASKS.get(task, task), "fixed": found.get("fixed"), "means": means, "classes": lines}


def _few_shot(task: Task) -> Iterator[list[str]]:
    """Return lines: number of examples, mean and range of the probes' and heads' accuracy, number of draws."""
    heads = draws_of(task, "head")
    for shots, draws in draws_of(task).items():
        cells = [str(shots)]
        for values in (draws, heads.get(shots, [])):
            spread = f"{percent(min(values))} to {percent(max(values))}" if values else ""
            cells += [percent(sum(values) / len(values)) if values else "", spread]
        yield [*cells, str(len(draws))]


def _wrong_image(error: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    image = run_image(folder, error.get("image"))
    return {
        "image": image and thumbnail(image),
        "nearest": [(str(name), percent(number(probability))) for name, probability in error.get("nearest") or []],
        **{key: str(error.get(key)) for key in ("key", "truth", "prediction")},
    }


def leaves(values: Any, separator: str) -> Iterator[tuple[str, Any]]:
    """Flatten nested mappings to paths and values; a measured share with its counts stays one value."""
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping) and not _is_share(value):
            yield from ((f"{name}{separator}{path}", leaf) for path, leaf in leaves(value, separator))
        else:
            yield str(name), value


def _is_share(value: Any) -> bool:
    return isinstance(value, Mapping) and {"value", "count", "images"} <= value.keys()


def _bias_value(value: Any) -> str:
    if not _is_share(value):
        return str(value)
    share = number(value["value"])
    text = "no images" if share is None else f"{percent(share)} % ({value['count']} of {value['images']})"
    return ", ".join(filter(None, [text, _between(as_interval(value.get("interval")))]))
