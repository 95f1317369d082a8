"""The evaluation sets whose overlap is looked for: which, from which similarity on, and what a model makes of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from datamodules.evaluation.image_folder import ImageFolderClasses
from datamodules.overlap.search import Queries
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet, LabelledImages, MissingData, MultiLabel
from lit_clip.evaluation.prompts import Prompts, prompts_of, text_classifier
from lit_clip.evaluation.suite import SuiteEntry, read_suite
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import stderr


@dataclass
class EvaluationSet:
    """A set that is looked into.

    Attributes:
        images: all of them.
        entry: how its classes are named.
    """

    images: ImageSet
    entry: SuiteEntry


def open_sets(
    folders: Sequence[str], suites: Sequence[str], names: Sequence[str] | None, data_root: Path, templates: list[str]
) -> dict[str, EvaluationSet]:
    """The sets by name; those of a suite that are not on the disk are left out, and said to be, unless named.

    Raises:
        InputError: none, one that is not there, or two of one name.
    """
    require(bool(folders) or bool(suites), "no evaluation set: name a folder of classes before the options, or --suite")
    require(not names or bool(suites), "--sets: names sets of a --suite")
    opened: dict[str, EvaluationSet] = {}
    for folder in folders:
        name = Path(folder).resolve().name
        require(name not in opened, f"{folder}: another set is called {name}; rename the folder")
        entry = SuiteEntry({"class_path": "datamodules.ImageFolderClasses"}, templates=templates)
        opened[name] = EvaluationSet(ImageFolderClasses(folder), entry)
    entries = read_suite(suites) if suites else {}
    for name in names or []:
        require(name in entries, f"--sets {name}: not in the suite; it has {', '.join(entries)}")
    for name, entry in entries.items():
        if names and name not in names:
            continue
        require(name not in opened, f"--sets {name}: a folder has that name too")
        try:
            opened[name] = EvaluationSet(entry.open("test", 0, data_root), entry)
        except MissingData as error:
            if names:
                raise
            stderr().print(f"left out: {name}: {error}", markup=False)
    require(bool(opened), f"--suite: none of its {len(entries)} sets is in {data_root}")
    return opened


def check_prompts(opened: Mapping[str, EvaluationSet]) -> None:
    """Raise :class:`InputError` for class names that do not fit, not only when all training data have been read."""
    for name, each in opened.items():
        try:
            _prompts(each)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error


def _prompts(each: EvaluationSet) -> Prompts | None:
    """Of its classes; None for sets without one class an image."""
    images = each.images
    if not isinstance(images, LabelledImages) or isinstance(images, MultiLabel):
        return None
    templates = each.entry.templates or getattr(images, "templates", None)
    return prompts_of(each.entry.class_names, templates, images.class_names)


def read_thresholds(words: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The threshold of each set, see :func:`overlap`.

    Raises:
        InputError: not a number from -1 to 1, no such set, or a set without one.
    """
    said: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.rpartition("=")
        if not equals and word.endswith((".yaml", ".yml")):
            said |= _read_mapping(Path(word), "numbers by the names of sets")
        elif name:
            require(name in names, f"--threshold {word}: no set {name}; there are {', '.join(names)}")
            said[name] = value
        else:
            said[""] = value
    found = {name: said.get(name, said.get("", 0.95)) for name in names}
    return {name: _threshold(name, value) for name, value in found.items()}


def _threshold(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"--threshold {value}: not a number (of {name})") from error
    require(-1 <= number <= 1, f"--threshold {value}: a cosine similarity is from -1 to 1 (of {name})")
    return number


def _read_mapping(path: Path, what: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: wants {what}")
    return values


def read_results(path: Path, names: Sequence[str]) -> dict[str, dict[str, bool]]:
    """True or false by image, by set: whether a model is right.

    Raises:
        InputError: not readable, a set that is not there, or anything but true and false.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--results {path}: not readable JSON ({' '.join(str(error).split())})") from error
    what = 'wants {"set": {"image": true, ...}, ...}'
    require(isinstance(values, dict), f"--results {path}: {what}")
    for name in names:
        answers = values.get(name)
        require(isinstance(answers, dict), f"--results {path}: nothing of {name}; the file {what}")
        wrong = next((key for key, value in answers.items() if not isinstance(value, bool)), None)
        require(wrong is None, f"--results {path}: {name}: {wrong} is neither true nor false")
    return values


def given(images: ImageSet, items_Q: np.ndarray, answers: Mapping[str, bool], name: str) -> Tensor:
    """Whether a model is right, of some items as a file says it: bool ``[N]``.

    Raises:
        InputError: an item is not in the file.
    """
    keys = [images.key(int(item)) for item in np.unique(items_Q)]
    missing = next((key for key in keys if key not in answers), None)
    require(missing is None, f"--results: {name}: nothing of {missing}")
    return torch.tensor([answers[key] for key in keys])


def recognised(model: CLIP, each: EvaluationSet, queries: Queries) -> Tensor | None:
    """Whether the model's first prediction is right, bool ``[N]``; None for sets without one class an image."""
    images, prompts = each.images, _prompts(each)
    if prompts is None or not isinstance(images, LabelledImages):
        return None
    items, counts = np.unique(queries.items, return_counts=True)
    features = torch.stack([part.mean(dim=0) for part in queries.features.split(counts.tolist())])
    labels = torch.tensor(images.labels())[torch.from_numpy(items)]
    return (features @ text_classifier(model, prompts, None).cpu().float()).argmax(dim=1) == labels
