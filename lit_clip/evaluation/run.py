"""The sets of a suite, evaluated one after the other into one folder."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_clip import distributed
from lit_clip.embedding.encode import start_processes
from lit_clip.embedding.precision import autocast
from lit_clip.errors import InputError, require
from lit_clip.evaluation.bias import bias_texts
from lit_clip.evaluation.caption_choice import encode_choices
from lit_clip.evaluation.caption_texts import caption_texts
from lit_clip.evaluation.data import (
    CaptionChoices,
    CaptionedImages,
    LabelledImages,
    MissingData,
    SomeOfImageNet,
    check_classes,
)
from lit_clip.evaluation.download import download_missing
from lit_clip.evaluation.files_read import files_read
from lit_clip.evaluation.open_set import DistinctCaptions, Fold, OpenSet
from lit_clip.evaluation.other_classes import single_classes, trained_classes
from lit_clip.evaluation.prompts import Prompts, prompts_of_set, text_classifier
from lit_clip.evaluation.results import Results, cache_key, code_digest
from lit_clip.evaluation.store import FeatureStore
from lit_clip.evaluation.suite import SuiteEntry, Task
from lit_clip.evaluation.tasks import TaskOptions, needed_splits, run_task, target_digests, top1_among, used_splits
from lit_clip.evaluation.zero_shot import imagenet_class_names
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import from_totals, progress, stderr

IMAGENET = "ImageNet"  # its name in the paper


class EvaluationRun:
    """Evaluation of one model into one output folder.

    All ranks compute features and classifiers together. The first rank alone then runs the tasks.

    Args:
        model: the encoders.
        store: of the model's features.
        root: folder that the sets' paths are relative to.
        results: of the output folder.
        options: of the tasks.
        tasks: those to run.
    """

    def __init__(
        self,
        model: CLIP,
        store: FeatureStore,
        root: Path,
        results: Results,
        options: TaskOptions,
        tasks: tuple[Task, ...],
    ) -> None:
        self.model, self.store, self.root = model, store, root
        self.results, self.options, self.tasks = results, options, tasks
        self.device, self.text_weights = torch.device("cpu"), store.fingerprint.text
        self.probes: dict[tuple[Any, ...], Any] = {}
        self.imagenet: list[OpenSet] = []  # ImageNet and the sets that have some of its classes
        self.not_downloaded: dict[str, str] = {}  # why, by set; known on the first rank

    def evaluate(self, entries: Mapping[str, SuiteEntry], download: bool = False) -> None:
        """Evaluate all sets, in order, after downloading those that are missing if ``download``."""
        self.device = start_processes(self.store.settings)
        if download:
            failed = distributed.on_first_rank(lambda: download_missing(entries, self.root, self.tasks))
            self.not_downloaded = failed or {}
        rank, world = distributed.rank_and_world()
        waiting = []
        for name, entry in entries.items():
            self.results.begin(name, entry)
            try:
                opened = self._open(name, entry)
            except InputError as error:
                self._record_failure(name, error)
                continue
            if world == 1:
                self._finish(opened)
            else:
                waiting.append(opened)
        for opened in waiting if rank == 0 else ():
            self._finish(opened)
        if rank == 0:
            self._add_subset_accuracies()

    def _record_failure(self, name: str, error: InputError) -> None:
        missing = isinstance(error, MissingData) and name not in self.not_downloaded
        status = "missing" if missing else "failed"
        self.results.update(name, status=status)
        self.results.add_reason(name, self.not_downloaded.get(name) or str(error))
        if distributed.rank_and_world()[0] == 0:
            stderr().print(f"{name}: {status}: {error}")

    def _open(self, name: str, entry: SuiteEntry) -> OpenSet:
        """Open a set and compute its features; called on all ranks in the same order."""
        opened = OpenSet(name, entry, [], scale=float(self.model.logit_scale.detach().exp()), probes=self.probes)
        tasks = opened.tasks = self._open_folds(opened)
        for number, fold in enumerate(opened.folds):
            for split, images in fold.images.items():
                title = f"{name} {split}" + (f" {number + 1}/{len(opened.folds)}" if len(opened.folds) > 1 else "")
                self.store.compute(images, title)
        if {"zero_shot", "bias"} & set(tasks):
            self._build_classifiers(opened, tasks)
        if distributed.rank_and_world()[0] == 0:
            self._read_features(opened)
        if "retrieval" in tasks:
            self._encode_captions(opened)
        if "caption_choice" in tasks:
            self._encode_choices(opened)
        return opened

    def _open_folds(self, opened: OpenSet) -> list[Task]:
        """Open the splits that are there and return the tasks that they allow.

        Raises:
            MissingData: there is no test split.
        """
        entry = opened.entry
        assert entry.tasks is not None
        tasks: list[Task] = [task for task in entry.tasks if task in self.tasks]
        wanted = {split for task in tasks for split in needed_splits(task) if split != "test"}
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
            tasks = [task for task in tasks if needed_splits(task) == ("test",)]
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
            classifier = text_classifier(self.model, prompts, folder, weights=self.text_weights, progress=count)
        self.model.cpu()
        return classifier.cpu()

    def _build_classifiers(self, opened: OpenSet, tasks: Sequence[Task]) -> None:
        """Build the classifiers of zero-shot and of the bias probes; each rank encodes its share of the prompts."""
        test = opened.folds[0].images["test"]
        if "zero_shot" in tasks:
            if not isinstance(test, LabelledImages):
                raise InputError(f"{type(test).__name__} has no classes, which zero-shot needs")
            prompts = prompts_of_set(opened.entry, test)
            opened.prompts, opened.classifier = prompts, self._encode(opened.name, prompts)
            counts = {"classes": len(prompts.names), "texts": sum(map(len, prompts.texts))}
            self.results.update(opened.name, class_names=prompts.names, prompts={**counts, "sha256": prompts.sha256})
        for probe, texts in bias_texts().items() if "bias" in tasks else ():
            opened.bias[probe] = self._encode(opened.name, Prompts(list(texts), [[text] for text in texts.values()]))

    def _read_features(self, opened: OpenSet) -> None:
        """Read the features and count the images, on the first rank."""
        splits: dict[str, Any] = {}
        for fold in opened.folds:
            for split, images in fold.images.items():
                fold.features[split] = self.store.read(images)
                features = fold.features[split]
                counts = {"images": len(features.rows), "skipped": features.skipped, "absent": images.absent}
                splits.setdefault(split, counts)
        for split, counts in splits.items():
            counts["files"] = files_read([fold.images[split] for fold in opened.folds], self.root)
        self.results.update(opened.name, splits=splits)
        not_finite = sum(int((~np.isfinite(fold.features["test"].after).all(axis=1)).sum()) for fold in opened.folds)
        if not_finite:
            reason = (
                f"the features of {not_finite} images are not finite and count as wrong; check weights and precision"
            )
            self.results.add_reason(opened.name, reason)

    def _encode_captions(self, opened: OpenSet) -> None:
        """Encode each distinct caption once; called on all ranks."""
        test = opened.folds[0].images["test"]
        require(isinstance(test, CaptionedImages), f"{type(test).__name__} has no captions, which retrieval needs")
        assert isinstance(test, CaptionedImages)
        rows = self.store.read(test).rows
        prompts, pairs = caption_texts(test, rows, opened.entry.templates)
        features = self._encode(opened.name, prompts).T
        digest = cache_key(prompts.sha256, [column.tolist() for column in pairs])
        opened.captions = DistinctCaptions(features.contiguous(), pairs, digest)

    def _encode_choices(self, opened: OpenSet) -> None:
        """Encode each distinct caption once; called on all ranks."""
        test = opened.folds[0].images["test"]
        require(isinstance(test, CaptionChoices), f"{type(test).__name__} has no questions, which caption_choice needs")
        assert isinstance(test, CaptionChoices)
        rows, encode = self.store.read(test).rows, partial(self._encode, opened.name)
        opened.choices = encode_choices(test, rows, opened.entry.templates, encode)

    def _finish(self, opened: OpenSet) -> None:
        """Run the tasks of a set, on the first rank."""
        try:
            digests = target_digests(opened)
        except InputError as error:
            self._record_failure(opened.name, error)
            return
        for number, fold in enumerate(opened.folds):
            splits = [split for split in fold.images if split != "test"]
            fold.trained_on = cache_key([self._split_key(fold, number, split, digests) for split in splits])
        for task in opened.tasks:
            key = self._cache_key(opened, task, digests)
            try:
                result = self.results.cached(opened.name, task, key)
                if result is None:
                    result = run_task(task, opened, self.options, self.results.folder)
            except InputError as error:
                self._record_failure(opened.name, error)
                continue  # another task may be possible
            self.results.add(opened.name, task, key, result)
            if "value" in result:
                value = f"{100 * result['value']:.1f} %"
                stderr().print(f"{opened.name}: {task} {opened.entry.metric} {value}")

        if opened.entry.paper == IMAGENET or isinstance(opened.folds[0].images["test"], SomeOfImageNet):
            self.imagenet.append(opened)

    def _add_subset_accuracies(self) -> None:
        """Add ImageNet's accuracy among the classes of each set that has only some, for effective robustness."""
        done = [opened for opened in self.imagenet if "zero_shot" in self.results.sets[opened.name]["tasks"]]
        for whole in done:
            for other in done if whole.entry.paper == IMAGENET else ():
                classes = single_classes(other.folds[0].images["test"])
                if 0 < len(classes) < len(imagenet_class_names()):
                    result, name = self.results.sets[whole.name]["tasks"]["zero_shot"], other.entry.paper or other.name
                    value, interval = top1_among(whole, classes)
                    result["metrics"][f"top1/{name}"], result["intervals"][f"top1/{name}"] = value, interval

    def _split_key(
        self, fold: Fold, number: int, split: str, digests: Mapping[tuple[int, str], str]
    ) -> tuple[Any, ...]:
        """Return what identifies the features and the truth of a split."""
        return split, self.store.path(fold.images[split]).name, fold.features[split].skipped, digests[number, split]

    def _cache_key(self, opened: OpenSet, task: Task, digests: Mapping[tuple[int, str], str]) -> str:
        """Hash all that a result depends on."""
        used = [
            self._split_key(fold, number, split, digests)
            for number, fold in enumerate(opened.folds)
            for split in fold.images
            if split in used_splits(task)
        ]
        entry, more = opened.entry, ()
        if task in ("linear_probe", "few_shot"):
            more = (vars(self.options), [fold.classes for fold in opened.folds])
        elif task == "zero_shot" and opened.prompts:
            more = (opened.prompts.names, opened.prompts.sha256)
        elif task == "caption_choice" and opened.choices:
            more = (opened.choices.digest,)
        elif opened.captions:
            more = (opened.captions.digest,)
        return cache_key(code_digest(), task, used, more, entry.metric, entry.data, entry.splits, entry.folds)
