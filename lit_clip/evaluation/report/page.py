"""An evaluation as one HTML file that needs nothing else: figures, tables, images that were taken for something else.

What it shows is in ``results.json``; only the images are read from the run's folder.
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from lit_clip.evaluation.overview import (
    COLUMNS,
    STATUSES,
    Column,
    Row,
    means,
    metric_words,
    papers_percent,
    percent,
    points,
    rows,
    sets_of,
)
from lit_clip.evaluation.published import PAPER, NearestModel, disagreements, nearest, papers_name
from lit_clip.evaluation.report.chart_style import run_name, svg
from lit_clip.evaluation.report.charts import figures
from lit_clip.evaluation.report.html_parts import STYLE
from lit_clip.evaluation.report.robustness_chart import effective_rows
from lit_clip.evaluation.report.set_section import section
from lit_clip.tools.atomic import replacing
from lit_clip.tools.html import details, page, plural, table

TITLES = {
    "zero_shot": "zero-shot",
    "linear_probe": "linear probe",
    "zero_shot_minus_probe": "zero-shot against a linear probe of the same features",
    "few_shot": "few-shot",
    "robustness": "robustness to a shift of the data",
}
KINDS = {"few_shot": "narrow", "robustness": "wide"}  # of charts, by how much of the page's width they need
Results = Mapping[str, Any]


def write_report(results: Results, out: Path, others: Mapping[str, Results]) -> None:
    """Write ``report.html``.

    Args:
        results: what ``results.json`` holds.
        out: the run's folder, in which the images are.
        others: other runs to compare with, by path or name.

    Raises:
        InputError: the folder cannot be written to.
    """
    with replacing(out / "report.html") as draft:
        draft.write_text(report_page(results, out, others), encoding="utf-8", errors="replace")


def report_page(results: Results, folder: Path, others: Mapping[str, Results]) -> str:
    """The page as text; see :func:`write_report`."""
    model = results.get("model") or {}
    near = nearest(model)
    found = sets_of(results)
    anchors = {name: f"set-{place}" for place, (name, _) in enumerate(found)}
    title = f"Evaluation of {model.get('name') or 'a model'}"
    parts = [f"<h1>{escape(title)}</h1>", _summary(results, near)]
    parts += ["<h2>results, %</h2>", _overall(rows(results), others, anchors)]
    parts += _charts(results, others)
    parts += ["<h2>where the numbers come from</h2>", _provenance(results, others)]
    parts += [section(name, entry, anchors[name], near.name, folder) for name, entry in found]
    return page(title, STYLE, "\n".join(parts))


def _summary(results: Results, near: NearestModel) -> str:
    statuses = [entry.get("status") or "done" for _, entry in sets_of(results)]
    counts = [f"{plural(statuses.count('done'), 'set')} done"]
    counts += [
        f"{statuses.count(status)} {words}" for status, words in STATUSES.items() if words and status in statuses
    ]
    skipped = {row.name: row.skipped for row in rows(results)}
    if sum(skipped.values()):
        counts.append(f"{plural(sum(skipped.values()), 'image')} skipped")
    beside = f"beside: the paper's {papers_name(near.name)} ({near.rule})"
    return f'<p class="muted">{escape("; ".join([*counts, beside]))}</p>'


class _Head(NamedTuple):
    """A column of the overall table.

    Attributes:
        title: of it.
        cell: what it says of a row.
        mean: what it says of all.
        kind: CSS classes.
    """

    title: str
    cell: Callable[[Row], str]
    mean: str = ""
    kind: str = "n"


def _overall(found: Sequence[Row], others: Mapping[str, Results], anchors: Mapping[str, str]) -> str:
    """A row a set and metric: this run, the paper, and every other run."""
    heads = [head for column in COLUMNS for head in _heads(found, others, column)]
    heads += [
        _Head("baseline", lambda row: percent(row.baseline)),
        _Head("images", lambda row: "" if row.images is None else f"{row.images:,}"),
        _Head("skipped", lambda row: f"{row.skipped:,}" if row.skipped else ""),
    ]
    lines = ["<tr><th>set</th><th>metric</th>"]
    lines += [f'<th class="n">{escape(head.title)}</th>' for head in heads] + ["</tr>"]
    for row in found:
        status = STATUSES.get(row.status, row.status)
        metric = f'<span class="wrong">{escape(status)}</span>' if status else escape(metric_words(row.metric))
        lines.append(f'<tr><td><a href="#{anchors[row.name]}">{escape(row.name)}</a></td><td>{metric}</td>')
        lines += [f'<td class="{head.kind}">{escape(head.cell(row))}</td>' for head in heads] + ["</tr>"]
    if len(found) > 1 and any(head.mean for head in heads):
        lines.append('<tr class="mean"><td>mean</td><td>of those in the paper</td>')
        lines += [f'<td class="n">{escape(head.mean)}</td>' for head in heads] + ["</tr>"]
    return f'<div class="scroll"><table class="overall">{"".join(lines)}</table></div>\n{_legend(found)}'


def _heads(found: Sequence[Row], others: Mapping[str, Results], column: Column) -> list[_Head]:
    """This run's values in that column, the paper's and the other runs', so far as there are any."""
    mean = means(found, column)
    heads = [_Head(COLUMNS[column], lambda row: percent(row.values.get(column)), percent(mean and mean.ours), "n ours")]
    if any(column in row.papers for row in found):
        heads.append(_Head("paper", lambda row: papers_percent(row.papers.get(column)), percent(mean and mean.papers)))
    there = any(column in row.values for row in found)
    for name, other in others.items():
        values = {(row.name, row.metric): row.values.get(column) for row in rows(other)}
        if any(values.get((row.name, row.metric)) is not None for row in found):
            there = True
            heads.append(_other(run_name(name), values))
    return heads if there else []


