"""Thresholds of ``lit-clip classify``, fitted on examples: images of one class each, or of several."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from lit_clip.commands.class_output import NONE, RankedClass, percent
from lit_clip.commands.class_truth import folder_truth
from lit_clip.embedding.image_files import FileRows, image_file, images_in
from lit_clip.errors import InputError, listed, require
from lit_clip.evaluation.intervals import UnitScores
from lit_clip.evaluation.thresholds import FIXED, FOLDS, fit_thresholds, macro, none_threshold
from lit_clip.tools.console import Text, stderr
from lit_clip.tools.images import OnError
from lit_clip.tools.reading import reading
from lit_clip.tools.text_files import read_text

TABLES = {".csv": ",", ".tsv": "\t"}
SEPARATOR = ";"  # of an image's classes in a table
MOST = 2**26  # probabilities of examples
SHOWN = 40  # classes whose thresholds are printed


class Scored(NamedTuple):
    """Places of B files, and of each the classes' probabilities and cosine similarities, ``[B, C]``."""

    rows: list[int]
    probability: Tensor
    similarity: Tensor


class Examples(NamedTuple):
    """Images and their classes: one each, -1 for an image of no class; or relevance ``[N, C]`` for several."""

    files: FileRows
    labels: list[int]
    relevance: Tensor | None = None


class Thresholds(NamedTuple):
    """A similarity below which an image shows none of the classes, or a probability from which it shows a class."""

    none: float | None = None
    classes: Tensor | None = None  # [C]
    summary: Sequence[str | Table] = ()  # what they cost on the examples

    def print_summary(self) -> None:
        for each in self.summary:
            stderr().print(each, highlight=False, soft_wrap=isinstance(each, str))

    def none_of(self, scored: Scored) -> list[bool]:
        """Return which images of a batch show none of the classes."""
        if self.classes is not None:
            return (scored.probability < self.classes).all(dim=1).tolist()
        best = scored.similarity.amax(dim=1)
        return [False] * len(best) if self.none is None else (best < self.none).tolist()

    def ranked(self, scored: Scored, names: Sequence[str], top_k: int) -> list[list[RankedClass]]:
        """Return the classes of each image of a batch, the most probable first, after "none of these" where it is."""
        above = self.classes
        best = scored.probability.topk(len(names) if above is not None else min(top_k, len(names)), dim=1)
        found: list[list[RankedClass]] = []
        for values, places, none in zip(best.values.tolist(), best.indices.tolist(), self.none_of(scored), strict=True):
            pairs = zip(values, places, strict=True)
            shown = [(value, place) for value, place in pairs if above is None or value >= above[place]]
            classes = [RankedClass(str(names[place]), value) for value, place in shown]
            found.append([RankedClass(NONE, None)] * none + classes)
        return found


def read_examples(path: str, names: Sequence[str], on_error: OnError) -> Examples:
    """Return the images of class folders, or of a table with the columns ``image`` and ``classes``."""
    if Path(path).suffix.lower() in TABLES:
        return _table(Path(path), names)
    files = images_in(Path(path), on_error)
    labels = folder_truth(files, names, [Path()])
    require(any(label >= 0 for label in labels), f"--examples {path}: no folder there is named like a class")
    return Examples(FileRows(files), labels)


def _table(path: Path, names: Sequence[str]) -> Examples:
    text = io.StringIO(read_text(path, "--examples"))
    with reading(path, "table", "--examples"):
        reader = csv.DictReader(text, delimiter=TABLES[path.suffix.lower()])
        found, rows = reader.fieldnames or [], list(reader)
    lacking = [column for column in ("image", "classes") if column not in found]
    require(not lacking, f"--examples {path}: has no column {' and '.join(lacking)}; there are {listed(found)}")
    places = {name.casefold(): place for place, name in enumerate(names)}
    files, relevant = FileRows(), list[list[int]]()
    for number, row in enumerate(rows, start=2):
        words = [word.strip() for word in (row["classes"] or "").split(SEPARATOR) if word.strip()]
        unknown = [word for word in words if word.casefold() not in places]
        require(not unknown, f"--examples {path}: line {number}: {listed(unknown)} is not among --classes")
        require(bool(row["image"]), f"--examples {path}: line {number}: names no image")
        files.append(image_file(row["image"], path.parent / row["image"]))
        relevant.append([places[word.casefold()] for word in words])
    require(bool(files), f"--examples {path}: the table is empty")
    most = f"--examples {path}: {len(files):,} images of {len(names):,} classes are too many; give fewer"
    require(len(files) * len(names) <= MOST, most)
    relevance = torch.zeros(len(files), len(names), dtype=torch.int8)
    for number, classes in enumerate(relevant):
        relevance[number, classes] = 1
    return Examples(files, [-1] * len(files), relevance)


def fit(examples: Examples, scored: Iterable[Scored], names: Sequence[str], error: float) -> Thresholds:
    """Fit thresholds on examples, with a summary of what they cost."""
    if examples.relevance is None:
        return _fit_none(examples, scored, error)
    rows: list[int] = []
    parts: list[Tensor] = []
    for batch in scored:
        rows += batch.rows
        parts.append(batch.probability.cpu())
    require(bool(rows), "--examples: none of the images could be read")
    return _fit_classes(torch.cat(parts), examples.relevance[rows], names)


def _fit_none(examples: Examples, scored: Iterable[Scored], error: float) -> Thresholds:
    known: list[float] = []
    others: list[float] = []
    for batch in scored:
        for row, best in zip(batch.rows, batch.similarity.amax(dim=1).tolist(), strict=True):
            (known if examples.labels[row] >= 0 else others).append(best)
    try:
        threshold = none_threshold(torch.tensor(known, dtype=torch.float64), error)
    except InputError as problem:
        raise InputError(f"--none_error: {problem}") from problem
    summary: list[str | Table] = [
        f"none of these: a similarity below {threshold:.4f} to every class; fitted on {len(known):,} examples, so that "
        f"on average at most {percent(error)} of new images of the classes are called so"
    ]
    if others:
        rejected = UnitScores((torch.tensor(others, dtype=torch.float64) < threshold).double().numpy())
        low, high = rejected.interval()
        summary.append(
            f"of {len(others):,} examples of no class {percent(rejected.mean())} are called so (99.5 % interval "
            f"{percent(low)} to {percent(high)})"
        )
    return Thresholds(none=threshold, summary=summary)


def _fit_classes(probability_NC: Tensor, relevance_NC: Tensor, names: Sequence[str]) -> Thresholds:
    found = fit_thresholds(probability_NC, relevance_NC)
    means = macro(found)
    line = (
        f"thresholds of {len(names)} classes, fitted on {len(relevance_NC):,} examples: mean F1 "
        f"{percent(means['f1_held_out'])} on held-out examples ({FOLDS} folds), {percent(means['f1_fixed'])} with "
        f"{FIXED} for all; {percent(means['f1_fitted'])} on the examples themselves"
    )
    table = Table("class")
    for title in ("examples", "threshold", f"F1 of {FIXED}", "F1 held out"):
        table.add_column(title, justify="right")
    for name, each in list(zip(names, found, strict=True))[:SHOWN]:
        numbers = (str(each.examples), f"{each.threshold:.3g}", percent(each.f1_fixed), percent(each.f1_held_out))
        table.add_row(Text(name), *numbers)
    never = [name for name, each in zip(names, found, strict=True) if not each.examples]
    lacking = [f"without an example, and so never given: {listed(never)}"] if never else []
    return Thresholds(classes=torch.tensor([each.threshold for each in found]), summary=[line, table, *lacking])
