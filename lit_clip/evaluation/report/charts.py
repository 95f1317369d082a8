"""Charts of an evaluation for its page, and their style.

The robustness chart is the paper's figure 13, with table 16: accuracy on ImageNet and under distribution shift.
Charts are matplotlib's ``Figure`` objects, made without pyplot: no global state changes, and no display is needed.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_clip.evaluation.comparison import THIS_RUN
from lit_clip.evaluation.overview import COLUMNS, Column, rows, sets_of, shots_of
from lit_clip.evaluation.published import Published, peers, published_metrics, same_set
from lit_clip.tools.console import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for colour-blind readers; the first colour is this run's, black is the paper's.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
INK, MUTED, GRID = "#222222", "#777777", "#E4E4E4"
WIDTH = 9.0  # inches
STYLE = {
    "text.parse_math": False,  # a name with two dollar signs is not a formula
    "axes.unicode_minus": False,
    "font.size": 9,
    "axes.edgecolor": "#AAAAAA",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "svg.fonttype": "none",  # keep text as text: the reader's fonts have glyphs that matplotlib's lack
}
IMAGENET = "ImageNet"
SHIFTED = ["ImageNetV2", "ImageNet-A", "ImageNet-R", "ObjectNet", "ImageNet-Sketch", "ImageNet-Vid", "YTBB"]
MODEL = "ViT-L-14-336"  # CLIP in table 16
GREYS = ["#222222", "#666666", "#9A9A9A", "#C4C4C4"]


class ChartRun(NamedTuple):
    """One run in a chart: its name in the legend, and the contents of its ``results.json``."""

    name: str
    results: Mapping[str, Any]


@contextmanager
def chart_settings(more: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Draw and save charts in our style; restore matplotlib's settings afterwards."""
    import matplotlib

    settings: dict[Any, Any] = {**STYLE, **(more or {})}
    with matplotlib.rc_context(settings):
        yield


def short_name(text: str, letters: int) -> str:
    """Shorten a name to fit a chart, and remove line breaks and control characters; runs' paths differ at the end."""
    text = "".join(letter if letter.isprintable() else " " for letter in text).strip() or "?"
    return text if len(text) <= letters else "…" + text[1 - letters :].lstrip()


def run_name(path: str) -> str:
    """Return a run's name, or its folder for the path of its ``results.json``."""
    return path.removesuffix("results.json").rstrip("/\\") or path


def new_figure(height: float, width: float = WIDTH, **options: Any) -> "tuple[Figure, Any]":
    """Return a figure, its size in inches, and its axes as ``subplots`` returns them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(**options)


def colour(place: int) -> str:
    """Return the colour of the run at this place."""
    return COLOURS[place % len(COLOURS)]


def svg(figure: "Figure", name: str) -> str:
    """Return the figure as a reproducible ``svg`` element; its ``name`` makes ids unique on a page."""
    data = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with chart_settings({"svg.hashsalt": name}), warnings.catch_warnings(action="ignore"):  # missing glyphs
        figure.savefig(data, format="svg", metadata=no_metadata)
    text = data.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # unused ids
    opening, rest = text.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", opening) + ">" + rest  # as wide as the page allows


def figures(results: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> "dict[str, Figure]":
    """Draw the charts that have data, with other runs by path or name; return them by name."""
    runs = [ChartRun(THIS_RUN, results), *(ChartRun(run_name(name), other) for name, other in others.items())]
    with chart_settings():
        drawn = {"few_shot": few_shot(runs), "robustness": robustness(runs)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def few_shot(runs: Sequence[ChartRun]) -> "Figure | None":
    """Plot the mean over sets that all runs have, by number of examples per class; a star is zero-shot.

    Thin lines are the sets of the first run.
    """
    found = [(place, run, curves) for place, run in enumerate(runs) if (curves := _curves(run.results))]
    shared = set.intersection(*(set(curves) for *_, curves in found)) if found else set[str]()
    of_shared = [(place, run, [curves[name] for name in curves if name in shared]) for place, run, curves in found]
    drawn = [each for each in of_shared if each[2] and _common(each[2])]
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
    figure.legend(handles, [short_name(label, 44) for label in labels], loc="outside upper left", ncols=3)
    return figure


Curve = tuple[dict[int, float], float | None]  # few-shot values of a set by number of examples; its zero-shot value


def _curves(results: Mapping[str, Any]) -> dict[str, Curve]:
    zero_shot = {row.name: row.values.get("zero_shot") for row in rows(results)}
    found = {name: (shots_of(entry), zero_shot.get(name)) for name, entry in sets_of(results)}
    return {name: curve for name, curve in found.items() if curve[0]}


def _common(curves: Sequence[Curve]) -> list[int]:
    """Return the numbers of examples that all sets have."""
    return sorted(set.intersection(*(set(curve) for curve, _ in curves)))


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
        ChartPoint(name, {known: (values.get("pm") or values["top1"]).value for known, values in of.items() if values})
        for name, of in figures.items()
        if any(of.values())
    ]


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
    right.set_yticks(range(len(sets)), sets)
    right.set_ylim(len(sets) - 0.4, -0.6)  # the first on top
    right.tick_params(length=0)
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
