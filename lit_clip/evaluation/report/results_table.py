"""Results as columns, which the terminal, the page and LaTeX show, and their table for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from rich import box
from rich.table import Table

from lit_clip.evaluation.comparison import THIS
from lit_clip.evaluation.overview import (
    COLUMNS,
    MERGED,
    STATUSES,
    Column,
    Row,
    given_metrics,
    group_means,
    metric_words,
    papers_percent,
    percent,
    rows,
    sets_of,
)
from lit_clip.evaluation.published import PAPER, Published, measured_weights, nearest, papers_name
from lit_clip.evaluation.report.charts import run_name
from lit_clip.tools.console import Console, Text

DIFFERS = 0.01  # a measured figure is shown if it differs by this much from the paper's, or if the paper has none
Groups = Mapping[str, Sequence[str]]  # see lit_clip.evaluation.comparison.seed_groups
Kind = Literal["ours", "paper", "measured", "recipe", "run", "count"]
WIDE = 130  # columns of a file
SET, METRIC = 12, 10  # least widths
SIDES = SET + METRIC + 5  # with the space around them
HEADS = {  # narrow
    "zero-shot": "zero-\nshot",
    "linear probe": "linear\nprobe",
    "measured": "meas-\nured",
    "baseline": "base-\nline",
    "skipped": "skip-\nped",
}


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
        return [cell.text if cell else "" for cell in self.cells]


def result_columns(
    found: Sequence[Row], others: Mapping[str, Mapping[str, Any]], groups: Groups | None = None
) -> Iterator[ResultColumn]:
    """Yield the columns with values: results, each beside the paper's and other runs', then the counts.

    The results are zero-shot, the linear probe, heads, and the largest number of shots of each set. Nothing is
    published of shots. Other runs are by path or name; runs of a group are seeds of one recipe, shown as one column.
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
        known = {(row.name, row.metric): row for row in table if column in row.values}
        same = [known.get((row.name, row.metric)) for row in found]
        return [
            row and Cell(percent(row.values[column]), row.values[column], row.intervals.get(column)) for row in same
        ]

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
    for name, table in tables.items():
        if name not in grouped:
            yield ResultColumn("run", run_name(name), cells(table), means(table))


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


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print :func:`results_table`, and what was not evaluated; the report explains how to get missing sets."""
    console = console or Console(file_width=WIDE)
    found = rows(results)
    if any(row.status == "done" for row in found):
        console.print(results_table(results, console.width))
    for line in incomplete_means(found):
        console.print(line, soft_wrap=True)
    missing = [row.name for row in found if row.status == "missing"]
    if missing:
        console.print(f"{STATUSES['missing']}: {', '.join(missing)}", soft_wrap=True)
    for row in found:
        if row.status not in ("done", "missing"):
            reason = f": {row.reason}" if row.reason else ""
            console.print(f"{row.name}: {STATUSES.get(row.status, row.status)}{reason}", soft_wrap=True)


def results_table(results: Mapping[str, Any], width: int = WIDE) -> Table:
    """Return a row for each metric of the evaluated sets, in %, beside the paper's nearest model.

    Columns that do not fit the terminal's ``width`` are left out, the least needed first.
    """
    found = [row for row in rows(results) if row.status == "done"]
    entries = dict(sets_of(results))
    columns = _fitting(list(result_columns(found, {})), width)
    caption = Text(_caption(results, columns, found), justify="left")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, caption=caption)
    table.add_column("set", overflow="fold", min_width=SET)
    table.add_column("metric", overflow="fold", min_width=METRIC)
    for column in columns:
        style = "dim" if column.title == "paper" else ""
        table.add_column(_head(column), justify="right", no_wrap=True, style=style)
    for place, row in enumerate(found):
        cells = [column.texts()[place] for column in columns]
        table.add_row(*map(Text, [row.name, metric_words(row.metric), *cells]))
        if found[place + 1 : place + 2] and found[place + 1].name == row.name:
            continue  # a set's rows are followed by those of its --metrics
        for metric, values in given_metrics(entries[row.name]).items():
            texts = {COLUMNS[column]: f"{value:.4g}" for column, value in values.items()}
            table.add_row(*map(Text, [row.name, metric, *(texts.get(column.title, "") for column in columns)]))
    for group in mean_groups(columns):
        table.add_section()
        table.add_row("mean", Text(f"of {group}"), *(column.means.get(group, "") for column in columns))
    return table


def _head(column: ResultColumn) -> str:
    return HEADS.get(column.title, column.title.replace(" ", "\n"))


def _fitting(columns: Sequence[ResultColumn], width: int) -> list[ResultColumn]:
    """Leave out columns that do not fit the terminal; the report has them."""
    few_shot = [column.title for column in columns if column.title[0].isdecimal()]
    for title in ("", "measured", *few_shot[:-1], "images", *few_shot[-1:], "paper", "baseline"):
        columns = [column for column in columns if column.title != title]
        cells = [[*_head(column).split("\n"), *column.texts(), *column.means.values()] for column in columns]
        if SIDES + sum(2 + max(map(len, of_column)) for of_column in cells) <= width:
            break
    return list(columns)


def mean_groups(columns: Sequence[ResultColumn]) -> list[str]:
    """Return the groups of sets for which a column has a mean."""
    return list(dict.fromkeys(group for column in columns for group, mean in column.means.items() if mean))


def incomplete_means(found: Sequence[Row]) -> list[str]:
    """Return a line for each incomplete group of sets; its mean is not shown."""
    lines: dict[str, list[str]] = {}
    for column, title in COLUMNS.items():
        for mean in group_means(found, column):
            if mean.missing:
                lines.setdefault(f"{mean.group}: no mean, {mean.counted}", []).append(title)
    return [f"{' and '.join(titles)}, {line}" for line, titles in lines.items()]


def _caption(results: Mapping[str, Any], columns: Sequence[ResultColumn], found: Sequence[Row]) -> str:
    model, titles = results.get("model") or {}, {column.title for column in columns}
    near, notes = nearest(model), ["in %"]
    if any(given_metrics(entry) for _, entry in sets_of(results)):
        notes = ["in %, --metrics as they are"]
    notes += [note] if (note := merged_note(found)) else []
    if "paper" in titles:
        notes.append(f"paper: {PAPER}, {papers_name(near.name)} ({near.rule})")
    if any(text.endswith("?") for column in columns if column.kind == "paper" for text in column.texts()):
        notes.append("? a figure that could not be checked")
    if "measured" in titles:
        notes.append(measured_note(model))
    return "; ".join(notes)


def measured_note(model: Mapping[str, Any]) -> str:
    """Return a note about the source of the figures in the column ``measured``."""
    weights = measured_weights(model)
    whose = weights if ":" in weights else f"OpenAI's {papers_name(weights)}"
    return f"measured: {whose} by open_clip or CLIP_benchmark, if the paper's figure is 1 point or more away or unknown"
