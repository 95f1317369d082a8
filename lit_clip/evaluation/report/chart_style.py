"""What all charts of an evaluation share: colours, sizes, and how names are shown.

Charts are matplotlib's ``Figure`` objects, without pyplot: nothing global is set, and no display is asked for.
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

# Okabe and Ito's colours, which the colour-blind tell apart too; the first is this run's, black the paper's.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
INK, MUTED, GRID = "#222222", "#777777", "#E4E4E4"
THIS_RUN = "this run"
LETTERS = 30  # of a name
WIDTH = 9.0  # inches
STYLE = {
    "text.parse_math": False,  # a name with two dollars is no formula
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
    "svg.fonttype": "none",  # text stays text: the reader's fonts have letters that matplotlib's lack
}


class Series(NamedTuple):
    """One run in a chart.

    Attributes:
        name: shown in the legend.
        results: of a ``results.json``.
    """

    name: str
    results: Mapping[str, Any]


@contextmanager
def styled(more: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Charts are drawn and saved within this; matplotlib's settings are as they were afterwards."""
    import matplotlib

    settings: dict[Any, Any] = {**STYLE, **(more or {})}
    with matplotlib.rc_context(settings):
        yield


def shown(text: str, letters: int = LETTERS) -> str:
    """A name as a chart has room for, without line breaks and control characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in text).strip() or "?"
    return text if len(text) <= letters else text[: letters - 1].rstrip() + "…"


def run_name(path: str) -> str:
    """What another run is called: the end of the path of its folder."""
    name = path.removesuffix("results.json").rstrip("/\\") or path
    return name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}"


def new_figure(height: float, width: float = WIDTH, **options: Any) -> "tuple[Figure, Any]":
    """A figure of so many inches, and its axes as ``subplots`` makes them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(**options)


def colour(place: int) -> str:
    """Of a run, by its place."""
    return COLOURS[place % len(COLOURS)]


def legend(figure: "Figure", handles: Sequence[Any], labels: Sequence[str], columns: int = 4) -> None:
    """Above the axes, where it hides nothing."""
    if handles:
        figure.legend(handles, [shown(label, 44) for label in labels], loc="outside upper left", ncols=columns)


def name_lines(axes: "Axes", names: Sequence[str]) -> None:
    """A name a unit of the vertical axis, the first on top."""
    axes.set_yticks(range(len(names)), [shown(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(length=0)


def diamonds(axes: "Axes", places: Sequence[tuple[float, float]], filled: bool = True) -> Any:
    """The paper's figures, as a handle for the legend."""
    x, y = zip(*places, strict=True)
    return axes.scatter(x, y, marker="D", s=26, facecolors=INK if filled else "white", edgecolors=INK, zorder=3)


def svg(figure: "Figure", name: str) -> str:
    """The figure as an ``svg`` element, the same each time and safe beside others on a page.

    Args:
        figure: one of ours.
        name: part of the ids within, so that figures on one page have different ones.
    """
    data = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with styled({"svg.hashsalt": name}), warnings.catch_warnings(action="ignore"):  # of letters that a font lacks
        figure.savefig(data, format="svg", metadata=nothing)
    text = data.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # nothing refers to groups
    opening, rest = text.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", opening) + ">" + rest  # as wide as the page allows
