"""The evaluation sets of ``lit-clip overlap``: their choice, their thresholds, and a model's correct answers."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_clip.embedding.precision import Precision, autocast
from lit_clip.embedding.reading import row_means
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet, LabelledImages, MissingData
from lit_clip.evaluation.prompts import Prompts, prompts_of_set, text_classifier
from lit_clip.evaluation.suite import SuiteEntry, read_suite
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import stderr
from lit_clip.tools.reading import naming
from ..evaluation.own_classes import ImageFolderClasses
from .search import EncodedImages


class EvaluationSet(NamedTuple):
    """A set to search the training data for, and its entry in the suite, which names the classes."""

    images: ImageSet
    entry: SuiteEntry


def open_sets(
    folders: Sequence[str], suites: Sequence[str], names: Sequence[str] | None, data_root: Path, templates: list[str]
) -> dict[str, EvaluationSet]:
    """Open the sets; skip a suite's missing sets with a note, unless they were named."""
    require(
        bool(folders) or bool(suites), "no evaluation set; name a folder of classes before the options, or a --suite"
    )
    require(not names or bool(suites), "--sets: needs a --suite")
    opened: dict[str, EvaluationSet] = {}
    for folder in folders:
        name = os.path.basename(os.path.realpath(folder))  # Path.resolve fails for a link to itself
        require(name not in opened, f"{folder}: another set is named {name}; rename the folder")
        entry = SuiteEntry({"class_path": "lit_clip.datamodules.ImageFolderClasses"}, templates=templates)
        opened[name] = EvaluationSet(ImageFolderClasses(folder), entry)
    entries = read_suite(suites) if suites else {}
    for name in names or []:
        require(name in entries, f"--sets {name}: not in the suite; it has {', '.join(entries)}")
    for name, entry in entries.items():
        if names and name not in names:
            continue
        require(name not in opened, f"--sets {name}: a folder has the same name; rename it")
        try:
            opened[name] = EvaluationSet(entry.open("test", 0, data_root), entry)
        except MissingData as error:
            if names:
                raise
            stderr().print(f"skipped: {name}: {error}")
    require(bool(opened), f"--suite: none of its {len(entries)} sets is in {data_root}; set --data_root")
    return opened


def check_prompts(opened: Mapping[str, EvaluationSet]) -> None:
    """Raise :class:`InputError` for class names that do not fit, before the training data are read."""
    for name, each in opened.items():
        with naming(name):
            _prompts(each)


def _prompts(each: EvaluationSet) -> Prompts | None:
    """Return the prompts of a set's classes; None unless each image has one class."""
    images = each.images
    if not isinstance(images, LabelledImages) or images.truth.relevance is not None:
        return None
    return prompts_of_set(each.entry, images)


def read_thresholds(words: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Read the threshold of each set, see :func:`datamodules.commands.overlap.overlap`."""
    found = dict.fromkeys(names, 0.95)
    for word in sorted(words, key=lambda word: "=" in word):  # that for all sets first
        name, _, value = word.rpartition("=")
        require(not name or name in names, f"--threshold {word}: no set named {name}; there are {', '.join(names)}")
        try:
            number = float(value)
        except ValueError as error:
            raise InputError(f"--threshold {value}: must be a number") from error
        require(-1 <= number <= 1, f"--threshold {value}: must be between -1 and 1, as cosine similarities are")
        found |= {name: number} if name else dict.fromkeys(names, number)
    return found


def recognised(
    model: CLIP, each: EvaluationSet, encoded: EncodedImages, precision: Precision = "32-true"
) -> Tensor | None:
    """Return whether the model's first prediction is right, bool ``[N]``; None unless each image has one class."""
    images, prompts = each.images, _prompts(each)
    if prompts is None or not isinstance(images, LabelledImages):
        return None
    items, counts = np.unique(encoded.rows, return_counts=True)
    features = row_means(torch.from_numpy(encoded.features), counts.tolist())
    labels = torch.tensor(images.labels())[torch.from_numpy(items)]
    with autocast(model.device, precision):
        classifier = text_classifier(model, prompts, None).cpu().float()
    return (features @ classifier).argmax(dim=1) == labels
