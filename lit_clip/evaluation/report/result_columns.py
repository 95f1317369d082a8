"""The columns of the tables of all results, for the terminal, the page and LaTeX."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lit_clip.evaluation.comparison import THIS, over_seeds
from lit_clip.evaluation.overview import COLUMNS, MERGED, Column, Row, group_means, papers_percent, percent, rows
from lit_clip.evaluation.report.chart_style import run_names

DIFFERS = 0.01  # a measured figure is shown if it differs by this much from the paper's, or if the paper has none
Groups = Mapping[str, Sequence[str]]  # see lit_clip.evaluation.comparison.seed_groups


class Cell(NamedTuple):
    """A value with its interval, or a mean over seeds with its standard deviation."""

    value: float
    interval: tuple[float, float] | None = None
    deviation: float | None = None


class RunColumn(NamedTuple):
    """The cells of a run, or of the seeds of a recipe: one for each row of the overview."""

    title: str
    cells: list[Cell | None]
    table: list[Row] = []  # the run's own rows


class Block(NamedTuple):
    """What there is of a quantity: zero-shot, the linear probe, or a number of shots, of which nothing is published."""

    title: str
    column: Column | None
    ours: list[Cell | None]
    runs: list[RunColumn]
    recipes: list[RunColumn]


class ResultColumn(NamedTuple):
    """A column as text: a cell for each row of the overview, and means over groups of sets, by name of the group."""

    title: str
    cells: list[str]
    means: dict[str, str] = {}
    ours: bool = False  # whether the values are this run's


def blocks(found: Sequence[Row], others: Mapping[str, Mapping[str, Any]], groups: Groups) -> Iterator[Block]:
    """Yield zero-shot, the linear probe, and the largest number of shots of each set.

    Args:
        found: rows of this run.
        others: results of other runs to compare with, by path or name.
        groups: names of runs that are seeds of one recipe, shown as one column.
    """
    tables = {name: rows(run) for name, run in others.items()}
    by_place = {name: {(row.name, row.metric): row for row in table} for name, table in tables.items()}
    grouped = {name for names in groups.values() for name in names}
    titles = run_names(name for name in tables if name not in grouped)
    kinds: list[tuple[str, Column | None, int]] = [(title, column, 0) for column, title in COLUMNS.items()]
    shots = sorted({max(row.shots) for row in found if row.shots})
    for title, column, n in [*kinds, *((f"{n} shot{'s' * (n > 1)}", None, n) for n in shots)]:

        def cell(row: Row | None, column: Column | None = column, n: int = n) -> Cell | None:
            value = None if row is None else row.values.get(column) if column else row.shots.get(n)
            return None if row is None or value is None else Cell(value, row.intervals.get(column) if column else None)

        runs = [
            RunColumn(titles[name], [cell(by_place[name].get((row.name, row.metric))) for row in found], tables[name])
            for name in titles
        ]
        recipes = []
        for group, names in groups.items():
            seeds = [[cell(by_place[name].get((row.name, row.metric))) for name in names] for row in found]
            ours = [[cell(row)] if group == THIS else [] for row in found]
            cells = [_over_seeds([*own, *of_row]) for own, of_row in zip(ours, seeds, strict=True)]
            recipes.append(RunColumn(f"{group}, {len(names) + (group == THIS)} runs", cells))
        yield Block(title, column, [cell(row) for row in found], runs, recipes)


def _over_seeds(cells: Sequence[Cell | None]) -> Cell | None:
    seeds = over_seeds([cell and cell.value for cell in cells])
    return Cell(seeds.mean, deviation=seeds.deviation) if seeds else None


def result_columns(
    found: Sequence[Row], others: Mapping[str, Mapping[str, Any]], groups: Groups | None = None
) -> Iterator[ResultColumn]:
    """Yield the columns that have values: results with the paper's and other runs' beside them, then the counts.

    Arguments are those of :func:`blocks`.
    """
    for block in blocks(found, others, groups or {}):
        ours = ResultColumn(block.title, _texts(block.ours), _means(found, block.column), ours=True)
        recipes = [ResultColumn(each.title, _texts(each.cells)) for each in block.recipes]
        runs = [ResultColumn(each.title, _texts(each.cells), _means(each.table, block.column)) for each in block.runs]
        if any(any(each.cells) for each in (ours, *recipes, *runs)):
            yield ours
            yield from (each for each in (*_published(found, block.column), *recipes, *runs) if any(each.cells))
    counts = (
        ResultColumn("baseline", [percent(row.baseline) for row in found]),
        ResultColumn("images", ["" if row.images is None else f"{row.images:,}" for row in found]),
        ResultColumn("skipped", [f"{row.skipped:,}" if row.skipped else "" for row in found]),
    )
    yield from (column for column in counts if any(column.cells))


def merged_note(found: Sequence[Row]) -> str:
    """Say what merged recalls are, if there are any."""
    merged = any(row.metric.startswith(MERGED) for row in found)
    return "merged: captions repeat, and equal ones count as one, right for all its images" if merged else ""


def _texts(cells: Sequence[Cell | None]) -> list[str]:
    deviations = ["" if cell is None or cell.deviation is None else f" ± {percent(cell.deviation)}" for cell in cells]
    return [percent(cell and cell.value) + deviation for cell, deviation in zip(cells, deviations, strict=True)]


def _means(table: Sequence[Row], column: Column | None) -> dict[str, str]:
    return {mean.group: percent(mean.ours) for mean in group_means(table, column)} if column else {}


def _published(found: Sequence[Row], column: Column | None) -> Iterator[ResultColumn]:
    """Yield the paper's figures, and measured ones where they tell more than the paper's."""
    if column is None:
        return
    papers, measured = [row.papers.get(column) for row in found], [row.measured.get(column) for row in found]
    means = {mean.group: percent(mean.papers) for mean in group_means(found, column)}
    yield ResultColumn("paper", list(map(papers_percent, papers)), means)
    both = zip(measured, papers, strict=True)
    told = [None if ours and paper and abs(ours.value - paper.value) < DIFFERS else ours for ours, paper in both]
    yield ResultColumn("measured", list(map(papers_percent, told)))
