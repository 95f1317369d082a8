"""``lit-clip evaluate``: evaluate a model on a suite of sets, as the paper does."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from lit_clip import distributed, load_model
from lit_clip.embedding.encode import EncodingSettings
from lit_clip.embedding.precision import Precision, autocast, check_precision
from lit_clip.errors import InputError, require
from lit_clip.evaluation.bias import bias_texts
from lit_clip.evaluation.caption_choice import encode_choices
from lit_clip.evaluation.comparison import OtherRun, other_runs, paired_differences, seed_groups
from lit_clip.evaluation.data import (
    CaptionChoices,
    CaptionedImages,
    ImageSet,
    LabelledImages,
    MissingData,
    SomeOfImageNet,
    check_classes,
)
from lit_clip.evaluation.download import download_missing
from lit_clip.evaluation.few_shot import SHOTS
from lit_clip.evaluation.files_read import files_read
from lit_clip.evaluation.other_classes import single_classes, trained_classes
from lit_clip.evaluation.prompts import Prompts, prompts_of, text_classifier
from lit_clip.evaluation.report.page import write_report
from lit_clip.evaluation.report.results_table import print_results
from lit_clip.evaluation.report.tables import write_tables
from lit_clip.evaluation.report.tensorboard import write_tensorboard
from lit_clip.evaluation.results import Results, cache_key, code_digest, provenance
from lit_clip.evaluation.retrieval import caption_texts
from lit_clip.evaluation.store import FeatureStore
from lit_clip.evaluation.suite import TASKS, SuiteEntry, Task, read_suite
from lit_clip.evaluation.tasks import (
    DistinctCaptions,
    Fold,
    OpenSet,
    TaskOptions,
    needed_splits,
    run_task,
    target_digests,
    top1_among,
    used_splits,
)
from lit_clip.evaluation.zero_shot import imagenet_class_names
from lit_clip.models.clip import CLIP
from lit_clip.tools.atomic import make_folder
from lit_clip.tools.console import from_totals, progress, stderr
from lit_clip.tools.images import OnError
from lit_clip.tools.workers import workers_for_images

IMAGENET = "ImageNet"  # its name in the paper


def evaluate(
    *,
    model: str,
    suite: list[str],
    output: str,
    data_root: str = ".",
    sets: list[str] | None = None,
    tasks: list[str] | None = None,
    compare: list[str] | None = None,
    cache: str | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    devices: int = 1,
    accelerator: str = "auto",
    precision: Precision = "32-true",
    on_error: OnError = "error",
    shots: list[int] | None = None,
    draws: int = 3,
    seed: int = 0,
    download: bool = False,
) -> None:
    """Evaluate a model on a suite of sets: zero-shot, linear probe, few-shot, retrieval, caption choice.

    Sets that are not below the data root are listed with how to get them; the others are evaluated. Features and
    results are cached: the same command resumes after an interruption.

    Args:
        model: a checkpoint, a weights file, or a name that lit_clip.load_model accepts.
        suite: YAML files of sets, such as configs/evaluation/paper.yaml.
        output: folder for results.json, report.html, results.csv, results.tex, predictions, images and TensorBoard
            curves.
        data_root: folder that the sets' paths are relative to.
        sets: names of the sets to evaluate; all if not given.
        tasks: tasks to run, of zero_shot, linear_probe, few_shot, retrieval, geolocation, bias, caption_choice;
            all if not given.
        compare: results.json of other runs, or their folders, to compare with; NAME=PATH names a run, and runs with
            one name are seeds of one recipe (this: of the evaluated model's).
        cache: folder for image and text features; cache in the output folder if not given.
        batch_size: images encoded at once by one process.
        num_workers: processes per device that decode images; the device's share of the cores but one, up to 8, if not
            given. Does not change the results.
        devices: number of processes, one per device; does not change the results.
        accelerator: cpu, gpu, mps, ...
        precision: of the encoders; 32-true is exact, bf16-mixed and on a GPU 16-mixed are faster.
        on_error: for an image that cannot be read, skip it and list it in the report, or fail its set with an error.
        shots: numbers of examples per class of the few-shot results; 1, 2, 4, 8 and 16 if not given.
        draws: number of draws of the examples of each few-shot result.
        seed: random seed of the draws and of held-out images.
        download: first download the missing sets that torchvision or the Hugging Face hub has.
    """
    check_precision(precision, accelerator)
    wanted = _tasks(tasks)
    entries = _chosen(read_suite(suite), sets, wanted)
    require(draws >= 1, f"--draws {draws} must be at least 1")
    require(min(shots or SHOTS) >= 1, f"--shots {min(shots or SHOTS)} must be at least 1")
    others = other_runs(compare or [], Path(output))
    clip, out = load_model(model), Path(output)
    make_folder(out, "--output")
    workers = _default_workers(devices) if num_workers is None else num_workers
    settings = EncodingSettings(batch_size, workers, devices, accelerator, precision, on_error)
    store = FeatureStore(clip, Path(cache) if cache else out / "cache", settings)
    options = TaskOptions(tuple(shots or SHOTS), draws, seed)
    run = _Run(clip, store, Path(data_root), Results(out), options, wanted)
    head = provenance(model, clip, store.fingerprint, precision, suite)
    run.evaluate(entries, download)
    if distributed.rank_and_world()[0]:
        return
    _write_reports(run.results, head, others)
    missing = [name for name in entries if run.results.sets[name]["status"] == "missing" and entries[name].download]
    if missing and not download:
        stderr().print(f"{len(missing)} of the missing sets can be downloaded with --download")
    _raise_failures(run.results.sets, data_root)


def _default_workers(devices: int) -> int:
    processes = devices if devices > 0 else torch.accelerator.device_count()  # -1: all
    return workers_for_images(max(1, processes))


def _write_reports(results: Results, head: dict[str, Any], others: Mapping[str, OtherRun]) -> None:
    folder, groups = results.folder, seed_groups(others)
    differences = paired_differences({**head, "sets": results.sets}, folder, others)
    compared = {"comparisons": [each.to_dict() for each in differences]} if others else {}
    written, runs = results.write({**head, **compared}), {name: run.results for name, run in others.items()}
    write_report(written, folder, runs, groups, differences)
    write_tables(written, folder, runs, groups)
    write_tensorboard(written, runs, folder)
    print_results(written)
    stderr().print(f"{folder / 'results.json'} and {folder / 'report.html'}")


def _chosen(
    entries: dict[str, SuiteEntry], names: Sequence[str] | None, tasks: Sequence[Task]
) -> dict[str, SuiteEntry]:
    """Return the named sets that have one of the tasks."""
    unknown = [name for name in names or [] if name not in entries]
    require(not unknown, f"--sets: no {', '.join(unknown)} in the suite; there are {', '.join(entries)}")
    named = {name: entry for name, entry in entries.items() if not names or name in names}
    chosen = {name: entry for name, entry in named.items() if set(tasks) & set(entry.tasks or ())}
    require(bool(chosen), f"--tasks {' '.join(tasks)}: not a task of any of the sets {', '.join(named)}")
    return chosen


def _tasks(names: Sequence[str] | None) -> tuple[Task, ...]:
    unknown = [name for name in names or [] if name not in get_args(Task)]
    require(not unknown, f"--tasks: there is no {', '.join(unknown)}; there are {', '.join(TASKS)}")
    return tuple(task for task in TASKS if not names or task in names)


def _raise_failures(sets: Mapping[str, Mapping[str, Any]], data_root: str) -> None:
    """Raise an error for failed sets after everything is written, so that scripts notice incomplete results."""
    failed = {name: found["reason"] for name, found in sets.items() if found["status"] == "failed"}
    if failed:
        name, reason = next(iter(failed.items()))
        more = f" (and {len(failed) - 1} more sets failed)" if len(failed) > 1 else ""
        raise InputError(f"{name}: {reason}{more}")
    if all(found["status"] == "missing" for found in sets.values()):
        raise InputError(f"--data-root {data_root}: none of {len(sets)} sets is there; the report says how to get them")


class _Run:
    """Evaluation of one model into one output folder.

    All ranks compute features and classifiers together. The first rank alone then runs the tasks.
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
        self.device = self.store.start()
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
            require(isinstance(test, LabelledImages), f"{type(test).__name__} has no classes, which zero-shot needs")
            prompts = self._prompts(opened.entry, test)
            opened.prompts, opened.classifier = prompts, self._encode(opened.name, prompts)
            counts = {"classes": len(prompts.names), "texts": sum(map(len, prompts.texts))}
            self.results.update(opened.name, class_names=prompts.names, prompts={**counts, "sha256": prompts.sha256})
        for probe, texts in bias_texts().items() if "bias" in tasks else ():
            opened.bias[probe] = self._encode(opened.name, Prompts(list(texts), [[text] for text in texts.values()]))

    @staticmethod
    def _prompts(entry: SuiteEntry, test: ImageSet) -> Prompts:
        assert isinstance(test, LabelledImages)
        templates = entry.templates or getattr(test, "templates", None)
        return prompts_of(entry.class_names, templates, test.class_names)

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
