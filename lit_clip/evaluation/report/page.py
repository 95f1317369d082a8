"""An evaluation as one HTML file: tables, charts, and images that the model got wrong.

Everything on the page comes from ``results.json``; only the images are read from the run's folder.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_clip.evaluation.comparison import PairedDifference
from lit_clip.evaluation.overview import STATUSES, TASKS, Row, metric_words, points, rows, sets_of, task_words
from lit_clip.evaluation.published import PAPER, NearestModel, disagreements, measured_weights, nearest, papers_name
from lit_clip.evaluation.report.chart_style import svg
from lit_clip.evaluation.report.charts import figures
from lit_clip.evaluation.report.result_columns import Groups, merged_note, result_columns
from lit_clip.evaluation.report.results_table import incomplete_means, mean_groups, measured_note
from lit_clip.evaluation.report.set_section import leaves, set_section
from lit_clip.tools.console import plural
from lit_clip.tools.html import write_page

TEMPLATE = Path(__file__).parent / "templates" / "report.html"
Results = Mapping[str, Any]


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
    """Compute the values of ``report.html``.

    Args:
        results: contents of ``results.json``.
        folder: of the run, which holds the images.
        others: results of other runs to compare with, by path or name.
        groups: names of runs that are seeds of one recipe, see :func:`lit_clip.evaluation.comparison.seed_groups`.
        differences: from the other runs on the same images.
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
        "charts": {name: svg(figure, name) for name, figure in figures(results, others).items()},
        "provenance": list(_provenance(results, others)),
        "architecture": list(leaves(model.get("architecture"), ".")),
        "sections": [set_section(name, entry, near.name, folder, weights) for name, entry in sets],
    }


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
