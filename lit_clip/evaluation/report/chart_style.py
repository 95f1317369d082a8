"""Colours, sizes and helpers for all charts of an evaluation.

Charts are matplotlib's ``Figure`` objects, made without pyplot: no global state changes, and no display is needed.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for colour-blind readers; the first colour is this run's, black is the paper's.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
INK, MUTED, GRID = "#222222", "#777777", "#E4E4E4"
LETTERS = 30  # longest name
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


def short_name(text: str, letters: int = LETTERS) -> str:
    """Shorten a name to fit a chart, and remove line breaks and control characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in text).strip() or "?"
    return text if len(text) <= letters else text[: letters - 1].rstrip() + "…"


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


def legend(figure: "Figure", handles: Sequence[Any], labels: Sequence[str], columns: int = 4) -> None:
    """Add a legend above the axes, where it covers no data."""
    if handles:
        figure.legend(handles, [short_name(label, 44) for label in labels], loc="outside upper left", ncols=columns)


def name_lines(axes: "Axes", names: Sequence[str]) -> None:
    """Label the vertical axis with one name per unit, the first on top."""
    axes.set_yticks(range(len(names)), [short_name(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(length=0)


def diamonds(axes: "Axes", places: Sequence[tuple[float, float]], filled: bool = True) -> Any:
    """Mark the paper's figures at these points, and return a handle for the legend."""
    x, y = zip(*places, strict=True)
    return axes.scatter(x, y, marker="D", s=26, facecolors=INK if filled else "white", edgecolors=INK, zorder=3)


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
