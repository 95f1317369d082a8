"""Judge ``lit-clip classify`` on images in folders that are named after their classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_clip.commands.class_output import percent
from lit_clip.commands.search import small_thumbnail
from lit_clip.embedding.image_files import ImageFile
from lit_clip.errors import InputError, require
from lit_clip.evaluation.class_metrics import Computed, build, check_metrics, compute, update, write_array
from lit_clip.evaluation.confusions import confusion_counts, confusion_entries, write_confusions
from lit_clip.evaluation.intervals import UnitScores
from lit_clip.evaluation.thresholds import NONE
from lit_clip.tools.console import progress, stderr
from lit_clip.tools.html import write_page

TEMPLATE = Path(__file__).parent / "templates" / "classify.html"
WRONG = 120  # images on the page, the most confidently wrong ones
NO_TRUTH = "no image is in a folder that is named like a class, so there is nothing to compare with"


def folder_names(paths: Sequence[str], files: Sequence[ImageFile]) -> list[str]:
    """Return the names of a folder's subfolders as class names, with spaces for underscores."""
    root = Path(paths[0]) if len(paths) == 1 else Path()
    inside = (
        [PurePath(file.path).relative_to(root).parts for file in files] if root.is_dir() and len(paths) == 1 else []
    )
    if not inside or any(len(parts) < 2 for parts in inside):
        raise InputError(
            f"--classes: not given, and {' '.join(paths[:2])} is no folder with a subfolder of images for each class; "
            "name the classes"
        )
    names = list(dict.fromkeys(parts[0].replace("_", " ") for parts in inside))
    require(len(names) > 1, f"--classes: not given, and {root} has one subfolder, {names[0]}; name the classes' folder")
    return names


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


def folder_truth(files: Sequence[ImageFile], names: Sequence[str], folders: Sequence[PurePath] = ()) -> list[int]:
    """Return the class of each image: the innermost folder named after a class; -1 if there is none.

    Counted are the folders below the one of ``folders`` that the image is in, and that one itself; of an image in none
    of them its own folder. Letters may be small or capital, and underscores and hyphens stand for spaces.
    """
    places = {_plain(name): place for place, name in reversed(list(enumerate(names)))}
    places |= {name: place for place, name in enumerate(names)}
    above = sorted(folders, key=lambda folder: -len(folder.parts))

    def place(path: PurePath) -> int:
        root = next((folder for folder in above if path.is_relative_to(folder)), path.parent)
        inside = (root.name, *path.relative_to(root).parts[:-1])
        known = (places.get(name, places.get(_plain(name), -1)) for name in reversed(inside))
        return next((each for each in known if each >= 0), -1)

    return [place(PurePath(file.key)) for file in files]


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
        lines, found = self._lines(truth, prediction, computed), confusion_entries(truth, prediction, self.names)
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
