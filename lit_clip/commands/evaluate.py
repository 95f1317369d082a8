"""``lit-clip evaluate``: a suite of sets, as the paper evaluates, into results that can be cited."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from lit_clip import __version__, distributed, load_model
from lit_clip.embedding.encode import EncodingSettings, Precision
from lit_clip.errors import InputError, require
from lit_clip.evaluation.bias import bias_texts
from lit_clip.evaluation.data import CaptionedImages, ImageSet, LabelledImages, MissingData, check_classes
from lit_clip.evaluation.prompts import Prompts, prompts_of, text_classifier, text_sha256
from lit_clip.evaluation.report.page import write_report
from lit_clip.evaluation.report.results_table import print_results
from lit_clip.evaluation.report.tensorboard import write_tensorboard
from lit_clip.evaluation.results import Results, provenance, read_results, recipe
from lit_clip.evaluation.store import FeatureStore
from lit_clip.evaluation.suite import TASKS, SuiteEntry, Task, read_suite
from lit_clip.evaluation.tasks import (
    DistinctCaptions,
    Fold,
    OpenSet,
    TaskOptions,
    caption_texts,
    needed_splits,
    run_task,
    top1_among,
    truth,
    used_splits,
)
from lit_clip.evaluation.zero_shot import imagenet_class_names
from lit_clip.models.clip import CLIP
from lit_clip.tools.console import stderr
from lit_clip.tools.images import OnError

IMAGENET = "ImageNet"  # the paper's name
PACKAGES = ("matplotlib", "scipy")  # of the extra "eval", those that every evaluation needs in the end


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
    num_workers: int = 4,
    devices: int = 1,
    accelerator: str = "auto",
    precision: Precision = "32-true",
    on_error: OnError = "error",
    draws: int = 3,
    seed: int = 0,
) -> None:
    """Evaluate a model on a suite of sets: zero-shot, linear probe, few-shot, retrieval.

    Sets that are not below the data root are listed with how to get them, and the others are evaluated. What is
    finished is kept: the same command goes on where it was interrupted, and image features are computed once.

    Args:
        model: a checkpoint, a weights file, or a name that lit_clip.load_model understands.
        suite: YAML files of sets, such as configs/evaluation/paper.yaml.
        output: a folder for results.json, report.html, images and curves for TensorBoard.
        data_root: the folder that the sets' roots are below.
        sets: only these of the suite.
        tasks: only these; zero_shot, linear_probe, few_shot, retrieval, geolocation, bias.
        compare: results.json of other runs, or their folders, shown beside.
        cache: the folder of image and text features; by default cache in the output folder.
        batch_size: images encoded at once by one process.
        num_workers: processes that decode images, of each process.
        devices: number of processes, one a device; the result is the same.
        accelerator: cpu, gpu, mps, ...
        precision: of the encoders; 32-true is exact.
        on_error: what an image that cannot be read does; skip counts and lists it, error ends its set.
        draws: of the examples of each few-shot result.
        seed: of what is drawn.
    """
    absent = [package for package in PACKAGES if find_spec(package) is None]
    require(not absent, f"{' and '.join(absent)} must be installed to evaluate: pip install {' '.join(absent)}")
    wanted = _tasks(tasks)
    entries = _chosen(read_suite(suite), sets, wanted)
    require(draws >= 1, f"--draws {draws} must be at least 1")
    others = {path: read_results(Path(path)) for path in compare or []}
    clip, out = load_model(model), Path(output)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {out}: cannot be made ({error.strerror})") from error
    settings = EncodingSettings(batch_size, num_workers, devices, accelerator, precision, on_error)
    store = FeatureStore(clip, Path(cache) if cache else out / "cache", settings)
    run = _Run(clip, store, Path(data_root), Results(out), TaskOptions(draws=draws, seed=seed), wanted)
    head = provenance(model, clip, store.fingerprint, precision, suite)
    run.evaluate(entries)
    if distributed.rank_and_world()[0]:
        return
    results = run.results.write(head)
    write_report(results, out, others)
    write_tensorboard(results, others, out)
    print_results(results)
    stderr().print(f"{out / 'results.json'} and {out / 'report.html'}", markup=False)
    _complain(run.results.sets, data_root)


def _chosen(
    entries: dict[str, SuiteEntry], names: Sequence[str] | None, tasks: Sequence[Task]
) -> dict[str, SuiteEntry]:
    """Those that are meant, and for which one of the tasks is."""
    unknown = [name for name in names or [] if name not in entries]
    require(not unknown, f"--sets: no {', '.join(unknown)} in the suite; there are {', '.join(entries)}")
    meant = {name: entry for name, entry in entries.items() if not names or name in names}
    chosen = {name: entry for name, entry in meant.items() if set(tasks) & set(entry.tasks or ())}
    require(bool(chosen), f"--tasks {' '.join(tasks)}: for none of the sets: {', '.join(meant)}")
    return chosen


def _tasks(names: Sequence[str] | None) -> tuple[Task, ...]:
    unknown = [name for name in names or [] if name not in get_args(Task)]
    require(not unknown, f"--tasks: there is no {', '.join(unknown)}; there are {', '.join(TASKS)}")
    return tuple(task for task in TASKS if not names or task in names)


def _complain(sets: Mapping[str, Mapping[str, Any]], data_root: str) -> None:
    """All has been written; now say what was wrong, so that a script does not take a part for the whole."""
    failed = {name: found["reason"] for name, found in sets.items() if found["status"] == "failed"}
    if failed:
        name, reason = next(iter(failed.items()))
        more = f" (and {len(failed) - 1} more sets failed)" if len(failed) > 1 else ""
        raise InputError(f"{name}: {reason}{more}")
    if all(found["status"] == "missing" for found in sets.values()):
        raise InputError(f"--data-root {data_root}: none of {len(sets)} sets is there; the report says how to get them")


class _Run:
    """One model, one suite, one output.

    Several processes compute features and classifiers together; tasks are the first one's, when the others have left.
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
        self.device, self.texts = torch.device("cpu"), text_sha256(model)
        self.imagenet: list[OpenSet] = []  # itself, and sets of some of its classes

    def evaluate(self, entries: Mapping[str, SuiteEntry]) -> None:
        """Every set in its turn."""
        self.device = self.store.start()
        rank, world = distributed.rank_and_world()
        waiting = []
        for name, entry in entries.items():
            self.results.begin(name, entry)
            try:
                opened = self._open(name, entry)
            except InputError as error:
                self._give_up(name, error)
                continue
            if world == 1:
                self._finish(opened)
            else:
                waiting.append(opened)
        for opened in waiting if rank == 0 else ():
            self._finish(opened)
        if rank == 0:
            self._among_classes_of_others()

    def _give_up(self, name: str, error: InputError) -> None:
        status = "missing" if isinstance(error, MissingData) else "failed"
        known = self.results.sets[name]["reason"]
        reason = known if str(error) in known else "; ".join(filter(None, (known, str(error))))
        self.results.say(name, status=status, reason=reason)
        if distributed.rank_and_world()[0] == 0:
            stderr().print(f"{name}: {status}: {error}", markup=False)

    def _open(self, name: str, entry: SuiteEntry) -> OpenSet:
        """Open a set and see to its features; on all ranks, in the same order."""
        opened = OpenSet(name, entry, [], scale=float(self.model.logit_scale.detach().exp()))
        tasks = self._possible(opened)
        for number, fold in enumerate(opened.folds):
            for split, images in fold.images.items():
                title = f"{name} {split}" + (f" {number + 1}/{len(opened.folds)}" if len(opened.folds) > 1 else "")
                self.store.compute(images, title)
        if {"zero_shot", "bias"} & set(tasks):
            self._classifiers(opened, tasks)
        if distributed.rank_and_world()[0] == 0:
            self._read(opened)
        if "retrieval" in tasks:
            self._captions(opened)
        return opened

    def _possible(self, opened: OpenSet) -> list[Task]:
        """Fill the folds with what is there; the tasks that this allows.

        Raises:
            MissingData: nothing to test on.
        """
        entry = opened.entry
        assert entry.tasks is not None
        asked = set(self.tasks)
        tasks: list[Task] = [task for task in entry.tasks if task in asked]
        wanted = {split for task in tasks for split in needed_splits(task)}
        if "train" in wanted and "val" in entry.splits:
            wanted.add("val")
        for number in range(len(entry.folds)):
            fold = Fold()
            for split in sorted(wanted):  # test before train: without it there is nothing to do
                try:
                    fold.images[split] = entry.open(split, number, self.root)
                except MissingData as error:
                    if split == "test":
                        raise
                    self.results.say(opened.name, reason=f"no {split} split: {error}")
                    break
            first = (opened.folds or [fold])[0].images["test"]
            check_classes({**fold.images, "the first fold": first})
            opened.folds.append(fold)
        return [task for task in tasks if all(set(needed_splits(task)) <= set(fold.images) for fold in opened.folds)]

    def _encode(self, prompts: Prompts) -> Tensor:
        """``[D, C]``, each prompt once and never again; all ranks must ask."""
        self.model.to(self.device)
        features = text_classifier(self.model, prompts, self.store.folder / "texts", weights=self.texts).cpu()
        self.model.cpu()
        return features

    def _classifiers(self, opened: OpenSet, tasks: Sequence[Task]) -> None:
        """The texts of the classes, as features; each rank encodes its share."""
        test = opened.folds[0].images["test"]
        if "zero_shot" in tasks:
            require(isinstance(test, LabelledImages), f"{type(test).__name__} has no classes, which zero-shot needs")
            prompts = self._prompts(opened.entry, test)
            opened.prompts, opened.classifier = prompts, self._encode(prompts)
            found = {"classes": len(prompts.names), "texts": sum(map(len, prompts.texts)), "sha256": prompts.sha256}
            self.results.say(opened.name, class_names=prompts.names, prompts=found)
        for probe, texts in bias_texts().items() if "bias" in tasks else ():
            opened.bias[probe] = self._encode(Prompts(list(texts), [[text] for text in texts.values()]))

    @staticmethod
    def _prompts(entry: SuiteEntry, test: ImageSet) -> Prompts:
        assert isinstance(test, LabelledImages)
        templates = entry.templates or getattr(test, "templates", None)
        return prompts_of(entry.class_names, templates, test.class_names)

    def _read(self, opened: OpenSet) -> None:
        """Features and counts, on the first rank."""
        splits: dict[str, Any] = {}
        for fold in opened.folds:
            for split, images in fold.images.items():
                fold.features[split] = self.store.read(images)
                features = fold.features[split]
                found = {"images": len(features.rows), "skipped": features.skipped, "absent": images.absent}
                splits.setdefault(split, found)
        self.results.say(opened.name, splits=splits)
        wrong = sum(int((~np.isfinite(fold.features["test"].after).all(axis=1)).sum()) for fold in opened.folds)
        if wrong:
            known = self.results.sets[opened.name]["reason"]
            reason = f"features of {wrong} images are no numbers, and count as wrong; look at weights and precision"
            self.results.say(opened.name, reason="; ".join(filter(None, (known, reason))))

    def _captions(self, opened: OpenSet) -> None:
        """Features of the captions, each distinct one once; on all ranks."""
        test = opened.folds[0].images["test"]
        require(isinstance(test, CaptionedImages), f"{type(test).__name__} has no captions, which retrieval needs")
        assert isinstance(test, CaptionedImages)
        rows = self.store.read(test).rows
        templates = opened.entry.templates or "{}"
        template = templates if isinstance(templates, str) else templates[0]
        require("{}" in template, f"templates: {template!r} has no {{}} for the caption")
        texts, pairs = caption_texts(test, rows, template)
        features = self._encode(Prompts(texts, [[text] for text in texts])).T
        opened.captions = DistinctCaptions(
            features.contiguous(), pairs, recipe(texts, [column.tolist() for column in pairs])
        )

    def _finish(self, opened: OpenSet) -> None:
        """Tasks, on the first rank."""
        try:
            known = truth(opened)
        except InputError as error:
            self._give_up(opened.name, error)
            return
        for task in self._now(opened):
            made = self._recipe(opened, task, known)
            try:
                result = self.results.known(opened.name, task, made)
                if result is None:
                    result = run_task(task, opened, self.options, self.results.folder)
            except InputError as error:
                self._give_up(opened.name, error)
                continue  # another task may be possible
            self.results.add(opened.name, task, made, result)
            if "value" in result:
                value = f"{100 * result['value']:.1f} %"
                stderr().print(f"{opened.name}: {task} {opened.entry.metric} {value}", markup=False)

        if opened.entry.paper == IMAGENET or hasattr(opened.folds[0].images["test"], "imagenet_classes"):
            self.imagenet.append(opened)

    def _among_classes_of_others(self) -> None:
        """ImageNet's accuracy among the classes of each set that has not all of them, for effective robustness."""
        done = [opened for opened in self.imagenet if "zero_shot" in self.results.sets[opened.name]["tasks"]]
        for whole in done:
            for other in done if whole.entry.paper == IMAGENET else ():
                classes = getattr(other.folds[0].images["test"], "imagenet_classes", None)
                if classes and len(classes) < len(imagenet_class_names()):
                    metrics = self.results.sets[whole.name]["tasks"]["zero_shot"]["metrics"]
                    metrics[f"top1/{other.entry.paper or other.name}"] = top1_among(whole, classes)

    def _now(self, opened: OpenSet) -> Iterator[Task]:
        for task in opened.entry.tasks or ():
            if task in self.tasks and set(needed_splits(task)) <= set(opened.folds[0].images):
                yield task

    def _recipe(self, opened: OpenSet, task: Task, known: Mapping[tuple[int, str], str]) -> str:
        """What a result depends on."""
        used = [
            (split, self.store.path(images).name, fold.features[split].skipped, known[number, split])
            for number, fold in enumerate(opened.folds)
            for split, images in fold.images.items()
            if split in used_splits(task)
        ]
        entry, more = opened.entry, ()
        if task in ("linear_probe", "few_shot"):
            more = (vars(self.options),)
        elif task == "zero_shot" and opened.prompts:
            more = (opened.prompts.names, opened.prompts.sha256)
        elif opened.captions:
            more = (opened.captions.digest,)
        return recipe(__version__, task, used, more, entry.metric, entry.data, entry.splits, entry.folds)
