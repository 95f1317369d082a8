"""The robustness chart: accuracy on ImageNet and under distribution shift (the paper's figure 13 and table 16)."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_clip.evaluation.overview import COLUMNS, Column, rows
from lit_clip.evaluation.published import Published, peers, published_metrics, same_set
from lit_clip.evaluation.report.chart_style import MUTED, ChartRun, colour, name_lines, new_figure, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGENET = "ImageNet"
SHIFTED = ["ImageNetV2", "ImageNet-A", "ImageNet-R", "ObjectNet", "ImageNet-Sketch", "ImageNet-Vid", "YTBB"]
MODEL = "ViT-L-14-336"  # CLIP in table 16
GREYS = ["#222222", "#666666", "#9A9A9A", "#C4C4C4"]


class ChartPoint(NamedTuple):
    """A classifier in the chart: its name, and accuracies by the paper's set names, including ImageNet."""

    name: str
    values: dict[str, float]

    def mean(self, sets: Sequence[str]) -> float | None:
        """Return the mean over the given sets, or None if one is missing."""
        whole = all(name in self.values for name in sets)
        return sum(self.values[name] for name in sets) / len(sets) if whole else None


def run_points(runs: Sequence[ChartRun]) -> list[ChartPoint]:
    """Return the zero-shot classifiers and probes with results on ImageNet and on a shifted set."""
    points = [ChartPoint(f"{run.name}, {COLUMNS[key]}", _values(run.results, key)) for run in runs for key in COLUMNS]
    return [point for point in points if IMAGENET in point.values and len(point.values) > 1]


def _values(results: Mapping[str, Any], column: Column) -> dict[str, float]:
    values: dict[str, float] = {}
    for row in rows(results):
        known = next((name for name in [IMAGENET, *SHIFTED] if same_set(row.paper, name)), None)
        if known and column in row.values:
            values.setdefault(known, row.values[column])
    return values


def papers_points() -> list[ChartPoint]:
    """Return the rows of table 16."""
    sets = [IMAGENET, *SHIFTED]
    figures = dict[str, Mapping[str, Mapping[str, Published]]]()
    for task, name in COLUMNS.items():
        figures[f"{name} CLIP"] = {known: published_metrics(known, task, MODEL) for known in sets}
    for peer in peers("ImageNetV2", "zero_shot"):
        figures[peer] = {known: peers(known, "zero_shot").get(peer, {}) for known in sets}
    return [
        ChartPoint(name, {known: _top1_or_pm(values) for known, values in of.items() if values})
        for name, of in figures.items()
        if any(of.values())
    ]


def _top1_or_pm(figures: Mapping[str, Published]) -> float:
    """Return top-1, or the mean of PM-0 and PM-10 as in the paper."""
    return fmean(figure.value for metric, figure in figures.items() if metric in ("top1", "pm0", "pm10"))


def robustness(runs: Sequence[ChartRun]) -> "Figure | None":
    """Plot ImageNet against the mean of the shifted sets that the runs have, and beside it against each set."""
    ours, theirs = run_points(runs), papers_points()
    if not ours:
        return None
    sets = [known for known in SHIFTED if any(known in point.values for point in ours)]
    figure, (left, right) = new_figure(4.9, 11.0, ncols=2, width_ratios=[1, 1.2])
    handles, labels = [], []
    for place, point in enumerate(ours):
        handles.append(_draw(left, right, point, sets, {"marker": "o", "s": 70, "color": colour(place)}))
        labels.append(short_name(point.name, 36))
    for grey, point in zip(GREYS, theirs, strict=True):
        handles.append(_draw(left, right, point, sets, {"marker": "D", "s": 34, "color": grey}))
        labels.append(f"paper: {point.name}")
    left.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle="--", zorder=1)
    left.text(52, 48, "y = x", color=MUTED, va="top", fontsize=8)
    shifted = f"mean of {len(sets)} shifted sets, %" if len(sets) > 1 else f"{sets[0]}, %"
    left.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", xlabel="ImageNet, %", ylabel=shifted)
    left.tick_params(length=0)
    name_lines(right, sets)
    right.set(xlim=(0, 101), xlabel="each shifted set, %")
    for axes in (left, right):
        axes.grid()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


def _draw(left: "Axes", right: "Axes", point: ChartPoint, sets: Sequence[str], style: Mapping[str, Any]) -> Any:
    options: dict[str, Any] = {**style, "edgecolors": "white", "linewidths": 0.8, "zorder": 3}
    mean = point.mean(sets)
    if mean is not None:
        left.scatter([100 * point.values[IMAGENET]], [100 * mean], **options)
    known_sets = [(100 * point.values[known], line) for line, known in enumerate(sets) if known in point.values]
    x, y = zip(*known_sets, strict=True)
    return right.scatter(x, y, **options)
