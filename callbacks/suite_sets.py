"""Evaluation sets in training: those of a suite that are there, and features of their pictures on all ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_clip import distributed
from lit_clip.embedding.image_files import MEND, OnError
from lit_clip.errors import InputError, require
from lit_clip.evaluation.data import MissingData, Pictures, check_classes
from lit_clip.evaluation.scores import evaluate_scores
from lit_clip.evaluation.suite import Metric, SuiteEntry, Task, read_suite
from lit_clip.evaluation.targets import Targets
from lit_clip.models.preprocess import pixels
from lit_clip.module import LitCLIP
from lit_clip.preemption import shield_worker

Fold = dict[str, Pictures]


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
    folds: Sequence[Mapping[str, Pictures]], metric: Metric, classes: int | None, on_error: OnError
) -> None:
    """Raise :class:`InputError` for what would otherwise end a run after its first epoch, hours later.

    Args:
        folds: each with its test split.
        metric: which must be defined on that.
        classes: how many names are in use.
        on_error: whether pictures that can be seen to be broken are an error.
    """
    for fold in folds:
        for pictures in fold.values():
            require(len(pictures) > 0, "the set is empty")
            if on_error == "error":
                _look_at(pictures)
        known = Targets.of(fold["test"], None, classes)
        evaluate_scores(metric, torch.zeros(()).expand(len(known), known.classes), known)


def _look_at(pictures: Pictures) -> None:
    try:
        pictures.check()
    except InputError as error:
        raise InputError(f"{str(error).removesuffix(MEND)}{MEND}, or set on_error to skip") from error


class _Item(NamedTuple):
    row: int
    pictures: Tensor | None  # uint8 [F, 3, S, S]
    reason: str  # for which there are none


class _Items(Dataset[_Item]):
    def __init__(self, pictures: Pictures, transform: Any) -> None:
        self.pictures, self.transform = pictures, transform

    def __getitem__(self, index: int) -> _Item:
        try:
            pictures = [self.transform(picture) for picture in self.pictures.pictures(index)]
            return _Item(index, torch.stack(pictures), "")
        except Exception as error:  # decoders answer a broken file with whatever they trip over
            reason = str(error).partition("\n")[0] or type(error).__name__
            ours = isinstance(error, InputError)
            return _Item(index, None, reason if ours else f"{self.pictures.key(index)}: cannot be read ({reason})")


class Encoded(NamedTuple):
    """Features of a set, the same on every rank.

    Attributes:
        rows: the N pictures that could be read, ascending.
        features: float32 ``[N, D]`` on the CPU.
    """

    rows: list[int]
    features: Tensor


class Reader:
    """Reads pictures and encodes them, batch by batch on all ranks: a batch is the same on any number of them.

    Args:
        batch_size: pictures encoded at once on each rank.
        num_workers: processes that read pictures.
        on_error: what a picture that cannot be read does.
        who: the callback, for messages.
    """

    def __init__(self, batch_size: int, num_workers: int, on_error: OnError, who: str) -> None:
        require(batch_size >= 1, f"{who}.batch_size: {batch_size} must be at least 1")
        require(num_workers >= 0, f"{who}.num_workers: {num_workers} must be at least 0")
        self.batch_size, self.num_workers, self.who = batch_size, num_workers, who
        self.on_error: OnError = on_error
        self._told: set[str] = set()

    def encode(self, module: LitCLIP, pictures: Pictures, encode: Callable[[Tensor], Tensor], name: str) -> Encoded:
        """Features of all pictures of a set; all ranks must ask.

        Args:
            module: whose preprocessing.
            pictures: of the set.
            encode: normalised ``[B, 3, H, W]`` -> ``[B, D]``.
            name: of the set, for messages.

        Raises:
            InputError: on all ranks, a picture that cannot be read unless it may be skipped, or none at all.
        """
        rank, world = distributed.rank_and_world()
        batches = torch.arange(len(pictures)).split(1 if pictures.several else self.batch_size)
        loader: Any = DataLoader(
            _Items(pictures, pixels(module.preprocessing)),
            batch_sampler=[rows.tolist() for rows in batches[rank::world]],
            num_workers=self.num_workers,
            worker_init_fn=shield_worker,
            collate_fn=list,
            generator=torch.Generator().manual_seed(0),  # training's own numbers stay what they are
        )
        rows: list[int] = []
        features: list[Tensor] = []
        bad: list[tuple[int, str]] = []
        for items in loader:
            read = [item for item in items if item.pictures is not None]
            rows += [item.row for item in read]
            features += self._features(module, [item.pictures for item in read], encode)
            bad += [(item.row, item.reason) for item in items if item.pictures is None]
        self._judge(distributed.gather_objects(bad), len(pictures), name)
        return _gathered(module, rows, features)

    def _features(self, module: LitCLIP, items: list[Tensor], encode: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Of each item ``[D]``, the mean of its pictures."""
        if not items:
            return []
        parts = torch.cat(items).split(self.batch_size)
        features = torch.cat([encode(module.model.normalize(part.to(module.device))).float() for part in parts])
        return [part.mean(dim=0) for part in features.split([len(item) for item in items])]

    def _judge(self, bad: list[tuple[int, str]], size: int, name: str) -> None:
        if not bad:
            return
        _, reason = min(bad)
        require(
            self.on_error == "skip", f"{name}: {reason.removesuffix(MEND)}{MEND}, or set {self.who}.on_error to skip"
        )
        require(len(bad) < size, f"{name}: none of {size} pictures could be read; {reason}")
        if name not in self._told:
            self._told.add(name)
            rank_zero_warn(f"{self.who}: {name}: {len(bad)} of {size} pictures are left out; the first: {reason}")


def _gathered(module: LitCLIP, rows: list[int], features: list[Tensor]) -> Encoded:
    """All ranks' rows in order; a rank that has none learns from the others how wide they are."""
    width = distributed.maximum(len(features[0]) if features else 0)
    mine = torch.stack(features) if features else torch.zeros(0, width, device=module.device)
    all_rows = distributed.gather_uneven(torch.tensor(rows, dtype=torch.long, device=module.device)).cpu()
    order = all_rows.argsort()
    return Encoded(all_rows[order].tolist(), distributed.gather_uneven(mine).cpu()[order])
