"""Evaluate the sets of a suite, one after the other, into one folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_clip import distributed
from lit_clip.embedding.encode import start_processes
from lit_clip.errors import InputError
from lit_clip.evaluation.class_metrics import describe
from lit_clip.evaluation.classification import TaskOptions, class_names
from lit_clip.evaluation.data import MissingData, check_classes
from lit_clip.evaluation.download import download_missing
from lit_clip.evaluation.open_set import Encoder, Fold, OpenSet, scale_and_bias, trained_classes
from lit_clip.evaluation.overview import judging, metric_words, recalls_of
from lit_clip.evaluation.prompts import Prompts, text_classifier
from lit_clip.evaluation.results import Results, cache_key, code_digest, files_read
from lit_clip.evaluation.store import FeatureStore
from lit_clip.evaluation.suite import SuiteEntry, Task
from lit_clip.evaluation.tasks import PARTS, encode_set, target_digests, used_splits
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import from_totals, progress, stderr
from lit_clip.tools.hardware import autocast


@dataclass
class EvaluationRun:
    """Evaluation of one model into one output folder; the sets' paths are relative to ``root``.

    All ranks compute features and classifiers together. The first rank alone then runs the tasks.
    """

    model: CLIP
    store: FeatureStore
    root: Path
    results: Results
    options: TaskOptions
    tasks: tuple[Task, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"), init=False)
    probes: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False)
    not_downloaded: dict[str, str] = field(default_factory=dict, init=False)  # why, by set; known on the first rank

    def evaluate(self, entries: Mapping[str, SuiteEntry], download: bool = False) -> None:
        """Evaluate all sets in order; with ``download``, first download the missing ones."""
        self.device = start_processes(self.store.settings)
        if download:
            failed = distributed.on_first_rank(lambda: download_missing(entries, self.root, self.tasks))
            self.not_downloaded = failed or {}
        rank, world = distributed.rank_and_world()
        waiting: list[OpenSet] = []
        for name, entry in entries.items():
            self.results.begin(name, entry)
            try:
                waiting.append(self._open(name, entry))
            except InputError as error:
                self._record_failure(name, error)
            while waiting and world == 1:  # otherwise the other ranks would wait for the first
                self._finish(waiting.pop())
        if rank == 0:
            for opened in waiting:
                self._finish(opened)

    def _record_failure(self, name: str, error: InputError) -> None:
        missing = isinstance(error, MissingData) and name not in self.not_downloaded
        status = "missing" if missing else "failed"
        self.results.update(name, status=status)
        self.results.add_reason(name, self.not_downloaded.get(name) or str(error))
        if distributed.rank_and_world()[0] == 0:
            stderr().print(f"{name}: {status}: {error}")

    def _open(self, name: str, entry: SuiteEntry) -> OpenSet:
        """Open a set and compute its features; called on all ranks in the same order."""
        if distributed.rank_and_world()[0] == 0:
            stderr().print(f"{name}: opening the set")  # a listing of many files takes minutes
        opened = OpenSet(name, entry, [], probes=self.probes, **scale_and_bias(self.model))
        opened.tasks = self._open_folds(opened)
        encode_set(opened, Encoder(self.store.features, partial(self._encode, name), self.store.places), self.model)
        self.results.update(name, class_names=class_names(opened))
        if prompts := opened.prompts:
            counts = {"classes": len(prompts.names), "texts": sum(map(len, prompts.texts))}
            self.results.update(name, prompts={**counts, "sha256": prompts.sha256})
        if distributed.rank_and_world()[0] == 0:
            self._count_images(opened)
        return opened

    def _open_folds(self, opened: OpenSet) -> list[Task]:
        """Open the splits on disk, which must include the test split, and return the tasks that they allow."""
        entry = opened.entry
        assert entry.tasks is not None
        tasks: list[Task] = [task for task in entry.tasks if task in self.tasks]
        wanted = {split for task in tasks for split in PARTS[task].needed if split != "test"}
        if "train" in wanted and "val" in entry.splits:
            wanted.add("val")
        for number in range(len(entry.folds)):
            fold = Fold({"test": entry.open("test", number, self.root)})
            check_classes({"test": fold.images["test"], "the first fold": (opened.folds or [fold])[0].images["test"]})
            opened.folds.append(fold)
        try:
            for number, fold in enumerate(opened.folds):
                for split in sorted(wanted):
                    fold.images[split] = entry.open(split, number, self.root)
                fold.classes = trained_classes(entry, fold.images)
        except InputError as error:  # other tasks do not need these splits
            if isinstance(error, MissingData):
                self.results.add_reason(opened.name, f"tasks that need training images are left out: {error}")
            else:
                self._record_failure(opened.name, error)
            for fold in opened.folds:
                fold.images = {"test": fold.images["test"]}
            tasks = [task for task in tasks if PARTS[task].needed == ("test",)]
        return tasks

    def _encode(self, name: str, prompts: Prompts) -> Tensor:
        """Return the cached or newly encoded classifier ``[D, C]``; called on all ranks."""
        self.model.to(self.device)
        rank, world = distributed.rank_and_world()
        share, folder = -(-sum(map(len, prompts.texts)) // world), self.store.folder / "texts"
        with (
            autocast(self.device, self.store.settings.precision),
            progress(f"{name} texts", share, enabled=rank == 0) as advance,
        ):
            count = from_totals(advance)
            classifier = text_classifier(
                self.model, prompts, folder, weights=self.store.fingerprint.text, progress=count
            )
        self.model.cpu()
        return classifier.cpu()

    def _count_images(self, opened: OpenSet) -> None:
        splits: dict[str, Any] = {}
        for split, features in opened.folds[0].features.items():
            folds = [fold.images[split] for fold in opened.folds]
            counts = {"images": len(features.rows), "skipped": features.skipped, "absent": folds[0].absent}
            splits[split] = {**counts, "files": files_read(folds, self.root)}
        self.results.update(opened.name, splits=splits)
        not_finite = sum(int((~np.isfinite(fold.features["test"].after).all(axis=1)).sum()) for fold in opened.folds)
        if not_finite:
            reason = (
                f"the features of {not_finite} images are not finite and count as wrong; check weights and precision"
            )
            self.results.add_reason(opened.name, reason)

    def _finish(self, opened: OpenSet) -> None:
        try:
            digests = target_digests(opened)
        except InputError as error:
            self._record_failure(opened.name, error)
            return
        for number, fold in enumerate(opened.folds):
            splits = [split for split in fold.images if split != "test"]
            fold.trained_on = cache_key([self._split_key(fold, split, digests[number, split]) for split in splits])
        for task in opened.tasks:
            key = self._cache_key(opened, task, digests)
            try:
                result = self.results.cached(opened.name, task, key)
                if result is None:
                    result = PARTS[task].run(opened, self.options, self.results.folder)
            except InputError as error:
                self._record_failure(opened.name, error)
                continue  # another task may be possible
            self.results.add(opened.name, task, key, result)
            for note in result.get("notes", []):
                self.results.add_reason(opened.name, note)
                stderr().print(f"{opened.name}: {note}")
            if "value" in result:
                metrics = result.get("metrics", {})
                told = {metric_words(name): metrics[name] for name in recalls_of(metrics) if task == "retrieval"}
                told = told or {judging(opened.entry.metric, metrics): result["value"]}
                line = ", ".join(f"{metric} {100 * value:.1f} %" for metric, value in told.items())
                stderr().print(f"{opened.name}: {task} {line}", soft_wrap=True)

    def _split_key(self, fold: Fold, split: str, digest: str) -> tuple[Any, ...]:
        return split, self.store.path(fold.images[split]).name, fold.features[split].skipped, digest

    def _cache_key(self, opened: OpenSet, task: Task, digests: Mapping[tuple[int, str], str]) -> str:
        used = [
            self._split_key(fold, split, digests[number, split])
            for number, fold in enumerate(opened.folds)
            for split in fold.images
            if split in used_splits(task)
        ]
        entry, options = opened.entry, self.options
        examples, head = (options.shots, options.draws, options.seed), options.head and options.head.sha256
        more = [
            opened.texts.get(task),
            (examples, [fold.classes for fold in opened.folds]) if "train" in PARTS[task].needed else (),
            describe(options.metrics) if task in ("zero_shot", "linear_probe", "head") else (),
            head if task == "head" else "",
        ]
        judged = entry.metric, entry.data, entry.splits, entry.folds, entry.text_weight
        return cache_key(code_digest(), task, used, more, judged)
