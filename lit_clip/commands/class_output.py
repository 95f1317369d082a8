"""Write the classes of images as a table, CSV or JSON; and judge them where the true classes are known."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.table import Column, Table
from torch import Tensor

from lit_clip.commands.search import small_thumbnail
from lit_clip.embedding.image_files import ImageFile
from lit_clip.errors import require
from lit_clip.evaluation.class_metrics import Computed, build, check_metrics, compute, update, write_array
from lit_clip.evaluation.intervals import UnitScores
from lit_clip.evaluation.predictions import confusion_counts, confusion_entries, write_confusions
from lit_clip.evaluation.thresholds import NONE
from lit_clip.tools.atomic import replacing
from lit_clip.tools.console import Console, Text, progress, stderr, write_results
from lit_clip.tools.html import write_page
from lit_clip.tools.reading import no_formula

TEMPLATE = Path(__file__).parent / "templates" / "classify.html"
WRONG = 120  # images on the page, the most confidently wrong ones
NO_TRUTH = "no image is in a folder that is named like a class, so there is nothing to compare with"
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


class _Answer(NamedTuple):
    file: ImageFile
    truth: int
    prediction: int  # -1: none of the classes
    probability: float  # of the best class
    of_truth: float  # probability of the true class


@dataclass
class Judge:
    """Compare the answers with the truth, batch by batch, and report their quality.

    ``truth`` is each file's class, -1 for none; ``given`` are metrics of torchmetrics; ``group`` is the classes'.
    """

    files: Sequence[ImageFile]
    names: Sequence[str]
    truth: Sequence[int]
    given: Mapping[str, Any]
    group: str = ""
    answers: list[_Answer] = field(default_factory=list)  # for the images of a class
    elsewhere: list[bool] = field(default_factory=list)  # of images of no class: whether they were called so

    def __post_init__(self) -> None:
        require(self.known or not self.given, f"--metrics: {NO_TRUTH}")
        check_metrics(self.given, torch.zeros(1, dtype=torch.int64), len(self.names))
        self._metrics = build(self.given, len(self.names))

    @property
    def known(self) -> bool:
        """Whether any image's class is known."""
        return any(place >= 0 for place in self.truth)

    def add(self, rows: Sequence[int], probability_BC: Tensor, none_B: Sequence[bool]) -> None:
        """Judge a batch: places of the files, class probabilities, and whether an image shows none of the classes."""
        best, place = (each.tolist() for each in probability_BC.max(dim=1))
        truth_B = [self.truth[row] for row in rows]
        for number, (row, truth, none) in enumerate(zip(rows, truth_B, none_B, strict=True)):
            if truth < 0:
                self.elsewhere.append(none)
                continue
            prediction, of_truth = -1 if none else place[number], float(probability_BC[number, truth])
            self.answers.append(_Answer(self.files[row], truth, prediction, best[number], of_truth))
        target = torch.tensor(truth_B)
        if self._metrics and bool((target >= 0).any()):
            update(self._metrics, probability_BC[target >= 0], target[target >= 0])

    def finish(self, page: Path) -> None:
        """Print accuracy, confusions and metrics, and write the page and the files beside it."""
        if not self.answers:
            return
        page = page.with_stem(f"{page.stem}_{self.group}") if self.group else page
        truth, prediction = np.array([(each.truth, each.prediction) for each in self.answers]).T
        computed, stem = compute(self._metrics), page.with_suffix("")
        counts = confusion_counts(truth, prediction, len(self.names))
        write_confusions(stem.with_name(f"{stem.name}_confusions.csv"), counts, self.names)
        for name, value in computed.arrays.items():
            write_array(stem.with_name(f"{stem.name}_{name}"), value, self.names)
        lines, found = self._lines(truth, prediction, computed), confusion_entries(counts, self.names)
        confused = [f"confused: {own} taken for {other}, {count} times" for own, other, count in found["confusions"]]
        for line in lines + confused[:3]:
            stderr().print(f"{self.group}: {line}" if self.group else line, highlight=False, soft_wrap=True)
        wrong = sorted(
            (each for each in self.answers if each.prediction != each.truth), key=lambda each: -each.probability
        )
        shown: list[dict[str, Any]] = []
        with progress("page", len(wrong[:WRONG])) as advance:
            for each in wrong[:WRONG]:
                shown.append(self._shown(each))
                advance(1)
        write_page(
            page,
            TEMPLATE,
            title="Images by class",
            lines=lines,
            names=self.names,
            matrix_counts=found.get("confusion_matrix", []),
            pairs=found["confusions"],
            wrong=shown,
            wrong_count=len(wrong),
        )
        stderr().print(f"wrong images and confusions: {page}")

    def _lines(self, truth: np.ndarray, prediction: np.ndarray, computed: Computed) -> list[str]:
        right = (truth == prediction).astype(np.float64)
        top1, mean = UnitScores(right), UnitScores(right, truth)
        low, high = top1.interval()
        lines = [
            f"accuracy: {percent(top1.mean())} of {len(truth):,} images (99.5 % interval {percent(low)} to "
            f"{percent(high)}), mean per class {percent(mean.mean())}"
        ]
        if (prediction < 0).any():
            lines.append(f"called {NONE}: {percent(float((prediction < 0).mean()))} of them")
        unknown = "without a class in the table" if self.group else "in no folder that is named like a class"
        if self.elsewhere:
            lines.append(f"not counted: {len(self.elsewhere):,} images, {unknown}")
        if any(self.elsewhere):
            lines.append(f"called {NONE}: {percent(float(np.mean(self.elsewhere)))} of those not counted")
        return [*lines, *(f"{name}: {value:.4g}" for name, value in computed.numbers.items())]

    def _shown(self, answer: _Answer) -> dict[str, Any]:
        none = answer.prediction < 0
        return {
            "image": small_thumbnail(answer.file.path, 256),
            "truth": self.names[answer.truth],
            "prediction": NONE if none else self.names[answer.prediction],
            "probability": "" if none else percent(answer.probability),
            "truth_probability": percent(answer.of_truth),
            "key": answer.file.key,
        }
