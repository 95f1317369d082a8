"""Judge ``lit-clip classify`` on images in folders that are named after their classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_clip.commands.class_output import percent
from lit_clip.commands.search import small_image
from lit_clip.embedding.image_files import ImageFile
from lit_clip.errors import InputError, require
from lit_clip.evaluation.class_metrics import Computed, build, check_metrics, compute, update, write_array
from lit_clip.evaluation.intervals import UnitScores
from lit_clip.evaluation.predictions import confusion_counts, confusion_entries, write_confusions
from lit_clip.evaluation.thresholds import NONE
from lit_clip.tools.console import progress, stderr
from lit_clip.tools.html import thumbnail, write_page

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
    rows: list[int] = field(default_factory=list)  # of the files that are judged
    prediction: list[int] = field(default_factory=list)  # -1: none of the classes
    probability: list[tuple[float, float]] = field(default_factory=list)  # of the best class and of the true one
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
        for number, row in enumerate(rows):
            truth = self.truth[row]
            if truth < 0:
                self.elsewhere.append(none_B[number])
                continue
            self.rows.append(row)
            self.prediction.append(-1 if none_B[number] else place[number])
            self.probability.append((best[number], float(probability_BC[number, truth])))
        known = [number for number, row in enumerate(rows) if self.truth[row] >= 0]
        if known and self._metrics:
            target = probability_BC.new_tensor([self.truth[rows[number]] for number in known]).long()
            update(self._metrics, probability_BC[known].cpu(), target.cpu())

    def finish(self, page: Path) -> None:
        """Print accuracy, confusions and metrics, and write the page and the files beside it."""
        if not self.rows:
            return
        if self.group:
            page = page.with_stem(f"{page.stem}_{self.group}")
        truth, prediction = np.array([self.truth[row] for row in self.rows]), np.array(self.prediction)
        computed, stem = compute(self._metrics), page.with_suffix("")
        counts = confusion_counts(truth, prediction, len(self.names))
        write_confusions(stem.with_name(f"{stem.name}_confusions.csv"), counts, self.names)
        for name, value in computed.arrays.items():
            write_array(stem.with_name(f"{stem.name}_{name}"), value, self.names)
        lines = self._lines(truth, prediction, computed)
        title = f"{self.group}: " if self.group else ""
        for line in lines:
            stderr().print(f"{title}{line}", highlight=False, soft_wrap=True)
        found = confusion_entries(truth, prediction, self.names)
        for first, other, count in found["confusions"][:3]:
            stderr().print(
                f"{title}confused: {first} taken for {other}, {count} times", highlight=False, soft_wrap=True
            )
        wrong = (truth != prediction).nonzero()[0].tolist()
        wrong.sort(key=lambda number: -self.probability[number][0])
        write_page(
            page,
            TEMPLATE,
            title="Images by class",
            lines=lines,
            names=self.names,
            matrix_counts=found.get("confusion_matrix", []),
            pairs=found["confusions"],
            wrong=[self._shown(number) for number in self._with_progress(wrong[:WRONG])],
            wrong_count=len(wrong),
        )
        stderr().print(f"wrong images and confusions: {page}")

    def _with_progress(self, numbers: Sequence[int]) -> Any:
        with progress("page", len(numbers)) as advance:
            for number in numbers:
                yield number
                advance(1)

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

    def _shown(self, number: int) -> dict[str, Any]:
        file, (best, own) = self.files[self.rows[number]], self.probability[number]
        image, place = small_image(file.path, 256), self.prediction[number]
        return {
            "image": "" if image is None else thumbnail(image, 256),
            "truth": self.names[self.truth[self.rows[number]]],
            "prediction": NONE if place < 0 else self.names[place],
            "probability": "" if place < 0 else percent(best),
            "truth_probability": percent(own),
            "key": file.key,
        }