def _other(name: str, values: Mapping[tuple[str, str], float | None]) -> _Head:
    return _Head(name, lambda row: percent(values.get((row.name, row.metric))))


def _legend(found: Sequence[Row]) -> str:
    figures = [figure for row in found for figure in row.papers.values()]
    if not figures:
        return ""
    text = f"paper: {PAPER} (arXiv 2103.00020), the tables named with each set"
    if not all(figure.verified for figure in figures):
        text += "; ? a figure that could not be checked against a source"
    return f'<p class="muted">{escape(text)}</p>\n' + details(
        "where the paper disagrees with itself", table([[line] for line in disagreements()])
    )


def _charts(results: Results, others: Mapping[str, Results]) -> list[str]:
    parts = []
    for name, figure in figures(results, others).items():
        parts.append(f"<h2>{escape(TITLES[name])}</h2>")
        parts.append(f'<figure class="chart {KINDS.get(name, "")}">{svg(figure, name)}</figure>')
        parts += _effective(results) if name == "robustness" else []
    return parts


def _effective(results: Results) -> list[str]:
    """The table below the robustness chart."""
    lines = [
        (
            row.name,
            percent(row.point.imagenet),
            percent(row.point.shifted),
            f"{100 * row.gap:.1f}",
            points(row.effective),
        )
        for row in effective_rows(results)
    ]
    if not lines:
        return []
    head = ["shifted set, zero-shot", "ImageNet, same classes", "on the set", "worse by", "effective robustness"]
    note = (
        "effective robustness: points above what classifiers trained on ImageNet alone would reach, from "
        "a line through their accuracies as logits (Taori et al. 2020); they have 69 to 78 % on ImageNet"
    )
    return [table(lines, head, right=range(1, 5)), f'<p class="muted">{escape(note)}</p>']


def _provenance(results: Results, others: Mapping[str, Results]) -> str:
    model = results.get("model") or {}
    facts = [
        ("model", model.get("name")),
        ("weights, SHA-256", model.get("weights_sha256")),
        ("activation", model.get("activation")),
        ("preprocessing", _listed(model.get("preprocessing"))),
        ("embedding", model.get("embed_dim")),
        ("parameters", f"{model['parameters']:,}" if isinstance(model.get("parameters"), int) else None),
        ("precision", results.get("precision")),
        *(("suite", f"{suite.get('path')}, SHA-256 {suite.get('sha256')}") for suite in results.get("suite") or []),
        ("made", results.get("created")),
        ("by", _listed({"lit-clip": results.get("lit_clip"), **(results.get("packages") or {})}, " ")),
    ]
    facts += [("beside", f"{name}: {(other.get('model') or {}).get('name')}") for name, other in others.items()]
    architecture = model.get("architecture")
    more = (
        details("architecture", table(_flat(architecture), kind="facts")) if isinstance(architecture, Mapping) else ""
    )
    return table([fact for fact in facts if fact[1] not in (None, "")], kind="facts") + more


def _listed(values: Any, between: str = ": ") -> str:
    if not isinstance(values, Mapping):
        return "" if values is None else str(values)
    return ", ".join(f"{key}{between}{value}" for key, value in values.items() if value is not None)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines = []
    for key, value in values.items():
        nested = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", str(value))]
        lines += nested
    return lines
