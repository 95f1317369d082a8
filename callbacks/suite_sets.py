"""Evaluation sets for callbacks: opened from a suite, and checked before training starts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_clip import distributed
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import ImageSet, MissingData, check_classes
from lit_clip.evaluation.scores import evaluate_scores
from lit_clip.evaluation.suite import Metric, SuiteEntry, Task, read_suite
from lit_clip.evaluation.targets import Targets
from lit_clip.tools.images import OnError, or_skip

Fold = dict[str, ImageSet]


def chosen_entries(
    suite: str | Sequence[str] | None, only: Sequence[str] | None, task: Task, who: str
) -> dict[str, SuiteEntry]:
    """The entries of a suite that a callback evaluates.

    Args:
        suite: one YAML file or several; None: nothing.
        only: some of the sets; None: all that the task is possible with.
        task: what is done with them.
        who: the callback.

    Raises:
        InputError: a suite that is wrong, a name that is not in it, or a set of another kind.
    """
    if suite is None:
        require(not only, f"{who}.only: names sets of a suite; give suite")
        return {}
    entries = read_suite([suite] if isinstance(suite, str) else list(suite))
    for name in only or ():
        require(name in entries, f"{who}.only: no {name!r} in the suite; there are {', '.join(entries)}")
        require(task in (entries[name].tasks or ()), f"{who}.only: {name} is not a set for {task}; leave it out")
    return {
        name: entry for name, entry in entries.items() if task in (entry.tasks or ()) and (only is None or name in only)
    }


def open_folds(entry: SuiteEntry, splits: Sequence[str], data_root: Path) -> list[Fold]:
    """Some splits of every fold; of these, ``val`` may not be one of the set's.

    Raises:
        MissingData: a split is not there; on all ranks, if on any.
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


def open_sets(entries: dict[str, SuiteEntry], splits: Sequence[str], data_root: str, who: str) -> dict[str, list[Fold]]:
    """The sets that are there; a warning names the others."""
    opened: dict[str, list[Fold]] = {}
    for name, entry in entries.items():
        try:
            opened[name] = open_folds(entry, splits, Path(data_root))
        except MissingData as error:
            rank_zero_warn(f"{who}: {name} is left out: {error}")
            continue
        with named(name):
            for fold in opened[name]:
                check_classes({**fold, "the first fold": opened[name][0]["test"]})
    return opened


@contextmanager
def named(name: str) -> Iterator[None]:
    """Errors say which set they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def check_folds(
    folds: Sequence[Mapping[str, ImageSet]], metric: Metric, classes: int | None, on_error: OnError
) -> None:
    """Raise :class:`InputError` for what would otherwise end a run after its first epoch, hours later.

    Args:
        folds: each with its test split.
        metric: which must be defined on that.
        classes: how many names are in use.
        on_error: whether images that can be seen to be broken are an error.
    """
    for fold in folds:
        for images in fold.values():
            require(len(images) > 0, "the set is empty")
            if on_error == "error":
                _look_at(images)
        known = Targets.of(fold["test"], None, classes)
        evaluate_scores(metric, torch.zeros(()).expand(len(known), known.classes), known)


def _look_at(images: ImageSet) -> None:
    try:
        images.check()
    except InputError as error:
        raise InputError(or_skip(str(error), "on_error to skip")) from error
