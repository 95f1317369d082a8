"""Test probes on another set than they were trained on: match the classes of the two sets."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet, LabelledImages, check_classes
from lit_clip.evaluation.prompts import prompts_of
from lit_clip.evaluation.suite import SuiteEntry
from lit_clip.evaluation.zero_shot import imagenet_class_names

Classes = list[list[int]]  # for each class of the tested set, those of the training set


def trained_classes(entry: SuiteEntry, splits: Mapping[str, ImageSet]) -> Classes | None:
    """Check a fold's classes; return the ``train`` classes for each ``test`` class, or None if both are of one set."""
    others = {name: images for name, images in splits.items() if name != "test" and entry.is_of_another_set(name)}
    if not others:
        check_classes(splits)
        return None
    train = others.get("train")
    require("train" in others and len(others) == len(splits) - 1, "splits: train and val must be of the same set")
    check_classes({"test": others["train"], **{name: images for name, images in others.items() if name != "train"}})
    test = splits["test"]
    for images in (train, test):
        require(isinstance(images, LabelledImages), f"{type(images).__name__} has no classes, which a probe needs")
    assert isinstance(train, LabelledImages)
    assert isinstance(test, LabelledImages)
    named = all(name.isdecimal() for name in test.class_names) and entry.class_names is not None
    names = prompts_of(entry.class_names, "{}", test.class_names).names if named else test.class_names
    return _matched(test, names, train)


def _matched(test: LabelledImages, names: Sequence[str], train: LabelledImages) -> Classes:
    """Match classes by name; if a set has only numbers, ``names`` come from the suite."""
    if names == train.class_names:
        return [[label] for label in range(len(train.class_names))]
    if test.in_imagenet and train.class_names == imagenet_class_names():
        return test.in_imagenet()
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(train.class_names):
        labels.setdefault(name, []).append(label)
    unknown = [name for name in names if name not in labels]
    if unknown:
        raise InputError(
            f"splits: train has no class {unknown[0]!r}, which test has ({len(unknown)} of {len(names)} classes are "
            "not there); train on a set with the same names"
        )
    return [labels[name] for name in names]


def among(scores: Tensor, classes: Sequence[Sequence[int]] | None) -> Tensor:
    """Return the scores of the tested set's classes ``[N, C]``, from scores of the training set's classes.

    A class that several trained classes mean has the highest of their scores, as in the paper (section 3.3); one that
    none means has minus infinity and is never predicted.
    """
    if classes is None:
        return scores
    never = scores.new_full((len(scores), 1), -torch.inf)
    return torch.cat([scores[:, list(labels)].amax(dim=1, keepdim=True) if labels else never for labels in classes], 1)
