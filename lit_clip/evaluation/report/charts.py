"""Charts of an evaluation for its page, and their style.

Charts are matplotlib's ``Figure`` objects, made without pyplot: no global state changes, and no display is needed.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lit_clip.evaluation.overview import rows, sets_of, shots_of
from lit_clip.tools.console import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for colour-blind readers; the first colour is this run's.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
INK, MUTED, GRID = "#222222", "#777777", "#E4E4E4"
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


def new_figure(height: float, width: float) -> "tuple[Figure, Any]":
    """Return a figure of this size in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots()


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


@chart_settings()
def few_shot(runs: Mapping[str, Mapping[str, Any]]) -> "Figure | None":
    """Plot the mean over sets that all runs have, by number of examples per class; a star is zero-shot.

    ``runs`` are the contents of ``results.json`` by name. Thin lines are the sets of the first run. None without data.
    """
    found = [(place, run, curves) for place, (run, each) in enumerate(runs.items()) if (curves := _curves(each))]
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
        shots, colour = _common(curves), COLOURS[place % len(COLOURS)]
        x = [positions[s] for s in shots]
        for curve, _ in curves if place == 0 else ():
            axes.plot(x, [100 * curve[s] for s in shots], color="#CFCFCF", linewidth=0.8)
        y = [100 * sum(curve[s] for curve, _ in curves) / len(curves) for s in shots]
        handles += axes.plot(x, y, color=colour, linewidth=2.2, marker="o", zorder=3)
        labels.append(f"{short_name(run, 24)}, {plural(len(curves), 'set')}")
        starts = [value for _, value in curves if value is not None]
        if len(starts) == len(curves):
            mean = 100 * sum(starts) / len(starts)
            axes.axhline(mean, color=colour, linewidth=0.8, linestyle=":")
            axes.plot([0], [mean], color=colour, marker="*", markersize=15, markeredgecolor="white", zorder=4)
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
