"""Write the classes of images as a table, CSV or JSON."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.table import Column, Table
from torch import Tensor

from lit_clip.evaluation.thresholds import NONE
from lit_clip.tools.atomic import replacing
from lit_clip.tools.console import Console, Text, write_results
from lit_clip.tools.text_files import no_formula

Output = Literal["table", "csv", "json"]


class RankedClass(NamedTuple):
    """A class of an image, with its rank in its group; :data:`NONE` has no probability."""

    name: str
    probability: float | None
    group: str = ""
    rank: int = 1


def ranked(
    probability_BC: Tensor,
    none_B: Sequence[bool],
    names: Sequence[str],
    top_k: int,
    above_C: Tensor | None = None,
    group: str = "",
) -> list[list[RankedClass]]:
    """Return the classes of each image in a batch, most probable first, or :data:`NONE` first where it applies.

    They are the first ``top_k``, or all those whose probability reaches ``above_C``.
    """
    best = probability_BC.topk(len(names) if above_C is not None else min(top_k, len(names)), dim=1)
    found: list[list[RankedClass]] = []
    for values, places, none in zip(best.values.tolist(), best.indices.tolist(), none_B, strict=True):
        shown: list[tuple[str, float | None]] = [(NONE, None)] if none else []
        for value, place in zip(values, places, strict=True):
            if above_C is None or value >= above_C[place]:
                shown.append((str(names[place]), value))
        found.append([RankedClass(*each, group, rank) for rank, each in enumerate(shown, start=1)])
    return found


def percent(value: float | None) -> str:
    """Return ``91.3 %`` for 0.913; an empty text for None."""
    return "" if value is None else f"{100 * value:.1f} %"


def write_classes(classes_of: dict[str, list[RankedClass]], output: Output, path: Path | None) -> None:
    """Write the classes of each image to a file, or to standard output."""
    text = io.StringIO()
    if output == "table":
        (Console() if path is None else Console(file=text, width=200)).print(_table(classes_of))
    else:
        text.write((_as_csv if output == "csv" else _as_json)(classes_of))
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape", newline="")
    elif output != "table":
        write_results(text.getvalue())


def _grouped(classes_of: dict[str, list[RankedClass]]) -> bool:
    return any(each.group for best in classes_of.values() for each in best)


def _table(classes_of: dict[str, list[RankedClass]]) -> Table:
    grouped = _grouped(classes_of)
    table = Table("image", *(["group"] if grouped else []), "class", Column("probability", justify="right"))
    for key, best in classes_of.items():
        for i, each in enumerate(best):
            image = Text(key if i == 0 else "", overflow="fold")
            group = [Text(each.group if each.rank == 1 else "")] if grouped else []
            table.add_row(image, *group, Text(each.name), percent(each.probability))
    return table


def _as_csv(classes_of: dict[str, list[RankedClass]]) -> str:
    text, grouped = io.StringIO(), _grouped(classes_of)
    rows: list[list[Any]] = [["image", *(["group"] if grouped else []), "rank", "class", "probability"]]
    for key, best in classes_of.items():
        for each in best:
            value = "" if each.probability is None else f"{each.probability:.6f}"
            rows.append([key, *([each.group] if grouped else []), each.rank, each.name, value])
    bare = any("\r" in str(cell) for row in rows for cell in row)  # which the writer quotes only where it ends lines
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL)
    writer.writerows(map(no_formula, row) for row in rows)
    return text.getvalue()


def _as_json(classes_of: dict[str, list[RankedClass]]) -> str:
    def entry(each: RankedClass) -> dict[str, Any]:
        group = {"group": each.group} if each.group else {}
        return {**group, "class": each.name, "probability": each.probability and round(each.probability, 6)}

    return json_text([{"image": key, "classes": [entry(each) for each in best]} for key, best in classes_of.items()])


def json_text(value: Any) -> str:
    """Return JSON with non-ASCII letters unescaped."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        text = json.dumps(value, indent=1)  # a file name that is not Unicode has to be escaped in JSON
    return text + "\n"
