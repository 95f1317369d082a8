"""Run tasks of ``lit-clip evaluate`` during training, and log their metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_clip import distributed
from lit_clip.errors import InputError, require
from lit_clip.evaluation.caption_choice import evaluate_choices
from lit_clip.evaluation.class_metrics import checked
from lit_clip.evaluation.classification import TaskOptions, all_targets, check_set_metrics
from lit_clip.evaluation.data import ImageSet, MissingData, check_classes
from lit_clip.evaluation.logistic import LogisticProblem
from lit_clip.evaluation.open_set import Encoder, Fold, OpenSet, scale_and_bias, trained_classes
from lit_clip.evaluation.places import PlaceTask, records_arrays
from lit_clip.evaluation.probe import Split, held_out
from lit_clip.evaluation.prompts import Prompts, text_classifier
from lit_clip.evaluation.scores import evaluate_scores
from lit_clip.evaluation.set_encoding import SetEncoder, SetFeatures, SetValues
from lit_clip.evaluation.suite import SuiteEntry, Task, read_suite
from lit_clip.evaluation.tasks import encode_set, encode_texts, task_metrics, used_splits
from lit_clip.models.clip import CLIP
from lit_clip.models.running import evaluation_mode
from lit_clip.module import LitCLIP
from lit_clip.retrieval.retrieval_set import Evaluation
from lit_clip.tools.images import OnError, or_skip
from lit_clip.tools.reading import naming
from lit_clip.tools.untrusted import Count, convert, entries
from lit_clip.training.lightning.fsdp import whole_weights
from lit_clip.training.lightning.run_folder import run_folder


class SuiteEvaluation(Callback):
    """Run tasks on sets of a suite, under ``fit``, ``validate`` and ``test``; log ``<task>/<set>/<metric>``.

    Ranks divide the images and the texts; the first rank then computes the metrics while the others wait.

    The first evaluation is at the first opportunity, so that a checkpoint callback always finds the metrics.
    Validations of ``fit`` without an evaluation log the last values again, also after resuming. ``validate`` and
    ``test`` always evaluate; with the same weights and ``trainer.precision`` their metrics equal those of ``fit``.

    Args:
        suite: one or several suite files of ``lit-clip evaluate``; sets without the callback's tasks are left out.
        data_root: folder that the suite's paths are relative to. Sets that are not there are skipped with a warning.
        only: names of the suite's sets to evaluate; None: all.
        every_n_epochs: evaluate at every n-th validation of ``fit`` (one per epoch, unless the trainer sets another
            interval).
        every_n_steps: evaluate every n optimiser steps instead, between two steps.
        batch_size: images encoded at once on each rank.
        num_workers: data workers of each rank; None: a share of the cores, and none for a small set.
        on_error: for an image that cannot be read, stop with an error or skip it with a warning.
        metrics: further metrics by name, each a class path of torchmetrics or of your own, ``class_path`` and
            ``init_args``, or in Python a metric; see :mod:`lit_clip.evaluation.class_metrics`. Results that are no
            numbers are files in the run's folder.
    """

    is_evaluation = True  # told by this, so that runs without one do not import the module
    tasks: tuple[Task, ...]
    needs_suite = True

    def __init__(
        self,
        suite: str | list[str] | None,
        data_root: str = ".",
        only: list[str] | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        batch_size: int = 256,
        num_workers: int | None = None,
        on_error: OnError = "error",
        metrics: dict[str, Any] | None = None,
    ) -> None:
        name = type(self).__name__
        for option, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            require(value is None or value >= 1, f"{name}.{option}: {value} must be at least 1")
        require(every_n_steps is None or every_n_epochs == 1, f"{name}: give either every_n_epochs or every_n_steps")
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self._last = Evaluation()
        self._waited = 0  # validations since the last evaluation
        self._logged = False  # whether the trainer has the last values
        where = f"{name}.metrics"
        classes = {"zero_shot", "linear_probe"}.intersection(self.tasks)
        require(
            not metrics or bool(classes), f"{where}: are of class probabilities; give them to ZeroShot or LinearProbe"
        )
        self.options = TaskOptions(show_progress=False, metrics=checked(metrics or {}, where))
        self.data_root = data_root
        self._folder: Path | None = None
        self.entries = self._chosen_entries(suite, only)
        self._encoder = SetEncoder(batch_size, num_workers, on_error, name)
        self._opened: list[OpenSet] | None = None

    def _chosen_entries(self, suite: str | list[str] | None, only: list[str] | None) -> dict[str, SuiteEntry]:
        name, wanted = type(self).__name__, " or ".join(self.tasks)
        require(suite is not None or not only, f"{name}.only: needs suite, whose sets it names")
        entries = {} if suite is None else read_suite(suite)
        able = {name: entry for name, entry in entries.items() if self._tasks_of(entry)}
        for each in only or ():
            require(each in entries, f"{name}.only: no {each!r} in the suite; there are {', '.join(entries)}")
            require(each in able, f"{name}.only: {each} does not have the task {wanted}; leave it out")
        require(bool(able) or not self.needs_suite, f"{name}.suite: no set has the task {wanted}")
        return {each: entry for each, entry in able.items() if only is None or each in only}

    def _tasks_of(self, entry: SuiteEntry) -> list[Task]:
        return [task for task in self.tasks if task in (entry.tasks or ())]

    @property
    def state_key(self) -> str:
        return self._generate_state_key(sets=sorted(self.entries))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the sets, and reset the state of an earlier run; a checkpoint's state is loaded later."""
        self._encoder.processes = trainer.num_devices
        if stage == "fit":
            self._last, self._waited, self._logged = Evaluation(), 0, False
            self._check_order(trainer)
        if self._opened is not None:
            return
        opened: list[OpenSet] = []
        for name, entry in self.entries.items():
            try:
                opened.append(OpenSet(name, entry, self._open(name, entry), self._tasks_of(entry)))
            except MissingData as error:
                rank_zero_warn(f"{type(self).__name__}: {name} is skipped: {error}")
                continue
            with naming(name):
                self._check(opened[-1])
        self._opened = opened

    def _check_order(self, trainer: Trainer) -> None:
        callbacks: list[Callback] = cast(Any, trainer).callbacks  # set by a connector
        late = [callback for callback in callbacks[callbacks.index(self) :] if isinstance(callback, WeightAveraging)]
        require(
            not late or self.every_n_steps is None,
            f"{type(self).__name__}.every_n_steps: would evaluate averaged weights without the last step; put "
            f"{type(late[0]).__name__ if late else ''} before it in the list of callbacks",
        )

    def _open(self, name: str, entry: SuiteEntry) -> list[Fold]:
        """Open the splits that the tasks use, of every fold; raise MissingData on all ranks if one rank lacks files."""
        splits = [split for split in used_splits(self.tasks[0]) if split in entry.splits]
        folds: list[Fold] = []
        missing: list[str] = []
        try:
            for number in range(len(entry.folds)):
                images = {split: entry.open(split, number, Path(self.data_root)) for split in splits}
                folds.append(Fold(images, trained_on=str(number)))
        except MissingData as error:
            missing.append(str(error))
        everywhere = distributed.gather_objects(missing)
        if everywhere:
            raise MissingData(everywhere[0])
        return folds

    def _check(self, opened: OpenSet) -> None:
        """Raise :class:`InputError` for settings that would stop a run hours later, at its first evaluation."""
        metric, test = opened.entry.metric, opened.test
        for fold in opened.folds:
            check_classes({"test": fold.images["test"], "the first fold": test})
            fold.classes = trained_classes(opened.entry, fold.images)
            for images in fold.images.values():
                require(len(images) > 0, "the set is empty")
                if self._encoder.on_error == "error":
                    try:
                        images.check()
                    except InputError as error:
                        raise InputError(or_skip(str(error), "on_error to skip")) from error
        encode_texts(opened, lambda prompts: torch.zeros(1, len(prompts.names)))
        for task in opened.tasks:
            if task == "caption_choice":
                assert opened.choices is not None
                evaluate_choices(metric, np.zeros((len(test), 1)), opened.choices)
            for fold in opened.folds if task in ("zero_shot", "linear_probe") else ():
                targets = all_targets(opened, fold, "test")
                evaluate_scores(metric, torch.zeros(()).expand(len(targets), targets.classes), targets)
                check_set_metrics(targets, self.options.metrics)
                if task == "linear_probe":
                    targets = {split: all_targets(opened, fold, split) for split in fold.images}
                    train = Split(torch.zeros(len(targets["train"]), 1), targets["train"])
                    if self.options.l2 is None and "val" not in fold.images:
                        train = held_out(train, 0)[0]
                    LogisticProblem(train.features, train.labels, train.targets.classes)

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self._last.metrics, "baselines": self._last.baselines, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        types = {"metrics": dict[str, object], "baselines": dict[str, object], "waited": Count}
        convert(state_dict, entries(types, total=True), f"callbacks.{type(self).__name__}")
        self._last = Evaluation(dict(state_dict["metrics"]), dict(state_dict["baselines"]))
        self._waited = state_dict["waited"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._waited += 1
        due = self.every_n_steps is None and self._waited >= self.every_n_epochs
        if due or not self._last.metrics or trainer.state.fn != TrainerFn.FITTING:
            self._run(trainer, pl_module)
        pl_module.log_dict(self._last.metrics)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run(trainer, pl_module)
        pl_module.log_dict(self._last.metrics)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps is None:
            return
        due = trainer.global_step % self.every_n_steps == 0 or not self._last.metrics
        if due:
            with _as_in_validation(trainer, pl_module):
                self._run(trainer, pl_module)
            for logger in trainer.loggers:  # at this step, even if it is not a logged step of training
                logger.log_metrics(self._last.metrics, trainer.global_step)
        if due or not self._logged:
            pl_module.log_dict(self._last.metrics, logger=False, on_step=True, on_epoch=False)
        self._logged = True

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(LitCLIP, pl_module)
        with trainer.precision_plugin.forward_context(), whole_weights(module):
            self._last = self.evaluate(trainer, module)
        self._waited = 0
        module.baselines |= self._last.baselines

    def features(self, model: CLIP, pixels: Tensor) -> Tensor:
        """Encode normalised images ``[B, 3, H, W]`` as the features ``[B, D]`` that the tasks compare."""
        return model.encode_image(pixels, True)

    def classifier(self, model: CLIP, prompts: Prompts) -> Tensor:
        """Return the classifier ``[D, C]`` of prompts; a collective call."""
        return text_classifier(model, prompts).cpu()

    def evaluate(self, trainer: Trainer, module: LitCLIP) -> Evaluation:
        """Compute the metrics on all ranks, in evaluation mode, without gradients, under the trainer's autocast."""
        result, options = Evaluation(), replace(self.options, device=module.device)
        self._folder = run_folder(trainer)  # every rank must ask
        for opened in self._opened or ():
            current = self.encoded(module.model, opened)
            with naming(opened.name), torch.autocast(module.device.type, enabled=False):
                for task in opened.tasks:
                    stem = self._folder and self._folder / f"{task}_{opened.name}"
                    found = distributed.on_first_rank(partial(task_metrics, task, current, options, stem))
                    (of_set,) = distributed.gather_objects([found] if found else [])
                    prefix = f"{task}/{opened.name}"
                    result.metrics |= {f"{prefix}/{name}": value for name, value in of_set.metrics.items()}
                    result.baselines |= {f"{prefix}/{name}": value for name, value in of_set.baselines.items()}
                self.show(trainer, module, current)
        return result

    def show(self, trainer: Trainer, module: LitCLIP, opened: OpenSet) -> None:
        """Show a set after its evaluation; called on all ranks."""

    def encoded(self, model: CLIP, opened: OpenSet) -> OpenSet:
        """Return the set with the features of its images and texts; splits with equal images are encoded once."""
        known: dict[str, SetFeatures] = {}

        def features(images: ImageSet, title: str) -> SetFeatures:
            stamp = f"{len(images)} {images.stamp()}" if len(opened.folds) > 1 else title
            if stamp not in known:
                known[stamp] = self._encoder.encode(model, images, partial(self.features, model), title)
            return known[stamp]

        def records(images: ImageSet, task: PlaceTask, texts: str, title: str) -> SetValues:
            found = records_arrays(self._encoder.steps(model, images, task, title))
            return SetValues(found["values"], found["rows"].tolist(), [])

        folds = [replace(fold, features={}) for fold in opened.folds]
        current = replace(opened, folds=folds, probes={}, records={}, **scale_and_bias(model))
        with naming(opened.name):
            encode_set(current, Encoder(features, partial(self.classifier, model), records), model)
        return current


class Retrieval(SuiteEvaluation):
    """Evaluate the sets of a suite that have captions, such as COCO and SugarCrepe, or the task ``image_retrieval``.

    Logs ``retrieval/<set>/<metric>``, for sets of right and wrong captions ``caption_choice/<set>/<metric>``, and
    ``image_retrieval/<set>/<metric>``. For the arguments see :class:`callbacks.suite_evaluation.SuiteEvaluation`.
    """

    tasks = ("retrieval", "caption_choice", "image_retrieval")


class ZeroShotSegmentation(SuiteEvaluation):
    """Evaluate the sets of a suite that have masks or boxes, such as ADE20K and Pascal VOC.

    Logs ``segmentation/<set>/miou`` and ``pixel_accuracy``, ``pointing/<set>/accuracy`` and ``mean_per_class``. A rank
    encodes one image at a time. For the arguments see :class:`callbacks.suite_evaluation.SuiteEvaluation`.
    """

    tasks = ("segmentation", "pointing")


class LinearProbe(SuiteEvaluation):
    """Train the paper's linear probe (appendix A.3) on the image encoder's current features, for sets of a suite.

    Logs ``linear_probe/<set>/<metric>``. The features are those before the projection. The first rank trains the probe
    while the others wait, so use sets for which that takes minutes at most.

    Args:
        suite: one or several suite files of ``lit-clip evaluate``; sets without a training split are left out.
        data_root: folder that the suite's paths are relative to.
        only: names of the suite's sets to evaluate; None: all.
        l2: strength of the penalty; None: search for it as in the paper, which takes about ten times as long.
        options: see :class:`callbacks.suite_evaluation.SuiteEvaluation`.
    """

    tasks = ("linear_probe",)

    def __init__(
        self,
        suite: str | list[str],
        data_root: str = ".",
        only: list[str] | None = None,
        l2: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(suite, data_root, only, **options)
        require(l2 is None or l2 > 0, f"LinearProbe.l2: {l2} must be above 0")
        self.options = replace(self.options, l2=l2)

    def features(self, model: CLIP, pixels: Tensor) -> Tensor:
        return model.image_features(pixels)[0]


@contextmanager
def _as_in_validation(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Evaluate between steps as in validation: averaged weights, evaluation mode, one rank's statistics."""
    averages = [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, WeightAveraging)]
    distributed.same_buffers(cast(LitCLIP, module).model)
    with evaluation_mode(module):
        for average in averages:
            average.on_validation_start(trainer, module)
        try:
            with torch.no_grad():
                yield
        finally:
            for average in averages:
                average.on_validation_end(trainer, module)
