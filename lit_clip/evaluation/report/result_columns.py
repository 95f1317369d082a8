"""The columns of the table of all results, for the terminal and for the page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lit_clip.evaluation.comparison import THIS, over_seeds
from lit_clip.evaluation.overview import COLUMNS, Column, Row, group_means, papers_percent, percent, rows
from lit_clip.evaluation.published import Published
from lit_clip.evaluation.report.chart_style import run_names

DIFFERS = 0.01  # a measured figure is shown if it differs by this much from the paper's, or if the paper has none
Groups = Mapping[str, Sequence[str]]  # see lit_clip.evaluation.comparison.seed_groups


class ResultColumn(NamedTuple):
    """A column, as text.

    Attributes:
        title: its heading.
        cells: one for each row of the overview.
        means: over groups of sets, by name of the group.
        ours: whether the values are this run's.
    """

    title: str
    cells: list[str]
    means: dict[str, str] = {}
    ours: bool = False


class Quantity(NamedTuple):
    """What a block of columns compares: zero-shot, linear probe, or a number of shots.

    Attributes:
        title: heading of this run's column.
        value: of a row.
        column: None for shots, of which nothing is published.
    """

    title: str
    value: Callable[[Row], float | None]
    column: Column | None = None


def quantities(found: Sequence[Row]) -> list[Quantity]:
    """Return zero-shot, linear probe, and the largest number of shots of each set."""
    shots = sorted({max(row.shots) for row in found if row.shots})
    return [
        *(Quantity(title, lambda row, key=key: row.values.get(key), key) for key, title in COLUMNS.items()),
        *(Quantity(f"{n} shot{'s' * (n > 1)}", lambda row, n=n: row.shots.get(n)) for n in shots),
    ]


def result_columns(
    found: Sequence[Row], others: Mapping[str, Mapping[str, Any]], groups: Groups | None = None
) -> Iterator[ResultColumn]:
    """Yield the columns that have values: results with the paper's and other runs' beside them, then the counts.

    Args:
        found: rows of this run.
        others: results of other runs to compare with, by path or name.
        groups: names of runs that are seeds of one recipe, shown as one column.
    """
    tables = {name: {(row.name, row.metric): row for row in rows(other)} for name, other in others.items()}
    for quantity in quantities(found):
        yield from _compared(found, tables, groups or {}, quantity)
    counts = (
        ResultColumn("baseline", [percent(row.baseline) for row in found]),
        ResultColumn("images", ["" if row.images is None else f"{row.images:,}" for row in found]),
        ResultColumn("skipped", [f"{row.skipped:,}" if row.skipped else "" for row in found]),
    )
    yield from (column for column in counts if any(column.cells))


def seed_values(
    found: Sequence[Row], tables: Mapping[str, Mapping[tuple[str, str], Row]], names: Sequence[str], group: str
) -> list[list[Row | None]]:
    """Return, for each row, the rows of the runs of a recipe; this run's is among those of :data:`THIS`."""
    return [
        [*([row] if group == THIS else []), *(tables[name].get((row.name, row.metric)) for name in names)]
        for row in found
    ]


def _compared(
    found: Sequence[Row],
    tables: Mapping[str, Mapping[tuple[str, str], Row]],
    groups: Groups,
    quantity: Quantity,
) -> list[ResultColumn]:
    column = quantity.column
    values = [percent(quantity.value(row)) for row in found]
    means = group_means(found, column) if column else []
    columns = [ResultColumn(quantity.title, values, {mean.group: percent(mean.ours) for mean in means}, ours=True)]
    if column:
        papers = [papers_percent(row.papers.get(column)) for row in found]
        columns.append(ResultColumn("paper", papers, {mean.group: percent(mean.papers) for mean in means}))
        others = [papers_percent(_differing(row.measured.get(column), row.papers.get(column))) for row in found]
        columns.append(ResultColumn("measured", others))
    grouped = {name for names in groups.values() for name in names}
    for group, names in groups.items():
        runs = [_seeds(quantity, of_row) for of_row in seed_values(found, tables, names, group)]
        columns.append(ResultColumn(f"{group}, {len(names) + (group == THIS)} runs", runs))
    titles = run_names(name for name in tables if name not in grouped)
    for name, table in tables.items():
        if name in titles:
            cells = [table.get((row.name, row.metric)) for row in found]
            other_means = group_means(list(table.values()), column) if column else []
            of_groups = {mean.group: percent(mean.ours) for mean in other_means}
            texts = ["" if cell is None else percent(quantity.value(cell)) for cell in cells]
            columns.append(ResultColumn(titles[name], texts, of_groups))
    if not any(any(each.cells) for each in columns if each.title not in ("paper", "measured")):
        return []
    return [columns[0], *(each for each in columns[1:] if any(each.cells))]


def _differing(figure: Published | None, paper: Published | None) -> Published | None:
    """Return a measured figure where it tells more than the paper's."""
    if figure and paper and abs(figure.value - paper.value) < DIFFERS:
        return None
    return figure


def _seeds(quantity: Quantity, runs: Sequence[Row | None]) -> str:
    found = over_seeds([None if run is None else quantity.value(run) for run in runs])
    return f"{percent(found.mean)} ± {percent(found.deviation)}" if found else ""
