"""Charts of an evaluation, for the page and TensorBoard."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lit_clip.evaluation.comparison import THIS_RUN
from lit_clip.evaluation.overview import COLUMNS, Column, Row, metric_words, percent, rows, sets_of, shots_of
from lit_clip.evaluation.published import nearest_model, papers_name
from lit_clip.evaluation.report.chart_style import (
    COLOURS,
    INK,
    LETTERS,
    ChartRun,
    chart_settings,
    colour,
    diamonds,
    legend,
    name_lines,
    new_figure,
    run_names,
    short_name,
)
from lit_clip.evaluation.report.robustness_chart import robustness
from lit_clip.tools.console import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TALL = 12  # rows above which the top of the chart has a scale too
Key = tuple[str, str]  # names of a set and a metric
Table = Mapping[Key, Row]


def figures(results: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> "dict[str, Figure]":
    """Draw the charts that have data, with other runs by path or name; return them by name."""
    names = run_names(others)
    runs = [ChartRun(THIS_RUN, results), *(ChartRun(names[name], other) for name, other in others.items())]
    with chart_settings():
        drawn = {
            "zero_shot": bars(runs, "zero_shot"),
            "linear_probe": bars(runs, "linear_probe"),
            "zero_shot_minus_probe": differences(results),
            "few_shot": few_shot(runs),
            "robustness": robustness(runs),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def bars(runs: Sequence[ChartRun], column: str) -> "Figure | None":
    """Draw a bar with its interval for each set and run, with marks for baseline and the paper's nearest model."""
    tables: list[Table] = [{(row.name, row.metric): row for row in rows(run.results)} for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    order = [key for key in keys if any(_value(table, key, column) is not None for table in tables)]
    kept = [place for place, table in enumerate(tables) if any(_value(table, key, column) is not None for key in order)]
    if not order:
        return None
    figure, axes = new_figure(1.0 + len(order) * (0.13 + 0.15 * len(kept)))
    handles, labels, thick = [], [], 0.8 / len(kept)
    for slot, place in enumerate(kept):
        values = [_value(tables[place], key, column) for key in order]
        where = [line - 0.4 + (slot + 0.5) * thick for line in range(len(order))]
        handles.append(
            axes.barh(where, [100 * (value or 0) for value in values], 0.9 * thick, color=colour(place), alpha=0.85)
        )
        labels.append(runs[place].name)
        for y, value, key in zip(where, values, order, strict=True):
            axes.text(107, y, percent(value), va="center", ha="right", fontsize=7.5, color=INK)
            if value is not None and column in tables[place][key].intervals:
                low, high = tables[place][key].intervals[column]
                axes.plot([100 * low, 100 * high], [y, y], color=INK, linewidth=1.0, solid_capstyle="butt")
    marked, model = [tables[0].get(key) for key in order], nearest_model(runs[0].results.get("model") or {})
    for handle, label in _marks(axes, marked, column, model, thick / 2 - 0.4):
        handles.append(handle)
        labels.append(label)
    name_lines(axes, [_title(key, order) for key in order])
    axes.set(xlim=(0, 107), xticks=range(0, 101, 20), xlabel=f"{COLUMNS[column]}, %")
    axes.tick_params(labeltop=len(order) > TALL)
    axes.grid(axis="x")
    legend(figure, handles, labels)
    return figure


def _value(table: Table, key: Key, column: Column) -> float | None:
    return table[key].values.get(column) if key in table else None


def _title(key: Key, order: Sequence[Key]) -> str:
    """Return the set's name, and the metric if the set has several."""
    name, metric = key
    several = sum(other == name for other, _ in order) > 1
    return f"{short_name(name, LETTERS - 19)}, {metric_words(metric)}" if several else name


def _marks(
    axes: "Axes", table: Sequence[Row | None], column: Column, model: str, first: float
) -> list[tuple[Any, str]]:
    """Mark the baseline and the paper's figures (hollow if unverified), and return handles and labels."""
    marks: list[tuple[Any, str]] = []
    baselines = [(line, row.baseline) for line, row in enumerate(table) if row and row.baseline is not None]
    if baselines:
        places = [100 * value for _, value in baselines]
        low, high = [line - 0.45 for line, _ in baselines], [line + 0.45 for line, _ in baselines]
        marks.append((axes.vlines(places, low, high, colors=INK, linestyles=":", linewidth=1.2), "baseline"))
    papers = [(line, row.papers[column]) for line, row in enumerate(table) if row and column in row.papers]
    for verified in (True, False):
        points = [(100 * figure.value, line + first) for line, figure in papers if figure.verified is verified]
        if points:
            label = f"paper, {papers_name(model)}" + ("" if verified else ", unchecked")
            marks.append((diamonds(axes, points, filled=verified), label))
    return marks


def differences(results: Mapping[str, Any]) -> "Figure | None":
    """Plot zero-shot accuracy minus a linear probe's on the same features, as in the paper's figure 5."""
    both = [row for row in rows(results) if {"zero_shot", "linear_probe"} <= row.values.keys()]
    if not both:
        return None
    gaps = sorted(((_gap(row.values), row) for row in both), key=lambda pair: -pair[0])
    figure, axes = new_figure(1.0 + 0.25 * len(both))
    values = [gap for gap, _ in gaps]
    axes.barh(range(len(gaps)), values, 0.7, color=[COLOURS[0] if gap >= 0 else COLOURS[1] for gap in values])
    marks: dict[bool, list[tuple[float, float]]] = {}
    for line, (_, row) in enumerate(gaps):
        if {"zero_shot", "linear_probe"} <= row.papers.keys():
            verified = row.papers["zero_shot"].verified and row.papers["linear_probe"].verified
            gap = _gap({column: figure.value for column, figure in row.papers.items()})
            marks.setdefault(verified, []).append((gap, line))
    model = papers_name(nearest_model(results.get("model") or {}))
    names = {True: f"paper, {model}", False: f"paper, {model}, unchecked"}
    legend(figure, [diamonds(axes, marks[key], key) for key in sorted(marks)], [names[key] for key in sorted(marks)])
    all_values = [0.0, *values, *(value for places in marks.values() for value, _ in places)]
    low, high = min(all_values), max(all_values)
    room = 0.05 * max(5.0, high - low)
    for line, gap in enumerate(values):
        axes.text(high + 3 * room, line, f"{gap:+.1f}", va="center", ha="right", fontsize=7.5)
    name_lines(axes, [row.name for _, row in gaps])
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(xlim=(low - room, high + 3 * room), xlabel="zero-shot minus linear probe on the same features, points")
    axes.grid(axis="x")
    return figure


def _gap(values: Mapping[Column, float]) -> float:
    return 100 * (values["zero_shot"] - values["linear_probe"])


def few_shot(runs: Sequence[ChartRun]) -> "Figure | None":
    """Plot the mean over sets that all runs have, by number of examples per class; a star is zero-shot.

    Thin lines are the sets of the first run.
    """
    found = {place: _curves(run.results) for place, run in enumerate(runs)}
    found = {place: curves for place, curves in found.items() if curves}
    shared = set.intersection(*map(set, found.values())) if found else set[str]()
    of_shared = {place: [curve for name, curve in curves.items() if name in shared] for place, curves in found.items()}
    drawn = [(place, runs[place], curves) for place, curves in of_shared.items() if curves and _common(curves)]
    if not drawn:
        return None
    figure, axes = new_figure(4.6, 7.5)
    positions = {
        shots: place for place, shots in enumerate(sorted({s for *_, curves in drawn for s in _common(curves)}), 1)
    }
    handles, labels = [], []
    for place, run, curves in drawn:
        shots = _common(curves)
        x = [positions[s] for s in shots]
        for curve, _ in curves if place == 0 else ():
            axes.plot(x, [100 * curve[s] for s in shots], color="#CFCFCF", linewidth=0.8)
        y = [100 * sum(curve[s] for curve, _ in curves) / len(curves) for s in shots]
        handles += axes.plot(x, y, color=colour(place), linewidth=2.2, marker="o", zorder=3)
        labels.append(f"{short_name(run.name, 24)}, {plural(len(curves), 'set')}")
        starts = [value for _, value in curves if value is not None]
        if len(starts) == len(curves):
            mean = 100 * sum(starts) / len(starts)
            axes.axhline(mean, color=colour(place), linewidth=0.8, linestyle=":")
            axes.plot([0], [mean], color=colour(place), marker="*", markersize=15, markeredgecolor="white", zorder=4)
    axes.set_xticks([0, *positions.values()], ["zero-shot", *map(str, positions)])
    axes.set(xlabel="labelled examples per class", ylabel="mean over sets, %")
    axes.grid(axis="y")
    axes.tick_params(length=0)
    legend(figure, handles, labels, 3)
    return figure


Curve = tuple[dict[int, float], float | None]  # few-shot values of a set by number of examples; its zero-shot value


def _curves(results: Mapping[str, Any]) -> dict[str, Curve]:
    """Return the curve of each set."""
    zero_shot = {row.name: row.values.get("zero_shot") for row in rows(results)}
    found = {name: (shots_of(entry), zero_shot.get(name)) for name, entry in sets_of(results)}
    return {name: curve for name, curve in found.items() if curve[0]}


def _common(curves: Sequence[Curve]) -> list[int]:
    """Return the numbers of examples that all sets have."""
    return sorted(set.intersection(*(set(curve) for curve, _ in curves)))
