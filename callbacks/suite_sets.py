"""Open and check the sets of a suite for callbacks that evaluate during training."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_clip import distributed
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet, MissingData, check_classes
from lit_clip.evaluation.other_classes import trained_classes
from lit_clip.evaluation.scores import evaluate_scores
from lit_clip.evaluation.suite import Metric, SuiteEntry, Task, read_suite
from lit_clip.evaluation.targets import Targets
from lit_clip.tools.images import OnError, or_skip

Fold = dict[str, ImageSet]


def chosen_entries(
    suite: str | Sequence[str] | None, only: Sequence[str] | None, tasks: Sequence[Task], callback: str
) -> dict[str, SuiteEntry]:
    """Return the entries of a suite that a callback evaluates.

    Args:
        suite: one YAML file or several; None for no sets.
        only: names of the sets; None for all that have one of the tasks.
        tasks: tasks of the callback.
        callback: name of the callback, for messages.
    """
    if suite is None:
        require(not only, f"{callback}.only: needs suite, whose sets it names")
        return {}
    entries = read_suite([suite] if isinstance(suite, str) else list(suite))
    for name in only or ():
        require(name in entries, f"{callback}.only: no {name!r} in the suite; there are {', '.join(entries)}")
        require(
            bool({*tasks} & {*(entries[name].tasks or ())}),
            f"{callback}.only: {name} does not have the task {' or '.join(tasks)}; leave it out",
        )
    return {
        name: entry
        for name, entry in entries.items()
        if {*tasks} & {*(entry.tasks or ())} and (only is None or name in only)
    }


def open_folds(entry: SuiteEntry, splits: Sequence[str], data_root: Path) -> list[Fold]:
    """Open some splits of every fold; splits that the entry does not define are left out.

    Raises:
        MissingData: the files of a split are not there; raised on all ranks if on any.
    """
    folds: list[Fold] = []
    missing: list[str] = []
    try:
        for number in range(len(entry.folds)):
            folds.append({split: entry.open(split, number, data_root) for split in splits if split in entry.splits})
    except MissingData as error:
        missing.append(str(error))
    everywhere = distributed.gather_objects(missing)
    if everywhere:
        raise MissingData(everywhere[0])
    return folds


def open_sets(
    entries: dict[str, SuiteEntry], splits: Sequence[str], data_root: str, callback: str
) -> dict[str, list[Fold]]:
    """Open the sets that are there and warn about the others."""
    opened: dict[str, list[Fold]] = {}
    for name, entry in entries.items():
        try:
            opened[name] = open_folds(entry, splits, Path(data_root))
        except MissingData as error:
            rank_zero_warn(f"{callback}: {name} is skipped: {error}")
            continue
        with named(name):
            for fold in opened[name]:
                check_classes({"test": fold["test"], "the first fold": opened[name][0]["test"]})
                trained_classes(entry, fold)
    return opened


@contextmanager
def named(name: str) -> Iterator[None]:
    """Prefix errors with the name of the set."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def check_folds(
    folds: Sequence[Mapping[str, ImageSet]], metric: Metric, classes: int | None, on_error: OnError
) -> None:
    """Raise :class:`InputError` for problems that would otherwise stop a run hours later, after its first epoch.

    Args:
        folds: folds with a test split each.
        metric: metric that must be defined for the test splits.
        classes: number of class names in use.
        on_error: whether visibly broken images are an error.
    """
    for fold in folds:
        for images in fold.values():
            check_images(images, on_error)
        targets = Targets.of(fold["test"], None, classes)
        evaluate_scores(metric, torch.zeros(()).expand(len(targets), targets.classes), targets)


def check_images(images: ImageSet, on_error: OnError) -> None:
    """Raise :class:`InputError` for a set without images and, if they are an error, for visibly broken ones."""
    require(len(images) > 0, "the set is empty")
    if on_error == "skip":
        return
    try:
        images.check()
    except InputError as error:
        raise InputError(or_skip(str(error), "on_error to skip")) from error
