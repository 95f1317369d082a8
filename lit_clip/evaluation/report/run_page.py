"""The page of a training run: before and after, curves, and examples of held-out images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_clip.evaluation.before_after import HEAD, Measured, PairFeatures, Row
from lit_clip.evaluation.report.charts import chart_settings, new_figure, svg
from lit_clip.tools.html import write_page

TEMPLATE = Path(__file__).parent / "templates" / "run.html"


def examples_of(pairs: PairFeatures, before: Measured, after: Measured, count: int) -> list[dict[str, Any]]:
    """Choose and describe images: first the largest changes in their caption's rank, then the worst and the best."""
    ranks = {name: model.more["rank"].numpy() for name, model in (("before", before), ("after", after))}
    moved = np.abs(np.log2(ranks["after"] + 1) - np.log2(ranks["before"] + 1))
    left, found = set(range(len(moved))), list[dict[str, Any]]()
    for number, (kind, order) in enumerate((("changed", -moved), ("worst", -ranks["after"]), ("best", ranks["after"]))):
        rows = [row for row in order.argsort(kind="stable").tolist() if row in left and (moved[row] or number)]
        for row in rows[: (count - len(found)) // (3 - number)]:
            left.remove(row)
            own = int(pairs.pairs.text[pairs.pairs.image == row][0])
            nearest = {"before": before.more["caption"], "after": after.more["caption"]}
            answers = [(name, pairs.captions[int(nearest[name][row])], int(ranks[name][row]) + 1) for name in ranks]
            found.append({"kind": kind, "key": pairs.keys[row], "own": pairs.captions[own], "answers": answers})
    return found


def write_run_page(
    path: Path,
    rows: Sequence[Row],
    start: str,
    worse: str,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    examples: Sequence[Mapping[str, Any]],
) -> None:
    """Write the page as one file that fetches nothing. Each example has its ``image`` as a data URI."""
    charts = []
    with chart_settings():
        for name, points in curves.items():
            figure, axes = new_figure(2.2, 4.5)
            axes.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) < 20 else "")
            axes.set(title=name, xlabel="step")
            charts.append(svg(figure, name))
    texts = {"title": f"Training run {path.parent.name}", "head": ["%", *HEAD], "start": start, "worse": worse}
    write_page(path, TEMPLATE, **texts, rows=[row.cells for row in rows], charts=charts, examples=examples)
