"""Columns of the tables of results, for the terminal, the page and LaTeX."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from lit_clip.evaluation.comparison import THIS
from lit_clip.evaluation.overview import COLUMNS, MERGED, Column, Row, group_means, papers_percent, percent, rows
from lit_clip.evaluation.published import Published
from lit_clip.evaluation.report.chart_style import run_names

DIFFERS = 0.01  # a measured figure is shown if it differs by this much from the paper's, or if the paper has none
Groups = Mapping[str, Sequence[str]]  # see lit_clip.evaluation.comparison.seed_groups
Kind = Literal["ours", "paper", "measured", "recipe", "run", "count"]


class Cell(NamedTuple):
    """A cell's text and value, with an interval, or with the standard deviation of a mean over seeds."""

    text: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    deviation: float | None = None


class ResultColumn(NamedTuple):
    """A column: a cell per row of the overview, None if empty, and means over groups of sets by group name.

    ``quantity`` is what it tells: zero-shot, the linear probe, a head, or a number of shots.
    """

    kind: Kind
    title: str
    cells: list[Cell | None]
    means: Mapping[str, str] = {}
    quantity: str = ""

    def texts(self) -> list[str]:
        """Return the cells as text."""
        return [cell.text if cell else "" for cell in self.cells]


def result_columns(
    found: Sequence[Row], others: Mapping[str, Mapping[str, Any]], groups: Groups | None = None
) -> Iterator[ResultColumn]:
    """Yield the columns with values: results, each beside the paper's and other runs', then the counts.

    The results are zero-shot, the linear probe, heads, and the largest number of shots of each set. Nothing is
    published of shots.

    Args:
        found: rows of this run.
        others: results of other runs to compare with, by path or name.
        groups: names of runs that are seeds of one recipe, shown as one column.
    """
    tables = {name: rows(run) for name, run in others.items()}
    shots = sorted({max(row.shots) for row in found if row.shots})
    titles: dict[Column, str] = {**COLUMNS, **{n: f"{n} shot{'s' if n > 1 else ''}" for n in shots}}
    for quantity, title in titles.items():
        ours, *rest = (each._replace(quantity=title) for each in _quantity(found, tables, groups or {}, quantity))
        shown = [each for each in rest if any(each.cells)]
        if any(ours.cells) or any(each.kind in ("recipe", "run") for each in shown):
            yield from (ours._replace(title=title), *shown)
    counts = {
        "baseline": [percent(row.baseline) for row in found],
        "images": ["" if row.images is None else f"{row.images:,}" for row in found],
        "skipped": [f"{row.skipped:,}" if row.skipped else "" for row in found],
    }
    for title, texts in counts.items():
        if any(texts):
            yield ResultColumn("count", title, [Cell(text) if text else None for text in texts])


def _quantity(
    found: Sequence[Row], tables: Mapping[str, Sequence[Row]], groups: Groups, column: Column
) -> Iterator[ResultColumn]:
    def cells(table: Sequence[Row]) -> list[Cell | None]:
        places = {(row.name, row.metric): row for row in table}
        return [_cell(places.get((row.name, row.metric)), column) for row in found]

    def means(table: Sequence[Row], of: str = "ours") -> dict[str, str]:
        return {mean.group: percent(getattr(mean, of)) for mean in group_means(table, column)}

    yield ResultColumn("ours", "", cells(found), means(found))
    papers = [row.papers.get(column) for row in found]
    yield ResultColumn("paper", "paper", _figures(papers), means(found, "papers"))
    both = zip([row.measured.get(column) for row in found], papers, strict=True)
    told = [None if ours and paper and abs(ours.value - paper.value) < DIFFERS else ours for ours, paper in both]
    yield ResultColumn("measured", "measured", _figures(told))
    for group, names in groups.items():
        runs = [*([found] if group == THIS else []), *(tables[name] for name in names)]
        seeds = map(_over_seeds, zip(*map(cells, runs), strict=True))
        yield ResultColumn("recipe", f"{group}, {len(runs)} runs", list(seeds))
    grouped = {name for names in groups.values() for name in names}
    for name, title in run_names(name for name in tables if name not in grouped).items():
        yield ResultColumn("run", title, cells(tables[name]), means(tables[name]))


def _cell(row: Row | None, column: Column) -> Cell | None:
    value = row and row.values.get(column)
    return None if row is None or value is None else Cell(percent(value), value, row.intervals.get(column))


def _figures(figures: Sequence[Published | None]) -> list[Cell | None]:
    return [figure and Cell(papers_percent(figure), figure.value) for figure in figures]


def _over_seeds(cells: Sequence[Cell | None]) -> Cell | None:
    """Return the mean and the sample standard deviation of a recipe's runs; None if a value is missing."""
    known = [cell.value for cell in cells if cell and cell.value is not None]
    if not len(known) == len(cells) > 1:
        return None
    mean, deviation = fmean(known), stdev(known)
    return Cell(f"{percent(mean)} ± {percent(deviation)}", mean, deviation=deviation)


def merged_note(found: Sequence[Row]) -> str:
    """Return a note about merged recalls, if there are any."""
    merged = any(row.metric.startswith(MERGED) for row in found)
    return "merged: captions repeat, and equal ones count as one, right for all its images" if merged else ""
